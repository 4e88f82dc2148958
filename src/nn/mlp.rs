//! A multi-layer perceptron of named linear layers, with or without adapters.

use super::{Adapter, Linear, LoraLinear};
use crate::autograd::{Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::Tensor;

/// A layer of a model: plain, or with adapters.
#[derive(Debug)]
pub enum Layer<B: Backend> {
    /// `y = x·Wᵀ + bias`
    Linear(Linear<B>),
    /// The same with adapters, each plus `scaling·(x·Aᵀ)·Bᵀ`
    Lora(LoraLinear<B>),
}

impl<B: Backend> Layer<B> {
    /// The layer without its adapters.
    pub fn base(&self) -> &Linear<B> {
        match self {
            Layer::Linear(linear) => linear,
            Layer::Lora(lora) => lora.base(),
        }
    }

    /// The layer with its adapters, if it has one.
    pub fn lora(&self) -> Option<&LoraLinear<B>> {
        match self {
            Layer::Linear(_) => None,
            Layer::Lora(lora) => Some(lora),
        }
    }

    /// The low-rank update of this name, if it has one; see [`DEFAULT`](super::DEFAULT).
    pub fn adapter(&self, name: &str) -> Option<&Adapter<B>> {
        self.lora().and_then(|lora| lora.adapter(name))
    }

    /// The layer with its adapters, if it has one.
    pub fn lora_mut(&mut self) -> Option<&mut LoraLinear<B>> {
        match self {
            Layer::Linear(_) => None,
            Layer::Lora(lora) => Some(lora),
        }
    }

    pub(super) fn into_base(self) -> Linear<B> {
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
    /// Those with these names, in full: `linear1`, and an error for a name that no layer has. PEFT's list picks also each layer whose
    /// name ends in a dot and one of these, and its pattern each whose whole name matches; in a folder they are read so here as well.
    Names(&'a [&'a str]),
}

/// Linear layers with relu between them.
#[derive(Debug)]
pub struct Mlp<B: Backend> {
    pub(super) layers: Vec<(String, Layer<B>)>,
}

impl<B: Backend> Mlp<B> {
    /// Layers `linear1`, `linear2`, … for sizes such as `[784, 1000, 2000, 10]`. Errors: [`Error::Value`] for fewer than two
    /// sizes.
    pub fn new(backend: &B, sizes: &[usize], rng: &mut Rng) -> Result<Self> {
        Error::unless(sizes.len() >= 2, "mlp", "sizes", format_args!("{sizes:?}"), "at least two")?;
        let layers = sizes.windows(2).map(|pair| Linear::new(backend, pair[0], pair[1], rng)).collect::<Result<_>>()?;
        Self::from_layers(layers)
    }

    /// From layers that fit one another; they are called `linear1`, `linear2`, … Errors: [`Error::Value`] for none, [`Error::Shape`].
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

    /// From layers that fit one another, first to last, by names of one's own: those that a PEFT folder has for them, say.
    ///
    /// Errors: as [`from_layers`](Self::from_layers), and [`Error::Value`] for a name that comes twice.
    pub fn from_named_layers(layers: Vec<(String, Linear<B>)>) -> Result<Self> {
        let (names, layers): (Vec<String>, Vec<Linear<B>>) = layers.into_iter().unzip();
        let mut model = Self::from_layers(layers)?;
        for (at, name) in names.into_iter().enumerate() {
            let new = model.layers[..at].iter().all(|(known, _)| *known != name);
            Error::unless(new, "mlp", "layers", format!("two of the name `{name}`"), "a name of its own for each")?;
            model.layers[at].0 = name;
        }
        Ok(model)
    }

    /// The layers by name, first to last.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)> {
        self.layers.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    /// The layers by name, first to last.
    pub fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)> {
        self.layers.iter_mut().map(|(name, layer)| (name.as_str(), layer))
    }

    /// Every parameter that a gradient may be found for: the base model's, then, layer by layer, the adapters'.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.layers.iter_mut().flat_map(|(_, layer)| {
            let (linear, lora) = match layer {
                Layer::Linear(linear) => (Some(linear), None),
                Layer::Lora(lora) => (None, Some(lora)),
            };
            linear.into_iter().flat_map(Linear::params_mut).chain(lora.into_iter().flat_map(LoraLinear::params_mut))
        })
    }

    /// Logits, on the tape. `seed` makes the dropout of the adapters take part, with a mask of its own in every layer.
    ///
    /// A model goes over a tape once: rows that belong to one step are one batch. A second time is fine without a gradient; else
    /// [`Tape::backward`] refuses the parameters that were used twice. For several batches a step there is
    /// [`Gradients::add`](crate::autograd::Gradients::add).
    ///
    /// Errors: [`Error::InLayer`] for an `x` that does not fit, those of the tape.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        self.forward_with(tape, x, seed, LoraLinear::forward)
    }

    /// [`forward`](Self::forward), with what a layer with adapters does told from outside.
    pub(super) fn forward_with<'m>(
        &'m self,
        tape: &mut Tape<'m, B>,
        x: Var,
        seed: Option<u64>,
        lora: impl Fn(&'m LoraLinear<B>, &mut Tape<'m, B>, Var, Option<u64>) -> Result<Var>,
    ) -> Result<Var> {
        tape.value(x)?;
        let mut value = x;
        for (i, (name, layer)) in self.layers.iter().enumerate() {
            if i > 0 {
                value = tape.relu(value)?;
            }
            let seed = seed.map(|seed| seed.wrapping_mul(self.layers.len() as u64).wrapping_add(i as u64));
            let made = match layer {
                Layer::Linear(linear) => linear.forward(tape, value),
                Layer::Lora(layer) => lora(layer, tape, value, seed),
            };
            value = made.map_err(|error| error.in_layer(name))?;
        }
        Ok(value)
    }

    /// Logits without a gradient: `m×k` in, `m×n` out, in host memory. Takes `x`, as a tape does; who needs it again has
    /// [`Tensor::try_clone`].
    pub fn predict(&self, backend: &B, x: Tensor<B>) -> Result<Vec<B::Elem>> {
        let mut tape = Tape::new(backend);
        let x = tape.input(x);
        let logits = self.forward(&mut tape, x, None)?;
        tape.value(logits)?.to_vec(backend)
    }

    /// Keeps the weight of every layer packed, where they all stay frozen; see [`Backend::keep_packed`].
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.layers.iter_mut().try_for_each(|(_, layer)| match layer {
            Layer::Linear(linear) => linear.keep_packed(backend, passes),
            Layer::Lora(lora) => lora.keep_packed(backend, passes),
        })
    }

    /// A layer by its name. Errors: [`Error::NoSuchLayer`].
    pub fn layer(&self, name: &str) -> Result<&Layer<B>> {
        let found = self.layers.iter().find(|(known, _)| known == name).map(|(_, layer)| layer);
        let known = || self.layers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| Error::NoSuchLayer { name: name.into(), known: known() })
    }

    pub(super) fn loras(&self) -> impl Iterator<Item = &LoraLinear<B>> {
        self.layers.iter().filter_map(|(_, layer)| layer.lora())
    }

    pub(super) fn loras_mut(&mut self) -> impl Iterator<Item = &mut LoraLinear<B>> {
        self.layers.iter_mut().filter_map(|(_, layer)| layer.lora_mut())
    }
}
