//! What the machine can do, measured in the same run: multiply-adds, reading, copying. Shares of a peak refer to these.

mod amx;
mod fma;
mod memory;
#[cfg(feature = "webgpu")]
mod webgpu;

use std::sync::Barrier;
use std::time::Instant;

/// Tries of a peak, of about a millisecond each; and of what the machine has of it right now.
const TRIES: usize = 100;
const FEW_TRIES: usize = 3;

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

/// What there is a peak of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Peak {
    Fma,
    Amx,
    Read,
    Copy,
}

impl Peak {
    pub fn name(self) -> &'static str {
        match self {
            Peak::Fma => "FMA",
            Peak::Amx => "AMX",
            Peak::Read => "read",
            Peak::Copy => "copy",
        }
    }
}

/// What a verb needs most of: so much of it, in units of the peak.
pub struct Bound {
    pub peak: Peak,
    work: f64,
}

/// What bounds a verb, and how close it came.
pub struct Share {
    pub peak: &'static str,
    pub share: f64,
}

impl Peaks {
    pub fn measure(threads: usize) -> Self {
        let amx = amx::flop_rate(TRIES, threads);
        let (fma, [read, copy]) = (fma::flop_rate(TRIES, threads), memory::rates(threads));
        Self { threads: Some(threads), fma, amx, read, copy }
    }

    /// Whichever peak takes longer for that much work; AMX is for `bf16` alone.
    pub fn bound(&self, flop: f64, bytes: f64, writes: bool, bf16: bool) -> Bound {
        let compute = Bound { peak: if bf16 && self.amx.is_some() { Peak::Amx } else { Peak::Fma }, work: flop };
        let memory = Bound { peak: if writes { Peak::Copy } else { Peak::Read }, work: bytes };
        let best = |bound: &Bound| bound.work / self.best(bound.peak);
        if best(&compute) >= best(&memory) { compute } else { memory }
    }

    fn best(&self, peak: Peak) -> f64 {
        match peak {
            Peak::Fma => self.fma,
            Peak::Amx => self.amx.expect("a bound is a peak that is there"),
            Peak::Read => self.read,
            Peak::Copy => self.copy,
        }
    }

    /// As the machine is at this moment: another tenant of the core takes half of its ports for minutes at a time. The memory's
    /// rates are not asked again: that would empty the caches before a run.
    fn now(&self, peak: Peak) -> f64 {
        match (peak, self.threads) {
            (Peak::Fma, Some(threads)) => fma::flop_rate(FEW_TRIES, threads),
            (Peak::Amx, Some(threads)) => amx::flop_rate(FEW_TRIES, threads).unwrap_or(f64::NAN),
            _ => self.best(peak),
        }
    }
}

impl Bound {
    /// How long that takes at least, as the machine is at this moment.
    pub fn seconds(&self, peaks: &Peaks) -> f64 {
        self.work / peaks.now(self.peak)
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
