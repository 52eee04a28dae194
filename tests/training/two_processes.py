"""Run by test_distributed.py under torchrun: some steps with each process on its own rows."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import datasets
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from layerskip.recipe import attach, detach
from layerskip.training import LayerSkipTrainer
from layerskip.training.data import Collator
from trainer_setup import DROPPING, arguments, rows, train_by_hand

EVAL_ROWS = 10  # no multiple of what two processes take at a time


def ddp(model, output, **changes):
    trainer = LayerSkipTrainer(
        model=model,
        args=arguments(output, max_steps=3, **changes),
        data_collator=Collator(0),
        train_dataset=rows(),
        eval_dataset=rows(EVAL_ROWS),
        recipe=DROPPING,
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    metrics = trainer.evaluate()
    whole = trainer.attached.evaluate((1,), Collator(0)(rows(EVAL_ROWS)), model)
    expected = dict(zip(whole.exits, (whole.loss_sums / whole.tokens).tolist(), strict=True))
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], metrics, expected


def ddp_accumulating(model, output):
    """Gradients wait for one another after the second batch alone."""
    return ddp(model, output, per_device_train_batch_size=2, gradient_accumulation_steps=2)


class Recording(LayerSkipTrainer):
    """Keeps which rows it was given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def training_step(self, model, inputs, *others):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *others)


def resume(model, output):
    """Two epochs and a half, unbroken, and again from the middle of the second one."""

    def trained(folder, **options):
        trainer = Recording(
            model=model,
            args=arguments(
                folder,
                max_steps=5,
                save_strategy="steps",
                save_steps=3,
                train_sampling_strategy="group_by_length",
            ),
            data_collator=Collator(0),
            train_dataset=datasets.Dataset.from_list(rows(16)),
            recipe=DROPPING,
        )
        trainer.train(**options)
        detach(model)
        return trainer.seen

    unbroken = trained(output)
    resumed = trained(output, resume_from_checkpoint=f"{output}/checkpoint-3")
    assert len(unbroken) == 5
    assert unbroken[2:4] != unbroken[:2]  # another order in another epoch
    assert resumed == unbroken[3:]


def fsdp2(model, output, exit_apart=False):
    """By hand: Accelerate has FSDP for accelerators only."""
    torch.distributed.init_process_group("gloo")
    handle = attach(model, dataclasses.replace(DROPPING, chunk_tokens=4 if exit_apart else None))
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if exit_apart:  # as Accelerate has it
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        parts = [model.model.norm, *[model.model.embed_tokens] * tied, model.lm_head]
        fully_shard(parts, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    rank = torch.distributed.get_rank()
    losses = train_by_hand(model, handle, own=[rank], processes=2)
    evaluated = handle.evaluate((1,), Collator(0)(rows(EVAL_ROWS)), model)
    assert evaluated.exits == (1, 4)
    total = torch.tensor(losses)
    torch.distributed.all_reduce(total)
    return total.tolist(), {}, {}


def fsdp2_with_the_exit_apart(model, output):
    """Norm and head are a group of their own, whose processes have chunks in different numbers."""
    return fsdp2(model, output, exit_apart=True)


def ddp_and_resume(model, output):
    result = ddp(model, output)
    detach(model)
    resume(model, output)
    return result


KINDS = {
    one.__name__: one
    for one in (ddp, ddp_accumulating, ddp_and_resume, fsdp2, fsdp2_with_the_exit_apart)
}


def main(model_folder, output, kind):
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    losses, metrics, expected = KINDS[kind](model, output)
    if torch.distributed.get_rank() == 0:
        result = json.dumps({"losses": losses, "metrics": metrics, "expected": expected})
        Path(output, "result.json").write_text(result)
    torch.distributed.barrier()
    # Now and then gloo's own threads abort the process while it is torn down; all is said by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
