"""Rows and arguments for Trainers on the CPU."""

import torch
from transformers import TrainingArguments

from layerskip.recipe import RecipeConfig

# What the processes of a distributed run and the one they are compared with have in common.
DROPPING = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.5)


def rows(count=64):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(4, 40, (6 + number % 5,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def arguments(folder, **changes):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "prediction_loss_only": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})
