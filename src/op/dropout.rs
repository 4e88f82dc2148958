//! `drop(x)[i] = x[i] / (1 - p)` with probability `1 - p`, else 0. The mask is a function of the seed and is not stored.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::philox;
use crate::view::{MatMut, MatRef};

/// Inverted dropout. The mask is recomputed from its seed wherever it is needed.
///
/// For element `i` of a row-major matrix, the random word is lane `i % 4` of [`philox`] with key `seed` and counter `i / 4`.
/// The element is dropped if the word is below `p·2³²`.
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

    /// The key for [`philox`].
    pub fn key(self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// `p·2³²`: elements with a random word below it are dropped.
    pub fn threshold(self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// `1 / (1 - p)`, the factor of the elements that are not dropped.
    pub fn keep_scale(self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// The factors of elements `4·block .. 4·block + 4`: 0 or [`keep_scale`](Self::keep_scale).
    pub fn factors(self, block: u64) -> [f32; 4] {
        let numbers = philox(self.key(), [block as u32, (block >> 32) as u32, 0, 0]);
        numbers.map(|number| if number < self.threshold() { 0.0 } else { self.keep_scale() })
    }
}

/// `y = drop(x)`. Its backward pass is `dx = drop(dy)`, with the same [`Dropout`].
pub struct DropoutForward<'t, B: Backend> {
    /// Any shape.
    pub x: MatRef<'t, B>,
    /// The mask. For one seed and shape, it is that of [`LoraForward`](super::LoraForward).
    pub dropout: Dropout,
    /// The shape of `x`, overwritten
    pub y: MatMut<'t, B>,
}

impl<B: Backend> DropoutForward<'_, B> {
    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        fits("dropout_forward", "y", self.x.shape(), self.y.shape())?;
        contiguous("dropout_forward", "x", self.x.is_contiguous())?;
        contiguous("dropout_forward", "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.dropout_forward(self.check()?)
    }
}
