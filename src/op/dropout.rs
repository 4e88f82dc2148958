//! `drop(x)[i] = x[i] / (1 - p)` where the generator says keep, else 0. The mask is a function of the seed: nothing is stored.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::philox;
use crate::view::{MatMut, MatRef};

/// Inverted dropout whose mask is made again from its seed wherever it is needed.
///
/// Element `i` of a row-major matrix takes lane `i % 4` of the block that [`philox`] makes of counter `i / 4` under the key
/// `seed`; it is dropped if that number is below `p·2³²`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    p: f32,
    seed: u64,
}

impl Dropout {
    /// Drops each element with probability `p`. Errors: [`Error::Value`] unless `0 ≤ p < 1`.
    pub fn new(p: f32, seed: u64) -> Result<Self> {
        Error::unless((0.0..1.0).contains(&p), "dropout", "p", p, "at least 0 and below 1")?;
        Ok(Self { p, seed })
    }

    /// The generator's key.
    pub fn key(self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Numbers below it mean: dropped.
    pub fn threshold(self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// What kept elements are multiplied with: `1 / (1 - p)`.
    pub fn keep_scale(self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// The factors of elements `4·block .. 4·block + 4`: 0 or [`keep_scale`](Self::keep_scale).
    pub fn factors(self, block: u64) -> [f32; 4] {
        let numbers = philox(self.key(), [block as u32, (block >> 32) as u32, 0, 0]);
        numbers.map(|number| if number < self.threshold() { 0.0 } else { self.keep_scale() })
    }
}

/// `y = drop(x)`. Its backward pass is the same verb on `dy`.
pub struct DropoutForward<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// Which elements are dropped: those that [`LoraForward`](super::LoraForward) drops for the same seed and shape.
    pub dropout: Dropout,
    /// The shape of `x`, overwritten
    pub y: MatMut<'t, B>,
}

impl<B: Backend> DropoutForward<'_, B> {
    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("dropout_forward", "y", self.x.shape(), self.y.shape())?;
        contiguous("dropout_forward", "x", self.x.is_contiguous())?;
        contiguous("dropout_forward", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.dropout_forward(self.check()?)
    }
}
