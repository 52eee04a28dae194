"""The recipe in a training loop of one's own with Accelerate, on one device or several.

    accelerate launch --num-processes 2 examples/accelerate_loop.py \
        --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output runs/loop

The rows of the JSON lines file have the field text. What matters on several devices is marked:
the loss is divided by the tokens of all of them, and all of them skip the same rows.
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
)

from layerskip.recipe import RecipeConfig, attach, detach


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--exit-layer", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # In 16 bits, as checkpoints are stored, most updates would be lost to rounding.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rotation = min(8, model.config.num_hidden_layers)
    recipe = RecipeConfig.preset("continual", rotation=rotation, fixed_exits=(options.exit_layer,))
    attached = attach(model, recipe)  # before the model is wrapped

    rows = load_dataset("json", data_files=options.data, split="train")

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        encoded = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=512)
        return {**encoded, "labels": encoded["input_ids"]}

    rows = rows.map(encode, remove_columns=rows.column_names)
    loader = torch.utils.data.DataLoader(
        rows,
        options.batch_size,
        shuffle=True,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, options.steps)

    model.train()
    step = 0
    while step < options.steps:
        for batch in loader:
            attached.set_step(step, options.steps)  # the same rows are skipped on every device
            labelled = (batch["labels"][:, 1:] != -100).sum()
            everywhere = accelerator.reduce(labelled, reduction="sum")
            loss = model(**batch, num_items_in_batch=everywhere).loss
            # Gradients are averaged over the devices, while this loss is this device's share.
            accelerator.backward(loss * accelerator.num_processes)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == options.steps:
                total = accelerator.reduce(loss.detach(), reduction="sum").item()
                accelerator.print(f"step {step}: loss {total:.3f}")
            if step == options.steps:
                break

    trained = accelerator.unwrap_model(model)
    detach(trained)
    weights = accelerator.get_state_dict(model)  # all take part where each holds a part of them
    if accelerator.is_main_process:
        # With GPT-NeoX, GPT-2 and OPT transformers cannot draft, and its generate fails by this field.
        trained.generation_config.assistant_early_exit = options.exit_layer
        trained.save_pretrained(options.output, state_dict=weights)
        tokenizer.save_pretrained(options.output)
    # In this order: all are done, then what communicates goes, then the group that it does so over.
    accelerator.wait_for_everyone()
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
