//! The linear layer, `y = x·Wᵀ + bias`.

use super::Init;
use crate::autograd::{LayerWeight, Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op::Weight;
use crate::quant::{QuantKind, Quantised};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// A linear layer, `y = x·Wᵀ + bias`, with `W n×k` and `bias 1×n`; the weight is dense or quantised.
#[derive(Debug)]
pub struct Linear<B: Backend> {
    /// Empty while the layer is quantised and nothing is merged.
    weight: Param<B>,
    quantised: Option<FrozenQuantised<B>>,
    bias: Option<Param<B>>,
}

/// The weight of a quantised layer, and whether a dense copy is used in its place: with what is merged.
#[derive(Debug)]
struct FrozenQuantised<B: Backend> {
    w: Quantised<B>,
    is_dense: bool,
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
        bias_fits(weight.rows(), bias.as_ref())?;
        Ok(Self { weight: Param::new(weight), quantised: None, bias: bias.map(Param::plus) })
    }

    /// From a quantised weight `n×k`, which stays as it is, and a bias `1×n`. Errors: [`Error::Shape`].
    ///
    /// Adapters train over it. Merging makes the weight dense, of the backend's element type, for as long as something is merged;
    /// unmerging gives the quantised weight back, untouched.
    pub fn from_quantised(backend: &B, weight: Quantised<B>, bias: Option<Tensor<B>>) -> Result<Self> {
        bias_fits(weight.rows(), bias.as_ref())?;
        let quantised = Some(FrozenQuantised { w: weight, is_dense: false });
        Ok(Self { weight: Param::frozen(Tensor::zeros(backend, (0, 0))?), quantised, bias: bias.map(Param::plus) })
    }

    /// Quantises the weight, which is frozen from then on. Errors: those of [`Quantised::quantise`]; [`Error::Value`] if it is quantised
    /// already.
    pub fn quantise(&mut self, backend: &B, kind: QuantKind) -> Result<()> {
        let w = Quantised::quantise(backend, self.dense_weight("quantise")?, kind)?;
        self.weight = Param::frozen(Tensor::zeros(backend, (0, 0))?);
        self.quantised = Some(FrozenQuantised { w, is_dense: false });
        Ok(())
    }

    /// From a weight that is stored as `in × out`, `k×n` (PEFT's `fan_in_fan_out`), and a bias `1×n`. The weight is transposed
    /// once, here. The adapters of such a layer are stored as those of any other layer. Errors: [`Error::Shape`].
    pub fn from_fan_in_fan_out(backend: &B, weight: &Tensor<B>, bias: Option<Tensor<B>>) -> Result<Self> {
        let ((k, n), host) = ((weight.rows(), weight.cols()), weight.to_vec(backend)?);
        let transposed: Vec<B::Elem> = (0..n).flat_map(|j| host.iter().skip(j).step_by(n.max(1)).take(k).copied()).collect();
        Self::from_tensors(Tensor::from_slice(backend, (n, k), &transposed)?, bias)
    }

    /// `n×k`, and `0×0` while the layer is quantised: [`quantised`](Self::quantised) is its weight then.
    pub fn weight(&self) -> &Param<B> {
        &self.weight
    }

    /// The quantised weight, if the layer has one; also while a dense copy with what is merged is used in its place.
    pub fn quantised(&self) -> Option<&Quantised<B>> {
        self.quantised.as_ref().map(|quantised| &quantised.w)
    }

    /// Outputs × inputs, `n×k`.
    pub fn shape(&self) -> Shape {
        self.quantised().map_or(self.weight.tensor.shape(), Quantised::shape)
    }

    /// The weight in use, as the tape takes it.
    pub fn layer_weight(&self) -> LayerWeight<'_, B> {
        match &self.quantised {
            Some(quantised) if !quantised.is_dense => LayerWeight::Quantised(&quantised.w),
            _ => LayerWeight::Param(&self.weight),
        }
    }

    /// The weight in use, as requests take it.
    pub(super) fn operand(&self) -> Weight<'_, B> {
        self.layer_weight().operand()
    }

    /// The dense weight, for what cannot do with another. Errors: [`Error::Value`] if the layer is quantised.
    pub(crate) fn dense_weight(&self, verb: &'static str) -> Result<&Tensor<B>> {
        match self.layer_weight() {
            LayerWeight::Param(param) => Ok(&param.tensor),
            LayerWeight::Quantised(w) => {
                let (got, want) =
                    (format!("quantised as {}", w.kind()), "a dense weight: `Quantised::dequantise` makes one".into());
                Err(Error::Value { verb, name: "weight", got, want })
            }
        }
    }

    /// `n×k`, dense from now on, to be merged into.
    pub(super) fn dense_mut(&mut self, backend: &B) -> Result<&mut Tensor<B>> {
        if let Some(quantised) = &mut self.quantised
            && !quantised.is_dense
        {
            self.weight = Param::frozen(quantised.w.dequantise(backend)?);
            quantised.is_dense = true;
        }
        Ok(&mut self.weight.tensor)
    }

    /// Drops the dense copy of a quantised weight.
    pub(super) fn drop_dense(&mut self, backend: &B) -> Result<()> {
        if let Some(quantised) = &mut self.quantised
            && quantised.is_dense
        {
            self.weight = Param::frozen(Tensor::zeros(backend, (0, 0))?);
            quantised.is_dense = false;
        }
        Ok(())
    }

    /// Makes the dense copy of a quantised weight, if it is used, the layer's own.
    pub(super) fn keep_dense(&mut self) {
        self.quantised = self.quantised.take().filter(|quantised| !quantised.is_dense);
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

    /// Prepacks the weight, for a layer that stays frozen; see [`Backend::keep_packed`]. Merging, unmerging and training drop the
    /// packed copy.
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        match self.layer_weight() {
            LayerWeight::Param(_) => backend.keep_packed(&mut self.weight.tensor, passes),
            LayerWeight::Quantised(_) => Ok(()), // it is read as it is
        }
    }

    /// A copy with parameters of its own, which are trainable. Errors: those of [`Tensor::try_clone`].
    pub fn try_clone(&self, backend: &B) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.tensor.try_clone(backend)).transpose()?;
        match self.layer_weight() {
            LayerWeight::Param(weight) => Self::from_tensors(weight.tensor.try_clone(backend)?, bias),
            LayerWeight::Quantised(weight) => Self::from_quantised(backend, weight.try_clone(backend)?, bias),
        }
    }

    /// The weight, unless it is quantised, then the bias.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        self.quantised.is_none().then_some(&self.weight).into_iter().chain(&self.bias)
    }

    /// The weight, unless it is quantised, then the bias.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.quantised.is_none().then_some(&mut self.weight).into_iter().chain(&mut self.bias)
    }

    /// [`params_mut`](Self::params_mut) with names: `weight`, `bias`.
    #[cfg(feature = "adapter")]
    pub(super) fn named_params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Param<B>)> {
        let weight = self.quantised.is_none().then_some(&mut self.weight);
        weight.into_iter().map(|weight| ("weight", weight)).chain(self.bias.iter_mut().map(|bias| ("bias", bias)))
    }

    /// `y = x·Wᵀ + bias`
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var) -> Result<Var> {
        tape.linear(x, self.layer_weight(), self.bias.as_ref())
    }
}

/// Errors: [`Error::Shape`] unless a bias has as many numbers as the layer has outputs.
fn bias_fits<B: Backend>(outputs: usize, bias: Option<&Tensor<B>>) -> Result<()> {
    let (Some(bias), want) = (bias, Shape::from((1, outputs))) else { return Ok(()) };
    if bias.shape() == want {
        return Ok(());
    }
    Err(Error::Shape { verb: "linear", name: "bias", got: bias.shape(), want })
}
