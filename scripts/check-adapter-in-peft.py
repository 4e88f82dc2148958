#!/usr/bin/env python3
"""Loads adapters that this crate wrote into PEFT, and checks that PEFT computes there what the crate computed.

    cargo test --test adapter                                   # writes target/tmp/for_peft
    python3 scripts/check-adapter-in-peft.py target/tmp/for_peft/*

Each folder is one of those that tests/cases/README.md describes: an adapter, and expected.safetensors beside it.
Needs torch, peft (0.21) and safetensors.
"""

import pathlib
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import load_file

from net import Net, relative_error

TOLERANCE = 1e-5


def net_of(expected):
    return Net({name.removeprefix("base."): value for name, value in expected.items() if name.startswith("base.")})


def named(folder):
    """The adapters in sub-folders, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}


def results(folder, expected):
    """What PEFT makes of the folder, under the names of expected.safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that it misses or does not expect
        model = PeftModel.from_pretrained(net_of(expected), folder).eval()
        for name, path in named(folder).items():
            model.load_adapter(path, name)
    got = dict(y_adapter=model(expected["x"]))
    if model.peft_config["default"].bias == "none":
        with model.disable_adapter():
            got["y_base"] = model(expected["x"])
    else:  # PEFT leaves trained biases in the model when it disables an adapter; here they go with it
        got["y_base"] = net_of(expected)(expected["x"])
    for name in named(folder):
        model.base_model.set_adapter(name)
        got[f"y_{name}"] = model(expected["x"])
    if named(folder):
        model.base_model.set_adapter(["default", *named(folder)])
        got["y_both"] = model(expected["x"])
    merged = model.merge_and_unload()
    got["y_merged"] = merged(expected["x"])
    return got | {f"merged.{name}": value for name, value in merged.state_dict().items()}


def main(folders):
    worst = 0.0
    for folder in map(pathlib.Path, folders):
        expected = load_file(folder / "expected.safetensors")
        got = results(folder, expected)
        missing = {"y_base", "y_adapter", "y_merged"} - expected.keys() | {name for name in expected if name[:2] == "y_"} - got.keys()
        assert not missing, f"{folder}: no {missing}"
        errors = {name: relative_error(value, expected[name]) for name, value in got.items() if name in expected}
        name, error = max(errors.items(), key=lambda item: item[1])
        assert all(error <= TOLERANCE for error in errors.values()), f"{folder}: {errors}"
        print(f"{folder}: {len(errors)} tensors agree, {name} worst ({error:.1e})")
        worst = max(worst, error)
    assert folders, __doc__
    print(f"{len(folders)} adapters agree in PEFT, within {worst:.1e}")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
