"""Compiles matrix products with Triton for GPUs that are not here: PTX for scripts/check-interpreter.

    python3 scripts/triton_kernels.py FOLDER [part of a name ..]

Writes FOLDER/NAME.ptx, and FOLDER/kernels.json, which says what each kernel computes and how it is launched. Needs triton (3.9.0)
and nothing else: no torch, no GPU. A is M×K, B is K×N, C is M×N, rows of C one after another; `at` and `bt` say that A and B are
stored transposed. A name says the GPU, the elements, the sides, the tile and the warps.
"""

import itertools
import json
import os
import pathlib
import re
import sys

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # no paths of this machine
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default, which Triton 3.10 changes

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, LDA: tl.constexpr, LDB: tl.constexpr, AT: tl.constexpr, BT: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOUBLED: tl.constexpr, MASKED: tl.constexpr):
    """C = A·B, or 2·A·B with A doubled in registers on its way into the product."""
    tiles = tl.cdiv(N, BN)
    i = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    j = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    at_a = a + (d[None, :] * LDA + i[:, None] if AT else i[:, None] * LDA + d[None, :])
    at_b = b + (j[None, :] * LDB + d[:, None] if BT else d[:, None] * LDB + j[None, :])
    sums = tl.zeros((BM, BN), tl.float32)
    for depth in range(0, K, BK):
        if MASKED:
            left = tl.load(at_a, mask=(i[:, None] < M) & (d[None, :] < K - depth), other=0.0)
            right = tl.load(at_b, mask=(d[:, None] < K - depth) & (j[None, :] < N), other=0.0)
        else:
            left = tl.load(at_a)
            right = tl.load(at_b)
        if DOUBLED:
            left = (left + left).to(left.dtype)
        sums = tl.dot(left, right, sums, input_precision="tf32")
        at_a += BK * (LDA if AT else 1)
        at_b += BK * (1 if BT else LDB)
    at_c = c + i[:, None] * N + j[None, :]
    if MASKED:
        tl.store(at_c, sums.to(c.dtype.element_ty), mask=(i[:, None] < M) & (j[None, :] < N))
    else:
        tl.store(at_c, sums.to(c.dtype.element_ty))


@triton.jit
def product_in_boxes(a, b, c, K, N: tl.constexpr, AT: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                     BK: tl.constexpr):
    """C = A·B, all three through maps of tensors."""
    tiles = N // BN
    i = tl.program_id(0) // tiles * BM
    j = tl.program_id(0) % tiles * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for depth in range(0, K, BK):
        left = a.load([depth, i]).T if AT else a.load([i, depth])
        right = b.load([j, depth]).T if BT else b.load([depth, j])
        sums = tl.dot(left, right, sums)
    c.store([i, j], sums.to(c.dtype))


