#!/usr/bin/env python3
"""Merges adapters of small models of many families with the program. The merged model, loaded by transformers, must compute what
PEFT's model computes before it merges; where PEFT's own merged model does so too, its weights must be ours.

    cargo build --features cli
    python3 scripts/check-merge-with-peft.py target/debug/lowrank [FAMILY ...]

Needs torch, transformers (5.24), peft (0.21) and safetensors.
"""

import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers.utils import logging

from net import relative_error
from small_models import make

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
QV = ["q_proj", "v_proj"]
HALF = dict(dtype=torch.bfloat16)
SHARDS = dict(max_shard_size="4KB")
TIED = dict(tie_word_embeddings=True)
UNTIED = dict(tie_word_embeddings=False)


def lora(*targets, **settings):
    return dict(target_modules=list(targets), **settings)


# family, settings of the model, settings of the adapter, how the base is stored
MERGED = [
    ("llama", {}, lora(*QV), {}),
    ("llama", {}, dict(target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True), {}),
    ("llama", {}, lora(*QV, "down_proj", rank_pattern={"^model.layers.0.*v_proj": 3}, alpha_pattern={"down_proj": 3.3}), {}),
    ("llama", {}, lora(*QV, layers_to_transform=[0], layers_pattern="layers"), {}),
    ("llama", {}, dict(target_modules=r".*\.self_attn\.[qk]_proj", exclude_modules=["k_proj"]), {}),
    ("llama", {}, dict(target_modules=r".*(?<!k)_proj"), {}),
    ("llama", {}, dict(target_modules="all-linear", use_dora=True), HALF),
    ("llama", {}, lora(*QV), dict(dtype=torch.float16)),
    ("llama", {}, lora(*QV, fan_in_fan_out=True), {}),
    ("llama", {}, lora(*QV, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]), {}),
    ("llama", {}, lora(*QV, init_lora_weights="pissa"), {}),
    ("llama", {}, lora(*QV, init_lora_weights="olora"), {}),
    ("llama", {}, lora(*QV, init_lora_weights="orthogonal"), {}),
    ("llama", {}, lora(*QV, init_lora_weights="eva"), {}),
    ("llama", {}, lora(*QV, init_lora_weights="mica"), {}),
    ("llama", {}, lora(*QV, "embed_tokens", "lm_head"), SHARDS),
    ("llama", {}, lora(*QV, "embed_tokens", use_dora=True), {}),
    ("llama", {}, lora("lm_head", use_dora=True, use_rslora=True), {}),
    ("llama", {}, lora(target_parameters=["q_proj.weight"]), {}),
    ("llama", {}, lora(*QV, trainable_token_indices=[5, 3]), {}),
    ("llama", {}, lora(*QV, trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [7]}), {}),
    ("llama", {}, lora(*QV, "embed_tokens", "lm_head"), dict(vocabulary=104)),
    ("llama", {}, lora(*QV, modules_to_save=["embed_tokens", "lm_head"]), dict(vocabulary=104)),
    ("llama", {}, lora(*QV, modules_to_save=["embed_tokens", "lm_head"]), dict(vocabulary=90)),
    ("llama", TIED, lora(*QV, modules_to_save=["embed_tokens"]), {}),
    ("llama", TIED, lora(*QV, modules_to_save=["lm_head"]), {}),
    ("llama", TIED, lora(*QV, modules_to_save=["embed_tokens", "lm_head"]), SHARDS),
    ("llama", TIED, lora(*QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True), {}),
    ("llama", TIED, lora(*QV, "lm_head"), {}),
    ("llama", TIED, lora(*QV, "embed_tokens"), HALF | SHARDS),
    ("llama", TIED, lora(*QV, "embed_tokens", "lm_head"), {}),
    ("llama", TIED, lora(*QV, "embed_tokens", ensure_weight_tying=True), {}),
    ("llama", TIED, lora(*QV, trainable_token_indices=[1, 2]), {}),
    ("llama", TIED, lora(*QV, trainable_token_indices=[1, 2], ensure_weight_tying=True), {}),
    ("qwen2", TIED, lora(*QV, bias="all"), {}),
    ("qwen2", {}, lora(*QV, "o_proj", bias="lora_only"), HALF),
    ("gemma", {}, lora(*QV, "embed_tokens"), {}),
    ("gemma3", {}, dict(target_modules="all-linear", task_type="CAUSAL_LM"), {}),
    ("gemma3", {}, lora(*QV, modules_to_save=["lm_head"]), {}),
    ("gpt2", {}, lora("c_attn", "c_proj", fan_in_fan_out=True, bias="lora_only"), {}),
    ("gpt2", {}, lora("c_fc", fan_in_fan_out=True, lora_bias=True, lora_alpha=3), {}),
    ("gpt2", {}, lora("c_attn", "c_proj", fan_in_fan_out=True, use_dora=True), {}),
    ("gpt2", {}, lora("c_attn", "c_proj", fan_in_fan_out=True, init_lora_weights="pissa"), {}),
    ("gpt2", {}, lora("wte", "wpe", "c_attn"), {}),
    ("gpt2", {}, lora("wte", "c_attn", use_dora=True, fan_in_fan_out=True), {}),
    ("gpt2", {}, lora("c_attn", "c_proj", "c_fc", "lm_head", bias="all"), dict(dtype=torch.float16)),
    ("gpt2", {}, lora("c_attn", "c_proj", fan_in_fan_out=True), dict(bare=transformers.GPT2Model)),
    ("neox", {}, lora("query_key_value", "embed_out", "embed_in"), {}),
    ("neox", TIED, lora("query_key_value", "embed_in"), {}),
    ("opt", {}, lora("q_proj", "fc1", "fc2", bias="all"), {}),
    ("opt", {}, lora("q_proj", "embed_tokens"), {}),
    ("opt", {}, lora("q_proj", "lm_head"), {}),
    ("bloom", {}, lora("query_key_value", "word_embeddings"), {}),
    ("bloom", {}, lora("query_key_value", modules_to_save=["word_embeddings", "lm_head"]), {}),
    ("falcon", {}, lora("query_key_value", "dense"), {}),
    ("phi", {}, lora("q_proj", "dense", "lm_head", bias="all"), {}),
    ("gptj", {}, lora("q_proj", "fc_in", "lm_head", bias="all"), {}),
    ("mamba", {}, lora("in_proj", "x_proj", "embeddings"), {}),
    ("mixtral", {}, lora(*QV, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), {}),
    ("mixtral", {}, lora("q_proj", "o_proj", target_parameters=["experts.down_proj"]), HALF | SHARDS),
    ("mixtral", dict(intermediate_size=32), lora(target_parameters=["experts.down_proj"]), {}),
    (
        "qwen3moe",
        {},
        lora(*QV, target_parameters=["experts.gate_up_proj"], rank_pattern={"experts.gate_up_proj": 3}),
        {},
    ),
    ("qwen3moe", {}, lora(target_parameters=["mlp.gate.weight"]), {}),
    ("gpt-oss", {}, lora(*QV, target_parameters=["experts.gate_up_proj", "experts.down_proj"]), {}),
    ("gpt-oss", dict(intermediate_size=32), lora(target_parameters=["experts.down_proj"]), {}),
    ("bert", {}, lora("query", "dense"), {}),
    ("bert", {}, lora("query", "word_embeddings", "position_embeddings"), {}),
    ("bert-classes", {}, lora("query", "value", task_type="SEQ_CLS"), {}),
    (
        "bert-classes",
        dict(num_labels=3),
        lora("query", "value", task_type="SEQ_CLS", bias="lora_only"),
        dict(bare=transformers.BertModel),
    ),
    ("bert-mlm", {}, lora("word_embeddings", "query"), {}),
    ("bert-mlm", {}, lora("decoder", "query"), {}),
    ("bert-mlm", {}, lora("query", modules_to_save=["word_embeddings"]), {}),
    ("roberta-mlm", {}, lora("word_embeddings", "query"), {}),
    ("roberta-mlm", {}, lora("decoder", "query"), {}),
    ("distilbert", {}, lora("word_embeddings", "q_lin"), {}),
    ("distilbert", {}, lora("vocab_projector", "q_lin"), {}),
    ("deberta", {}, lora("query_proj", task_type="SEQ_CLS"), {}),
    ("t5", {}, lora("q", "v", "wi"), {}),
    ("t5", {}, lora("q", "v", "lm_head"), {}),
    ("t5", UNTIED, lora("q", "v", "lm_head"), {}),
    ("t5", dict(feed_forward_proj="gated-gelu") | UNTIED, dict(target_modules="all-linear"), {}),
    ("bart", {}, lora(*QV, "fc1", bias="all"), {}),
    ("bart", {}, lora(*QV, "lm_head"), {}),
    ("bart", {}, lora(*QV, modules_to_save=["embed_positions"]), {}),
    ("whisper", {}, lora("q_proj", "proj_out"), {}),
    ("whisper", {}, lora("q_proj", "embed_tokens"), {}),
    ("vit", {}, lora("query", "projection", modules_to_save=["classifier"]), {}),
    ("vit", {}, lora("query", "projection", use_dora=True), {}),
    ("vit", dict(hidden_size=48), lora("projection", r=2), {}),
    ("wav2vec2", {}, lora("q_proj", "projection", modules_to_save=["lm_head"]), {}),
    ("clip", {}, lora("q_proj", "visual_projection", "patch_embedding"), {}),
    ("clip", {}, lora("token_embedding", "position_embedding"), {}),
    ("llava", {}, dict(target_modules=r".*language_model.*q_proj"), {}),
    ("llava", {}, lora(*QV, "patch_embedding"), {}),
    ("llava", {}, lora(*QV, modules_to_save=["multi_modal_projector"]), {}),
    ("llava", {}, lora("lm_head"), HALF),
]

