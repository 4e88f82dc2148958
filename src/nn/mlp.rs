//! A multi-layer perceptron of named linear layers, with or without adapters.

use super::{Adaptable, Adapters, Layer, Linear};
use crate::autograd::{Tape, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::Tensor;

/// Linear layers with ReLU between them. The methods for layers and adapters are those of [`Adaptable`].
#[derive(Debug)]
pub struct Mlp<B: Backend> {
    layers: Vec<(String, Layer<B>)>,
}

impl<B: Backend> Adaptable<B> for Mlp<B> {
    fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)> {
        self.layers.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)> {
        self.layers.iter_mut().map(|(name, layer)| (name.as_str(), layer))
    }
}

impl<B: Backend> Mlp<B> {
    /// New layers `linear1`, `linear2`, … for sizes such as `[784, 1000, 2000, 10]`. Errors: [`Error::Value`] for fewer than two sizes.
    pub fn new(backend: &B, sizes: &[usize], rng: &mut Rng) -> Result<Self> {
        Error::unless(sizes.len() >= 2, "mlp", "sizes", format_args!("{sizes:?}"), "at least two")?;
        let layers = sizes.windows(2).map(|pair| Linear::new(backend, pair[0], pair[1], rng)).collect::<Result<_>>()?;
        Self::from_layers(layers)
    }

    /// From layers, first to last, named `linear1`, `linear2`, … Errors: [`Error::Value`] for an empty list, [`Error::Shape`] if a layer
    /// does not fit the one before it.
    pub fn from_layers(layers: Vec<Linear<B>>) -> Result<Self> {
        Error::unless(!layers.is_empty(), "mlp", "layers", layers.len(), "at least 1")?;
        for pair in layers.windows(2) {
            let (got, want) = (pair[1].weight().tensor.shape(), pair[0].weight().tensor.rows());
            if got.cols != want {
                return Err(Error::Shape { verb: "mlp", name: "weight", got, want: (got.rows, want).into() });
            }
        }
        let name = |(i, linear)| (format!("linear{}", i + 1), Layer::from(linear));
        Ok(Self { layers: layers.into_iter().enumerate().map(name).collect() })
    }

    /// From layers with names, first to last; for example the names that a PEFT folder has for them.
    ///
    /// Errors: those of [`from_layers`](Self::from_layers), and [`Error::Value`] for two layers of one name.
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

    /// The logits, on the tape. `seed` is for training: with it the dropout of the adapters is applied, with a different mask in each
    /// layer.
    ///
    /// Errors: [`Error::InLayer`] for an `x` of the wrong shape, those of the tape.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        self.forward_with(tape, x, seed, Adapters::Active)
    }

    /// [`forward`](Self::forward) with the adapters that the caller chooses.
    ///
    /// Errors: those of [`forward`](Self::forward); for named adapters [`Error::NoSuchAdapter`], and those of
    /// [`LoraLinear::forward_with`](super::LoraLinear::forward_with).
    pub fn forward_with<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, adapters: Adapters<'_>) -> Result<Var> {
        tape.value(x)?;
        if let Adapters::Named(names) = adapters {
            self.check_adapters(names)?;
        }
        let mut value = x;
        for (i, (name, layer)) in self.layers.iter().enumerate() {
            if i > 0 {
                value = tape.relu(value)?;
            }
            let seed = seed.map(|seed| seed.wrapping_mul(self.layers.len() as u64).wrapping_add(i as u64));
            value = layer.forward_with(tape, value, seed, adapters).map_err(|error| error.in_layer(name))?;
        }
        Ok(value)
    }

    /// The logits without a gradient, in host memory: `m×n` for an `x` of `m×k`. Consumes `x`; to keep it, pass a copy
    /// ([`Tensor::try_clone`]).
    pub fn predict(&self, backend: &B, x: Tensor<B>) -> Result<Vec<B::Elem>> {
        let mut tape = Tape::new(backend);
        let x = tape.input(x);
        let logits = self.forward(&mut tape, x, None)?;
        tape.value(logits)?.to_vec(backend)
    }

    /// [`predict`](Self::predict) with an adapter for each row; `None` is the base model. The rows of one adapter are computed as one
    /// batch.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] unless there is one name for each row, or while an adapter is merged.
    pub fn predict_mixed(&self, backend: &B, x: &Tensor<B>, adapters: &[Option<&str>]) -> Result<Vec<B::Elem>> {
        Error::unless(adapters.len() == x.rows(), "predict_mixed", "adapters", adapters.len(), "one a row")?;
        self.predict_mixed_with(backend, x, adapters, |tape, x, adapters| self.forward_with(tape, x, None, adapters))
    }
}
