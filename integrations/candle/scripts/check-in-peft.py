#!/usr/bin/env python3
"""Opens folders that lowrank-candle saved with transformers and PEFT, and compares logits.

    check-in-peft.py BASE SAVED REFERENCE

BASE is a model's folder, SAVED an adapter's folder or a merged model's, and REFERENCE a safetensors file with `input_ids` (and
`attention_mask`, if rows are padded) and the `logits` that lowrank-candle has for them. Exits with 1 where logits are further apart than
1e-5 of the greatest magnitude.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BOUND = 1e-5


def load(base, saved):
    if (saved / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(model, saved)
        if not [name for name, _ in loaded.named_parameters() if "lora_" in name]:
            sys.exit(f"{saved}: PEFT finds no adapter in it")
        return loaded.eval()
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


def main():
    base, saved, reference = map(Path, sys.argv[1:])
    want = load_file(reference)
    mask = want.get("attention_mask", torch.ones_like(want["input_ids"])).long()
    with torch.no_grad():
        got = load(base, saved)(input_ids=want["input_ids"].long(), attention_mask=mask).logits
    counted = mask.bool()
    difference = (got - want["logits"])[counted].abs().max().item()
    bound = BOUND * want["logits"][counted].abs().max().item()
    print(f"{saved}: logits differ by {difference:.2e} at most, allowed {bound:.2e}")
    sys.exit(difference > bound)


if __name__ == "__main__":
    main()
