//! What a model says of its adapters: their layers, ranks and states, and how many parameters there are.

use super::{Adaptable, loras};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::nn::{LayerAdapter, LoraLinear};

/// How many parameters there are, how many the adapters add, and how many may be trained.
#[doc(alias = "print_trainable_parameters")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterReport {
    /// Weights and biases of the model without adapters.
    pub original: usize,
    /// Those of the adapters.
    pub introduced: usize,
    /// Those that may be trained.
    pub trainable: usize,
}

impl ParameterReport {
    /// What the adapters add, in per cent of the model without them. PEFT's `trainable%` is another number: what may be trained, in
    /// per cent of all, `100 · trainable / (original + introduced)`.
    pub fn percent(self) -> f64 {
        100.0 * self.introduced as f64 / self.original.max(1) as f64
    }
}

/// A layer and its adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerStatus {
    /// The layer.
    pub name: String,
    /// Whether its active adapters take part.
    pub enabled: bool,
    /// Its adapters, in the order they were added.
    pub adapters: Vec<AdapterStatus>,
}

/// An adapter in a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterStatus {
    /// The adapter.
    pub name: String,
    /// Whether it is active.
    pub active: bool,
    /// Whether it is in the weight.
    pub merged: bool,
    /// Whether any of its parameters may be trained: PEFT's `requires_grad`.
    pub trainable: bool,
    /// The rank of its update; `None` if it brings a bias or a whole layer.
    pub rank: Option<usize>,
    /// What its update is multiplied with; `None` if it brings a bias or a whole layer.
    pub scaling: Option<f32>,
    /// How many parameters it has.
    pub parameters: usize,
}

impl ParameterReport {
    pub(super) fn of<B: Backend>(model: &impl Adaptable<B>) -> Self {
        let base = || model.layers().flat_map(|(_, layer)| layer.base().params()).chain(model.other_params());
        let added = || loras(model).flat_map(LoraLinear::parts).flat_map(|(_, part)| part.params());
        let quantised = model.layers().filter_map(|(_, layer)| layer.base().quantised());
        let quantised: usize = quantised.map(|w| w.rows() * w.cols()).sum();
        Self {
            original: quantised + base().map(Param::count).sum::<usize>(),
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
