#!/usr/bin/env python3
"""Makes a model of 1.3 GB and an adapter for it, to measure `lowrank merge` with.

    python scripts/make-checkpoint.py DIR [--layers N] [--dtype bfloat16] [--r 16] [--shard-size 400MB]

DIR/base is a Llama of random weights as transformers saves it, DIR/adapter what PEFT saves for all its linear layers.
Needs torch, transformers and peft.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--layers", type=int, default=10, help="0.1 GB each in bfloat16")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--shard-size", default="100GB")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    inner = args.hidden * 11 // 4
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        vocab_size=32000,
        dtype=args.dtype,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.dir / "base", max_shard_size=args.shard_size)
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(args.dir / "adapter")
    size = sum(path.stat().st_size for path in (args.dir / "base").glob("*.safetensors"))
    print(f"{args.dir}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
