#!/usr/bin/env python3
"""Asks the owners' libraries whether `lowrank convert` reads and writes their formats.

    cargo build --release --features cli
    python3 scripts/check-convert.py target/release/lowrank [gguf mlx diffusers torchtune loralib peft]

Each check makes a small adapter of random numbers, converts it with the program, and compares with what the library makes of the
same. Needs numpy and safetensors, and for each check the library of its name: gguf; mlx and mlx-lm; diffusers and torch; torchtune's
files and torch; loralib and torch; peft, transformers and torch. A check whose library is missing fails.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

HEADS, KV_HEADS, HIDDEN, INNER, RANK, ALPHA = 4, 2, 16, 24, 3, 5.0
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=32, rms_norm_eps=1e-6, max_position_embeddings=64,
    tie_word_embeddings=False, head_dim=HIDDEN // HEADS,
)
KV = HIDDEN // HEADS * KV_HEADS
SIDES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{i}.{name}": sides for i in range(2) for name, sides in SIDES.items()}
RNG = np.random.default_rng(0)
PROGRAM = None


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def convert(*words):
    run = subprocess.run([PROGRAM, "convert", *map(str, words)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def peft_folder(path, modules=MODULES):
    """A PEFT folder of random numbers; gives A and B by module."""
    path.mkdir()
    factors = {name: (numbers(RANK, k), numbers(n, RANK)) for name, (n, k) in modules.items()}
    names = {"A": 0, "B": 1}
    save_file({f"base_model.model.{m}.lora_{f}.weight": ab[i] for m, ab in factors.items() for f, i in names.items()},
              path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=sorted({m.rsplit(".", 1)[1] for m in modules}))
    (path / "adapter_config.json").write_text(json.dumps(config))
    return factors


def read_peft(path):
    """A and B by module, and the scaling of the first."""
    tensors, config = load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())
    prefix, modules = "base_model.model.", {}
    for name, tensor in tensors.items():
        module, factor, _ = name.removeprefix(prefix).rsplit(".", 2)
        modules.setdefault(module, {})[factor] = tensor
    return {m: (ab["lora_A"], ab["lora_B"]) for m, ab in modules.items()}, config["lora_alpha"] / config["r"]


def base(path):
    """A Llama in the names of transformers."""
    path.mkdir()
    weights = {f"{m}.weight": numbers(n, k) for m, (n, k) in MODULES.items()}
    for i in range(2):
        weights |= {f"model.layers.{i}.{norm}.weight": numbers(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
    weights |= {"model.norm.weight": numbers(HIDDEN), "model.embed_tokens.weight": numbers(32, HIDDEN), "lm_head.weight": numbers(32, HIDDEN)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return weights


def same(got, want, what):
    assert got.keys() == want.keys(), (what, got.keys() ^ want.keys())
    for name in want:
        for one, other in zip(got[name], want[name]):
            assert np.array_equal(one, other), (what, name)


def interleaved(rows, heads):
    """As llama.cpp's converter permutes the rows of q and k."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def check_gguf(desk):
    import gguf

    factors = peft_folder(desk / "peft")
    base(desk / "base")
    convert(desk / "peft", "--to", "gguf", "--base", desk / "base", "--out", desk / "lora.gguf")
    reader = gguf.GGUFReader(desk / "lora.gguf")
    field = lambda key: reader.get_field(key).contents()
    assert (field("general.type"), field("adapter.type"), field("general.architecture")) == ("adapter", "lora", "llama")
    assert field("adapter.lora.alpha") == ALPHA
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    want = {}
    for module, (a, b) in factors.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rsplit(".", 1)[1])
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        want[f"{name}.lora_a"] = [a]
        want[f"{name}.lora_b"] = [interleaved(b, heads) if heads else b]
    same({t.name: [np.array(t.data).reshape([int(n) for n in t.shape[::-1]])] for t in reader.tensors}, want, "gguf")

    writer = gguf.GGUFWriter(desk / "theirs.gguf", "llama")  # and what their writer writes comes back
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, (tensor,) in want.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    convert(desk / "theirs.gguf", "--to", "peft", "--base", desk / "base", "--out", desk / "back")
    got, scaling = read_peft(desk / "back")
    same(got, factors, "gguf")
    assert scaling == ALPHA / RANK
    return f"{len(want)} tensors bit for bit, there and back"


def check_mlx(desk):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    weights = base(desk / "base")

    def model():
        model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
        model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
        return model

    def worst(model, factors, scaling):
        fused = {name: np.array(m.fuse().weight) for name, m in model.named_modules() if hasattr(m, "fuse")}
        assert fused.keys() == factors.keys(), fused.keys() ^ factors.keys()
        want = {m: weights[f"{m}.weight"] + scaling * (b.astype(float) @ a.astype(float)) for m, (a, b) in factors.items()}
        return max(np.abs(fused[m] - want[m]).max() / np.abs(want[m]).max() for m in factors)

    factors = peft_folder(desk / "peft")
    convert(desk / "peft", "--to", "mlx-lm", "--out", desk / "mlx")
    error = worst(load_adapters(model(), str(desk / "mlx")), factors, ALPHA / RANK)

    theirs = model()
    settings = dict(rank=RANK, scale=7.0, dropout=0.0, keys=["self_attn.q_proj", "mlp.down_proj"])
    linear_to_lora_layers(theirs, 1, settings)
    for _, module in theirs.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.array(numbers(*module.lora_b.shape))
    (desk / "theirs").mkdir()
    trained = {name: value for name, value in tree_flatten(theirs.parameters()) if name.endswith(("lora_a", "lora_b"))}
    mx.save_safetensors(str(desk / "theirs/adapters.safetensors"), trained)
    (desk / "theirs/adapter_config.json").write_text(json.dumps(dict(fine_tune_type="lora", num_layers=1, lora_parameters=settings)))
    convert(desk / "theirs", "--to", "peft", "--out", desk / "back")
    back = worst(theirs, *read_peft(desk / "back"))
    assert max(error, back) < 1e-6, (error, back)
    return f"fused weights within {error:.1e} there and {back:.1e} back"