# the same, and a word of the reason
REFUSED = [
    ("llama", {}, lora(*QV, layer_replication=[[0, 2], [1, 2]]), {}, "layer_replication"),
    ("llama", {}, lora(*QV, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), {}, "alora_invocation_tokens"),
    ("llama", {}, lora(*QV, init_lora_weights="pissa_niter_4"), {}, "pissa_niter_4"),
    ("gemma", {}, lora(*QV, modules_to_save=["embed_tokens"]), dict(vocabulary=104), "another number of rows"),
    ("t5", {}, lora("q", "v", modules_to_save=["shared"]), {}, "it is not known which of them"),
    ("wav2vec2", {}, dict(target_modules=r".*pos_conv_embed\.conv"), {}, "4 groups"),
]


def store(model, folder, bare=None, max_shard_size="1GB", **_):
    """Saves a model, or only the part of it that a class without a head has."""
    if bare:
        prefix = f"{model.base_model_prefix}."
        part = {name.removeprefix(prefix): value for name, value in model.state_dict().items()}
        model = bare(model.config)
        model.load_state_dict(part, strict=False)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def adapted(case, folder):
    """Stores a model, and PEFT's of it with an adapter whose every number is random. Gives the latter, its forward, and what the
    base computes."""
    family, settings, adapter, stored = case
    model, forward = make(family, **settings)
    model = model.to(stored.get("dtype", torch.float32))
    store(model, folder / "base", **stored)
    if rows := stored.get("vocabulary"):
        model.resize_token_embeddings(rows)
    with torch.no_grad():
        before = forward(model)
    model = get_peft_model(model, LoraConfig(**dict(init_lora_weights=False, r=4, lora_alpha=7) | adapter)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder / "adapter")
    return model, forward, before


