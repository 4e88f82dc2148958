//! Progress: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::experiment::Progress;

/// The interval between lines if there is no terminal.
const PLAIN: Duration = Duration::from_secs(10);

/// A progress bar for a download.
pub fn download(name: &str, bytes: Option<u64>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("downloading {name}");
    }
    let bar = bytes.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    bar.with_style(style("{prefix} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}")).with_prefix(name.to_string())
}

/// Shows the progress of training.
pub struct Watch {
    bar: Option<ProgressBar>,
    phase: &'static str,
    printed: Instant,
}

impl Watch {
    /// A watch that has shown nothing yet.
    pub fn new() -> Self {
        Self { bar: None, phase: "", printed: Instant::now() }
    }

    /// Shows the progress of a phase.
    pub fn show(&mut self, at: &Progress) {
        if self.phase != at.phase {
            (self.phase, self.printed) = (at.phase, Instant::now());
            let bar = ProgressBar::new(at.steps as u64).with_prefix(at.phase);
            let bar = bar.with_style(style("{prefix:9} {bar:30} {pos}/{len}  {msg}  {elapsed} of about {duration}"));
            self.bar = std::io::stderr().is_terminal().then_some(bar);
        }
        let rate = at.step as f64 / at.seconds.max(1e-9);
        let text = format!("loss {:.4}  {rate:.0} steps/s", at.loss);
        let done = at.step == at.steps;
        match &self.bar {
            Some(bar) => {
                bar.set_message(text);
                bar.set_position(at.step as u64);
                if done {
                    bar.finish();
                }
            }
            None if done || self.printed.elapsed() >= PLAIN => {
                eprintln!("{} {}/{}  {text}", at.phase, at.step, at.steps);
                self.printed = Instant::now();
            }
            None => {}
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}
