//! Interleaved runs: what slows the machine for a moment slows everyone.

use std::time::{Duration, Instant};

/// How long to measure.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Rounds at least.
    pub rounds: usize,
    /// Then rounds until this much time is spent.
    pub time: Duration,
}

impl Effort {
    /// For figures worth keeping.
    pub const FULL: Self = Self { rounds: 9, time: Duration::from_secs(3) };
    /// For a look.
    pub const QUICK: Self = Self { rounds: 3, time: Duration::from_millis(300) };
}

/// A sample is at least this long, so that the clock and a thread that wakes up late do not count.
const SAMPLE: Duration = Duration::from_millis(2);

/// Seconds that work takes until it is done.
pub type Clock<'a> = dyn Fn(&mut dyn FnMut()) -> f64 + 'a;

/// Median seconds a run, of each. Every round runs everyone once, and begins with another one.
pub fn medians(clock: &Clock<'_>, runs: &mut [Box<dyn FnMut() + '_>], effort: Effort) -> Vec<f64> {
    let repeats: Vec<u32> =
        runs.iter_mut().map(|run| (SAMPLE.as_secs_f64() / timed(clock, run, 1)).clamp(1.0, 10_000.0) as u32).collect();
    let mut samples = vec![Vec::new(); runs.len()];
    let began = Instant::now();
    let mut round = 0;
    while round < effort.rounds || began.elapsed() < effort.time {
        for turn in 0..runs.len() {
            let who = (turn + round) % runs.len();
            samples[who].push(timed(clock, &mut runs[who], repeats[who]));
        }
        round += 1;
    }
    samples.into_iter().map(median).collect()
}

/// Seconds a run.
fn timed(clock: &Clock<'_>, run: &mut dyn FnMut(), repeats: u32) -> f64 {
    let seconds = clock(&mut || (0..repeats).for_each(|_| run()));
    (seconds / f64::from(repeats)).max(1e-9)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
