"""Rows and arguments for Trainers on the CPU."""

import torch
from transformers import TrainingArguments

from layerskip.recipe import RecipeConfig
from layerskip.training.data import Collator

# For the processes of a distributed run and the one they are compared with: so high a rate that all
# rows skip the last layer in some steps.
DROPPING = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.9)


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


def train_by_hand(model, handle, own, processes=1, steps=3, accumulation=1):
    """Some steps as Trainer's: AdamW, clipping, linear decay. Loss of each step, own rows only.

    Every step has eight rows, of which two processes take four each, in `accumulation` batches; `own`
    says which processes' rows these are. Each counts its micro-batches by itself, so both skip the
    same rows.
    """
    settings = arguments("unused")
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    data, losses = rows(), []
    for step in range(steps):
        of_step, size = data[8 * step : 8 * step + 8], 4 // accumulation
        batches = [Collator(0)(of_step[start : start + size]) for start in range(0, 8, size)]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        total = 0.0
        for number in own:
            handle.set_step(step, steps)
            for batch in batches[number::2]:  # as processes take them: in turns
                loss = model(**batch, num_items_in_batch=items).loss
                (processes * loss).backward()  # gradients are averaged over processes
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (steps - step) / steps
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
