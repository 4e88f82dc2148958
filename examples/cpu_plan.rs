//! How the CPU backend cuts products on this machine, beside what it would do with other caches, each measured.
//!
//! ```text
//! cargo run --release --example cpu_plan
//! ```
//!
//! One thread, f32; the least and the median of interleaved runs, each in a process of its own with `LOWRANK_CACHES` set. Where
//! another row is faster by more than noise, `LOWRANK_CACHES` is worth setting, and a word to us.

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use lowrank::op::{LinearBackward, LinearForward};
use lowrank::random::Rng;
use lowrank::{Cpu, Tensor};

/// `m`, `k` and `n`.
const SHAPES: [[usize; 3]; 2] = [[1024, 1024, 1024], [512, 4096, 4096]];
/// What else the caches could be.
const CACHES: [&str; 6] = ["16K,256K,32M", "16K,1M,32M", "32K,256K,32M", "32K,512K,32M", "32K,1M,32M", "48K,2M,32M"];
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some("one") {
        return one();
    }
    let cpu = Cpu::<f32>::new()?;
    for [m, k, n] in SHAPES {
        println!("{m}×{k}×{n}: {}", cpu.explain(m, k, n));
    }
    println!("\n| caches | shape | forward: least, median | dx: least, median |\n|---|---|---|---|");
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
            let cells: Vec<String> = times.iter_mut().map(|times| of(times)).collect();
            println!("| {} | {m}×{k}×{n} | {} |", caches.unwrap_or("as found"), cells.join(" | "));
        }
    }
    Ok(())
}

/// The least and the median, in milliseconds.
fn of(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    format!("{:.1}, {:.1} ms", 1e3 * times[0], 1e3 * times[times.len() / 2])
}

/// Seconds of a forward and of `dx`, for each shape; each the least of three.
fn one() -> Result<(), Box<dyn Error>> {
    let cpu = Cpu::<f32>::new()?.with_threads(1)?;
    let mut rng = Rng::new(1);
    for [m, k, n] in SHAPES {
        let mut random = |rows, cols| {
            let numbers: Vec<f32> = (0..rows * cols).map(|_| rng.unit() as f32 - 0.5).collect();
            Tensor::from_slice(&cpu, (rows, cols), &numbers)
        };
        let (x, w, dy) = (random(m, k)?, random(n, k)?, random(m, n)?);
        let (mut y, mut dx) = (Tensor::zeros(&cpu, (m, n))?, Tensor::zeros(&cpu, (m, k))?);
        let forward = least(|| LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu))?;
        let (x, w) = (None, Some((&w).into()));
        let backward =
            least(|| LinearBackward { x, w, dy: dy.view(), dx: Some((&mut dx).into()), dw: None, dbias: None }.run(&cpu))?;
        println!("{forward} {backward}");
    }
    Ok(())
}

fn least(mut run: impl FnMut() -> lowrank::Result<()>) -> lowrank::Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        let began = Instant::now();
        run()?;
        least = least.min(began.elapsed().as_secs_f64());
    }
    Ok(least)
}
