//! Models with adapters. A model lends its linear layers by name; the trait provides everything else for adapters.

mod insert;
mod merged;
mod mixed;
mod status;
mod swap;

pub use status::{AdapterStatus, LayerStatus, ParameterReport};

use super::{Adapter, Adapters, DEFAULT, Layer, LayerAdapter, LoraConfig, LoraLinear, Merge, UnmergeCost};
use crate::autograd::{Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::Tensor;

/// A model whose linear layers can have adapters.
///
/// A model implements two methods that lend its layers by name; the other methods are provided. `lowrank::adapter` reads and writes
/// the adapters of any such model as PEFT folders, so a layer should have the name that it has in PEFT's files, such as
/// `model.layers.0.self_attn.q_proj`. [`Mlp`](super::Mlp) is one such model; `examples/attention` shows one with attention blocks.
///
/// ```
/// use lowrank::autograd::{Tape, Var};
/// use lowrank::nn::{Adaptable, Layer, Linear, LoraConfig, Targets};
/// use lowrank::{Backend, Cpu, random::Rng};
///
/// /// `y = x + down(relu(up(x)))`
/// struct Residual<B: Backend> {
///     layers: [(&'static str, Layer<B>); 2],
/// }
///
/// impl<B: Backend> Adaptable<B> for Residual<B> {
///     fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)> {
///         self.layers.iter().map(|(name, layer)| (*name, layer))
///     }
///     fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)> {
///         self.layers.iter_mut().map(|(name, layer)| (*name, layer))
///     }
/// }
///
/// impl<B: Backend> Residual<B> {
///     fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> lowrank::Result<Var> {
///         let [(_, up), (_, down)] = &self.layers;
///         let hidden = up.forward(tape, x, seed)?;
///         let hidden = tape.relu(hidden)?;
///         let y = down.forward(tape, hidden, seed)?;
///         tape.add(x, y)
///     }
/// }
///
/// let (cpu, rng) = (Cpu::<f32>::new()?, &mut Rng::new(0));
/// let (up, down) = (Linear::new(&cpu, 4, 8, rng)?, Linear::new(&cpu, 8, 4, rng)?);
/// let mut model = Residual { layers: [("up_proj", up.into()), ("down_proj", down.into())] };
/// model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), rng)?;
/// model.merge_adapters(&cpu)?;
/// model.unmerge_adapters(&cpu)?;
/// println!("{:?}", model.parameter_report());
/// # Ok::<(), lowrank::Error>(())
/// ```
///
/// Both methods must lend the same layers in the same order, with distinct names; adding an adapter checks this.
pub trait Adaptable<B: Backend>: Sized {
    /// The layers by name, first to last.
    fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)>;

    /// The layers by name, first to last, to be changed.
    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)>;

    /// The parameters that are in no layer, such as embeddings and the weights of norms. None by default.
    /// [`freeze`](Self::freeze) freezes them, and [`parameter_report`](Self::parameter_report) counts them.
    fn other_params(&self) -> impl Iterator<Item = &Param<B>> {
        std::iter::empty()
    }

    /// The parameters of [`other_params`](Self::other_params), to be changed. A model that has such parameters implements both methods.
    fn other_params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        std::iter::empty()
    }

    /// A layer by its name. Errors: [`Error::NoSuchLayer`].
    fn layer(&self, name: &str) -> Result<&Layer<B>> {
        let found = self.layers().find(|(known, _)| *known == name).map(|(_, layer)| layer);
        found.ok_or_else(|| Error::NoSuchLayer { name: name.into(), known: layer_names(self).join(", ") })
    }

    /// The parameters of each layer: weight, bias, then those of its adapters. A merged adapter, and the weight and bias that it is
    /// merged into, are left out.
    fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.layers_mut().flat_map(|(_, layer)| layer.params_mut())
    }

    /// Prepacks the weight of every layer, for models whose base stays frozen; see [`Backend::keep_packed`].
    fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.layers_mut().try_for_each(|(_, layer)| layer.keep_packed(backend, passes))
    }

    /// Freezes the model and adds a new adapter named [`DEFAULT`] to each target. It replaces an adapter of that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Value`]. Nothing is changed then.
    fn add_adapters(&mut self, backend: &B, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        self.add_adapter(backend, DEFAULT, targets, config, rng)
    }

    /// Freezes the model and adds a new adapter of this name to each target. The first adapter of a model is active at once; later ones
    /// need [`set_active`](Self::set_active). An adapter of the same name is replaced as a whole, also in layers that are not targets.
    ///
    /// Errors: [`Error::NoSuchLayer`] for a target or a module to save; [`Error::Value`] for settings out of range or no target; those of
    /// [`insert_adapter`](Self::insert_adapter). Nothing is changed then.
    fn add_adapter(&mut self, backend: &B, name: &str, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        let parts = insert::new_parts(self, backend, targets, config, rng)?;
        insert::insert(self, "add_adapter", name, parts)
    }

    /// Freezes the model and adds these updates, each with the name of its layer, as the adapter [`DEFAULT`]. It replaces an adapter of
    /// that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for an empty list, or for a layer that holds a merged adapter.
    /// Nothing is changed then.
    fn set_adapters(&mut self, adapters: Vec<(String, Adapter<B>)>) -> Result<()> {
        let parts = adapters.into_iter().map(|(layer, adapter)| (layer, LayerAdapter::Lora(adapter))).collect();
        insert::insert(self, "set_adapters", DEFAULT, parts)
    }

    /// Freezes the model and adds an adapter; each part has the name of its layer. An adapter of the same name is replaced as a whole:
    /// it is also removed from layers that `parts` does not name. The new adapter is active if the replaced one was, or if no adapter
    /// is active.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for an empty list, a name with a dot or a slash, a layer that
    /// holds a merged adapter, two active adapters that each bring a bias or a whole layer, and two layers of one name. Nothing is
    /// changed then.
    fn insert_adapter(&mut self, name: &str, parts: Vec<(String, LayerAdapter<B>)>) -> Result<()> {
        insert::insert(self, "insert_adapter", name, parts)
    }

    /// Removes an adapter; its layers stay frozen. If it was the only active one, the model computes as the base model until
    /// [`set_active`](Self::set_active) is called (PEFT activates another adapter by itself).
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while an adapter is merged.
    fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.check_adapters(&[name])?;
        check_unmerged(self, "delete_adapter")?;
        loras_mut(self).try_for_each(|lora| lora.remove(name))
    }

    /// Removes all adapters; the layers that had one stay frozen. Errors: [`Error::Value`] while an adapter is merged.
    fn unload(&mut self) -> Result<()> {
        check_unmerged(self, "unload")?;
        self.layers_mut().for_each(|(_, layer)| layer.unload());
        Ok(())
    }

    /// Freezes every weight and bias of the base model, and all [`other_params`](Self::other_params). Adapters stay trainable.
    fn freeze(&mut self) {
        self.layers_mut().for_each(|(_, layer)| layer.freeze());
        self.other_params_mut().for_each(|param| param.trainable = false);
    }

    /// The names of all adapters, in the order of the layers that have them.
    fn adapter_names(&self) -> Vec<&str> {
        unique(loras(self).flat_map(|lora| lora.parts().map(|(name, _)| name)))
    }

    /// The names of the active adapters.
    fn active_adapters(&self) -> Vec<&str> {
        unique(loras(self).flat_map(|lora| lora.active().iter().map(String::as_str)))
    }

    /// The low-rank updates of an adapter, each with the name of its layer.
    fn adapters<'s>(&'s self, name: &'s str) -> impl Iterator<Item = (&'s str, &'s Adapter<B>)>
    where
        B: 's,
    {
        self.layers().filter_map(move |(layer, there)| Some((layer, there.adapter(name)?)))
    }

    /// Errors: [`Error::NoSuchAdapter`] for the first name that no layer has.
    fn check_adapters(&self, names: &[&str]) -> Result<()> {
        let known = self.adapter_names();
        match names.iter().find(|name| !known.contains(name)) {
            Some(name) => Err(Error::NoSuchAdapter { name: name.to_string(), known: known.join(", ") }),
            None => Ok(()),
        }
    }

    /// Makes these adapters the active ones, summed in this order. Only active adapters are trainable.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while an adapter is merged, or for two that each bring a bias or a whole layer.
    /// Nothing is changed then.
    #[doc(alias = "set_adapter")]
    fn set_active(&mut self, names: &[&str]) -> Result<()> {
        self.check_adapters(names)?;
        loras(self).try_for_each(|lora| lora.check_activate("set_active", names))?;
        loras_mut(self).try_for_each(|lora| lora.set_active(names))
    }

    /// Enables or disables all adapters. While they are disabled, the model computes as the base model. Errors: [`Error::Value`] while
    /// an adapter is merged.
    fn set_adapters_enabled(&mut self, enabled: bool) -> Result<()> {
        check_unmerged(self, "set_adapters_enabled")?;
        loras_mut(self).try_for_each(|lora| lora.set_enabled(enabled))
    }

    /// Multiplies the scaling that the settings of an adapter give by `scale`. It is not saved with the adapter.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while an adapter is merged, or unless `scale` is finite.
    fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.check_adapters(&[name])?;
        check_unmerged(self, "set_scale")?;
        loras_mut(self).try_for_each(|lora| lora.set_scale(name, scale))
    }

    /// Pads `A` and `B` of an adapter with zeros to a larger rank, so that [`swap_adapter`](Self::swap_adapter) can replace it by
    /// adapters of up to that rank. The outputs of the model stay the same.
    ///
    /// `A` and `B` become new parameters, unless they have that rank already.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while an adapter is merged; [`Error::TooLarge`], [`Error::OutOfMemory`]. Nothing
    /// is changed then.
    fn reserve_rank(&mut self, backend: &B, name: &str, rank: usize) -> Result<()> {
        self.check_adapters(&[name])?;
        check_unmerged(self, "reserve_rank")?;
        swap::reserve_rank(self, backend, name, rank)
    }

    /// Overwrites the tensors and settings of an adapter in place with those of another: PEFT's "hotswap". A smaller rank is padded
    /// with zeros. In a layer that `parts` does not name the adapter adds nothing. The scaling is that of the new settings, without
    /// the factor that [`set_scale`](Self::set_scale) gave the old adapter.
    ///
    /// The parameters keep their identity, so an [`Adam`](super::Adam) still holds the moments of the old adapter: to train further,
    /// create a new one.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::NoSuchLayer`] for a layer that the old adapter does not change; [`Error::Value`] for a
    /// rank above the [reserved one](Self::reserve_rank), for magnitudes, biases or whole layers that only one of the two adapters
    /// has, and while an adapter is merged; [`Error::Shape`]. Nothing is changed then.
    fn swap_adapter(&mut self, backend: &B, name: &str, parts: Vec<(String, LayerAdapter<B>)>) -> Result<()> {
        self.check_adapters(&[name])?;
        check_unmerged(self, "swap_adapter")?;
        swap::swap(self, backend, name, &parts)
    }

    /// Merges the active adapters into the weights with [`Merge::default`]: checked for finite results, rounded to the nearest. An
    /// adapter that is already merged is not merged again.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as).
    fn merge_adapters(&mut self, backend: &B) -> Result<()> {
        let active: Vec<String> = self.active_adapters().into_iter().map(String::from).collect();
        merged::merge(self, backend, &active, Merge::default())
    }

    /// Merges these adapters, active or not, in this order, on top of those that are merged.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::InLayer`] while adapters are disabled, for a bias of the update where a layer has no
    /// bias, and, with [`Merge::safe`], for results that are not finite. Nothing is changed then.
    fn merge_as(&mut self, backend: &B, names: &[&str], how: Merge) -> Result<()> {
        self.check_adapters(names)?;
        merged::merge(self, backend, names, how)
    }

    /// Takes all merged adapters out of the weights, which are then equal to the original ones, bit for bit.
    fn unmerge_adapters(&mut self, backend: &B) -> Result<()> {
        loras_mut(self).try_for_each(|lora| lora.unmerge(backend))
    }

    /// Takes one merged adapter out of the weights. They are then what they would be if only the others had been merged.
    ///
    /// Errors: [`Error::NoSuchAdapter`].
    fn unmerge_adapter(&mut self, backend: &B, name: &str) -> Result<()> {
        self.check_adapters(&[name])?;
        loras_mut(self).try_for_each(|lora| lora.unmerge_one(backend, name))
    }

    /// Merges the active adapters and removes all adapters. The result is a plain model with the same outputs.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as). Nothing is changed then.
    fn merge_and_unload(&mut self, backend: &B) -> Result<()> {
        self.merge_adapters(backend)?;
        self.layers_mut().for_each(|(_, layer)| layer.unload_merged());
        Ok(())
    }

    /// The host memory that exact unmerging takes at present, over all layers.
    fn kept(&self) -> UnmergeCost {
        let sum = |sum: UnmergeCost, cost: UnmergeCost| UnmergeCost {
            weights: sum.weights + cost.weights,
            bytes: sum.bytes + cost.bytes,
        };
        loras(self).map(LoraLinear::kept).fold(UnmergeCost::default(), sum)
    }

    /// The layers that have adapters, first to last, with the state of each adapter.
    #[doc(alias = "get_layer_status")]
    fn status(&self) -> Vec<LayerStatus> {
        let layers = self.layers().filter_map(|(name, layer)| Some((name, layer.lora()?)));
        layers.map(|(name, lora)| LayerStatus::of(name, lora)).collect()
    }

    /// The numbers of parameters: of the base model, of the adapters, and of those that are trainable.
    #[doc(alias = "print_trainable_parameters")]
    fn parameter_report(&self) -> ParameterReport {
        ParameterReport::of(self)
    }

    /// The outputs, in host memory, for a batch in which each part names its adapter. `x` is divided into `adapters.len()` parts of
    /// equal numbers of rows, such as single rows or sequences; `None` is the base model.
    ///
    /// `forward` is the forward pass of the model. It is called once for each adapter, with all parts of that adapter as one batch,
    /// passes the [`Adapters`] on to [`Layer::forward_with`], and returns the same number of rows for each part.
    ///
    /// ```
    /// # use lowrank::nn::{Adaptable, LoraConfig, Mlp, Targets};
    /// # use lowrank::{Cpu, Tensor, random::Rng};
    /// # let (cpu, rng) = (Cpu::<f32>::new()?, &mut Rng::new(0));
    /// # let mut model = Mlp::new(&cpu, &[4, 3], rng)?;
    /// # model.add_adapter(&cpu, "terse", Targets::All, &LoraConfig::new(2, 4.0), rng)?;
    /// let x = Tensor::from_slice(&cpu, (6, 4), &[0.1; 24])?; // two sequences of three rows
    /// let forward = |tape: &mut _, x, adapters: lowrank::nn::Adapters<'_>| model.forward_with(tape, x, None, adapters);
    /// let y = model.predict_mixed_with(&cpu, &x, &[Some("terse"), None], forward)?;
    /// assert_eq!(y.len(), 6 * 3);
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] if the rows of `x` cannot be divided into equal parts, or while an adapter is
    /// merged; those of `forward`.
    fn predict_mixed_with<'m>(
        &'m self,
        backend: &'m B,
        x: &Tensor<B>,
        adapters: &[Option<&str>],
        forward: impl Fn(&mut Tape<'m, B>, Var, Adapters<'_>) -> Result<Var>,
    ) -> Result<Vec<B::Elem>> {
        let named: Vec<&str> = adapters.iter().flatten().copied().collect();
        check_unmerged(self, "predict_mixed")?;
        self.check_adapters(&named)?;
        mixed::predict(backend, x, adapters, forward)
    }
}