def check_diffusers(desk):
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors.torch import save_file as save_torch

    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    modules = {f"{block}.attn1.to_q": (8, 6), f"{block}.attn1.to_out.0": (6, 8), f"{block}.ff.net.2": (6, 24),
               "up_blocks.1.attentions.2.proj_in": (8, 8)}
    factors = peft_folder(desk / "peft", modules)
    save_file({f"{m}.weight": numbers(n, k) for m, (n, k) in modules.items()}, desk / "unet.safetensors")
    convert(desk / "peft", "--to", "kohya", "--out", desk / "kohya.safetensors")
    ours = {name: torch.from_numpy(value) for name, value in load_file(desk / "kohya.safetensors").items()}
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(dict(ours))
    assert set(alphas.values()) == {ALPHA} and len(alphas) == len(modules), alphas
    stripped = {name.removeprefix("unet."): value for name, value in theirs.items()}
    got = {}
    for name, tensor in convert_unet_state_dict_to_peft(stripped).items():
        module, factor, _ = name.replace(".processor", "").rsplit(".", 2)
        module = module[:-len(".to_out")] + ".to_out.0" if module.endswith(".to_out") else module
        got.setdefault(module, {})[factor] = tensor.numpy()
    same({m: (ab["lora_A"], ab["lora_B"]) for m, ab in got.items()}, factors, "diffusers")
    save_torch({name: value.contiguous() for name, value in theirs.items()}, desk / "diffusers.safetensors")
    for path, more in [("kohya.safetensors", ["--base", desk / "unet.safetensors"]), ("diffusers.safetensors", [])]:
        convert(desk / path, "--to", "peft", *more, "--out", desk / f"back-{path}")
        same(read_peft(desk / f"back-{path}")[0], factors, path)
    return f"{len(modules)} modules bit for bit, from kohya's names and diffusers' older ones"


def check_torchtune(desk):
    import torch

    package = pathlib.Path(importlib.util.find_spec("torchtune").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("convert_weights", package / "models/convert_weights.py")
    library = importlib.util.module_from_spec(spec)  # the file alone: the package wants one version of torchao
    spec.loader.exec_module(library)

    there = {"self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3", "mlp.down_proj": "mlp.w2"}
    tensors = {}
    for module, (n, k) in MODULES.items():
        _, _, layer, name = module.split(".", 3)
        name = f"layers.{layer}.{there.get(name, name.replace('self_attn', 'attn'))}"
        tensors |= {f"{name}.lora_a.weight": numbers(RANK, k), f"{name}.lora_b.weight": numbers(n, RANK)}
    save_file(tensors, desk / "adapter.safetensors")
    base(desk / "base")
    convert(desk / "adapter.safetensors", "--to", "peft", "--base", desk / "base", "--alpha", ALPHA, "--out", desk / "out")
    theirs = library.tune_to_peft_adapter_weights(
        {name: torch.from_numpy(value) for name, value in tensors.items()}, num_heads=HEADS, num_kv_heads=KV_HEADS, dim=HIDDEN)
    got = load_file(desk / "out/adapter_model.safetensors")
    same({name: [value] for name, value in got.items()}, {name: [value.numpy()] for name, value in theirs.items()}, "torchtune")
    return f"{len(theirs)} tensors bit for bit"


def check_loralib(desk):
    import loralib
    import torch

    layer = loralib.Linear(6, 8, r=RANK, lora_alpha=ALPHA)
    with torch.no_grad():
        layer.lora_B.copy_(torch.from_numpy(numbers(8, RANK)))
    model = torch.nn.ModuleDict({"q": layer})
    save_file({name: value.numpy() for name, value in loralib.lora_state_dict(model).items()}, desk / "lora.safetensors")
    convert(desk / "lora.safetensors", "--to", "peft", "--alpha", ALPHA, "--out", desk / "out")
    factors, scaling = read_peft(desk / "out")
    want = layer.weight.detach().numpy() + scaling * (factors["q"][1] @ factors["q"][0])
    layer.eval()  # loralib merges then
    error = np.abs(layer.weight.detach().numpy() - want).max()
    assert error < 1e-6, error
    return f"merged weight within {error:.1e}"


def check_peft(desk):
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    weights = base(desk / "base")
    factors = peft_folder(desk / "peft")
    convert(desk / "peft", "--to", "mlx-lm", "--out", desk / "mlx")
    convert(desk / "mlx", "--to", "peft", "--out", desk / "back")
    model = LlamaForCausalLM.from_pretrained(desk / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, desk / "back").merge_and_unload().state_dict()
    want = {m: weights[f"{m}.weight"] + ALPHA / RANK * (b @ a) for m, (a, b) in factors.items()}
    error = max(np.abs(merged[f"{m}.weight"].numpy() - want[m]).max() / np.abs(want[m]).max() for m in factors)
    assert error < 1e-6, error
    return f"merged weights of a folder that was mlx-lm's within {error:.1e}"


def main():
    global PROGRAM
    assert len(sys.argv) > 1, __doc__
    PROGRAM = str(pathlib.Path(sys.argv[1]).resolve())
    checks = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
    failed = 0
    for name in sys.argv[2:] or checks:
        with tempfile.TemporaryDirectory() as desk:
            try:
                print(f"{name:10} {checks[name](pathlib.Path(desk))}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{name:10} FAILED: {type(error).__name__}: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
