//! Training several adapters in one pass over the base model.

use super::host::{HostAdapter, HostUpdate};
use super::{AdapterBank, Mixed, MixedRows};
use crate::autograd::{Gradients, Param};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::nn::{Adam, Adaptable, Adapter, LayerAdapter, LoraConfig};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// Adapters that are trained together: each row of a batch trains one of them. Each has an optimizer of its own: its learning rate, its
/// moments, and its count of steps, which goes on only where it takes part.
#[derive(Debug)]
pub struct Sweep<B: Backend> {
    bank: AdapterBank<B>,
    adapters: Vec<Trained<B>>,
    /// `true`: the loss of an adapter is the mean over its own rows, as if it was trained alone. `false`: the mean over all rows of the
    /// batch. `true` by default; it needs a loss that is a mean over rows, all of which have a label.
    pub own_means: bool,
}

/// The settings of one adapter of a [`Sweep`].
#[derive(Debug)]
pub struct Recipe<B: Backend> {
    /// Its name.
    pub name: String,
    /// Its rank, scaling and initialisation.
    pub config: LoraConfig,
    /// Its optimizer.
    pub adam: Adam<B>,
}

#[derive(Debug)]
struct Trained<B: Backend> {
    name: String,
    config: LoraConfig,
    scaling: f32,
    adam: Adam<B>,
    /// `A r×k` and `B` transposed, `r×n`, for each layer.
    layers: Vec<(String, [Param<B>; 2])>,
}

impl<B: Backend> Sweep<B> {
    /// New adapters beside all layers of a model, whose base they leave as it is.
    ///
    /// Errors: [`Error::Value`] for no adapter, two of one name, settings out of range, and those that ask for more than a low-rank
    /// update; [`Error::OutOfMemory`].
    pub fn new(backend: &B, model: &impl Adaptable<B>, recipes: Vec<Recipe<B>>, rng: &mut Rng) -> Result<Self> {
        let rank = recipes.iter().map(|recipe| recipe.config.rank).max().unwrap_or(0);
        Error::unless(rank > 0, "sweep", "recipes", "without an adapter", "one of rank 1 or more")?;
        let mut sweep =
            Self { bank: AdapterBank::new(backend, model, recipes.len(), rank)?, adapters: Vec::new(), own_means: true };
        for recipe in recipes {
            let new = sweep.bank.slot(&recipe.name).is_none();
            Error::unless(new, "sweep", "recipes", format!("two of the name `{}`", recipe.name), "a name of its own for each")?;
            let trained = Trained::new(backend, model, recipe, rng)?;
            sweep.bank.load(backend, &trained.name, &trained.on_host(backend)?)?;
            sweep.bank.set_pinned(&trained.name, true)?;
            sweep.adapters.push(trained);
        }
        Ok(sweep)
    }

    /// Assigns an adapter to each row of a batch; `None` trains none. Errors: [`Error::Value`] naming one that is not here, and its row.
    pub fn assign(&mut self, backend: &B, rows: &[Option<&str>]) -> Result<MixedRows<B>> {
        self.bank.assign_loaded(backend, rows, 1)
    }

    /// For a forward pass, with gradients for the adapters that take part. Errors: [`Error::Value`] for rows of another bank.
    pub fn mixed<'m>(&'m self, rows: &'m MixedRows<B>) -> Result<Mixed<'m, B>> {
        Ok(self.bank.mixed(rows)?.trained(self))
    }

    /// Updates the adapters that have a gradient, each by its own optimizer. Errors: those of [`Adam::step`]; [`Error::Device`].
    pub fn step(&mut self, backend: &B, gradients: &Gradients<B>) -> Result<()> {
        for (slot, Trained { adam, layers, scaling, .. }) in self.adapters.iter_mut().enumerate() {
            let takes_part = layers.iter().flat_map(|(_, params)| params).any(|param| gradients.get(param).is_some());
            if !takes_part {
                continue;
            }
            adam.step(backend, layers.iter_mut().flat_map(|(_, params)| params), gradients)?;
            for ((_, params), (_, bank)) in layers.iter().zip(&mut self.bank.layers) {
                bank.load_parts(backend, slot, params.each_ref().map(|param| &param.tensor), *scaling)?;
            }
        }
        Ok(())
    }

