#!/usr/bin/env python3
"""The rival of examples/mnist_lora: the same training step in PyTorch, milliseconds a step.

The procedure of the pre-training, batch for batch: a ReLU MLP 784-1000-2000-10 with biases, batches of 10 shuffled images,
mean cross-entropy, Adam 1e-3. Measured twice:

    as written   what people write: default Adam, default threads, a DataLoader
    at its best  Adam(fused=True), batches gathered from one tensor, the best number of threads

    python benches/rivals/mnist_step.py [--data DIR] [--steps N] [--repeats N] [--json PATH]

Without --data it takes random images of the same shape: the time of a step does not depend on what they show.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import struct
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, SIZES = 10, (784, 1000, 2000, 10)


def read_idx(folder, name):
    """The bytes of an IDX file, as it is or gzipped, in the shape that its header says."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise SystemExit(f"{folder / name}: is not there, nor with .gz behind its name")
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    zero, kind, dimensions = struct.unpack(">HBB", content[:4])
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    if (zero, kind) != (0, 8):
        raise SystemExit(f"{path}: is not an IDX file of bytes")
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).reshape(shape)


def load(folder):
    """Normalised images and labels: MNIST's, or random ones."""
    if folder is None:
        return torch.randn(60_000, SIZES[0]), torch.randint(0, SIZES[-1], (60_000,))
    images, labels = (read_idx(folder, f"train-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    return (images.flatten(1).float() / 255 - 0.1307) / 0.3081, labels.long()


def model():
    k, hidden1, hidden2, n = SIZES
    return nn.Sequential(nn.Linear(k, hidden1), nn.ReLU(), nn.Linear(hidden1, hidden2), nn.ReLU(), nn.Linear(hidden2, n))


def loaded(images, labels):
    """Batches as people load them: for ever, in a new order every epoch."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
    while True:
        yield from loader


def gathered(images, labels):
    """The same without collating single images: one gather a batch."""
    while True:
        for rows in torch.randperm(len(images)).split(BATCH):
            yield images[rows], labels[rows]


def seconds_a_step(batches, steps, repeats, **adam):
    """The mean of so many steps, for each repeat after a warm-up; and the last loss, as a sign of learning."""
    torch.manual_seed(0)
    net, loss_of = model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **adam)
    times, loss = [], None
    for repeat in range(repeats + 1):
        count = max(20, steps // 5) if repeat == 0 else steps
        began = time.perf_counter()
        for _ in range(count):
            x, y = next(batches)
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
        times.append((time.perf_counter() - began) / count)
    return times[1:], loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MNIST_DIR"), help="folder with MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=200, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    images, labels = load(Path(args.data) if args.data else None)

    default_threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    counts = sorted({1, 2, cores // 2, cores, default_threads} - {0})
    ways = [("as written", default_threads, loaded, {})]
    ways += [("fused", threads, gathered, {"fused": True}) for threads in counts if threads <= cores]
    rows = []
    print(f"torch {torch.__version__}, {platform.machine()}, {cores} cores; {'MNIST' if args.data else 'random images'}")
    for variant, threads, batches, adam in ways:
        torch.set_num_threads(threads)
        times, loss = seconds_a_step(batches(images, labels), args.steps, args.repeats, **adam)
        row = {
            "verb": "mnist_step",
            "backend": "pytorch",
            "variant": variant,
            "dtype": "f32",
            "shape": "x".join(map(str, (BATCH, *SIZES))),
            "threads": threads,
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "last_loss": loss,
            "torch": torch.__version__,
        }
        rows.append(row)
        low, middle, high = (1e3 * row[key] for key in ("fastest", "seconds", "slowest"))
        print(f"{variant:11} {threads:3} threads  {middle:8.2f} ms a step  ({low:.2f} to {high:.2f})")
    best = min(rows[1:], key=lambda row: row["seconds"])
    best["best"] = True
    print(f"at its best: {1e3 * best['seconds']:.2f} ms a step, {best['threads']} threads, fused Adam")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
