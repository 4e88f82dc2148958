#!/usr/bin/env python3
"""tests/small_steps.rs with PEFT's layers: how far an adapter's `B·A` over a bf16 base is off from the one over the same base in f32.

usage: small-steps-in-peft.py [SEEDS]

Prints, for each seed, the relative difference layer by layer and as a whole. Needs torch and peft; PEFT keeps the adapter in f32.
"""
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

SIZES = [64, 128, 128, 10]
LAYERS = ["0", "2", "4"]


def batches():
    for _ in range(16):
        x = torch.randn(32, SIZES[0]).bfloat16()
        yield x, x[:, :10].float().argmax(1)


def trained(model, data, dtype):
    params = [param for param in model.parameters() if param.requires_grad]
    assert all(param.dtype == torch.float32 for param in params)
    adam = torch.optim.Adam(params, lr=1e-4)
    for step in range(200):
        x, labels = data[step % len(data)]
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
    of = model.state_dict()
    factor = lambda layer, name: of[f"base_model.model.{layer}.lora_{name}.default.weight"].double()
    return [factor(layer, "B") @ factor(layer, "A") for layer in LAYERS]


def off(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(SIZES[0], SIZES[1]), nn.ReLU(), nn.Linear(SIZES[1], SIZES[2]), nn.ReLU(), nn.Linear(SIZES[2], SIZES[3])]
    base, data = nn.Sequential(*layers).bfloat16(), list(batches())
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)
    low, wide = get_peft_model(copy.deepcopy(base), config), get_peft_model(copy.deepcopy(base).float(), config)
    wide.load_state_dict({name: tensor.float() for name, tensor in low.state_dict().items()})
    got, want = trained(low, data, torch.bfloat16), trained(wide, data, torch.float32)
    norm = lambda mats: sum(mat.norm().item() ** 2 for mat in mats) ** 0.5
    apart = [a - b for a, b in zip(got, want)]
    return [norm([a]) / norm([b]) for a, b in zip(apart, want)], norm(apart) / norm(want)


for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 6):
    layers, whole = off(seed)
    print(f"seed {seed}: whole {whole:.2%}, layers", ", ".join(f"{layer:.2%}" for layer in layers), flush=True)
