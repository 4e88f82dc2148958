#!/usr/bin/env python3
"""The rivals of `cargo run -p rivals-cuda` in Python, on a GPU in one call: seconds a run, medians of interleaved rounds.

    eager    F.linear(x, W) + scale·F.linear(F.linear(x, A), B): what people write
    addmm    the adapter's second product added to the first
    peft     PEFT's own layer
    compile  torch.compile of eager
    triton   a fused kernel: one loop along the depth for x·Wᵀ and x·Aᵀ, then the update, in one launch

Forward, forward with backward for x, A and B, merging; decoding with 1, 16 and 64 rows. `base` is the bare product x·Wᵀ, which
the adapter's cost is measured against; a copy of a gigabyte and a large product are the ceilings. On a GPU calls are captured in
graphs where that works (PEFT's layer and compiled ones run as they are if not), and take turns over more layers than the L2
cache holds. Each is first compared with the formula in float64.

    python benches/rivals/gpu.py [--device cuda|cpu] [--quick] [--json FILE] [--dtype bf16|f32 …] [--shape NAME …]

The rows of --json are those of `cargo run -p rivals-cuda`; the time is eager's, the others are its rivals.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SCALE = 2.0
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
HERE = Path(__file__).resolve().parent
TABLE = next(path for path in (HERE / "shapes.csv", HERE.parent / "shapes" / "shapes.csv") if path.exists())
with TABLE.open() as file:  # rows, and both sides of the layer
    SHAPES = {row["name"]: (int(row["m"]), int(row["k"])) for row in csv.DictReader(file) if row["on"] != "cpu"}
ON_A_CPU = {"decode": (1, 1024), "decode16": (16, 1024), "large": (256, 1024)}
ENOUGH = 256 << 20  # bytes of weights: several times the L2 cache of any GPU


class Layers:
    """Several layers of one shape, and what passes through them. x, A and B want gradients, W does not."""

    def __init__(self, rows, side, rank, dtype, device):
        generator = torch.Generator(device).manual_seed(1)
        new = lambda *size: (torch.rand(size, generator=generator, device=device) - 0.5).to(dtype)
        on_gpu = device == "cuda"
        count = -(-ENOUGH // (side * side * dtype.itemsize)) if on_gpu else 2
        self.x, self.dy = new(rows, side).requires_grad_(True), new(rows, side)
        self.w = [new(side, side) for _ in range(count)]
        self.a = [new(rank, side).requires_grad_(True) for _ in range(count)]
        self.b = [new(side, rank).requires_grad_(True) for _ in range(count)]
        self.peft = [peft_layer(w, a, b) for w, a, b in zip(self.w, self.a, self.b)]

    def one(self, i):
        i %= len(self.w)
        return self.x, self.w[i], self.a[i], self.b[i]


def eager(x, w, a, b):
    return F.linear(x, w) + SCALE * F.linear(F.linear(x, a), b)


def addmm(x, w, a, b):
    return torch.addmm(F.linear(x, w), F.linear(x, a), b.t(), alpha=SCALE)


def peft_layer(w, a, b):
    """PEFT's layer around a Linear with these tensors; None where PEFT is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    rank, (n, k) = a.shape[0], w.shape
    model = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=w.dtype, device=w.device))
    model[0].weight = torch.nn.Parameter(w, requires_grad=False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"]), model)
    layer = model[0]
    layer.lora_A["default"].weight = torch.nn.Parameter(a.detach())
    layer.lora_B["default"].weight = torch.nn.Parameter(b.detach())
    return layer


if triton:

    @triton.jit
    def fused_kernel(x, w, a, b, y, m, n, k, scale, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        """A block of y: along the depth x·Wᵀ and x·Aᵀ together, then the update from registers."""
        rows = tl.program_id(0) * M + tl.arange(0, M)
        cols = tl.program_id(1) * N + tl.arange(0, N)
        ranks, depth = tl.arange(0, R), tl.arange(0, K)
        sums, h = tl.zeros((M, N), tl.float32), tl.zeros((M, R), tl.float32)
        for d in range(0, k, K):
            left = tl.load(x + rows[:, None] * k + d + depth[None, :], mask=rows[:, None] < m, other=0.0)
            base = tl.load(w + cols[None, :] * k + d + depth[:, None])
            down = tl.load(a + ranks[None, :] * k + d + depth[:, None])
            sums = tl.dot(left, base, sums, input_precision="ieee")
            h = tl.dot(left, down, h, input_precision="ieee")
        up = tl.load(b + cols[None, :] * R + ranks[:, None])
        sums += scale * tl.dot(h.to(up.dtype), up, input_precision="ieee")
        tl.store(y + rows[:, None] * n + cols[None, :], sums.to(y.dtype.element_ty), mask=rows[:, None] < m)


def fused(x, w, a, b):
    """Rank at least 16, sides multiples of the blocks, as all shapes here are."""
    (m, k), n, rank = x.shape, w.shape[0], a.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    rows, cols, depth, warps = (128, 128, 64, 8) if m >= 128 else (16, 32, 256, 4)
    if x.dtype == torch.float32:
        rows, cols, depth, warps = (64, 64, 32, 4) if m >= 128 else (16, 32, 64, 4)
    grid = (triton.cdiv(m, rows), n // cols)
    fused_kernel[grid](x, w, a, b, y, m, n, k, SCALE, R=rank, M=rows, N=cols, K=depth, num_warps=warps, num_stages=3)
    return y


def forwards(layers, device):
    """Who makes y of layer i."""
    compiled = torch.compile(eager)
    all_ = {
        "eager": lambda i: eager(*layers.one(i)),
        "base": lambda i: F.linear(layers.x, layers.w[i % len(layers.w)]),
        "addmm": lambda i: addmm(*layers.one(i)),
        "compile": lambda i: compiled(*layers.one(i)),
    }
    if layers.peft[0] is not None:
        all_["peft"] = lambda i: layers.peft[i % len(layers.peft)](layers.x)
    if triton and device == "cuda" and layers.a[0].shape[0] >= 16:
        all_["triton"] = lambda i: fused(*layers.one(i))
    return all_


def without_graph(call):
    def run(i):
        with torch.no_grad():
            return call(i)

    return run


def with_backward(call, layers, name):
    def run(i):
        _, _, a, b = layers.one(i)
        if name == "peft":
            layer = layers.peft[i % len(layers.peft)]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return torch.autograd.grad(call(i), (layers.x, a, b), layers.dy)

    return run


def merge(layers, name):
    def run(i):
        _, w, a, b = layers.one(i)
        scale = 1e-3 if i % 2 == 0 else -1e-3
        with torch.no_grad():
            return torch.addmm(w, b, a, alpha=scale, out=w) if name == "addmm" else w.add_(scale * (b @ a))

    return run


def check(name, verb, got, layers):
    """Layer 0 against float64: within what the type's rounding explains, norm by norm; a rounding before each sum included."""
    x, w, a, b = (tensor.detach().double().requires_grad_(True) for tensor in layers.one(0))
    y = F.linear(x, w) if name == "base" else eager(x, w, a, b)
    want = [y] if verb == "lora_forward" else torch.autograd.grad(y, (x, a, b), layers.dy.double())
    limit = 8 * torch.finfo(layers.x.dtype).eps
    for ours, theirs in zip([got] if verb == "lora_forward" else got, want):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < limit, f"{name}, {verb}: relative error {error:.2e}, limit {limit:.2e}"


class OnGpu:
    """Calls in a graph if they can be captured, timed by events."""

    CALLS = 24

    def __init__(self, call):
        self.call = call
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.kept = [call(i) for i in range(self.CALLS)]
        except RuntimeError:
            self.graph = None
            torch.cuda.synchronize()

    def seconds(self):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self.graph:
            self.graph.replay()
        else:
            for i in range(self.CALLS):
                self.call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.CALLS


class OnCpu:
    def __init__(self, call):
        self.call, self.repeats = call, 1
        call(0)
        self.repeats = max(1, int(2e-3 / self.seconds()))

    def seconds(self):
        began = time.perf_counter()
        for i in range(self.repeats):
            self.call(i)
        return (time.perf_counter() - began) / self.repeats


def medians(runs, device, rounds):
    """Median seconds a call of each; every round runs everyone once. Who fails is named, and left out."""
    ready = {}
    for name, call in runs.items():
        try:
            ready[name] = (OnGpu if device == "cuda" else OnCpu)(call)
        except Exception as error:  # a compiler that is not there, memory that runs out
            print(f"not measured: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    samples = {name: [] for name in ready}
    for round_ in range(rounds):
        names = list(ready)
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(ready[name].seconds())
    return {name: statistics.median(times) for name, times in samples.items()}


def ceilings(device, dtype, rounds):
    """Bytes a second of a large copy, read and written; operations a second of a large product."""
    size, side = (1 << 30, 8192 if dtype == torch.bfloat16 else 4096) if device == "cuda" else (1 << 27, 512)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    x, w = (torch.rand((side, side), device=device).to(dtype) for _ in range(2))
    seconds = medians({"copy": lambda i: target.copy_(source), "product": lambda i: F.linear(x, w)}, device, rounds)
    return 2 * size / seconds["copy"], 2 * side**3 / seconds["product"]


def share(verb, rows, side, rank, dtype, seconds, limits):
    """Of the ceiling that binds."""
    w, adapter, activations = side * side, 2 * rank * side, 2 * rows * side
    products, elements = {
        "lora_forward": (rows * w + rows * adapter, w + adapter + activations),
        "lora_forward_backward": (2 * rows * w + 3 * rows * adapter, 2 * (w + adapter + activations)),
        "lora_merge": (w * rank, 2 * w + adapter),
    }[verb]
    memory, arithmetic = elements * dtype.itemsize / limits[0], 2 * products / limits[1]
    return (max(memory, arithmetic) / seconds, "copy" if memory > arithmetic else "product")


def measure(name, rows, side, args, dtype, limits):
    """One row a verb."""
    layers = Layers(rows, side, args.rank, DTYPES[dtype], args.device)
    rounds, all_ = 3 if args.quick else 15, forwards(layers, args.device)
    for verb in ("lora_forward", "lora_forward_backward", "lora_merge"):
        if verb != "lora_forward" and rows < 256:
            continue
        if verb == "lora_forward":
            runs = {who: without_graph(call) for who, call in all_.items()}
        elif verb == "lora_forward_backward":
            runs = {who: with_backward(call, layers, who) for who, call in all_.items() if who not in ("base", "triton")}
        else:
            runs = {who: merge(layers, who) for who in ("eager", "addmm")}
        if verb != "lora_merge":
            for who, run in list(runs.items()):
                try:
                    check(who, verb, run(0), layers)
                except AssertionError:
                    raise
                except Exception as error:
                    print(f"not measured: {who}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                    del runs[who]
        seconds = medians(runs, args.device, rounds)
        eagers = seconds.pop("eager")
        of_peak, peak = share(verb, rows, side, args.rank, DTYPES[dtype], eagers, limits)
        yield {
            "verb": verb,
            "backend": "pytorch",
            "dtype": dtype,
            "shape": name,
            "rank": args.rank,
            "threads": 0 if args.device == "cuda" else torch.get_num_threads(),
            "seconds": eagers,
            "peak_share": of_peak,
            "peak": peak,
            "rivals": seconds,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few rounds: for a look")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("not measured: PyTorch sees no GPU (--device cpu tries out what can run there, on smaller layers)")
    torch.backends.cuda.matmul.allow_tf32 = False

    on = torch.cuda.get_device_name() if args.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {on}; rivals: their time over eager's")
    rows = []
    for dtype in args.dtype:
        limits = ceilings(args.device, DTYPES[dtype], 3 if args.quick else 9)
        print(f"\n{dtype}: a copy moves {limits[0] / 1e9:.0f} GB/s, a large product {limits[1] / 1e9:.0f} GFLOP/s\n")
        print(f"| {'verb':21} | {'shape':18} | {'eager':>10} | {'ceiling':>8} | rivals |\n|{'-' * 23}|{'-' * 20}|{'-' * 12}|{'-' * 10}|---|")
        for name, (m, side) in (SHAPES if args.device == "cuda" else ON_A_CPU).items():
            if args.shape and name not in args.shape or dtype == "f32" and name == "huge":
                continue
            for row in measure(name, m, side, args, dtype, limits):
                rows.append(row)
                ratios = ", ".join(f"{who} {seconds / row['seconds']:.2f}×" for who, seconds in row["rivals"].items())
                cells = [f"{row['verb']:21}", f"{name} {m}x{side}x{side}".ljust(18), f"{1e6 * row['seconds']:7.1f} µs"]
                print("|", " | ".join(cells + [f"{100 * row['peak_share']:6.1f} %", ratios]), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
