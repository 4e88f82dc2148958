//! The linear layer, `y = x·Wᵀ + bias`.

use super::Init;
use crate::autograd::{Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::element::Float;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// A linear layer, `y = x·Wᵀ + bias`, with `W n×k` and `bias 1×n`.
#[derive(Debug)]
pub struct Linear<B: Backend> {
    weight: Param<B>,
    bias: Option<Param<B>>,
}

impl<B: Backend> Linear<B> {
    /// A layer initialised as in PyTorch: weight and bias uniform in `±1/√inputs`.
    pub fn new(backend: &B, inputs: usize, outputs: usize, rng: &mut Rng) -> Result<Self> {
        let weight = Init::KaimingUniform.tensor(backend, (outputs, inputs), rng)?;
        let bound = 1.0 / (inputs.max(1) as f64).sqrt();
        let bias: Vec<B::Elem> = (0..outputs).map(|_| B::Elem::from_f32(rng.uniform(-bound, bound) as f32)).collect();
        let bias = Tensor::from_slice(backend, (1, outputs), &bias)?;
        Self::from_tensors(weight, Some(bias))
    }

    /// From a weight `n×k` and a bias `1×n`. Errors: [`Error::Shape`].
    pub fn from_tensors(weight: Tensor<B>, bias: Option<Tensor<B>>) -> Result<Self> {
        if let Some(bias) = &bias {
            let (got, want) = (bias.shape(), Shape::from((1, weight.rows())));
            if got != want {
                return Err(Error::Shape { verb: "linear", name: "bias", got, want });
            }
        }
        Ok(Self { weight: Param::new(weight), bias: bias.map(Param::plus) })
    }

    /// From a weight that is stored as `in × out`, `k×n` (PEFT's `fan_in_fan_out`), and a bias `1×n`. The weight is transposed once,
    /// here. The adapters of such a layer are stored as those of any other layer. Errors: [`Error::Shape`].
    pub fn from_fan_in_fan_out(backend: &B, weight: &Tensor<B>, bias: Option<Tensor<B>>) -> Result<Self> {
        let ((k, n), host) = ((weight.rows(), weight.cols()), weight.to_vec(backend)?);
        let transposed: Vec<B::Elem> = (0..n).flat_map(|j| host.iter().skip(j).step_by(n.max(1)).take(k).copied()).collect();
        Self::from_tensors(Tensor::from_slice(backend, (n, k), &transposed)?, bias)
    }

    /// `n×k`
    pub fn weight(&self) -> &Param<B> {
        &self.weight
    }

    /// `1×n`
    pub fn bias(&self) -> Option<&Param<B>> {
        self.bias.as_ref()
    }

    /// `n×k`, to be changed in place; its shape cannot change.
    pub(super) fn weight_mut(&mut self) -> &mut Tensor<B> {
        &mut self.weight.tensor
    }

    /// `1×n`, to be changed in place; its shape cannot change.
    pub(super) fn bias_mut(&mut self) -> Option<&mut Tensor<B>> {
        self.bias.as_mut().map(|bias| &mut bias.tensor)
    }

    /// Prepacks the weight, for a layer that stays frozen; see [`Backend::keep_packed`]. Merging, unmerging and training drop the packed
    /// copy.
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        backend.keep_packed(&mut self.weight.tensor, passes)
    }

    /// A copy with parameters of its own, which are trainable. Errors: those of [`Tensor::try_clone`].
    pub fn try_clone(&self, backend: &B) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.tensor.try_clone(backend)).transpose()?;
        Self::from_tensors(self.weight.tensor.try_clone(backend)?, bias)
    }

    /// The weight, then the bias.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    /// The weight, then the bias.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        std::iter::once(&mut self.weight).chain(&mut self.bias)
    }

    /// `y = x·Wᵀ + bias`
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var) -> Result<Var> {
        tape.linear(x, &self.weight, self.bias.as_ref())
    }
}
