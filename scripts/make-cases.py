#!/usr/bin/env python3
"""Makes the project's own reference cases, tests/cases/*, with PyTorch and PEFT. The format: tests/cases/README.md.

Needs torch, peft (0.21) and safetensors. The same versions make the same files.
"""

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT keeps target_modules as a set, and writes it in the order of the hashes
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import json
import pathlib
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from net import Net

CASES = pathlib.Path(__file__).parent.parent / "tests" / "cases"


def randn(*shape, scale=1.0):
    return torch.randn(*shape) * scale


def write(name, inputs, outputs, metadata):
    tensors = {f"in.{key}": value.detach().contiguous() for key, value in inputs.items()}
    tensors |= {f"out.{key}": value.detach().double().contiguous() for key, value in outputs.items()}
    save_file(tensors, CASES / f"{name}.safetensors", {key: str(value) for key, value in metadata.items()})


def lora_linear(name, m, k, n, r, scale, bias=True, dropout=None, merged=True):
    """One layer, forward and backward: inputs are float32, all arithmetic is float64."""
    inputs = dict(x=randn(m, k), weight=randn(n, k, scale=k**-0.5))
    inputs |= dict(lora_a=randn(r, k, scale=k**-0.5), lora_b=randn(n, r), grad_y=randn(m, n))
    if bias:
        inputs["bias"] = randn(n)
    if dropout is not None:
        inputs["dropout_mask"] = (torch.rand(m, k) >= dropout).float() / (1 - dropout)

    wide = {key: value.double().requires_grad_() for key, value in inputs.items()}
    x, weight, a, b = wide["x"], wide["weight"], wide["lora_a"], wide["lora_b"]
    y = x @ weight.T + scale * (x * wide.get("dropout_mask", 1.0)) @ a.T @ b.T + wide.get("bias", 0.0)
    y.backward(wide["grad_y"])
    outputs = dict(y=y, grad_x=x.grad, grad_lora_a=a.grad, grad_lora_b=b.grad)
    if bias:
        outputs["grad_bias"] = wide["bias"].grad
    if merged:
        outputs["merged_weight"] = weight + scale * b @ a
    write(name, inputs, outputs, dict(op="lora_linear", scale=scale))


def mixed_batch(name, m, k, n, ranks, scales):
    """One layer with several adapters; each row of the batch names its own, or -1 for none."""
    index = torch.arange(m) % (len(ranks) + 1) - 1
    inputs = dict(x=randn(m, k), weight=randn(n, k, scale=k**-0.5), bias=randn(n), adapter_index=index.int())
    y = inputs["x"].double() @ inputs["weight"].double().T + inputs["bias"].double()
    for i, (r, scale) in enumerate(zip(ranks, scales)):
        a, b = randn(r, k, scale=k**-0.5), randn(n, r)
        inputs |= {f"adapter.{i}.lora_a": a, f"adapter.{i}.lora_b": b}
        y += (index == i)[:, None] * scale * (inputs["x"].double() @ a.double().T @ b.double().T)
    write(name, inputs, dict(y=y), dict(op="mixed_batch", scales=json.dumps(scales)))


def mlp_trace(name, sizes, r, scale, steps, m, lr):
    """A short training of the adapters of a net, in float64."""
    betas, eps = (0.9, 0.999), 1e-8
    inputs = dict(batches=randn(steps, m, sizes[0]), labels=torch.randint(sizes[-1], (steps, m), dtype=torch.int32))
    for layer, (k, n) in enumerate(zip(sizes, sizes[1:])):
        inputs[f"layer.{layer}.weight"] = randn(n, k, scale=k**-0.5)
        inputs[f"layer.{layer}.bias"] = randn(n, scale=0.1)
        inputs[f"layer.{layer}.lora_a"] = randn(r, k, scale=1 / r)
        inputs[f"layer.{layer}.lora_b"] = torch.zeros(n, r)

    layers = range(len(sizes) - 1)
    wide = {key: value.double() for key, value in inputs.items() if key != "labels"}
    adapters = {f"layer.{i}.{part}": wide[f"layer.{i}.{part}"].requires_grad_() for i in layers for part in ["lora_a", "lora_b"]}
    adam = torch.optim.Adam(adapters.values(), lr=lr, betas=betas, eps=eps)
    losses = []
    for x, labels in zip(wide["batches"], inputs["labels"].long()):
        for i in layers:
            weight, bias, a, b = (wide[f"layer.{i}.{part}"] for part in ["weight", "bias", "lora_a", "lora_b"])
            x = torch.relu(x) if i > 0 else x
            x = x @ weight.T + bias + scale * x @ a.T @ b.T
        loss = torch.nn.functional.cross_entropy(x, labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    outputs = dict(losses=torch.tensor(losses, dtype=torch.float64)) | adapters
    write(name, inputs, outputs, dict(op="mlp_trace", scale=scale, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps))


def peft_folder(name, dtype=torch.float32, cases=CASES, **settings):
    """An adapter that PEFT made and saved, and what PEFT computes with it."""
    folder, sizes = cases / f"peft_{name}", [13, 11, 9, 7]
    settings = dict(init_lora_weights=False) | settings
    base = {}
    for i, (k, n) in enumerate(zip(sizes, sizes[1:]), 1):
        base |= {f"linear{i}.weight": randn(n, k, scale=k**-0.5), f"linear{i}.bias": randn(n)}
    expected = {f"base.{key}": value for key, value in base.items()} | dict(x=randn(5, sizes[0]))

    expected["y_base"] = Net(base)(expected["x"])
    model = get_peft_model(Net(base), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(randn(*value.shape, scale=0.5).to(dtype))
    expected["y_adapter"] = model(expected["x"])

    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tensors = folder / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(tensors).items()}, tensors, {"format": "pt"})

    merged = model.merge_and_unload()
    expected["y_merged"] = merged(expected["x"])
    expected |= {f"merged.{key}": value for key, value in merged.state_dict().items()}
    save_file({key: value.detach().contiguous() for key, value in expected.items()}, folder / "expected.safetensors")