    /// The names of the adapters, in the order of their recipes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|adapter| adapter.name.as_str())
    }

    /// The optimizer of an adapter, to change its learning rate. Errors: [`Error::NoSuchAdapter`].
    pub fn adam_mut(&mut self, name: &str) -> Result<&mut Adam<B>> {
        let at = self.position(name)?;
        Ok(&mut self.adapters[at].adam)
    }

    /// An adapter as it is now. Errors: [`Error::NoSuchAdapter`].
    pub fn adapter(&self, backend: &B, name: &str) -> Result<HostAdapter> {
        self.adapters[self.position(name)?].on_host(backend)
    }

    /// Overwrites the factors of an adapter. The optimizer keeps its moments.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::InLayer`] for a layer that is missing, or factors of another rank.
    pub fn set_adapter(&mut self, backend: &B, name: &str, adapter: &HostAdapter) -> Result<()> {
        let slot = self.position(name)?;
        let Trained { layers, scaling, .. } = &mut self.adapters[slot];
        let mut numbers = Vec::new();
        for (layer, [a, b]) in layers.iter() {
            let found = adapter.updates.get(layer).filter(|update| update.a.len() == a.count() && update.b.len() == b.count());
            let fine = Error::unless(found.is_some(), "set_adapter", "adapter", "without factors of the same rank", "one with");
            fine.map_err(|error| error.in_layer(layer))?;
            let narrow = |numbers: &[f32]| -> Vec<B::Elem> { numbers.iter().map(|&number| B::Elem::from_f32(number)).collect() };
            numbers.extend(found.map(|update| [narrow(&update.a), turned(&narrow(&update.b), a.tensor.rows())]));
        }
        for (((_, params), new), (_, bank)) in layers.iter_mut().zip(&numbers).zip(&mut self.bank.layers) {
            params.iter_mut().zip(new).try_for_each(|(param, new)| param.copy_from_slice(backend, new))?;
            bank.load_parts(backend, slot, params.each_ref().map(|param| &param.tensor), *scaling)?;
        }
        Ok(())
    }

    /// Puts the adapters beside the layers of a model, by their names, as they are now: to save them, or to go on alone.
    ///
    /// Errors: those of [`Adaptable::insert_adapter`].
    pub fn insert_into(&self, backend: &B, model: &mut impl Adaptable<B>) -> Result<()> {
        for Trained { name, config, layers, .. } in &self.adapters {
            let part = |(layer, [a, b]): &(String, [Param<B>; 2])| {
                let turned = turned(&b.tensor.to_vec(backend)?, b.tensor.cols());
                let b = Tensor::from_slice(backend, (b.tensor.cols(), b.tensor.rows()), &turned)?;
                let adapter = Adapter::from_tensors(a.tensor.try_clone(backend)?, b, config.clone())?;
                Ok((layer.clone(), LayerAdapter::Lora(adapter)))
            };
            model.insert_adapter(name, layers.iter().map(part).collect::<Result<_>>()?)?;
        }
        Ok(())
    }

    fn position(&self, name: &str) -> Result<usize> {
        let found = self.names().position(|known| known == name);
        let known = || self.names().collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| Error::NoSuchAdapter { name: name.into(), known: known() })
    }

    /// The parameters of the adapter in a slot, of a layer.
    pub(super) fn params_in(&self, slot: usize, layer: &str) -> Option<[&Param<B>; 2]> {
        let layers = &self.adapters.get(slot)?.layers;
        layers.iter().find(|(known, _)| known == layer).map(|(_, params)| params.each_ref())
    }
}

impl<B: Backend> Trained<B> {
    fn new(backend: &B, model: &impl Adaptable<B>, recipe: Recipe<B>, rng: &mut Rng) -> Result<Self> {
        let Recipe { name, config, adam } = recipe;
        config.check()?;
        let more =
            config.use_dora || config.lora_bias || config.bias != crate::nn::Bias::None || !config.modules_to_save.is_empty();
        Error::unless(!more, "sweep", "config", "one with DoRA, biases or whole layers", "low-rank updates alone")?;
        let scaling = config.scaling.of(config.alpha, config.rank);
        let mut layers = Vec::new();
        for (layer, there) in model.layers() {
            let Shape { rows: n, cols: k } = there.base().weight().tensor.shape();
            let (a, b) = config.init.factors(backend, (n, k, config.rank), rng)?;
            let b = Tensor::from_slice(backend, (config.rank, n), &turned(&b.to_vec(backend)?, config.rank))?;
            layers.push((layer.to_string(), [Param::new(a), Param::plus(b)]));
        }
        Ok(Self { name, config, scaling, adam, layers })
    }

    fn on_host(&self, backend: &B) -> Result<HostAdapter> {
        let mut adapter = HostAdapter::default();
        for (layer, [a, b]) in &self.layers {
            let wide = |numbers: Vec<B::Elem>| numbers.into_iter().map(Float::to_f32).collect();
            let (a, b) = (a.tensor.to_vec(backend)?, turned(&b.tensor.to_vec(backend)?, b.tensor.cols()));
            adapter.updates.insert(layer.clone(), HostUpdate { a: wide(a), b: wide(b), scaling: self.scaling });
        }
        Ok(adapter)
    }
}

/// The transpose of a row-major matrix with so many columns.
fn turned<T: Copy>(matrix: &[T], cols: usize) -> Vec<T> {
    let rows = matrix.len().checked_div(cols).unwrap_or(0);
    (0..matrix.len()).map(|e| matrix[e % rows * cols + e / rows]).collect()
}