@triton.jit
def copy_of_boxes(a, c, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """C = A, loaded in boxes and stored through pointers."""
    i = tl.program_id(0) // (N // BN) * BM
    j = tl.program_id(0) % (N // BN) * BN
    box = a.load([i, j])
    tl.store(c + (i + tl.arange(0, BM))[:, None] * N + (j + tl.arange(0, BN))[None, :], box)


@triton.jit
def chain(a, b, e, c, K: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    """C = (A·B)·E for E N×N: the sums of the first product are the left side of the second, and stay in registers."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.arange(0, N)
    d = tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + d[None, :])
    right = tl.load(b + (j[None, :] * K + d[:, None] if BT else d[:, None] * N + j[None, :]))
    last = tl.load(e + j[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(tl.dot(left, right).to(left.dtype), last))


def compiled(function, gpu, types, constants, warps, stages):
    """The PTX, and what it needs to be launched."""
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*" or name == "K" in types}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=warps, num_stages=stages)
    result = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    ptx = result.asm["ptx"]
    boxes = [meta["block_size"] for meta in result.metadata.tensordesc_meta or []]
    assert all(meta["swizzle"] == 3 and meta["elem_size"] == 2 for meta in result.metadata.tensordesc_meta or [])
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    return ptx, dict(entry=function.__name__, threads=threads, shared=result.metadata.shared, boxes=boxes)


def pointers(gpu, element, out, m, n, k, tile, at, bt, warps, stages, doubled=False, masked=False):
    bm, bn, bk = tile
    constants = dict(M=m, N=n, LDA=m if at else k, LDB=k if bt else n, AT=at, BT=bt, BM=bm, BN=bn, BK=bk, DOUBLED=doubled, MASKED=masked)
    types = dict(a="*" + element, b="*" + element, c="*" + out, K="i32")
    shape = dict(kind="product", element=element, out=out, m=m, n=n, k=k, tile=[bm, bn], at=at, bt=bt, doubled=doubled)
    return shape, lambda: compiled(product, gpu, types, constants, warps, stages)


def boxes(element, m, n, k, tile, at, bt, warps, stages):
    bm, bn, bk = tile
    box = lambda rows, cols: f"tensordesc<{element}[{rows},{cols}]>"
    types = dict(a=box(bk, bm) if at else box(bm, bk), b=box(bn, bk) if bt else box(bk, bn), c=box(bm, bn), K="i32")
    constants = dict(N=n, AT=at, BT=bt, BM=bm, BN=bn, BK=bk)
    shape = dict(kind="boxes", element=element, out=element, m=m, n=n, k=k, tile=[bm, bn], at=at, bt=bt, doubled=False)
    return shape, lambda: compiled(product_in_boxes, 90, types, constants, warps, stages)


def copy(element, m, n, tile):
    types = dict(a=f"tensordesc<{element}[{tile[0]},{tile[1]}]>", c="*" + element)
    shape = dict(kind="copy", element=element, out=element, m=m, n=n, k=n, tile=tile, at=False, bt=False, doubled=False)
    return shape, lambda: compiled(copy_of_boxes, 90, types, dict(N=n, BM=tile[0], BN=tile[1]), 4, 1)


def chained(gpu, element, m, n, k, bm, bt):
    types = dict(a="*" + element, b="*" + element, e="*" + element, c="*fp32")
    shape = dict(kind="chain", element=element, out="fp32", m=m, n=n, k=k, tile=[bm, n], at=False, bt=bt, doubled=False)
    return shape, lambda: compiled(chain, gpu, types, dict(K=k, N=n, BT=bt, BM=bm), 4, 1)


def jobs():
    """Every kernel: its name, what it computes, and how to compile it."""
    sides = list(itertools.product((False, True), repeat=2))
    tiles = [(64, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)]
    for element, (at, bt) in itertools.product(("bf16", "fp16"), sides):
        name = f"{element}_a{'t' if at else 'n'}_b{'t' if bt else 'n'}"
        yield f"sm80_{name}_64x64x32", *pointers(80, element, element, 128, 128, 128, (64, 64, 32), at, bt, 4, 3)
        for m, n in ((112, 208), (208, 176)):
            shape = (m, n, 144 if m == 112 else 208)
            yield f"masked80_{name}_{m}x{n}", *pointers(80, element, element, *shape, (64, 64, 32), at, bt, 4, 3, masked=True)
        for bm, bn, warps in tiles:
            m, n, stages = 2 * bm, 256 if bn > 64 else 128, 2 if bn == 256 else 3
            tile, name_ = (bm, bn, 64), f"{name}_{bm}x{bn}x64_w{warps}"
            yield f"sm90_{name_}", *pointers(90, element, element, m, n, 192, tile, at, bt, warps, stages)
            yield f"tma90_{name_}", *boxes(element, m, n, 192, tile, at, bt, warps, stages)
            if not at:
                yield f"sm90reg_{name_}", *pointers(90, element, element, 128, n, 192, tile, at, bt, warps, 2, doubled=True)
    for (bm, bn, warps), bt in itertools.product(tiles, (False, True)):
        n, name = 256 if bn > 64 else 128, f"an_b{'t' if bt else 'n'}_{bm}x{bn}"
        yield f"sm90_tf32_{name}x32_w{warps}", *pointers(90, "fp32", "fp32", 128, n, 96, (bm, bn, 32), False, bt, warps, 2)
        yield f"sm90reg_tf32_{name}x16_w{warps}", *pointers(90, "fp32", "fp32", 128, n, 96, (bm, bn, 16), False, bt, warps, 2, doubled=True)
    for element, bt in itertools.product(("bf16", "fp16"), (False, True)):
        for gpu in (80, 90):
            yield f"chain{gpu}_{element}_b{'t' if bt else 'n'}", *chained(gpu, element, 128, 64, 64, 64, bt)
    for element in ("bf16", "fp16"):
        yield f"copy90_{element}_64x64", *copy(element, 128, 128, [64, 64])
        yield f"copy90_{element}_128x128", *copy(element, 256, 256, [128, 128])


# What ptx-interpreter/fixtures holds: they suffice to tell every wrong reading that third_party.rs knows.
FIXTURES = [
    "sm80_bf16_an_bt_64x64x32",
    "masked80_bf16_an_bn_112x208",
    "chain80_bf16_bt",
    "copy90_bf16_128x128",
    "sm90_bf16_an_bt_128x256x64_w8",
    "sm90_bf16_an_bn_128x256x64_w8",
    "sm90_bf16_at_bn_128x128x64_w8",
    "sm90reg_bf16_an_bn_128x128x64_w8",
    "tma90_bf16_an_bn_128x128x64_w8",
    "tma90_bf16_an_bt_128x256x64_w8",
    "sm90reg_tf32_an_bt_128x128x16_w8",
    "sm90reg_tf32_an_bt_128x256x16_w8",
]


def main(folder, *parts):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kernels = []
    for name, shape, job in jobs():
        if name not in FIXTURES if parts == ("--fixtures",) else parts and not any(part in name for part in parts):
            continue
        ptx, launch = job()
        (folder / f"{name}.ptx").write_text(ptx)
        kernels.append(json.dumps(dict(name=name, **shape, **launch)))
        print(name, flush=True)
    (folder / "kernels.json").write_text("[\n" + ",\n".join(kernels) + "\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