def main():
    torch.manual_seed(0)
    lora_linear("lora_linear_bias", m=7, k=33, n=18, r=3, scale=2.0)
    lora_linear("lora_linear_no_bias", m=10, k=16, n=31, r=1, scale=0.5, bias=False, merged=False)
    lora_linear("lora_linear_one_row", m=1, k=40, n=17, r=4, scale=1.0)
    lora_linear("lora_linear_rank_above_sides", m=5, k=6, n=4, r=11, scale=16 / 11)
    lora_linear("lora_linear_negative_scale", m=19, k=20, n=20, r=8, scale=-0.25, bias=False)
    lora_linear("lora_linear_dropout", m=9, k=21, n=14, r=2, scale=4.0, dropout=0.25)
    mlp_trace("mlp_trace_short", sizes=[24, 18, 15, 6], r=2, scale=2.0, steps=15, m=8, lr=1e-2)

    linear = ["linear1", "linear2", "linear3"]
    peft_folder("plain", r=3, lora_alpha=6, lora_dropout=0.1, target_modules=linear)
    peft_folder("rslora", r=2, lora_alpha=3, use_rslora=True, target_modules=["linear1", "linear3"])
    patterns = dict(rank_pattern={"linear2": 9, "linear[12]": 1}, alpha_pattern={"linear[23]": 2.5})
    peft_folder("patterns", r=4, lora_alpha=8, target_modules=linear, **patterns)
    peft_folder("regex", r=2, lora_alpha=5, target_modules=r"linear(1|3)")
    peft_folder("bf16", r=2, lora_alpha=2, target_modules="all-linear", dtype=torch.bfloat16)
    peft_folder("f16", r=2, lora_alpha=2, target_modules=["linear2"], dtype=torch.float16)
    peft_folder("dora", r=3, lora_alpha=8, use_dora=True, target_modules=linear)
    peft_folder("lora_bias", r=2, lora_alpha=5, lora_bias=True, target_modules=linear)
    peft_folder("bias_all", r=2, lora_alpha=4, bias="all", target_modules=["linear2"])
    peft_folder("bias_lora_only", r=2, lora_alpha=4, bias="lora_only", target_modules=["linear1", "linear3"])
    peft_folder("modules_to_save", r=2, lora_alpha=3, target_modules="all-linear", modules_to_save=["linear3"])
    peft_folder("exclude", r=2, lora_alpha=3, target_modules=r"linear\d", exclude_modules=["linear2"])
    # They begin with a part of the weights, which to repeat takes the crate's feature `svd`.
    principal = dict(cases=CASES.parent / "principal", target_modules=linear)
    peft_folder("pissa", r=3, lora_alpha=6, init_lora_weights="pissa", rank_pattern={"linear2": 2}, **principal)
    peft_folder("pissa_rslora", r=2, lora_alpha=3, init_lora_weights="pissa", use_rslora=True, bias="lora_only", **principal)
    peft_folder("pissa_dora", r=2, lora_alpha=5, init_lora_weights="pissa", use_dora=True, **principal)
    peft_folder("olora", r=4, lora_alpha=3, init_lora_weights="olora", **principal)
    mixed_batch("mixed_batch", m=9, k=21, n=15, ranks=[2, 5, 1], scales=[0.5, 2.0, -1.0])


if __name__ == "__main__":
    main()
