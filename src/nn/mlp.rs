//! A multi-layer perceptron of named linear layers, with or without adapters.

use super::{Adapter, Linear, LoraConfig, LoraLinear};
use crate::autograd::{Param, Tape, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::Tensor;

/// A layer of a model: plain, or with an adapter.
#[derive(Debug)]
pub enum Layer<B: Backend> {
    /// `y = x·Wᵀ + bias`
    Linear(Linear<B>),
    /// The same, plus `scaling·(x·Aᵀ)·Bᵀ`
    Lora(LoraLinear<B>),
}

impl<B: Backend> Layer<B> {
    /// The layer without an adapter.
    pub fn base(&self) -> &Linear<B> {
        match self {
            Layer::Linear(linear) => linear,
            Layer::Lora(lora) => lora.base(),
        }
    }

    /// The layer with its adapter, if it has one.
    pub fn lora(&self) -> Option<&LoraLinear<B>> {
        match self {
            Layer::Linear(_) => None,
            Layer::Lora(lora) => Some(lora),
        }
    }

    /// The layer with its adapter, if it has one.
    pub fn lora_mut(&mut self) -> Option<&mut LoraLinear<B>> {
        match self {
            Layer::Linear(_) => None,
            Layer::Lora(lora) => Some(lora),
        }
    }

    fn into_base(self) -> Linear<B> {
        match self {
            Layer::Linear(linear) => linear,
            Layer::Lora(lora) => lora.into_base(),
        }
    }
}

/// Which layers get an adapter: PEFT's `target_modules`.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// Every linear layer.
    All,
    /// Those with these names.
    Names(&'a [&'a str]),
}

/// How many parameters there are, and how many the adapters add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterReport {
    /// Weights and biases of the model without adapters.
    pub original: usize,
    /// Those of the adapters.
    pub introduced: usize,
}

impl ParameterReport {
    /// What the adapters add, in per cent of the model.
    pub fn percent(self) -> f64 {
        100.0 * self.introduced as f64 / self.original.max(1) as f64
    }
}

/// Linear layers with relu between them.
#[derive(Debug)]
pub struct Mlp<B: Backend> {
    layers: Vec<(String, Layer<B>)>,
}

impl<B: Backend> Mlp<B> {
    /// Layers `linear1`, `linear2`, … for sizes such as `[784, 1000, 2000, 10]`. Errors: [`Error::Value`] for fewer than two
    /// sizes.
    pub fn new(backend: &B, sizes: &[usize], rng: &mut Rng) -> Result<Self> {
        let layers = sizes.windows(2).map(|pair| Linear::new(backend, pair[0], pair[1], rng)).collect::<Result<_>>()?;
        Self::from_layers(layers)
    }

    /// From layers that fit one another; they are called `linear1`, `linear2`, …
    pub fn from_layers(layers: Vec<Linear<B>>) -> Result<Self> {
        Error::unless(!layers.is_empty(), "mlp", "layers", layers.len(), "at least 1")?;
        for pair in layers.windows(2) {
            let (got, want) = (pair[1].weight().tensor.shape(), pair[0].weight().tensor.rows());
            if got.cols != want {
                return Err(Error::Shape { verb: "mlp", name: "weight", got, want: (got.rows, want).into() });
            }
        }
        let name = |(i, linear)| (format!("linear{}", i + 1), Layer::Linear(linear));
        Ok(Self { layers: layers.into_iter().enumerate().map(name).collect() })
    }

