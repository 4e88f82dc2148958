#!/usr/bin/env python3
"""The rivals of `cargo run -p rivals` in Python: the same verbs on the same shapes in PyTorch, seconds a run.

    eager  F.linear(x, W) + scale·F.linear(F.linear(x, A), B): what people write
    addmm  the adapter's second product added to the first: one pass over y less
    peft   PEFT's own layer

Forward (without a graph), and forward with backward for x, A and B; float32 and bfloat16. Runs of the three are interleaved and
the median counts. Each is first compared with the formula in float64: one whose error is out of bound is timed all the same, and the
last column of its row, `out_of_bound` in JSON, says by how much.

    python benches/rivals/lora_layer.py [--quick] [--json FILE] [--shape NAME …] [--threads N …] [--dtype f32|bf16 …]

The rows of --json are those of `cargo run -p rivals`; the time is eager's, the others are its rivals.
"""

import argparse
import csv
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

SCALE = 2.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TABLE = Path(__file__).resolve().parent.parent / "shapes" / "shapes.csv"


class Layer:
    """x, A and B want gradients, W does not; numbers in [-0.5, 0.5), always the same."""

    def __init__(self, shape, dtype):
        generator = torch.Generator().manual_seed(1)
        m, k, n, r = (int(shape[name]) for name in ("m", "k", "n", "rank"))
        new = lambda *size: (torch.rand(size, generator=generator) - 0.5).to(dtype)
        self.x, self.w, self.a, self.b, self.dy = new(m, k), new(n, k), new(r, k), new(n, r), new(m, n)
        for tensor in (self.x, self.a, self.b):
            tensor.requires_grad_(True)


def eager(layer):
    return lambda: F.linear(layer.x, layer.w) + SCALE * F.linear(F.linear(layer.x, layer.a), layer.b)


def addmm(layer):
    return lambda: torch.addmm(F.linear(layer.x, layer.w), F.linear(layer.x, layer.a), layer.b.t(), alpha=SCALE)


def peft(layer):
    """PEFT's layer around a Linear; `None` where PEFT is not installed. It holds the same tensors."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    r, (n, k) = layer.a.shape[0], layer.w.shape
    model = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=layer.w.dtype))
    model[0].weight = torch.nn.Parameter(layer.w, requires_grad=False)
    config = LoraConfig(r=r, lora_alpha=SCALE * r, target_modules=["0"])
    inject_adapter_in_model(config, model)
    adapted = model[0]
    adapted.lora_A["default"].weight = torch.nn.Parameter(layer.a.detach())
    adapted.lora_B["default"].weight = torch.nn.Parameter(layer.b.detach())
    layer.peft_parameters = (adapted.lora_A["default"].weight, adapted.lora_B["default"].weight)
    return lambda: adapted(layer.x)


def parameters(layer, name):
    return layer.peft_parameters if name == "peft" else (layer.a, layer.b)


def without_graph(forward):
    def run():
        with torch.no_grad():
            return forward()

    return run


def with_backward(forward, layer, name):
    wanted = (layer.x, *parameters(layer, name))
    return lambda: torch.autograd.grad(forward(), wanted, layer.dy)


def limit(dtype):
    """The relative error, norm by norm, that the type's rounding explains; a rounding before each sum included."""
    return 8 * torch.finfo(dtype).eps


def error(verb, run, layer):
    """The largest relative error against float64, norm by norm."""
    exact = Layer.__new__(Layer)
    for key in ("x", "w", "a", "b", "dy"):
        setattr(exact, key, getattr(layer, key).detach().double().requires_grad_(key in "xab"))
    want = eager(exact)
    want = [want()] if verb == "lora_forward" else with_backward(want, exact, "eager")()
    got = run()
    got = [got] if verb == "lora_forward" else got
    return torch.stack([(ours.double() - theirs).norm() / theirs.norm() for ours, theirs in zip(got, want)]).max().item()


def timed(run, repeats):
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def medians(runs, quick):
    """Median seconds a run of each; every round runs everyone once."""
    repeats = {name: max(1, min(1000, int(2e-3 / timed(run, 1)))) for name, run in runs.items()}
    samples, began, round_ = {name: [] for name in runs}, time.perf_counter(), 0
    least, limit = (3, 0.3) if quick else (9, 3.0)
    while round_ < least or time.perf_counter() - began < limit:
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            samples[name].append(timed(runs[name], repeats[name]))
        round_ += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def measure(shape, dtype, threads, quick):
    """One row a verb."""
    torch.set_num_threads(threads)
    layer = Layer(shape, DTYPES[dtype])
    forwards = {"eager": eager(layer), "addmm": addmm(layer), "peft": peft(layer)}
    forwards = {name: forward for name, forward in forwards.items() if forward}
    for verb in ("lora_forward", "lora_forward_backward"):
        if verb == "lora_forward":
            runs = {name: without_graph(forward) for name, forward in forwards.items()}
        else:
            runs = {name: with_backward(forward, layer, name) for name, forward in forwards.items()}
        errors, most = {name: error(verb, run, layer) for name, run in runs.items()}, limit(layer.x.dtype)
        seconds = medians(runs, quick)
        yield {
            "verb": verb,
            "backend": "pytorch",
            "dtype": dtype,
            "shape": shape["name"],
            "rank": int(shape["rank"]),
            "threads": threads,
            "seconds": seconds.pop("eager"),
            "peak_share": None,
            "rivals": seconds,
            "out_of_bound": {name: f"{error:.1e} > {most:.1e}" for name, error in errors.items() if not error < most},
        }


def main():
    with TABLE.open() as file:
        shapes = [shape for shape in csv.DictReader(file) if shape["on"] != "gpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds: for a look")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--shape", nargs="*", choices=[shape["name"] for shape in shapes])
    parser.add_argument("--threads", nargs="*", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--dtype", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    args = parser.parse_args()

    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; the others: their time over eager's\n")
    print(f"| {'verb':21} | {'':4} | {'shape':20} | {'r':>2} | {'threads':7} | {'eager':>9} | {'addmm':>6} | {'peft':>6} | out of bound |")
    print(f"|{'-' * 23}|{'-' * 6}|{'-' * 22}|{'-' * 4}|{'-' * 9}|{'-' * 11}|{'-' * 8}|{'-' * 8}|{'-' * 14}|")
    rows = []
    for dtype in args.dtype:
        for shape in shapes:
            if args.shape and shape["name"] not in args.shape:
                continue
            for threads in args.threads:
                for row in measure(shape, dtype, threads, args.quick):
                    rows.append(row)
                    seconds, size = row["seconds"], f"{shape['name']} {shape['m']}x{shape['k']}x{shape['n']}"
                    ratios = [f"{row['rivals'][name] / seconds:.2f}×" if name in row["rivals"] else "" for name in ("addmm", "peft")]
                    cells = [f"{row['verb']:21}", f"{dtype:4}", f"{size:20}", f"{row['rank']:2}", f"{threads:7}"]
                    beyond = ", ".join(f"{name} {error}" for name, error in row["out_of_bound"].items())
                    cells += [f"{1e3 * seconds:6.2f} ms"] + [f"{ratio:>6}" for ratio in ratios] + [beyond]
                    print("|", " | ".join(cells), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