/// The layers that get an adapter: PEFT's `target_modules`.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// Every layer that the model lends.
    All,
    /// The layers with one of these names, or with a name that ends with a dot and one of these. As in PEFT, `q_proj` matches
    /// `model.layers.0.self_attn.q_proj` and the `q_proj` of every other layer. A name that matches no layer is an error.
    Names(&'a [&'a str]),
}

fn loras<B: Backend>(model: &impl Adaptable<B>) -> impl Iterator<Item = &LoraLinear<B>> {
    model.layers().filter_map(|(_, layer)| layer.lora())
}

fn loras_mut<B: Backend>(model: &mut impl Adaptable<B>) -> impl Iterator<Item = &mut LoraLinear<B>> {
    model.layers_mut().filter_map(|(_, layer)| layer.lora_mut())
}

fn layer_mut<'m, B: Backend>(model: &'m mut impl Adaptable<B>, name: &str) -> Option<&'m mut Layer<B>> {
    model.layers_mut().find(|(known, _)| *known == name).map(|(_, layer)| layer)
}

fn layer_names<B: Backend>(model: &impl Adaptable<B>) -> Vec<&str> {
    model.layers().map(|(name, _)| name).collect()
}

/// The distinct names, in the order of their first occurrence.
fn unique<'n>(names: impl Iterator<Item = &'n str>) -> Vec<&'n str> {
    names.fold(Vec::new(), |mut unique, name| {
        if !unique.contains(&name) {
            unique.push(name);
        }
        unique
    })
}

