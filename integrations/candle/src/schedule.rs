//! Learning rates over a run: a linear warm-up, then constant, linear to zero, or half a cosine to zero. The numbers are those of transformers'
//! `get_scheduler`.

use std::f64::consts::PI;

use crate::error::{Error, Result};

/// How the rate goes after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It stays. transformers' `constant_with_warmup`.
    Constant,
    /// Straight to zero at the end of the run. transformers' `linear`.
    #[default]
    Linear,
    /// Half a cosine, to zero at the end of the run. transformers' `cosine`.
    Cosine,
}

/// How long the warm-up is.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// In steps of the optimizer.
    Steps(usize),
    /// As a part of all steps, between 0 and 1, rounded up.
    Ratio(f64),
}

impl Default for Warmup {
    fn default() -> Self {
        Self::Steps(0)
    }
}

/// The learning rate of each step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    warmup: usize,
    steps: usize,
    decay: Decay,
}

impl Schedule {
    /// A run of `steps` steps of the optimizer that reaches the rate `peak` after the warm-up.
    ///
    /// Errors: [`Error::Setting`] for a rate that is negative or not finite, a ratio outside `0..=1`, or a run without steps.
    pub fn new(peak: f64, steps: usize, warmup: Warmup, decay: Decay) -> Result<Self> {
        Error::unless(peak.is_finite() && peak >= 0.0, "lr", peak, "a finite number that is not negative")?;
        Error::unless(steps > 0, "steps", steps, "1 or more")?;
        let warmup = match warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => {
                Error::unless((0.0..=1.0).contains(&ratio), "warmup", ratio, "a ratio between 0 and 1")?;
                (steps as f64 * ratio).ceil() as usize
            }
        };
        Ok(Self { peak, warmup, steps, decay })
    }

    /// How many steps the run has.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The rate of a step; the first is 0. With a warm-up the first step has the rate 0, as in transformers.
    pub fn rate(&self, step: usize) -> f64 {
        self.peak * self.factor(step)
    }

    fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let after = self.steps.saturating_sub(self.warmup).max(1) as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => self.steps.saturating_sub(step) as f64 / after,
            Decay::Cosine => (0.5 * (1.0 + (PI * (step - self.warmup) as f64 / after).cos())).max(0.0),
        }
    }
}
