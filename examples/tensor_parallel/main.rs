//! Two layers with adapters, cut over ranks (tensor parallelism): the same outputs and gradients as on one rank, with one all-reduce
//! a pass.
//!
//! `cargo run --release --example tensor_parallel`. The layers are in `mlp.rs`; the ranks are threads here, and any `Communicator`
//! takes their place.
#![allow(unreachable_pub, reason = "the modules are as public as they are in a crate of their own")]

mod mlp;

use std::thread;

use lowrank::distributed::{Communicator, SingleProcess, Threads};
use lowrank::random::Rng;
use lowrank::{Cpu, MatRef, Result};
use mlp::{Gradients, Layer, ParallelMlp};

/// Rows of the batch.
const M: usize = 32;
/// Inputs of the first layer.
const K: usize = 256;
/// Numbers between the layers.
const HIDDEN: usize = 1024;
/// Outputs of the second layer.
const N: usize = 256;
/// Rank of the updates.
const R: usize = 8;

fn main() -> Result<()> {
    let (whole, _) = step(&SingleProcess)?;
    for size in [2, 4] {
        let ranks = Threads::group(size).into_iter().map(|comm| thread::spawn(move || step(&comm)));
        for (rank, thread) in ranks.collect::<Vec<_>>().into_iter().enumerate() {
            let (summed, own) = thread.join().expect("a rank does not panic")?;
            let apart = whole.iter().zip(&summed).map(|(a, b)| difference(a, b)).fold(0.0, f32::max);
            println!(
                "rank {rank} of {size}: y, dx, dA1 and dB2 within {apart:.1e} of the largest number; {own} gradients of its own"
            );
        }
    }
    println!("all-reduced: {} bytes forward, {} backward", 4 * M * N, 4 * (M * K + R * K + N * R));
    Ok(())
}

/// A forward and a backward pass. Returns `y`, `dx`, `dA₁` and `dB₂`, which all ranks have, and the number of the gradients that only
/// this rank has.
fn step(comm: &impl Communicator) -> Result<([Vec<f32>; 4], usize)> {
    let (cpu, rng) = (Cpu::new()?.with_threads(1)?, &mut Rng::new(0));
    let mut numbers = |rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|_| rng.gaussian() as f32 / (cols as f32).sqrt()).collect()
    };
    // What the host framework holds. Here every rank has all of it, and uses its part; it may as well have read only its part.
    let [w1, a1, b1] = [numbers(HIDDEN, K), numbers(R, K), numbers(HIDDEN, R)];
    let [w2, a2, b2] = [numbers(N, HIDDEN), numbers(R, HIDDEN), numbers(N, R)];
    let [x, dy] = [numbers(M, K), numbers(M, N)];
    let matrix = MatRef::from_slice;
    let first = Layer { w: matrix(&w1, (HIDDEN, K))?, a: matrix(&a1, (R, K))?, b: matrix(&b1, (HIDDEN, R))?, scale: 2.0 };
    let second = Layer { w: matrix(&w2, (N, HIDDEN))?, a: matrix(&a2, (R, HIDDEN))?, b: matrix(&b2, (N, R))?, scale: 2.0 };

    let mlp = ParallelMlp::new(first, second, comm)?;
    let x = matrix(&x, (M, K))?;
    let forward = mlp.forward(&cpu, x)?;
    let Gradients { dx, da1, db1, da2, db2 } = mlp.backward(&cpu, x, &forward, matrix(&dy, (M, N))?)?;
    Ok(([forward.y, dx, da1, db2], db1.len() + da2.len()))
}

/// The largest difference, relative to the largest number.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}
