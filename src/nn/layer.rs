//! A layer of a model, with or without adapters.

use super::{Adapter, Adapters, LayerAdapter, Linear, LoraLinear};
use crate::autograd::{Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::error::Result;
use crate::quant::QuantKind;

/// A layer of a model: a linear one, `y = x·Wᵀ + bias`, to which adapters can be added by name.
///
/// ```
/// use lowrank::nn::{Layer, Linear};
/// use lowrank::{Cpu, Tensor, autograd::Tape, random::Rng};
///
/// let cpu = Cpu::<f32>::new()?;
/// let layer = Layer::from(Linear::new(&cpu, 3, 4, &mut Rng::new(0))?); // 3 inputs, 4 outputs
/// let mut tape = Tape::new(&cpu);
/// let x = tape.input(Tensor::from_slice(&cpu, (1, 3), &[1.0, 2.0, 3.0])?);
/// let y = layer.forward(&mut tape, x, None)?;
/// assert_eq!(tape.value(y)?.shape(), (1, 4).into());
/// # Ok::<(), lowrank::Error>(())
/// ```
#[derive(Debug)]
pub struct Layer<B: Backend>(LoraLinear<B>);

impl<B: Backend> From<Linear<B>> for Layer<B> {
    /// A layer without adapters; its parameters stay trainable or frozen.
    fn from(linear: Linear<B>) -> Self {
        Self(LoraLinear::without_adapters(linear))
    }
}

impl<B: Backend> From<LoraLinear<B>> for Layer<B> {
    fn from(lora: LoraLinear<B>) -> Self {
        Self(lora)
    }
}

impl<B: Backend> Layer<B> {
    /// The layer without its adapters.
    pub fn base(&self) -> &Linear<B> {
        self.0.base()
    }

    /// The layer with its adapters, if it has one.
    pub fn lora(&self) -> Option<&LoraLinear<B>> {
        Some(&self.0).filter(|lora| !lora.parts.is_empty())
    }

    /// The layer with its adapters, if it has one, to be changed.
    pub fn lora_mut(&mut self) -> Option<&mut LoraLinear<B>> {
        Some(&mut self.0).filter(|lora| !lora.parts.is_empty())
    }

    /// The low-rank update of the adapter of this name, if it has one; see [`DEFAULT`](super::DEFAULT).
    pub fn adapter(&self, name: &str) -> Option<&Adapter<B>> {
        self.0.adapter(name)
    }

    /// The weight, the bias, and the parameters of the adapters.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        self.0.base().params().chain(self.0.parts().flat_map(|(_, part)| part.params()))
    }

    /// The weight, the bias, and the parameters of the adapters, without merged adapters and the base that holds them.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.0.params_mut()
    }

    /// The weight, the bias, and the parameters of the adapters, with names that are unique in this layer: `weight`, `bias`,
    /// `default.lora_A`. A dot separates the name of an adapter, which has none.
    #[cfg(feature = "adapter")]
    pub(crate) fn named_params_mut(&mut self) -> impl Iterator<Item = (String, &mut Param<B>)> {
        self.0.named_params_mut()
    }

    /// The base layer and its active adapters: [`LoraLinear::forward`].
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        self.0.forward(tape, x, seed)
    }

    /// The base layer and the adapters that the caller chooses: [`LoraLinear::forward_with`].
    pub fn forward_with<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, adapters: Adapters<'_>) -> Result<Var> {
        self.0.forward_with(tape, x, seed, adapters)
    }

    /// Prepacks the weight, for a base that stays frozen; see [`Backend::keep_packed`].
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.0.keep_packed(backend, passes)
    }

    /// Quantises the weight of the base layer, which is frozen from then on; adapters stay. Errors: [`Error::Value`](crate::Error::Value)
    /// while an adapter is merged; those of [`Linear::quantise`].
    pub fn quantise(&mut self, backend: &B, kind: QuantKind) -> Result<()> {
        self.0.check_unmerged("quantise")?;
        self.0.base.quantise(backend, kind)
    }

    /// The layer without its adapters; a merged update stays in the weight.
    pub fn into_base(self) -> Linear<B> {
        self.0.into_base()
    }

    /// Freezes the base layer. One with adapters is already frozen.
    pub(super) fn freeze(&mut self) {
        if self.0.parts.is_empty() {
            self.0.freeze();
        }
    }

    /// Returns the errors that [`insert`](Self::insert) would.
    pub(super) fn check_insert(&self, verb: &'static str, name: &str, part: &LayerAdapter<B>, active: bool) -> Result<()> {
        self.0.check_insert(verb, name, part, active)
    }

    /// [`LoraLinear::insert`]; `enabled` is the state that a layer without adapters gets.
    pub(super) fn insert(&mut self, name: &str, part: LayerAdapter<B>, active: bool, enabled: bool) -> Result<()> {
        if self.0.parts.is_empty() {
            self.0.set_enabled(enabled)?;
        }
        self.0.insert(name, part, active)
    }

    /// Removes all adapters.
    pub(super) fn unload(&mut self) {
        self.0.unload();
    }

    /// Removes all adapters; merged updates stay in the weight.
    pub(super) fn unload_merged(&mut self) {
        self.0.unload_merged();
    }
}
