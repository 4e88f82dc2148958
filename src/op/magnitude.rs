//! `y = (magnitude / norm)·z + bias`, column by column, and its derivatives: the second step of DoRA.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::Result;
use crate::view::{MatMut, MatRef};

/// `y = (magnitude / norm)·z + bias`, column by column
///
/// The weight decomposition of DoRA: with `z = x·Wᵀ + scale·h·Bᵀ` and `norm` from [`LoraRowNorm`](super::LoraRowNorm), each row
/// of `W + scale·B·A` is scaled to the length `magnitude`. A row of zeros has no direction: where `norm` is 0, the output is
/// `bias`.
pub struct Magnitude<'t, B: Backend> {
    /// `m×n`
    pub z: MatRef<'t, B>,
    /// `1×n`
    pub magnitude: MatRef<'t, B>,
    /// `1×n`
    pub norm: MatRef<'t, B, f32>,
    /// `1×n`
    pub bias: Option<MatRef<'t, B>>,
    /// `m×n`, overwritten
    pub y: MatMut<'t, B>,
}

impl<B: Backend> Magnitude<'_, B> {
    const VERB: &'static str = "magnitude";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, n) = (self.z.rows(), self.z.cols());
        fits(Self::VERB, "magnitude", (1, n), self.magnitude.shape())?;
        fits(Self::VERB, "norm", (1, n), self.norm.shape())?;
        if let Some(bias) = self.bias {
            fits(Self::VERB, "bias", (1, n), bias.shape())?;
        }
        fits(Self::VERB, "y", (m, n), self.y.shape())?;
        contiguous(Self::VERB, "z", self.z.is_contiguous())?;
        contiguous(Self::VERB, "y", self.y.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.magnitude(self.check()?)
    }
}

/// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy` over the rows. Outputs that are `None` are not
/// computed.
///
/// `norm` is treated as a constant, although it depends on `A` and `B`, as in the DoRA paper and in PEFT.
pub struct MagnitudeBackward<'t, B: Backend> {
    /// `m×n`
    pub z: MatRef<'t, B>,
    /// `1×n`
    pub magnitude: MatRef<'t, B>,
    /// `1×n`, as in the forward pass
    pub norm: MatRef<'t, B, f32>,
    /// `m×n`
    pub dy: MatRef<'t, B>,
    /// `m×n`, overwritten
    pub dz: Option<MatMut<'t, B>>,
    /// `1×n`, overwritten
    pub dmagnitude: Option<MatMut<'t, B, f32>>,
    /// `1×n`, overwritten
    pub dbias: Option<MatMut<'t, B, f32>>,
}

impl<B: Backend> MagnitudeBackward<'_, B> {
    const VERB: &'static str = "magnitude_backward";

    /// Checks the request. Errors: [`Error::Shape`](crate::Error::Shape) naming the operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an operand that is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let (m, n) = (self.z.rows(), self.z.cols());
        fits(Self::VERB, "magnitude", (1, n), self.magnitude.shape())?;
        fits(Self::VERB, "norm", (1, n), self.norm.shape())?;
        fits(Self::VERB, "dy", (m, n), self.dy.shape())?;
        if let Some(dz) = &self.dz {
            fits(Self::VERB, "dz", (m, n), dz.shape())?;
        }
        if let Some(dmagnitude) = &self.dmagnitude {
            fits(Self::VERB, "dmagnitude", (1, n), dmagnitude.shape())?;
        }
        if let Some(dbias) = &self.dbias {
            fits(Self::VERB, "dbias", (1, n), dbias.shape())?;
        }
        contiguous(Self::VERB, "z", self.z.is_contiguous())?;
        contiguous(Self::VERB, "dy", self.dy.is_contiguous())?;
        let dz = self.dz.as_ref().is_none_or(MatMut::is_contiguous);
        contiguous(Self::VERB, "dz", dz)?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.magnitude_backward(self.check()?)
    }
}
