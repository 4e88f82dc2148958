//! The kernels for Hopper that ship, on the emulated device: every edge of their tiles, and seeded bugs that must be caught.
#![cfg(feature = "cuda")]

mod support;

use lowrank::op::Dropout;
use lowrank::{Float, bf16, f16};
use support::bounds::{assert_exact, assert_within};
use support::data::{Dims, mask, random, whole};
use support::emulator::Emulator;
use support::oracle::Lora;
use support::suite::{run_linear, run_lora};

/// Both sides of the edges of tiles of 128 rows and of 128 or 256 columns, of stages 64 deep and of rings of them, of chunks of
/// 16 ranks; more chunks than steps; more tiles than multiprocessors. The last have wide tiles.
const SHAPES: [Dims; 9] = [
    Dims { m: 1, k: 8, n: 8, r: 1 },
    Dims { m: 127, k: 56, n: 136, r: 17 },
    Dims { m: 64, k: 64, n: 64, r: 16 },
    Dims { m: 129, k: 72, n: 120, r: 15 },
    Dims { m: 257, k: 136, n: 8, r: 33 },
    Dims { m: 65, k: 392, n: 24, r: 3 },
    Dims { m: 20, k: 128, n: 1032, r: 2 },
    Dims { m: 130, k: 776, n: 520, r: 5 },
    Dims { m: 260, k: 264, n: 784, r: 20 },
];

fn products_are_exact_on_whole_numbers<E: Float>() {
    let backend = Emulator::hopper_backend::<E>();
    for (seed, dims) in SHAPES.into_iter().enumerate() {
        let start = std::time::Instant::now();
        let layer = whole(dims, seed as u64);
        let (got, want) = (run_lora(&backend, &layer, None), layer.run());
        assert_exact(&format!("{dims:?} y"), &got.y, &want.y);
        assert_exact(&format!("{dims:?} dx"), &got.dx, &want.dx);
        let (y, dx, ..) = run_linear(&backend, &layer);
        assert_exact(&format!("{dims:?} y"), &y, &(&layer.x * &layer.w.t()).plus_row(layer.bias.as_ref().unwrap()));
        assert_exact(&format!("{dims:?} dx"), &dx, &(&layer.dy * &layer.w));
        eprintln!("{dims:?} {:?}", start.elapsed());
    }
}

#[test]
fn products_are_exact_on_whole_numbers_f16() {
    products_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn products_are_exact_on_whole_numbers_bf16() {
    products_are_exact_on_whole_numbers::<bf16>();
}
