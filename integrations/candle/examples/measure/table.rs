//! Times of interleaved rounds, and what follows from them.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// What is counted.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Clock {
    /// Time that goes by.
    Wall,
    /// Time that processors spend on this process, on all its threads. Linux tells it.
    Cpu,
}

impl Clock {
    /// Seconds since some moment.
    pub(crate) fn now(self) -> std::io::Result<f64> {
        if self == Clock::Wall {
            return Ok(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        }
        let mut nanoseconds = 0.0;
        for thread in std::fs::read_dir("/proc/self/task")? {
            let spent = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            nanoseconds += spent.split(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(f64::NAN);
        }
        Ok(nanoseconds * 1e-9)
    }
}

/// Seconds of several contestants, round by round.
pub(crate) struct Table {
    names: Vec<String>,
    rounds: Vec<Vec<f64>>,
}

impl Table {
    pub(crate) fn new(names: Vec<String>) -> Self {
        Self { names, rounds: Vec::new() }
    }

    /// A round: the seconds of each.
    pub(crate) fn add(&mut self, seconds: Vec<f64>) {
        self.rounds.push(seconds);
    }

    fn column(&self, at: usize, each: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let mut column: Vec<f64> = self.rounds.iter().map(|round| each(round) * round[at]).collect();
        column.sort_by(f64::total_cmp);
        column
    }
}

/// The least, and the median of sorted numbers.
fn least_and_median(sorted: &[f64]) -> [f64; 2] {
    [sorted.first(), sorted.get(sorted.len() / 2)].map(|number| number.copied().unwrap_or(f64::NAN))
}

impl fmt::Display for Table {
    /// Of each the least and the median; and over the first the ratio of the least, and the median of the rounds' ratios.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = least_and_median(&self.column(0, |_| 1.0))[0];
        writeln!(
            f,
            "| who | least, ms | median, ms | least over least of {} | median ratio |\n|---|---|---|---|---|",
            self.names[0]
        )?;
        for (at, name) in self.names.iter().enumerate() {
            let [least, median] = least_and_median(&self.column(at, |_| 1.0));
            let ratio = least_and_median(&self.column(at, |round| 1.0 / round[0]))[1];
            writeln!(f, "| {name} | {:.1} | {:.1} | {:.3} | {ratio:.3} |", least * 1e3, median * 1e3, least / first)?;
        }
        Ok(())
    }
}
