#!/usr/bin/env python3
"""Makes tests/fixtures/tiny-*: small random language models with a LoRA adapter, and all that transformers and PEFT compute with them.

    python3 -m venv venv && venv/bin/pip install torch transformers peft gguf
    venv/bin/python scripts/make-fixtures.py            # all of them
    venv/bin/python scripts/make-fixtures.py tiny-qwen3

A folder holds a model and an adapter as transformers and PEFT save them, and reference.safetensors:

    input_ids, attention_mask, labels   2 rows of 12; the second has 8 tokens and padding on its right; labels -100 do not count
    base_logits, logits, loss           without and with the adapter; the loss is the mean over the labels that count, shifted by one
    grad.NAME                           the gradient of that loss for each A and B, by the adapter's names
    losses, after.NAME                  five steps of AdamW (settings in the metadata): the loss before each, A and B afterwards
    greedy_prompt, greedy_base, greedy  the tokens that follow, chosen greedily without and with the adapter; greedy_margin is the least
                                        distance of a chosen logit to the next one
"""

import os
import sys

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT keeps target_modules as a set, and writes it in the order of the hashes
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import tiny_tokenizer
from tiny_gguf import write_gguf

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
VOCABULARY = 320
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
STEPS, NEW_TOKENS = 5, 12

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# Each frequency of the rotary embedding meets another branch of this scaling: unchanged, between, divided.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=LLAMA3))


def qwen2():
    theta = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=False, rope_parameters=theta))


def qwen3():
    """Heads of 12 columns: 4 of them are more than the 32 columns of the model."""
    theta = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=12, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=theta))


MODELS = {"tiny-llama": llama, "tiny-qwen2": qwen2, "tiny-qwen3": qwen3}


def randomise(model):
    """Norms and biases, which begin as ones and zeros and would hide what is done to them."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = 1 + 0.2 * torch.randn_like(weight)
        elif name.endswith("bias"):
            weight.data = 0.3 * torch.randn_like(weight)


def write_config_of_version_4(folder):
    """As the files on the hub are: `rope_theta` and `torch_dtype` at the top, where version 5 writes `rope_parameters` and `dtype`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def batch():
    ids = torch.randint(3, VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[0, 8] = -100
    labels[1, :2] = -100
    ids[1, 8:], mask[1, 8:], labels[1, 8:] = 2, 0, -100
    return ids, mask, labels


def greedy(model, prompt):
    """Without a cache. The margin shows that rounding does not choose."""
    ids, margin = prompt, float("inf")
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(input_ids=ids).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[:1].reshape(1, 1)], 1)
    return ids[0, prompt.shape[1]:], margin


def trainable(model):
    return {name.replace(".default", ""): weight for name, weight in model.named_parameters() if weight.requires_grad}


def make(name, build):
    torch.manual_seed(sum(name.encode()))
    folder = FIXTURES / name
    model = build().eval()
    randomise(model)
    model.save_pretrained(folder)
    if name == "tiny-qwen2":
        write_config_of_version_4(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    ids, mask, labels = batch()
    prompt = ids[:1, :5]
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels, "greedy_prompt": prompt[0]}
    with torch.no_grad():
        out["base_logits"] = model(input_ids=ids, attention_mask=mask).logits
    out["greedy_base"], base_margin = greedy(model, prompt)

    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    factors = trainable(tuned)
    for weight in factors.values():
        weight.data = 0.1 * torch.randn_like(weight)
    tuned.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    out["greedy"], margin = greedy(tuned, prompt)
    out["greedy_margin"] = torch.tensor([base_margin, margin])

    optimiser, losses = torch.optim.AdamW(factors.values(), **ADAMW), []
    for step in range(STEPS):
        optimiser.zero_grad()
        result = tuned(input_ids=ids, attention_mask=mask, labels=labels)
        result.loss.backward()
        losses.append(result.loss.item())
        if step == 0:
            out["logits"], out["loss"] = result.logits.detach(), result.loss.detach().reshape(1)
            out.update({f"grad.{key}": weight.grad.clone() for key, weight in factors.items()})
        optimiser.step()
    out["losses"] = torch.tensor(losses)
    out.update({f"after.{key}": weight.detach() for key, weight in factors.items()})
    settings = {"adamw": json.dumps(ADAMW)}
    save_file({key: value.contiguous().clone() for key, value in out.items()}, folder / "reference.safetensors", settings)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: losses {losses}, greedy {out['greedy'].tolist()}, margins {base_margin:.3f} {margin:.3f}, {size / 1024:.0f} KB")
    return model


def main(names):
    torch.set_num_threads(1)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in names or MODELS:
        make(name, MODELS[name])
        if name == "tiny-llama":
            tiny_tokenizer.write(FIXTURES / name, VOCABULARY)
            weights = load_file(FIXTURES / name / "model.safetensors")
            write_gguf(FIXTURES / "tiny-llama.gguf", FIXTURES / name, weights)


if __name__ == "__main__":
    main(sys.argv[1:])
