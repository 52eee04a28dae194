"""Run by test_distributed.py under torchrun: some steps with each process on its own rows."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from layerskip.training import LayerSkipTrainer
from layerskip.training.data import Collator
from trainer_setup import DROPPING, arguments, rows


def main(model_folder, output, kind):
    options = {}
    if kind == "fsdp2":
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        }
    trainer = LayerSkipTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=arguments(output, max_steps=3, **options),
        data_collator=Collator(0),
        train_dataset=rows(),
        eval_dataset=rows(10),
        recipe=DROPPING,
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == {
        "ddp": "DistributedDataParallel",
        "fsdp2": "FSDPLlamaForCausalLM",
    }[kind]
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        Path(output, "result.json").write_text(json.dumps({"logs": logs, "metrics": metrics}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
