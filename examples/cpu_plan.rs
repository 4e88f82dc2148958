//! Prints the plan of the CPU backend for this machine, and measures it against the plans for other cache sizes.
//!
//! ```text
//! cargo run --release --example cpu_plan
//! ```
//!
//! One thread, f32; minimum and median of interleaved runs, each in a process of its own with `LOWRANK_CACHES` set. If another row is
//! faster by more than noise, set `LOWRANK_CACHES`, and please report it.

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use lowrank::op::{LinearBackward, LinearForward};
use lowrank::random::Rng;
use lowrank::{Cpu, Tensor};

/// `m`, `k` and `n`.
const SHAPES: [[usize; 3]; 2] = [[1024, 1024, 1024], [512, 4096, 4096]];
/// Other cache sizes to try: L1, L2, L3.
const CACHES: [&str; 6] = ["16K,256K,32M", "16K,1M,32M", "32K,256K,32M", "32K,512K,32M", "32K,1M,32M", "48K,2M,32M"];
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some("one") {
        return measure();
    }
    let cpu = Cpu::<f32>::new()?;
    for [m, k, n] in SHAPES {
        println!("{m}×{k}×{n}: {}", cpu.explain(m, k, n));
    }
    println!("\n| caches | shape | forward: minimum, median | dx: minimum, median |\n|---|---|---|---|");
    let all: Vec<Option<&str>> = std::iter::once(None).chain(CACHES.map(Some)).collect();
    let mut times = vec![vec![Vec::new(); 2 * SHAPES.len()]; all.len()];
    for _ in 0..ROUNDS {
        for (caches, times) in all.iter().zip(&mut times) {
            let mut child = Command::new(std::env::current_exe()?);
            caches.map(|caches| child.env("LOWRANK_CACHES", caches));
            let text = String::from_utf8(child.arg("one").output()?.stdout)?;
            for (time, times) in text.split_whitespace().zip(times) {
                times.push(time.parse::<f64>()?);
            }
        }
    }
    for (caches, times) in all.iter().zip(&mut times) {
        for ([m, k, n], times) in SHAPES.iter().zip(times.chunks_mut(2)) {
            let cells: Vec<String> = times.iter_mut().map(|times| summary(times)).collect();
            println!("| {} | {m}×{k}×{n} | {} |", caches.unwrap_or("as found"), cells.join(" | "));
        }
    }
    Ok(())
}

/// The minimum and the median, in milliseconds.
fn summary(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    format!("{:.1}, {:.1} ms", 1e3 * times[0], 1e3 * times[times.len() / 2])
}

/// Prints the seconds of a forward pass and of `dx` for each shape; each the minimum of three runs.
fn measure() -> Result<(), Box<dyn Error>> {
    let cpu = Cpu::<f32>::new()?.with_threads(1)?;
    let mut rng = Rng::new(1);
    for [m, k, n] in SHAPES {
        let mut random = |rows, cols| {
            let numbers: Vec<f32> = (0..rows * cols).map(|_| rng.unit() as f32 - 0.5).collect();
            Tensor::from_slice(&cpu, (rows, cols), &numbers)
        };
        let (x, w, dy) = (random(m, k)?, random(n, k)?, random(m, n)?);
        let (mut y, mut dx) = (Tensor::zeros(&cpu, (m, n))?, Tensor::zeros(&cpu, (m, k))?);
        let forward = minimum(|| LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu))?;
        let (x, w) = (None, Some((&w).into()));
        let backward =
            minimum(|| LinearBackward { x, w, dy: dy.view(), dx: Some((&mut dx).into()), dw: None, dbias: None }.run(&cpu))?;
        println!("{forward} {backward}");
    }
    Ok(())
}

fn minimum(mut run: impl FnMut() -> lowrank::Result<()>) -> lowrank::Result<f64> {
    let mut minimum = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        run()?;
        minimum = minimum.min(start.elapsed().as_secs_f64());
    }
    Ok(minimum)
}
