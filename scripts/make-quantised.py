#!/usr/bin/env python3
"""Makes tests/quantised/*.safetensors: weights that bitsandbytes quantised and dequantised on the CPU.

Needs torch, bitsandbytes (0.50.2), gguf and safetensors. The same versions make the same file.
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from safetensors.torch import save_file

FILE = pathlib.Path(__file__).parent.parent / "tests" / "quantised" / "cases.safetensors"

tensors, cases = {}, {}


def add(name, info, **parts):
    cases[name] = info
    tensors.update({f"{name}.{key}": value.detach().contiguous().clone() for key, value in parts.items()})


def four_bits(name, w, kind="nf4", block=64, double=False):
    codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=double)
    info = dict(kind=kind, block=block, double=double, rows=w.shape[0], cols=w.shape[1])
    parts = dict(weight=w, codes=codes.flatten(), absmax=state.absmax, map=state.code)
    if double:
        parts |= dict(nested_absmax=state.state2.absmax, nested_map=state.state2.code, offset=state.offset.reshape(1))
    narrow = [] if w.numel() > 4096 else [torch.bfloat16, torch.float16]
    for dtype in [torch.float32, *narrow]:
        state.dtype = dtype
        out = bnb.dequantize_4bit(codes, state)
        parts[f"out_{str(dtype).removeprefix('torch.')}"] = out.reshape(w.shape)
    add(name, info, **parts)


def int8_rows(name, w):
    codes, absmax, _ = bnb.int8_vectorwise_quant(w.clone())
    out = bnb.int8_vectorwise_dequant(codes, absmax)
    add(name, dict(kind="int8", rows=w.shape[0], cols=w.shape[1]), weight=w, codes=codes, absmax=absmax, out_float32=out)


def q8_0(name, w):
    raw = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q8_0)
    out = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    blocks = raw.reshape(-1, 34)
    scales = torch.from_numpy(blocks[:, :2].copy().view(np.float16).reshape(-1))
    codes = torch.from_numpy(blocks[:, 2:].copy().view(np.int8)).reshape(w.shape)
    info = dict(kind="q8_0", rows=w.shape[0], cols=w.shape[1])
    add(name, info, weight=w, codes=codes, absmax=scales, out_float32=torch.from_numpy(out).reshape(w.shape))


def checkpoint():
    """A model as transformers saves it: weights with what bitsandbytes keeps beside them, and what they stand for."""
    model, plain = {}, {}
    for name, kind, double, dtype in [("a", "nf4", True, torch.bfloat16), ("b", "nf4", False, torch.float32), ("c", "fp4", True, torch.float16)]:
        w = (torch.randn(9, 70) * 0.1).to(dtype)
        codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=double)
        model[f"{name}.weight"] = codes
        model |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        plain[f"{name}.weight"] = bnb.dequantize_4bit(codes, state).reshape(w.shape)
    w = torch.randn(6, 40) * 0.1
    codes, absmax, _ = bnb.int8_vectorwise_quant(w.clone())
    model |= {"d.weight": codes, "d.SCB": absmax, "d.weight_format": torch.tensor(0, dtype=torch.uint8)}
    plain["d.weight"] = bnb.int8_vectorwise_dequant(codes, absmax).bfloat16()
    model["norm.weight"] = plain["norm.weight"] = torch.randn(70).bfloat16()
    for name, tensors in [("model", model), ("plain", plain)]:
        save_file({key: value.contiguous() for key, value in tensors.items()}, FILE.parent / f"{name}.safetensors")


def main():
    torch.manual_seed(19)
    levels = bnb.get_4bit_type("nf4", device="cpu")
    four_bits("all_codes", torch.stack([levels.repeat(4), levels.flip(0).repeat(4) * 3.0]))
    half = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([half, half.nextafter(torch.tensor(2.0)), half.nextafter(torch.tensor(-2.0)), levels[[0, 15]]])
    four_bits("thresholds", torch.nn.functional.pad(edges, (0, 64 - edges.numel())).reshape(1, 64))
    four_bits("odd", torch.randn(7, 13))
    four_bits("one", torch.randn(1, 1))
    four_bits("one_block_and_one", torch.randn(1, 65))
    four_bits("rows_across_blocks", torch.randn(5, 100), block=32)
    four_bits("block_128", torch.randn(3, 256), block=128)
    four_bits("block_4096", torch.randn(2, 2049), block=4096)
    mixed = torch.randn(6, 64)
    mixed[0] = 0
    mixed[1] *= 1e-40
    mixed[2] *= 1e30
    mixed[3, 7] = -1e38
    mixed[4, :32] = -0.0
    four_bits("extremes", mixed)
    scales = torch.rand(8, 1) * 3 + 0.01
    four_bits("double", torch.randn(8, 128) * scales, double=True)
    four_bits("double_two_groups", torch.randn(33, 256) * torch.rand(33, 1), block=32, double=True)
    four_bits("double_odd", torch.randn(9, 77), double=True)
    four_bits("fp4", torch.randn(4, 96), kind="fp4")
    table = bnb.get_4bit_type("fp4", device="cpu")
    four_bits("fp4_all_codes", table.repeat(4).reshape(1, 64), kind="fp4")
    int8_rows("int8", torch.randn(5, 33) * torch.rand(5, 1))
    q8_0("q8_0", torch.randn(3, 96) * torch.rand(3, 1))
    FILE.parent.mkdir(exist_ok=True)
    checkpoint()
    save_file(tensors, FILE, {"cases": json.dumps(cases)})
    print(f"{FILE.name}: {len(cases)} cases, {FILE.stat().st_size} bytes")


main()
