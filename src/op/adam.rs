//! `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = (1 - lr·weight_decay)·w - lr·m̂ / (√v̂ + eps)`

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The gradient of a weight: a dense matrix, or two factors whose product it is.
///
/// For a batch of m rows, the weight gradient of a linear layer is `dyᵀ·x`, of rank m. If m is small, the two factors are much
/// smaller than the product. [`Adam`] is bound by memory traffic, so it computes each element of the product where it needs it,
/// and the product is never stored.
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

/// The scalars of one step of [`Adam`], checked, with the bias corrections computed.
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
    /// `1 - lr·weight_decay`, the factor of the weight before the step.
    pub(crate) decay: f32,
}

impl AdamRate {
    /// Step `t` of Adam, counted from 1, without weight decay. Errors: [`Error::Value`] unless `lr` is finite and not negative,
    /// the betas are in `[0, 1)`, `eps` is finite and positive, and `t` at least 1.
    pub fn new(lr: f32, beta1: f32, beta2: f32, eps: f32, t: u64) -> Result<Self> {
        Self::adamw(lr, beta1, beta2, eps, 0.0, t)
    }

    /// Step `t` of AdamW (I. Loshchilov and F. Hutter, 2019): before the step, the weight is multiplied by `1 - lr·weight_decay`.
    /// A weight decay of 0 gives the bits of [`new`](Self::new).
    ///
    /// Errors: those of [`new`](Self::new); [`Error::Value`] unless `weight_decay` is finite and not negative, and
    /// `lr·weight_decay` is finite.
    pub fn adamw(lr: f32, beta1: f32, beta2: f32, eps: f32, weight_decay: f32, t: u64) -> Result<Self> {
        const VERB: &str = "adam";
        Error::unless(lr.is_finite() && lr >= 0.0, VERB, "lr", lr, "finite and not negative")?;
        Error::unless((0.0..1.0).contains(&beta1), VERB, "beta1", beta1, "at least 0 and below 1")?;
        Error::unless((0.0..1.0).contains(&beta2), VERB, "beta2", beta2, "at least 0 and below 1")?;
        Error::unless(eps.is_finite() && eps > 0.0, VERB, "eps", eps, "finite and positive")?;
        let decay = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
        let decays = weight_decay >= 0.0 && weight_decay.is_finite() && decay.is_finite();
        Error::unless(decays, VERB, "weight_decay", weight_decay, "finite and not negative, with a finite `lr·weight_decay`")?;
        Error::unless(t > 0, VERB, "t", t, "at least 1")?;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let step_size = (f64::from(lr) / correction(beta1)) as f32;
        let root_scale = (1.0 / correction(beta2).sqrt()) as f32;
        Ok(Self { beta1, beta2, step_size, root_scale, eps, decay })
    }
}

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
///
/// One step of Adam or AdamW, as PyTorch computes them, in one pass over `w`, `m` and `v`. The moments are `f32` for every
/// element type.
///
/// In a 16-bit `w`, steps that are small compared with `w` are lost to rounding. With a `master`, the step is taken on this
/// `f32` copy of the weight, and `w` becomes the master rounded to nearest, ties to even. **Writes to `w` win:** where `w` is
/// not the rounded master, the caller has written to `w` since the last step, and the step starts from `w` in place of the
/// master. So a new master is all zeros, and a master never needs to be updated by hand.
pub struct Adam<'t, B: Backend> {
    /// The gradient `g`, `n×k` or its two factors
    pub grad: WeightGrad<'t, B>,
    /// The scalars of this step.
    pub rate: AdamRate,
    /// `n×k`, updated
    pub m: &'t mut Tensor<B, f32>,
    /// `n×k`, updated
    pub v: &'t mut Tensor<B, f32>,
    /// `n×k`, updated: the `f32` copy of `w`; zeros before the first step
    pub master: Option<&'t mut Tensor<B, f32>>,
    /// `n×k`, updated
    pub w: &'t mut Tensor<B>,
}

impl<B: Backend> Adam<'_, B> {
    const VERB: &'static str = "adam";

    /// Checks the request. Errors: [`Error::Shape`] naming the operand that does not fit.
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

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.adam(self.check()?)
    }
}
