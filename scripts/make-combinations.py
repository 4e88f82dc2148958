#!/usr/bin/env python3
"""Makes tests/combined: three adapters, and what PEFT's add_weighted_adapter makes of them, in every way it knows.

Needs torch, peft (0.21) and safetensors. Where PEFT prunes at random, it is given the random numbers of this crate: Philox
4x32-10 under a key, two words to a number, in the order of modules, factors and adapters.
"""

import json
import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":  # as in make-cases.py
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from net import Net

FOLDER = pathlib.Path(__file__).parent.parent / "tests" / "combined"
SIZES = [13, 11, 9, 7]
WORD = 0xFFFFFFFF


def words(seed):
    """The stream of `Rng::new(seed)`, word by word."""
    block = 0
    while True:
        k0, k1 = seed & WORD, seed >> 32
        c0, c1, c2, c3 = block & WORD, block >> 32, 1, 0
        for _ in range(10):
            left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
            k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
        yield from (c0, c1, c2, c3)
        block += 1


def bernoulli(seed):
    stream = words(seed)

    def draw(probabilities):
        units = [((next(stream) << 32 | next(stream)) >> 11) / 2**53 for _ in range(probabilities.numel())]
        return (torch.tensor(units, dtype=torch.float64).reshape(probabilities.shape) < probabilities.double()).to(probabilities)

    return draw


def adapters(base):
    """Two adapters of one rank and one of another, on some of the layers, with scalings that are not 1."""
    linear = ["linear1", "linear2", "linear3"]
    settings = dict(
        first=LoraConfig(r=3, lora_alpha=6, target_modules=linear, init_lora_weights=False),
        second=LoraConfig(r=3, lora_alpha=2, target_modules=linear[:2], init_lora_weights=False),
        third=LoraConfig(r=5, lora_alpha=4, use_rslora=True, target_modules=linear[1:], init_lora_weights=False),
    )
    for name, config in settings.items():
        model = get_peft_model(Net(base), config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(torch.randn(value.shape) * 0.5)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()


def cases():
    pair, weights = ["first", "second"], [0.7, -1.3]
    for kind in ["linear", "cat", "svd"]:
        yield dict(type=kind, adapters=pair, weights=weights)
    for kind in ["cat", "svd"]:
        yield dict(type=kind, adapters=["first", "second", "third"], weights=[1.0, 0.5, -2.0])
    yield dict(type="svd", adapters=["second", "third"], weights=[0.25, 1.0], svd_rank=2)
    for kind in ["magnitude_prune", "magnitude_prune_svd"]:
        yield dict(type=kind, adapters=pair, weights=weights, density=0.4)
    for kind in ["ties", "ties_svd"]:
        for method in ["total", "frequency"]:
            yield dict(type=kind, adapters=pair, weights=[0.7, 1.3], density=0.6, majority_sign_method=method)
    for kind in ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]:
        yield dict(type=kind, adapters=pair, weights=weights, density=0.5, seed=len(kind) + (1 << 33))
    yield dict(type="ties", adapters=["third"], weights=[-0.5], density=0.5)


def combined(base, case):
    model = PeftModel.from_pretrained(Net(base), FOLDER / case["adapters"][0], case["adapters"][0])
    for name in case["adapters"][1:]:
        model.load_adapter(FOLDER / name, name)
    options = {key: case[key] for key in ["svd_rank", "density", "majority_sign_method"] if key in case}
    torch.bernoulli, kept = bernoulli(case.get("seed", 0)), torch.bernoulli
    model.add_weighted_adapter(case["adapters"], case["weights"], "new", case["type"], **options)
    torch.bernoulli = kept
    for layer, module in model.base_model.model.named_children():
        if "new" in getattr(module, "lora_A", {}):
            a, b = module.lora_A["new"].weight.detach(), module.lora_B["new"].weight.detach()
            # `cat` keeps use_rslora of the first adapter, which its factors do not know of: their product is what is meant.
            yield layer, b @ a


def main():
    torch.manual_seed(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    base = {}
    for i, (k, n) in enumerate(zip(SIZES, SIZES[1:]), 1):
        base |= {f"linear{i}.weight": torch.randn(n, k), f"linear{i}.bias": torch.randn(n)}
    adapters(base)
    metadata, expected = [], {}
    for at, case in enumerate(cases()):
        metadata.append(case)
        expected |= {f"{at}.{layer}": delta.contiguous() for layer, delta in combined(base, case)}
    save_file(expected, FOLDER / "expected.safetensors", {"cases": json.dumps(metadata)})


if __name__ == "__main__":
    main()
