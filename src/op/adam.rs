//! `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = (1 - lr·weight_decay)·w - lr·m̂ / (√v̂ + eps)`

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The gradient of a weight: a matrix, or the product it is.
///
/// A batch of m rows gives a linear layer the weight gradient `dyᵀ·x`, of rank m. For a small batch the two factors are far
/// smaller than the product, and Adam, bound by memory traffic, makes each element of it on the fly.
pub enum WeightGrad<'t, B: Backend> {
    /// `n×k`
    Dense(&'t Tensor<B, f32>),
    /// `g = dyᵀ·x`
    Factored {
        /// `m×n`
        dy: &'t Tensor<B>,
        /// `m×k`
        x: &'t Tensor<B>,
    },
}

/// The scalars of one Adam step, checked and with the bias corrections worked out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamRate {
    /// β₁
    pub(crate) beta1: f32,
    /// β₂
    pub(crate) beta2: f32,
    /// `lr / (1 - β₁ᵗ)`
    pub(crate) step_size: f32,
    /// `1 / √(1 - β₂ᵗ)`
    pub(crate) root_scale: f32,
    /// eps
    pub(crate) eps: f32,
    /// `1 - lr·weight_decay`: what the weight is multiplied with before the step.
    pub(crate) decay: f32,
}

impl AdamRate {
    /// Step `t`, counted from 1, without weight decay. Errors: [`Error::Value`] unless `lr` is finite and not negative, the betas
    /// are in `[0, 1)`, `eps` is positive and `t` at least 1.
    pub fn new(lr: f32, beta1: f32, beta2: f32, eps: f32, t: u64) -> Result<Self> {
        Self::adamw(lr, beta1, beta2, eps, 0.0, t)
    }

    /// Step `t` of AdamW (I. Loshchilov and F. Hutter, 2019): before the step, the weight is multiplied with `1 - lr·weight_decay`.
    /// A weight decay of 0 gives the bits of [`new`](Self::new).
    ///
    /// Errors: as [`new`](Self::new); [`Error::Value`] unless `weight_decay` is not negative and finite, also when multiplied with `lr`.
    pub fn adamw(lr: f32, beta1: f32, beta2: f32, eps: f32, weight_decay: f32, t: u64) -> Result<Self> {
        const VERB: &str = "adam";
        Error::unless(lr.is_finite() && lr >= 0.0, VERB, "lr", lr, "finite and not negative")?;
        Error::unless((0.0..1.0).contains(&beta1), VERB, "beta1", beta1, "at least 0 and below 1")?;
        Error::unless((0.0..1.0).contains(&beta2), VERB, "beta2", beta2, "at least 0 and below 1")?;
        Error::unless(eps.is_finite() && eps > 0.0, VERB, "eps", eps, "finite and positive")?;
        let decay = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
        let decays = weight_decay >= 0.0 && weight_decay.is_finite() && decay.is_finite();
        Error::unless(decays, VERB, "weight_decay", weight_decay, "not negative, and finite, also times `lr`")?;
        Error::unless(t > 0, VERB, "t", t, "at least 1")?;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let step_size = (f64::from(lr) / correction(beta1)) as f32;
        let root_scale = (1.0 / correction(beta2).sqrt()) as f32;
        Ok(Self { beta1, beta2, step_size, root_scale, eps, decay })
    }
}

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
///
/// Adam and AdamW as PyTorch computes them, in one pass over `w`, `m` and `v`. The moments are `f32` always.
///
/// A 16-bit `w` loses steps that are small beside it to rounding, unless there is a master copy: then the step is taken on the
/// master in `f32`, and `w` becomes the master rounded, to nearest, ties to even. **`w` has the last word:** wherever it is not
/// the master rounded, as after somebody wrote to `w`, the step begins from `w`, and the master's number is forgotten. So a master
/// begins as zeros, and is never out of date.
pub struct Adam<'t, B: Backend> {
    /// `g`: `n×k`, or its two factors
    pub grad: WeightGrad<'t, B>,
    /// The scalars of this step.
    pub rate: AdamRate,
    /// `n×k`, updated
    pub m: &'t mut Tensor<B, f32>,
    /// `n×k`, updated
    pub v: &'t mut Tensor<B, f32>,
    /// `n×k`, updated: the weight in `f32`; zeros before the first step
    pub master: Option<&'t mut Tensor<B, f32>>,
    /// `n×k`, updated
    pub w: &'t mut Tensor<B>,
}

impl<B: Backend> Adam<'_, B> {
    const VERB: &'static str = "adam";

    /// Compares the shapes.
    pub fn check(self) -> Result<Checked<Self>> {
        let (n, k) = (self.w.rows(), self.w.cols());
        match self.grad {
            WeightGrad::Dense(grad) => fits(Self::VERB, "grad", (n, k), grad.shape())?,
            WeightGrad::Factored { dy, x } => {
                fits(Self::VERB, "dy", (x.rows(), n), dy.shape())?;
                fits(Self::VERB, "x", (dy.rows(), k), x.shape())?;
            }
        }
        fits(Self::VERB, "m", (n, k), self.m.shape())?;
        fits(Self::VERB, "v", (n, k), self.v.shape())?;
        if let Some(master) = &self.master {
            fits(Self::VERB, "master", (n, k), master.shape())?;
        }
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.adam(self.check()?)
    }
}
