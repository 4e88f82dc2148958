#!/usr/bin/env python3
"""bitsandbytes and transformers read what `lowrank quantise` writes, and `lowrank dequantise` what they write.

Needs torch, bitsandbytes (0.50.2), transformers and safetensors, and the program: `cargo build --features cli`, or its path as argument.
"""

import pathlib
import subprocess
import sys
import tempfile

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = sys.argv[1] if len(sys.argv) > 1 else ROOT / "target" / "debug" / "lowrank"


def lowrank(*arguments):
    run = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def state_of(tensors, name):
    """What bitsandbytes makes of the tensors of a weight."""
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))


def ours_in_bitsandbytes(folder):
    """Each code dequantised by bitsandbytes is what `lowrank dequantise` makes of it, to the bit."""
    torch.manual_seed(0)
    plain = {"a.weight": torch.randn(24, 128) * 0.1, "b.weight": torch.randn(7, 26) * 0.1, "a.bias": torch.randn(24)}
    save_file(plain, folder / "plain.safetensors")
    for flags in [["nf4"], ["nf4", "--single"], ["nf4", "--block", "128"], ["fp4"], ["int8"]]:
        for file in ["small", "dense"]:
            (folder / f"{file}.safetensors").unlink(missing_ok=True)
        lowrank("quantise", folder / "plain.safetensors", "--type", *flags, "--out", folder / "small.safetensors")
        lowrank("dequantise", folder / "small.safetensors", "--dtype", "f32", "--out", folder / "dense.safetensors")
        small, dense = load_file(folder / "small.safetensors"), load_file(folder / "dense.safetensors")
        for name in ["a.weight", "b.weight"]:
            if flags == ["int8"]:
                got = bnb.functional.int8_vectorwise_dequant(small[name], small[name.replace("weight", "SCB")])
            else:
                got = bnb.functional.dequantize_4bit(small[name], state_of(small, name))
            assert torch.equal(got.reshape(plain[name].shape), dense[name]), (flags, name)
            error = float((dense[name] - plain[name]).norm() / plain[name].norm())
            print(f"{' '.join(flags)}, {name}: relative error {error:.4f}")
        assert torch.equal(small["a.bias"], plain["a.bias"])


def model_of_transformers(folder):
    """A Llama of two layers: transformers loads what we quantised and runs it, and we dequantise what its layers give."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()
    model.save_pretrained(folder / "llama")
    lowrank("quantise", folder / "llama", "--type", "nf4", "--out", folder / "nf4")
    quantised = AutoModelForCausalLM.from_pretrained(folder / "nf4", device_map="cpu")
    layer = quantised.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bnb.nn.Linear4bit), type(layer)
    lowrank("dequantise", folder / "nf4", "--out", folder / "dense")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        ours, theirs, before = (each(tokens).logits.float() for each in [dense, quantised, model])
    apart = float((ours - theirs).norm() / theirs.norm())
    print(f"logits of the dequantised and the quantised Llama: {apart:.4f} apart; quantising: {float((ours - before).norm() / before.norm()):.4f}")
    assert apart < 0.02, apart
    # `save_pretrained` of transformers 5.24 raises NotImplementedError for a model that it loaded quantised: the tensors as its layers give
    # them, which are bitsandbytes' own.
    theirs = {name: value.contiguous().clone() for name, value in quantised.state_dict().items()}
    assert any("quant_state" in name for name in theirs), sorted(theirs)
    save_file(theirs, folder / "theirs.safetensors")
    lowrank("dequantise", folder / "theirs.safetensors", "--out", folder / "back.safetensors")
    back = load_file(folder / "back.safetensors")
    for name, value in load_file(folder / "dense" / "model.safetensors").items():
        assert torch.equal(back[name], value), name


with tempfile.TemporaryDirectory() as temporary:
    ours_in_bitsandbytes(pathlib.Path(temporary))
    model_of_transformers(pathlib.Path(temporary))
print("all agree")