    /// The layers by name, first to last.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)> {
        self.layers.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    /// The layers by name, first to last.
    pub fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)> {
        self.layers.iter_mut().map(|(name, layer)| (name.as_str(), layer))
    }

    /// Freezes the model and puts a new adapter beside each target; a layer that has one gets a new one.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Value`]. Nothing is changed then.
    pub fn add_adapters(&mut self, backend: &B, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        let mut adapters = Vec::new();
        for name in self.resolve(targets)? {
            let shape = self.layer(&name)?.base().weight().tensor.shape();
            adapters.push((name, Adapter::new(backend, shape.cols, shape.rows, config.clone(), rng)?));
        }
        self.set_adapters(adapters)
    }

    /// Freezes the model and puts these adapters beside the layers they name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`], [`Error::Value`] for a layer that holds a merged adapter. Nothing is
    /// changed then.
    pub fn set_adapters(&mut self, adapters: Vec<(String, Adapter<B>)>) -> Result<()> {
        for (name, adapter) in &adapters {
            let layer = self.layer(name)?;
            adapter.fits(layer.base())?;
            let merged = layer.lora().is_some_and(LoraLinear::is_merged);
            Error::unless(!merged, "set_adapters", "adapter", "merged into the weight", "unmerged first")?;
        }
        self.freeze();
        for (name, adapter) in adapters {
            if let Some(at) = self.layers.iter().position(|(known, _)| *known == name) {
                let (name, layer) = self.layers.remove(at);
                self.layers.insert(at, (name, Layer::Lora(LoraLinear::new(layer.into_base(), adapter)?)));
            }
        }
        Ok(())
    }

    /// Takes every adapter away; the layers that had one stay frozen. Errors: [`Error::Value`] while one is merged.
    pub fn unload(&mut self) -> Result<()> {
        let merged = self.loras_mut().any(|lora| lora.is_merged());
        Error::unless(!merged, "unload", "adapter", "merged into the weight", "unmerged first")?;
        let layers = std::mem::take(&mut self.layers).into_iter();
        self.layers = layers.map(|(name, layer)| (name, Layer::Linear(layer.into_base()))).collect();
        Ok(())
    }

    /// Makes every weight and bias of the base model frozen; adapters stay trainable.
    pub fn freeze(&mut self) {
        for (_, layer) in &mut self.layers {
            // A layer that has an adapter was frozen when it got it.
            if let Layer::Linear(linear) = layer {
                linear.params_mut().for_each(|param| param.trainable = false);
            }
        }
    }

    /// Switches every adapter on or off. Errors: [`Error::Value`] while one is merged.
    pub fn set_adapters_enabled(&mut self, enabled: bool) -> Result<()> {
        self.loras_mut().try_for_each(|lora| lora.set_enabled(enabled))
    }

    /// Merges every adapter into its weight.
    pub fn merge_adapters(&mut self, backend: &B) -> Result<()> {
        self.loras_mut().try_for_each(|lora| lora.merge(backend))
    }

    /// Takes every merged adapter out of its weight again, up to rounding.
    pub fn unmerge_adapters(&mut self, backend: &B) -> Result<()> {
        self.loras_mut().try_for_each(|lora| lora.unmerge(backend))
    }

    /// Every parameter that a gradient may be found for: the base model's, then, layer by layer, the adapters'.
    pub fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        let mut params = Vec::new();
        for (_, layer) in &mut self.layers {
            match layer {
                Layer::Linear(linear) => params.extend(linear.params_mut()),
                Layer::Lora(lora) => params.extend(lora.params_mut()),
            }
        }
        params
    }

    /// How many parameters there are, and how many the adapters add.
    pub fn parameter_report(&self) -> ParameterReport {
        let count = |param: &Param<B>| param.tensor.rows() * param.tensor.cols();
        let original = self.layers.iter().flat_map(|(_, layer)| layer.base().params()).map(count).sum();
        let loras = self.layers.iter().filter_map(|(_, layer)| layer.lora());
        let introduced = loras.flat_map(|lora| [lora.adapter().a(), lora.adapter().b()]).map(count).sum();
        ParameterReport { original, introduced }
    }

    /// Logits, on the tape. `seed` makes the dropout of the adapters take part, with a mask of its own in every layer.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        let mut value = x;
        for (i, (_, layer)) in self.layers.iter().enumerate() {
            if i > 0 {
                value = tape.relu(value)?;
            }
            let seed = seed.map(|seed| seed.wrapping_mul(self.layers.len() as u64).wrapping_add(i as u64));
            value = match layer {
                Layer::Linear(linear) => linear.forward(tape, value)?,
                Layer::Lora(lora) => lora.forward(tape, value, seed)?,
            };
        }
        Ok(value)
    }

    /// Logits without a gradient: `m×k` in, `m×n` out, in host memory.
    pub fn predict(&self, backend: &B, x: Tensor<B>) -> Result<Vec<B::Elem>> {
        let mut tape = Tape::new(backend);
        let x = tape.input(x);
        let logits = self.forward(&mut tape, x, None)?;
        tape.value(logits)?.to_vec(backend)
    }

    fn loras_mut(&mut self) -> impl Iterator<Item = &mut LoraLinear<B>> {
        self.layers.iter_mut().filter_map(|(_, layer)| layer.lora_mut())
    }

    fn layer(&self, name: &str) -> Result<&Layer<B>> {
        let found = self.layers.iter().find(|(known, _)| known == name).map(|(_, layer)| layer);
        let known = || self.layers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| Error::NoSuchLayer { name: name.into(), known: known() })
    }

    fn resolve(&self, targets: Targets<'_>) -> Result<Vec<String>> {
        match targets {
            Targets::All => Ok(self.layers.iter().map(|(name, _)| name.clone()).collect()),
            Targets::Names(names) => names.iter().map(|name| self.layer(name).map(|_| name.to_string())).collect(),
        }
    }
}
