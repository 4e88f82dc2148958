//! Adam over the parameters of a model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::autograd::{Gradients, Param};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::op::{self, AdamRate};
use crate::tensor::Tensor;

/// Adam (D. P. Kingma and J. Ba, 2015), as PyTorch computes it: one fused pass over each parameter and its moments.
///
/// Steps are counted by parameter, as PyTorch counts them: one that joins later, such as another adapter that is made active, begins
/// with its own first step.
///
/// Moments are `f32`, parameters are of the backend's element type, and so are the adapters over 16-bit weights: PEFT makes those `f32`
/// unless told otherwise (`autocast_adapter_dtype`). A step of less than 1/512 of a number in bf16, or 1/4096 in f16, is lost to
/// rounding: at a learning rate of 1e-4 a number above 0.06 does not move in bf16. For small learning rates train over `f32`.
#[derive(Debug)]
pub struct Adam<B: Backend> {
    /// The learning rate.
    pub lr: f32,
    /// β₁
    pub beta1: f32,
    /// β₂
    pub beta2: f32,
    /// What keeps the division finite.
    pub eps: f32,
    /// LoRA+: how many times the learning rate of `A` that of `B` is, and of biases and magnitudes. 1 unless set; 16 is usual.
    pub loraplus_lr_ratio: f32,
    steps: u64,
    moments: HashMap<u64, Moments<B>>,
}

#[derive(Debug)]
struct Moments<B: Backend> {
    /// How many steps the parameter has made.
    t: u64,
    m: Tensor<B, f32>,
    v: Tensor<B, f32>,
}

impl<B: Backend> Adam<B> {
    /// PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8. Errors: [`Error::Value`] unless `lr` is finite
    /// and not negative.
    pub fn new(lr: f32) -> Result<Self> {
        let (beta1, beta2, eps, loraplus_lr_ratio) = (0.9, 0.999, 1e-8, 1.0);
        let adam = Self { lr, beta1, beta2, eps, loraplus_lr_ratio, steps: 0, moments: HashMap::new() };
        adam.check().map(|()| adam)
    }

    /// How often [`step`](Self::step) was called. A parameter that joined later has made fewer steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates each trainable parameter that has a gradient. Errors: those of the verb `adam`; the scalars are checked before
    /// anything is changed.
    pub fn step<'p>(
        &mut self,
        backend: &B,
        params: impl IntoIterator<Item = &'p mut Param<B>>,
        gradients: &Gradients<B>,
    ) -> Result<()>
    where
        B: 'p,
    {
        self.check()?;
        self.steps += 1;
        for param in params {
            let Some(grad) = gradients.get(param).filter(|_| param.trainable) else { continue };
            let (shape, made) = (param.tensor.shape(), self.moments.get(&param.id()).map_or(0, |moments| moments.t));
            let rate = self.rate(param.plus, made + 1)?;
            let Moments { t, m, v } = match self.moments.entry(param.id()) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(new) => {
                    new.insert(Moments { t: 0, m: Tensor::zeros(backend, shape)?, v: Tensor::zeros(backend, shape)? })
                }
            };
            op::Adam { grad, rate, m, v, w: &mut param.tensor }.run(backend)?;
            *t = made + 1;
        }
        Ok(())
    }

    /// The scalars of step `t` of a parameter: the usual ones, or those for what LoRA+ speeds up.
    fn rate(&self, plus: bool, t: u64) -> Result<AdamRate> {
        let lr = if plus { self.lr * self.loraplus_lr_ratio } else { self.lr };
        AdamRate::new(lr, self.beta1, self.beta2, self.eps, t)
    }

    /// Errors: [`Error::Value`] for scalars that no step can take.
    fn check(&self) -> Result<()> {
        self.rate(false, 1)?;
        let (ratio, plus) = (self.loraplus_lr_ratio, self.lr * self.loraplus_lr_ratio);
        let fine = ratio >= 0.0 && plus.is_finite();
        Error::unless(fine, "adam", "loraplus_lr_ratio", ratio, "not negative, and finite times `lr`")
    }
}
