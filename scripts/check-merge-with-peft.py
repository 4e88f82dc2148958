#!/usr/bin/env python3
"""Merges adapters of small transformers with the program and with PEFT, and checks that both give the same weights.

    cargo build --features cli
    python3 scripts/check-merge-with-peft.py target/debug/lowrank

What the program refuses is told, with its reason. Needs torch, transformers, peft (0.21) and safetensors.
"""

import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from net import relative_error

TOLERANCE = 1e-5
QV = ["q_proj", "v_proj"]


def llama(tied=False):
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied))


def gpt2():
    ends = dict(bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=16, **ends))


MERGED = [
    (llama, dict(target_modules=QV, r=4, lora_alpha=7)),
    (llama, dict(target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)),
    (llama, dict(target_modules=[*QV, "down_proj"], rank_pattern={"^model.layers.0.*v_proj": 3}, alpha_pattern={"down_proj": 3.3})),
    (llama, dict(target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers")),
    (llama, dict(target_modules=r".*\.self_attn\.[qk]_proj", exclude_modules=["k_proj"])),
    (llama, dict(target_modules=[*QV, "gate_proj"], use_dora=True)),
    (llama, dict(target_modules=QV, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"])),
    (llama, dict(target_modules=QV, init_lora_weights="pissa")),
    (llama, dict(target_modules=QV, init_lora_weights="olora")),
    (llama, dict(target_modules=QV, init_lora_weights="orthogonal")),
    (llama, dict(target_modules=QV, init_lora_weights="eva")),
    (llama, dict(target_modules=QV, init_lora_weights="mica")),
    (gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="lora_only")),
    (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True, bias="all", r=2)),
    (gpt2, dict(target_modules=["c_fc"], fan_in_fan_out=True, lora_bias=True, lora_alpha=3)),
    (gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    (gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights="pissa")),
    (llama, dict(target_modules=[*QV, "embed_tokens"])),
    (llama, dict(target_modules=[*QV, "embed_tokens"], use_dora=True)),
    (llama, dict(target_modules=[*QV, "lm_head"])),
    (llama, dict(target_modules=[], target_parameters=["q_proj.weight"])),
    (llama, dict(target_modules=QV, trainable_token_indices=[1, 2])),
    (llama, dict(target_modules=r".*(?<!k)_proj")),
    (lambda: llama(tied=True), dict(target_modules=[*QV, "lm_head"])),
    (lambda: llama(tied=True), dict(target_modules=QV, modules_to_save=["lm_head"])),
    (lambda: llama(tied=True), dict(target_modules=QV, modules_to_save=["embed_tokens"])),
    (lambda: llama(tied=True), dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    (lambda: llama(tied=True), dict(target_modules=QV, trainable_token_indices=[1, 2])),
]

REFUSED = [
    (llama, dict(target_modules=QV, layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    (llama, dict(target_modules=QV, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), "alora_invocation_tokens"),
    (llama, dict(target_modules=QV, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
]


def adapted(make, settings, folder):
    """A model on the disk, and PEFT's of it with an adapter that is trained, as far as numbers tell."""
    model = make()
    model.save_pretrained(folder / "base")
    model = get_peft_model(model, LoraConfig(**dict(init_lora_weights=False) | settings))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder / "adapter")
    return model


def merge(program, folder):
    words = [program, "merge", "--base", folder / "base", "--adapter", folder / "adapter", "--out", folder / "merged"]
    return subprocess.run(words, capture_output=True, text=True)


def main(program):
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for make, settings in MERGED:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            want = adapted(make, settings, folder).merge_and_unload().state_dict()
            run = merge(program, folder)
            assert run.returncode == 0, f"{settings}: {run.stderr}"
            got = load_file(folder / "merged" / "model.safetensors")
            assert want.keys() - got.keys() <= {"lm_head.weight"}, settings  # tied, so stored once
            worst = max(relative_error(value, want[name]) for name, value in got.items() if want[name].norm() > 0)
            assert worst <= TOLERANCE, f"{settings}: {worst}"
            print(f"{settings}: {len(got)} tensors agree within {worst:.1e}")
    for make, settings, word in REFUSED:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            adapted(make, settings, folder)
            run = merge(program, folder)
            assert run.returncode == 1 and word in run.stderr, f"{settings}: {run.stderr}"
            print(f"{settings}: refused: {run.stderr.strip().split(': ', 2)[-1]}")
    print(f"{len(MERGED)} merged as PEFT does, {len(REFUSED)} refused by name")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
