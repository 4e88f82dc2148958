//! What the machine can do, measured in the same run: multiply-adds, reading, copying. Shares of a peak refer to these.

mod amx;
mod fma;
mod memory;
#[cfg(feature = "webgpu")]
mod webgpu;

use std::sync::Barrier;
use std::time::Instant;

/// Units a second, all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Of the CPU.
    pub threads: Option<usize>,
    /// f32 multiplications and additions in registers, FLOP/s.
    pub fma: f64,
    /// bf16 products of AMX tiles, FLOP/s.
    pub amx: Option<f64>,
    /// Bytes read from memory that no cache holds.
    pub read: f64,
    /// Bytes read plus bytes written: the faster of copying, and of changing memory in place.
    pub copy: f64,
}

/// What bounds a verb, and how close it came.
pub struct Share {
    pub peak: &'static str,
    pub share: f64,
}

impl Peaks {
    pub fn measure(threads: usize) -> Self {
        let amx = amx::flop_rate(threads);
        let (fma, [read, copy]) = (fma::flop_rate(threads), memory::rates(threads));
        Self { threads: Some(threads), fma, amx, read, copy }
    }

    /// The share of whichever peak takes longer for that much work.
    pub fn share(&self, flop: f64, bytes: f64, writes: bool, narrow: bool, seconds: f64) -> Share {
        let compute = match self.amx {
            Some(amx) if narrow => ("AMX", flop / amx),
            _ => ("FMA", flop / self.fma),
        };
        let memory = if writes { ("copy", bytes / self.copy) } else { ("read", bytes / self.read) };
        let (peak, least) = if compute.1 >= memory.1 { compute } else { memory };
        Share { peak, share: least / seconds }
    }
}

/// The best of `tries` rates of so many threads, each of which does `work(thread)` units: a peak is what the machine can do when
/// nothing else runs.
fn best_rate(tries: usize, threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let once = || {
        let start = Barrier::new(threads);
        let run = |thread| {
            start.wait();
            let began = Instant::now();
            let done = work(thread);
            (done, began.elapsed().as_secs_f64())
        };
        let results: Vec<(f64, f64)> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
            started.into_iter().map(|thread| thread.join().expect("a peak's thread")).collect()
        });
        let longest = results.iter().map(|result| result.1).fold(0.0, f64::max);
        results.iter().map(|result| result.0).sum::<f64>() / longest
    };
    (0..tries).map(|_| once()).fold(0.0, f64::max)
}