/// Errors: [`Error::Value`] while an adapter is merged.
pub(crate) fn check_unmerged<B: Backend>(model: &impl Adaptable<B>, verb: &'static str) -> Result<()> {
    loras(model).try_for_each(|lora| lora.check_unmerged(verb))
}

/// Errors: [`Error::Value`] for two layers of one name: a file could hold only one of them.
pub(crate) fn distinct<B: Backend>(model: &impl Adaptable<B>, verb: &'static str) -> Result<()> {
    let mut names = layer_names(model);
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Error::unless(false, verb, "layers", format!("two of the name `{}`", pair[0]), "a name of its own for each")
        }
        None => Ok(()),
    }
}

/// Errors: [`Error::Value`] for two layers of one name, and unless `layers` and `layers_mut` lend the same layers.
pub(crate) fn check_layers<B: Backend>(model: &mut impl Adaptable<B>, verb: &'static str) -> Result<()> {
    distinct(model, verb)?;
    let names: Vec<String> = layer_names(model).into_iter().map(String::from).collect();
    let same = model.layers_mut().map(|(name, _)| name).eq(names.iter().map(String::as_str));
    Error::unless(same, verb, "layers_mut", "not the layers of `layers`", "the same layers in the same order")
}

#[cfg(feature = "svd")]
pub(crate) use insert::{insert_inactive, write_factors};
