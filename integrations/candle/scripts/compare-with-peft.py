#!/usr/bin/env python3
"""Trains with PEFT what `examples/sft` trained, and compares the losses on the conversations that were held back.

    cargo run --release --example sft -- --record run.json
    compare-with-peft.py MODEL.gguf run.json

MODEL.gguf is the model that was trained, and run.json says what the run was: its settings, the tokens of each batch in their order, the
conversations held back, and the losses on them. The model, LoRA and the optimizer are those of transformers, PEFT and PyTorch; the initial
adapter and the dropout masks are others. Needs torch, transformers, peft and gguf. Exits with 1 where the losses differ by more than 2 %.
"""

import json
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BOUND = 0.02


def batch_of(examples):
    """Rows filled up on the right; what is no answer has no label."""
    length = max(len(example["ids"]) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens, answer = torch.tensor(example["ids"]), torch.tensor(example["answer"])
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(answer, tokens, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def evaluate(model, examples, rows):
    model.eval()
    total, counted = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(examples), rows):
            batch = batch_of(examples[at : at + rows])
            count = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch).loss.item() * count
            counted += count
    model.train()
    return total / counted


def rate(settings, step, steps):
    """Linear warm-up, then half a cosine: transformers' schedule `cosine`."""
    warmup = math.ceil(settings["warmup_ratio"] * steps)
    if step < warmup:
        return settings["lr"] * step / warmup
    return settings["lr"] * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main():
    path, record = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    settings, batches, held = record["settings"], record["batches"], record["held_back"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    lora = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    before = evaluate(model, held, settings["rows"])
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(settings, step, len(batches))
        optimizer.zero_grad()
        loss = model(**batch_of(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["clip"])
        optimizer.step()
        print(f"step {step + 1} of {len(batches)}: loss {loss.item():.4f}", flush=True)
    after, ours = evaluate(model, held, settings["rows"]), record["loss"]
    difference = abs(ours["after"] / after - 1.0)
    print(f"held-back loss before: {ours['before']:.4f}, PEFT {before:.4f}")
    print(f"held-back loss after: {ours['after']:.4f}, PEFT {after:.4f}: {100 * difference:.2f} % apart, allowed {100 * BOUND:.0f} %")
    sys.exit(difference > BOUND)


if __name__ == "__main__":
    main()
