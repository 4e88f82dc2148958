//! The state of a model's adapters by layer, and counts of parameters.

use super::{Adaptable, loras};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::nn::{LayerAdapter, LoraLinear};

/// The numbers of parameters of a model.
#[doc(alias = "print_trainable_parameters")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterReport {
    /// Parameters of the model without adapters.
    pub original: usize,
    /// Parameters of the adapters.
    pub introduced: usize,
    /// Trainable parameters of both.
    pub trainable: usize,
}

impl ParameterReport {
    /// Parameters of the adapters, in per cent of the model without them. PEFT's `trainable%` is another number:
    /// `100 · trainable / (original + introduced)`.
    pub fn percent(self) -> f64 {
        100.0 * self.introduced as f64 / self.original.max(1) as f64
    }
}

/// A layer and its adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerStatus {
    /// The name of the layer.
    pub name: String,
    /// True unless its adapters are disabled.
    pub enabled: bool,
    /// Its adapters, in the order they were added.
    pub adapters: Vec<AdapterStatus>,
}

/// An adapter in a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterStatus {
    /// The name of the adapter.
    pub name: String,
    /// True if it is active.
    pub active: bool,
    /// True if it is merged into the weight.
    pub merged: bool,
    /// True if any of its parameters is trainable: PEFT's `requires_grad`.
    pub trainable: bool,
    /// The rank of its update; `None` if it brings a bias or a whole layer.
    pub rank: Option<usize>,
    /// The factor of its update; `None` if it brings a bias or a whole layer.
    pub scaling: Option<f32>,
    /// The number of its parameters.
    pub parameters: usize,
}

impl ParameterReport {
    pub(super) fn of<B: Backend>(model: &impl Adaptable<B>) -> Self {
        let base = || model.layers().flat_map(|(_, layer)| layer.base().params()).chain(model.other_params());
        let added = || loras(model).flat_map(LoraLinear::parts).flat_map(|(_, part)| part.params());
        Self {
            original: base().map(Param::count).sum(),
            introduced: added().map(Param::count).sum(),
            trainable: base().chain(added()).filter(|param| param.trainable).map(Param::count).sum(),
        }
    }
}

impl LayerStatus {
    pub(super) fn of<B: Backend>(name: &str, lora: &LoraLinear<B>) -> Self {
        let adapter = |(name, part): (&str, &LayerAdapter<B>)| AdapterStatus {
            name: name.into(),
            active: lora.active().iter().any(|active| active == name),
            merged: lora.merged().any(|merged| merged == name),
            trainable: part.params().any(|param| param.trainable),
            rank: part.adapter().map(|adapter| adapter.config().rank),
            scaling: part.adapter().map(|adapter| adapter.scaling()),
            parameters: part.params().map(Param::count).sum(),
        };
        Self { name: name.into(), enabled: lora.is_enabled(), adapters: lora.parts().map(adapter).collect() }
    }
}
