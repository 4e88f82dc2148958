//! `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`

use super::{Checked, Dropout, Factor, Output, Weight, contiguous, finite, fits, inputs_of, rank_of};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
///
/// Gradients of [`LoraForward`](super::LoraForward). `W` is frozen and has no gradient. Without `w`, `dx = drop(dh·A)`. Outputs
/// that are `None` are not computed.
pub struct LoraBackward<'t, B: Backend> {
    /// `m×k`
    pub x: MatRef<'t, B>,
    /// `n×k`, as in the forward pass
    pub w: Option<Weight<'t, B>>,
    /// `r×k`
    pub a: Factor<'t, B>,
    /// `n×r`
    pub b: Factor<'t, B>,
    /// `m×r`, the output of the forward pass; contiguous
    pub h: MatRef<'t, B, f32>,
    /// `m×n`
    pub dy: MatRef<'t, B>,
    /// As in the forward pass.
    pub scale: f32,
    /// As in the forward pass: the mask is recomputed from the seed.
    pub dropout: Option<Dropout>,
    /// `r×k`, overwritten; contiguous
    pub da: MatMut<'t, B, f32>,
    /// `n×r`, overwritten; contiguous
    pub db: MatMut<'t, B, f32>,
    /// `1×n`, overwritten
    pub dbias: Option<MatMut<'t, B, f32>>,
    /// `m×k`, overwritten or added to
    pub dx: Option<Output<'t, B>>,
}

impl<B: Backend> LoraBackward<'_, B> {
    const VERB: &'static str = "lora_backward";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) unless `scale` is finite, the rank at least 1, and `h`, `da`, `db` contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, k) = (self.x.rows(), inputs_of(self.x.shape(), self.w.map(|w| w.shape()), self.a.shape()));
        let n = self.w.map_or(self.b.rows(), |w| w.rows());
        let r = rank_of(Self::VERB, self.a.shape())?;
        fits(Self::VERB, "x", (m, k), self.x.shape())?;
        if let Some(w) = self.w {
            fits(Self::VERB, "w", (n, k), w.shape())?;
        }
        fits(Self::VERB, "a", (r, k), self.a.shape())?;
        fits(Self::VERB, "b", (n, r), self.b.shape())?;
        fits(Self::VERB, "h", (m, r), self.h.shape())?;
        contiguous(Self::VERB, "h", self.h.is_contiguous())?;
        fits(Self::VERB, "dy", (m, n), self.dy.shape())?;
        finite(Self::VERB, "scale", self.scale)?;
        fits(Self::VERB, "da", (r, k), self.da.shape())?;
        contiguous(Self::VERB, "da", self.da.is_contiguous())?;
        fits(Self::VERB, "db", (n, r), self.db.shape())?;
        contiguous(Self::VERB, "db", self.db.is_contiguous())?;
        if let Some(dbias) = &self.dbias {
            fits(Self::VERB, "dbias", (1, n), dbias.shape())?;
        }
        if let Some(dx) = &self.dx {
            fits(Self::VERB, "dx", (m, k), dx.shape())?;
        }
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.lora_backward(self.check()?)
    }
}
