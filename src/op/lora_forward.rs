//! `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`

use super::{Checked, Dropout, Factor, Output, Weight, contiguous, finite, fits, inputs_of, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
///
/// A linear layer with a low-rank update (LoRA), with `A` and `B` stored as PEFT stores them. Dropout applies to the `x` of the
/// update, not to that of the base layer. Without `w` only the update is computed, `y = bias + scale·h·Bᵀ`; with
/// [`Output::AddTo`] it can be added to a base layer that other code computed. `h` is an output because
/// [`LoraBackward`](super::LoraBackward) reads it. It is `f32` for every element type, since rounding it to 16 bits costs
/// accuracy.
pub struct LoraForward<'t, B: Backend> {
    /// `m×k`
    pub x: MatRef<'t, B>,
    /// `n×k`; `None` to compute the update alone
    pub w: Option<Weight<'t, B>>,
    /// `1×n`
    pub bias: Option<MatRef<'t, B>>,
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// Factor of the update: `alpha / r` in the LoRA paper.
    pub scale: f32,
    /// Dropout on the `x` of the update.
    pub dropout: Option<Dropout>,
    /// `m×r`, overwritten; contiguous
    pub h: MatMut<'t, B, f32>,
    /// `m×n`, overwritten or added to
    pub y: Output<'t, B>,
}

impl<B: Backend> LoraForward<'_, B> {
    const VERB: &'static str = "lora_forward";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) unless `scale` is finite, the rank at least 1, and `h` contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, k) = (self.x.rows(), inputs_of(self.x.shape(), self.w.map(|w| w.shape()), self.a.shape()));
        let n = self.w.map_or(self.b.rows(), |w| w.rows());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "x", (m, k), self.x.shape())?;
        if let Some(w) = self.w {
            fits(Self::VERB, "w", (n, k), w.shape())?;
        }
        if let Some(bias) = self.bias {
            fits(Self::VERB, "bias", (1, n), bias.shape())?;
        }
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "h", (m, r), self.h.shape())?;
        contiguous(Self::VERB, "h", self.h.is_contiguous())?;
        fits(Self::VERB, "y", (m, n), self.y.shape())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_forward(self.check()?)
    }
}
