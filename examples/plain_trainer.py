"""The recipe with a plain transformers Trainer: the three lines marked below.

    python examples/plain_trainer.py --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \
        --output runs/plain

The rows of the JSON lines file have the fields prompt and completion.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.training import RecipeCallback


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--exit-layer", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=500)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # In 16 bits, as checkpoints are stored, most updates would be lost to rounding.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        # Without what a tokenizer puts before a text: the model would learn to answer with it.
        answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)
        completion = answer["input_ids"]
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * len(prompt + completion),
            "labels": [-100] * len(prompt) + completion,
        }

    rows = load_dataset("json", data_files=options.data, split="train")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.max_steps,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )

    recipe = RecipeConfig.preset("task", fixed_exits=(options.exit_layer,))
    attached = attach(model, recipe)  # 1: layer dropout and early exit loss, in training only
    trainer.add_callback(RecipeCallback(attached))  # 2: tells the recipe which step it is
    trainer.train()
    detach(model)  # 3: an ordinary model again

    model.config.use_cache = True  # Trainer turned it off
    # With GPT-NeoX, GPT-2 and OPT transformers cannot draft, and its generate fails by this field.
    model.generation_config.assistant_early_exit = options.exit_layer
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
