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

/// What the rounds say of a contender.
#[derive(Clone, Copy)]
pub struct Timed {
    /// A run, the median.
    pub seconds: f64,
    /// Over the first contender, the median of the rounds' ratios: what slows the machine for longer than a round does not count.
    pub ratio: f64,
}

/// Times everyone. Every round runs everyone once, and begins with another one.
///
/// `least` is asked right before the first contender, each time: how many seconds its work takes at least, as the machine is at that
/// moment. Also returns the median of what that is of the time it took.
pub fn rounds(
    clock: &Clock<'_>,
    runs: &mut [Box<dyn FnMut() + '_>],
    least: &dyn Fn() -> f64,
    effort: Effort,
) -> (Vec<Timed>, f64) {
    let repeats: Vec<u32> =
        runs.iter_mut().map(|run| (SAMPLE.as_secs_f64() / timed(clock, run, 1)).clamp(1.0, 10_000.0) as u32).collect();
    let (mut samples, mut shares) = (vec![Vec::new(); runs.len()], Vec::new());
    let began = Instant::now();
    let mut round = 0;
    while round < effort.rounds || began.elapsed() < effort.time {
        for turn in 0..runs.len() {
            let who = (turn + round) % runs.len();
            let floor = if who == 0 { Some(least()) } else { None };
            let seconds = timed(clock, &mut runs[who], repeats[who]);
            shares.extend(floor.map(|floor| floor / seconds));
            samples[who].push(seconds);
        }
        round += 1;
    }
    let ratio = |theirs: &[f64]| median(theirs.iter().zip(&samples[0]).map(|(theirs, ours)| theirs / ours).collect());
    let each = samples.iter().map(|seconds| Timed { seconds: median(seconds.clone()), ratio: ratio(seconds) }).collect();
    (each, median(shares))
}

/// Seconds a run.
fn timed(clock: &Clock<'_>, run: &mut dyn FnMut(), repeats: u32) -> f64 {
    let seconds = clock(&mut || (0..repeats).for_each(|_| run()));
    (seconds / f64::from(repeats)).max(1e-9)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_unstable_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Two contenders, the second twice as slow, on a machine that halves its speed after three of nine rounds.
    #[test]
    fn ratios_and_shares_are_of_the_same_moment() {
        let (asked, work) = (Cell::new(0), Cell::new(0.0));
        let speed = || if asked.get() < 2 + 3 * 2 { 2.0 } else { 1.0 };
        let clock = |run: &mut dyn FnMut()| {
            run();
            let seconds = work.get() / speed();
            asked.set(asked.get() + 1);
            seconds
        };
        let mut runs: Vec<Box<dyn FnMut()>> = vec![Box::new(|| work.set(1.0)), Box::new(|| work.set(2.0))];
        let (timed, share) = rounds(&clock, &mut runs, &|| 0.5 / speed(), Effort { rounds: 9, time: Duration::ZERO });
        assert_eq!((timed[0].seconds, timed[1].seconds), (1.0, 2.0));
        assert_eq!((timed[0].ratio, timed[1].ratio, share), (1.0, 2.0, 0.5));
    }
}