def merge(program, folder):
    words = [program, "merge", "--base", folder / "base", "--adapter", folder / "adapter", "--out", folder / "merged"]
    return subprocess.run(words, capture_output=True, text=True)


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def check_merged(case, program, folder):
    """Gives how far our merged model is from PEFT's model, and whether PEFT's merged weights were comparable."""
    model, forward, before = adapted(case, folder)
    bound = TOLERANCE[case[3].get("dtype", torch.float32)]
    with torch.no_grad():
        want = forward(model.get_base_model())
        assert relative_error(before, want) > 10 * bound, "the adapter changes too little for a check"
        run = merge(program, folder)
        assert run.returncode == 0, run.stderr
        loader = type(model.get_base_model())
        ours, report = loader.from_pretrained(folder / "merged", output_loading_info=True, dtype=want.dtype)
        assert not any(report.values()), report
        error = relative_error(forward(ours.eval()), want)
        assert error <= bound, error
        merged = model.merge_and_unload()
        comparable = relative_error(forward(merged), want) <= bound
    if comparable:
        merged.save_pretrained(folder / "peft")
        got = tensors(folder / "merged")
        for name, value in tensors(folder / "peft").items():
            same = name not in got or got[name].shape == value.shape and relative_error(got[name], value) <= bound
            assert same or value.norm() == 0, name
    return error, comparable


def check_refused(case, program, folder):
    adapted(case[:4], folder)
    run = merge(program, folder)
    assert run.returncode == 1 and case[4] in run.stderr, run.stderr or run.stdout
    return run.stderr.strip().removeprefix(f"lowrank: {folder}/")


def main(program, *families):
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed, done = 0, 0
    for case in [*MERGED, *REFUSED]:
        if families and case[0] not in families:
            continue
        torch.manual_seed(0)
        title = f"{case[0]} {case[1] or ''} {case[2]} {case[3] or ''}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                if len(case) == 5:
                    print(f"refused  {title}: {check_refused(case, program, pathlib.Path(folder))}", flush=True)
                else:
                    error, comparable = check_merged(case, program, pathlib.Path(folder))
                    note = "" if comparable else " (PEFT's own merged model computes something else)"
                    print(f"{error:.1e}  {title}{note}", flush=True)
                done += 1
            except AssertionError as error:
                failed += 1
                print(f"FAILED   {title}: {error}", flush=True)
    print(f"{done} as they should be, {failed} not")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0 if len(sys.argv) > 1 else __doc__)
