//! `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`

use super::{Checked, Dropout, Factor, Output, Weight, check_per_row, contiguous, finite, fits, inputs_of, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
///
/// The paper's `y = x·A·B·scale + linear(x)` with `A` and `B` stored as PEFT stores them. Only the adapter sees the
/// dropped-out `x`. Without `w` there is no base layer: `y = bias + scale·h·Bᵀ`, to be added to what else feeds the same
/// output. `h` is kept for the backward pass, in `f32` always: a 16-bit `h` is a known loss of accuracy.
///
/// `A` and `B` may be [another adapter's for each row](super::Bank). Then `W` is read once for the whole batch; a row without an adapter
/// has the bits of the base layer, and no row's bits depend on what the other rows use, or on their order.
pub struct LoraForward<'t, B: Backend> {
    /// `m×k`
    pub x: MatRef<'t, B>,
    /// `n×k`
    pub w: Option<Weight<'t, B>>,
    /// `1×n`
    pub bias: Option<MatRef<'t, B>>,
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// What the update is multiplied with; alpha/r in the paper. The adapters of a [`Bank`](super::Bank) have scalings of their own,
    /// which are multiplied with it.
    pub scale: f32,
    /// Which elements of `x` the adapter does not see.
    pub dropout: Option<Dropout>,
    /// `m×r`, overwritten; rows that follow one another
    pub h: MatMut<'t, B, f32>,
    /// `m×n`, overwritten or added to
    pub y: Output<'t, B>,
}

impl<B: Backend> LoraForward<'_, B> {
    const VERB: &'static str = "lora_forward";

    /// Compares the shapes; `scale` must be finite and the rank at least 1.
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
        check_per_row(Self::VERB, self.a, self.b, m)?;
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "h", (m, r), self.h.shape())?;
        contiguous(Self::VERB, "h", self.h.is_contiguous())?;
        fits(Self::VERB, "y", (m, n), self.y.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_forward(self.check()?)
    }
}
