//! Adam over the parameters of a model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::autograd::{Gradients, Param};
use crate::backend::Backend;
use crate::element::{DType, Float};
use crate::error::{Error, Result};
use crate::op::{self, AdamRate};
use crate::tensor::{Shape, Tensor};

/// Adam (D. P. Kingma and J. Ba, 2015) and AdamW (I. Loshchilov and F. Hutter, 2019), as PyTorch computes them: one fused pass
/// over each parameter and its moments.
///
/// Steps are counted for each parameter, as in PyTorch: a parameter that is added later, with another adapter for example, starts
/// at step 1.
///
/// Moments are `f32`; parameters are of the backend's element type. In 16 bits a step of less than 1/512 of an element (bf16) or
/// 1/4096 (f16) would be lost to rounding: at a learning rate of 1e-4 an element above 0.06 would not move in bf16. So on 16-bit
/// backends every updated parameter has a master copy in `f32`. A step updates the master, and the parameter is the master
/// rounded.
///
/// The caller may overwrite a parameter between steps ([`set_tensor`](Param::set_tensor),
/// [`copy_from_slice`](Param::copy_from_slice), [`swap_adapter`](super::Adaptable::swap_adapter), or a kernel of its own). Where
/// an element of the parameter is not its master rounded, the next step starts from the element of the parameter. See
/// [`op::Adam`].
///
/// Memory: 8 bytes of moments for each updated element, and 4 of master on 16-bit backends. So a parameter and its state take
/// 12 bytes for each element in `f32`, and 14 in bf16 or f16.
#[derive(Debug)]
pub struct Adam<B: Backend> {
    /// The learning rate.
    pub lr: f32,
    /// β₁
    pub beta1: f32,
    /// β₂
    pub beta2: f32,
    /// Added to `√v` in the denominator.
    pub eps: f32,
    /// The weight decay of AdamW: before each step a parameter is multiplied by `1 - lr·weight_decay`. Default 0. As in PyTorch,
    /// it applies to every updated parameter, also to biases and magnitudes. With LoRA+, `lr` is the learning rate of that
    /// parameter.
    pub weight_decay: f32,
    /// LoRA+: the learning rate of `B`, biases and magnitudes, divided by that of `A`. Default 1; 16 is usual.
    pub loraplus_lr_ratio: f32,
    steps: u64,
    states: HashMap<u64, State<B>>,
}

/// The state of one parameter.
#[derive(Debug)]
pub(crate) struct State<B: Backend> {
    /// The number of steps of this parameter.
    pub(crate) t: u64,
    pub(crate) m: Tensor<B, f32>,
    pub(crate) v: Tensor<B, f32>,
    /// The parameter in `f32`, if its own type has 16 bits.
    pub(crate) master: Option<Tensor<B, f32>>,
}

impl<B: Backend> State<B> {
    /// The state before the first step. The first step fills the master from the parameter, because zeros are not the parameter
    /// rounded.
    fn new(backend: &B, shape: Shape) -> Result<Self> {
        let zeros = || Tensor::zeros(backend, shape);
        let master = (B::Elem::DTYPE != DType::F32).then(zeros).transpose()?;
        Ok(Self { t: 0, m: zeros()?, v: zeros()?, master })
    }
}

impl<B: Backend> Adam<B> {
    /// Adam with PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8. Errors: [`Error::Value`] unless `lr` is finite and not
    /// negative.
    pub fn new(lr: f32) -> Result<Self> {
        Self::adamw(lr, 0.0)
    }

    /// AdamW with PyTorch's defaults, except for the weight decay (0.01 there). Errors: those of [`new`](Self::new);
    /// [`Error::Value`] unless `weight_decay` and `lr·weight_decay` are finite and not negative.
    pub fn adamw(lr: f32, weight_decay: f32) -> Result<Self> {
        let (beta1, beta2, eps, loraplus_lr_ratio) = (0.9, 0.999, 1e-8, 1.0);
        let adam = Self { lr, beta1, beta2, eps, weight_decay, loraplus_lr_ratio, steps: 0, states: HashMap::new() };
        adam.check().map(|()| adam)
    }

    /// The number of calls of [`step`](Self::step). A parameter that was added later has made fewer steps.
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
            let made = self.states.get(&param.id()).map_or(0, |state| state.t);
            let rate = self.rate(param.plus, made + 1)?;
            let State { t, m, v, master } = match self.states.entry(param.id()) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(new) => new.insert(State::new(backend, param.tensor.shape())?),
            };
            op::Adam { grad, rate, m, v, master: master.as_mut(), w: &mut param.tensor }.run(backend)?;
            *t = made + 1;
        }
        Ok(())
    }

    /// The state of a parameter; `None` before its first step.
    #[cfg(feature = "adapter")]
    pub(crate) fn state(&self, param: &Param<B>) -> Option<&State<B>> {
        self.states.get(&param.id())
    }

    /// Replaces the number of steps and the states of all parameters, by their ids.
    #[cfg(feature = "adapter")]
    pub(crate) fn restore(&mut self, steps: u64, states: HashMap<u64, State<B>>) {
        (self.steps, self.states) = (steps, states);
    }

    /// The scalars of step `t` of a parameter; `plus` selects the learning rate of LoRA+.
    fn rate(&self, plus: bool, t: u64) -> Result<AdamRate> {
        let lr = if plus { self.lr * self.loraplus_lr_ratio } else { self.lr };
        AdamRate::adamw(lr, self.beta1, self.beta2, self.eps, self.weight_decay, t)
    }

    /// Errors: [`Error::Value`] for settings that are out of range.
    fn check(&self) -> Result<()> {
        self.rate(false, 1)?;
        let (ratio, plus) = (self.loraplus_lr_ratio, self.lr * self.loraplus_lr_ratio);
        let fine = ratio >= 0.0 && plus.is_finite();
        Error::unless(fine, "adam", "loraplus_lr_ratio", ratio, "not negative, and finite times `lr`")?;
        self.rate(true, 1).map(drop)
    }
}
