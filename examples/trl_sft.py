"""The recipe with TRL's SFTTrainer, by way of a mixin.

    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \
        --output runs/trl

The rows are whatever SFTTrainer takes: prompt and completion, messages, or text.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from layerskip.recipe import RecipeConfig, detach
from layerskip.training import LayerSkipMixin


class LayerSkipSFTTrainer(LayerSkipMixin, SFTTrainer):
    """SFTTrainer with layer dropout, early exit loss, and each exit's figures in its logs."""


def main() -> None:
    """Train, look at every exit, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--exit-layer", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=500)
    options = parser.parse_args()

    rows = load_dataset("json", data_files=options.data, split="train")
    rows = rows.train_test_split(test_size=0.1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # In 16 bits, as checkpoints are stored, most updates would be lost to rounding.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = LayerSkipSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            bf16=False,
            loss_type="nll",  # the recipe's own takes its place; some versions default to another
            prediction_loss_only=True,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        recipe=RecipeConfig.preset("task", fixed_exits=(options.exit_layer,)),
    )
    trainer.train()
    print(trainer.evaluate())

    detach(model)
    model.config.use_cache = True  # Trainer turned it off
    # With GPT-NeoX, GPT-2 and OPT transformers cannot draft, and its generate fails by this field.
    model.generation_config.assistant_early_exit = options.exit_layer
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
