//! Models with adapters: a model lends its linear layers by name, and everything that is done with adapters is written once, here.

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
/// A model implements two methods, which lend its layers by name. All others are there then, and so are the folders of
/// `lowrank::adapter`: the names are those that PEFT's files have for the layers, such as `model.layers.0.self_attn.q_proj`.
/// [`Mlp`](super::Mlp) is one such model. `examples/attention` has attention blocks.
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
/// Both methods lend the same layers in the same order, and no two of one name; adding an adapter checks it.
pub trait Adaptable<B: Backend>: Sized {
    /// The layers by name, first to last.
    fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)>;

    /// The layers by name, first to last.
    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)>;

    /// The parameters that are in no layer, such as embeddings and the weights of norms; none unless the model says so.
    /// [`freeze`](Self::freeze) freezes them, and [`parameter_report`](Self::parameter_report) counts them.
    fn other_params(&self) -> impl Iterator<Item = &Param<B>> {
        std::iter::empty()
    }

    /// Those of [`other_params`](Self::other_params), to be changed. A model that has such parameters implements both.
    fn other_params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        std::iter::empty()
    }

    /// A layer by its name. Errors: [`Error::NoSuchLayer`].
    fn layer(&self, name: &str) -> Result<&Layer<B>> {
        let found = self.layers().find(|(known, _)| *known == name).map(|(_, layer)| layer);
        found.ok_or_else(|| Error::NoSuchLayer { name: name.into(), known: layer_names(self).join(", ") })
    }

    /// The parameters of the layers: of each the weight and the bias, then those of its adapters; all that is not merged.
    fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.layers_mut().flat_map(|(_, layer)| layer.params_mut())
    }

    /// Keeps the weight of every layer packed, where they all stay frozen; see [`Backend::keep_packed`].
    fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.layers_mut().try_for_each(|(_, layer)| layer.keep_packed(backend, passes))
    }

    /// Freezes the model and puts a new adapter beside each target, [`DEFAULT`] by name, in place of one of that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Value`]. Nothing is changed then.
    fn add_adapters(&mut self, backend: &B, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        self.add_adapter(backend, DEFAULT, targets, config, rng)
    }

    /// Freezes the model and puts a new adapter of this name beside each target. The first of a model is active; others wait for
    /// [`set_active`](Self::set_active). One of the same name is replaced as a whole, in layers that are no targets as well.
    ///
    /// Errors: [`Error::NoSuchLayer`] for a target or a module to save, [`Error::Value`] for settings out of range, no target, or what
    /// [`insert_adapter`](Self::insert_adapter) refuses. Nothing is changed then.
    fn add_adapter(&mut self, backend: &B, name: &str, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        let parts = insert::new_parts(self, backend, targets, config, rng)?;
        insert::insert(self, "add_adapter", name, parts)
    }

    /// Freezes the model and puts these updates beside the layers they name: the adapter [`DEFAULT`], in place of one of that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for none, and for a layer that holds a merged adapter. Nothing
    /// is changed then.
    fn set_adapters(&mut self, adapters: Vec<(String, Adapter<B>)>) -> Result<()> {
        let parts = adapters.into_iter().map(|(layer, adapter)| (layer, LayerAdapter::Lora(adapter))).collect();
        insert::insert(self, "set_adapters", DEFAULT, parts)
    }

    /// Freezes the model and gives it an adapter: what it does to the layers it names. One of the same name is replaced as a whole:
    /// it goes from the layers that the new one does not name. The new one is active if that was, or if no other is.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for no part, a name with a dot or a slash, a layer that holds a
    /// merged adapter, two active adapters that each bring a bias or a whole layer, and two layers of one name. Nothing is changed
    /// then.
    fn insert_adapter(&mut self, name: &str, parts: Vec<(String, LayerAdapter<B>)>) -> Result<()> {
        insert::insert(self, "insert_adapter", name, parts)
    }

    /// Takes an adapter away; the layers it had stay frozen. If it was active, no other becomes so (PEFT picks one): without another
    /// active one the model is the base model, until [`set_active`](Self::set_active).
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged.
    fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.check_adapters(&[name])?;
        unmerged(self, "delete_adapter")?;
        loras_mut(self).try_for_each(|lora| lora.remove(name))
    }

    /// Takes every adapter away; the layers that had one stay frozen. Errors: [`Error::Value`] while one is merged.
    fn unload(&mut self) -> Result<()> {
        unmerged(self, "unload")?;
        self.layers_mut().for_each(|(_, layer)| layer.unload());
        Ok(())
    }

    /// Makes every weight and bias of the base model frozen, and all [`other_params`](Self::other_params); adapters stay trainable.
    fn freeze(&mut self) {
        self.layers_mut().for_each(|(_, layer)| layer.freeze());
        self.other_params_mut().for_each(|param| param.trainable = false);
    }

    /// The names of all adapters, in the order of the layers that have them.
    fn adapter_names(&self) -> Vec<&str> {
        unique(loras(self).flat_map(|lora| lora.parts().map(|(name, _)| name)))
    }

    /// The names of those that take part.
    fn active_adapters(&self) -> Vec<&str> {
        unique(loras(self).flat_map(|lora| lora.active().iter().map(String::as_str)))
    }

    /// The layers that an adapter adds an update to, and the updates.
    fn adapters<'s>(&'s self, name: &'s str) -> impl Iterator<Item = (&'s str, &'s Adapter<B>)>
    where
        B: 's,
    {
        self.layers().filter_map(move |(layer, there)| Some((layer, there.adapter(name)?)))
    }

    /// Errors: [`Error::NoSuchAdapter`] for the first of these that no layer has.
    fn check_adapters(&self, names: &[&str]) -> Result<()> {
        let known = self.adapter_names();
        match names.iter().find(|name| !known.contains(name)) {
            Some(name) => Err(Error::NoSuchAdapter { name: name.to_string(), known: known.join(", ") }),
            None => Ok(()),
        }
    }

    /// Makes these adapters take part, added up in this order, and no others; only they are trainable.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged, or for two that each bring a bias or a whole layer.
    /// Nothing is changed then.
    #[doc(alias = "set_adapter")]
    fn set_active(&mut self, names: &[&str]) -> Result<()> {
        self.check_adapters(names)?;
        loras(self).try_for_each(|lora| lora.can_activate("set_active", names))?;
        loras_mut(self).try_for_each(|lora| lora.set_active(names))
    }

    /// Switches the adapters on or off. Errors: [`Error::Value`] while one is merged.
    fn set_adapters_enabled(&mut self, enabled: bool) -> Result<()> {
        unmerged(self, "set_adapters_enabled")?;
        loras_mut(self).try_for_each(|lora| lora.set_enabled(enabled))
    }

    /// Makes the scaling of an adapter `scale` times what its settings say. Not saved: the files have the settings.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged, or unless `scale` is finite.
    fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.check_adapters(&[name])?;
        unmerged(self, "set_scale")?;
        loras_mut(self).try_for_each(|lora| lora.set_scale(name, scale))
    }

    /// Makes room for a larger rank in an adapter, so that [`swap_adapter`](Self::swap_adapter) can put others of up to that rank in
    /// its place. What it computes stays the same.
    ///
    /// Its `A` and `B` are new parameters then, unless there was as much room.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged; [`Error::TooLarge`], [`Error::OutOfMemory`]. Nothing is
    /// changed then.
    fn reserve_rank(&mut self, backend: &B, name: &str, rank: usize) -> Result<()> {
        self.check_adapters(&[name])?;
        unmerged(self, "reserve_rank")?;
        swap::reserve_rank(self, backend, name, rank)
    }

    /// Writes another adapter's numbers and settings over those of an adapter that is there, PEFT's "hotswap". Its tensors stay
    /// where they are: a smaller rank is filled up with zeros, and a layer that the new one does not adapt adds nothing. It brings its
    /// own scaling: what [`set_scale`](Self::set_scale) said of the old one is forgotten.
    ///
    /// The parameters stay as well, and [`Adam`](super::Adam) has the moments of the old numbers under them: who trains on begins
    /// with a new one.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::NoSuchLayer`] for a layer that the old one does not change; [`Error::Value`] for a
    /// rank without [room](Self::reserve_rank), for magnitudes, biases or whole layers that only one of the two has, and while an
    /// adapter is merged; [`Error::Shape`]. Nothing is changed then.
    fn swap_adapter(&mut self, backend: &B, name: &str, parts: Vec<(String, LayerAdapter<B>)>) -> Result<()> {
        self.check_adapters(&[name])?;
        unmerged(self, "swap_adapter")?;
        swap::swap(self, backend, name, &parts)
    }

    /// Merges the active adapters into the weights, safely, rounding to the nearest. What is merged already stays merged once.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as).
    fn merge_adapters(&mut self, backend: &B) -> Result<()> {
        let active: Vec<String> = self.active_adapters().into_iter().map(String::from).collect();
        merged::merge(self, backend, &active, Merge::default())
    }

    /// Merges these adapters, active or not, in this order, on top of those that are merged.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::InLayer`] while adapters are off, for a bias of the update where a layer has no bias,
    /// and, if the merge is to be safe, for numbers that would not be finite. Nothing is changed then.
    fn merge_as(&mut self, backend: &B, names: &[&str], how: Merge) -> Result<()> {
        self.check_adapters(names)?;
        merged::merge(self, backend, names, how)
    }

    /// Takes every merged adapter out of the weights, which then are what they were, bit for bit.
    fn unmerge_adapters(&mut self, backend: &B) -> Result<()> {
        loras_mut(self).try_for_each(|lora| lora.unmerge(backend))
    }

    /// Takes one merged adapter out of the weights, which then are what they would be had only the others been merged.
    ///
    /// Errors: [`Error::NoSuchAdapter`].
    fn unmerge_adapter(&mut self, backend: &B, name: &str) -> Result<()> {
        self.check_adapters(&[name])?;
        loras_mut(self).try_for_each(|lora| lora.unmerge_one(backend, name))
    }

    /// Merges the active adapters and takes all away: a plain model that does what this one did.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as). Nothing is changed then.
    fn merge_and_unload(&mut self, backend: &B) -> Result<()> {
        self.merge_adapters(backend)?;
        self.layers_mut().for_each(|(_, layer)| layer.unload_merged());
        Ok(())
    }

    /// What exact unmerging costs just now, over all layers.
    fn kept(&self) -> UnmergeCost {
        let sum = |sum: UnmergeCost, kept: UnmergeCost| UnmergeCost {
            weights: sum.weights + kept.weights,
            bytes: sum.bytes + kept.bytes,
        };
        loras(self).map(LoraLinear::kept).fold(UnmergeCost::default(), sum)
    }

    /// The layers that have adapters, first to last, and those.
    #[doc(alias = "get_layer_status")]
    fn status(&self) -> Vec<LayerStatus> {
        let layers = self.layers().filter_map(|(name, layer)| Some((name, layer.lora()?)));
        layers.map(|(name, lora)| LayerStatus::of(name, lora)).collect()
    }

    /// How many parameters there are, how many the adapters add, and how many may be trained.
    #[doc(alias = "print_trainable_parameters")]
    fn parameter_report(&self) -> ParameterReport {
        ParameterReport::of(self)
    }

    /// The outputs for a batch whose parts go through adapters of their own, in host memory. A part is a row of `x`, or a sequence of
    /// as many rows as the others: `adapters` names one for each part, and `None` is the base model.
    ///
    /// `forward` is the forward pass of the model: from the parts of one adapter, one after the other, and that adapter, to as many
    /// output rows for each. It hands the [`Adapters`] on to [`Layer::forward_with`].
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
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] for rows that are not as many equal parts as there are names, or while an
    /// adapter is merged; those of `forward`.
    fn predict_mixed_with<'m>(
        &'m self,
        backend: &'m B,
        x: &Tensor<B>,
        adapters: &[Option<&str>],
        forward: impl Fn(&mut Tape<'m, B>, Var, Adapters<'_>) -> Result<Var>,
    ) -> Result<Vec<B::Elem>> {
        let named: Vec<&str> = adapters.iter().flatten().copied().collect();
        unmerged(self, "predict_mixed")?;
        self.check_adapters(&named)?;
        mixed::predict(backend, x, adapters, forward)
    }
}

/// Which layers get an adapter: PEFT's `target_modules`.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// Every layer that the model lends.
    All,
    /// Those with these names, or whose names end with a dot and one of these: `q_proj` is `model.layers.0.self_attn.q_proj` and all
    /// others of that name, as in PEFT. One that picks no layer is an error.
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

/// Each name once, in the order they come.
fn unique<'n>(names: impl Iterator<Item = &'n str>) -> Vec<&'n str> {
    names.fold(Vec::new(), |mut unique, name| {
        if !unique.contains(&name) {
            unique.push(name);
        }
        unique
    })
}

/// Errors: [`Error::Value`] while an adapter is merged.
pub(crate) fn unmerged<B: Backend>(model: &impl Adaptable<B>, verb: &'static str) -> Result<()> {
    loras(model).try_for_each(|lora| lora.unmerged(verb))
}

/// Errors: [`Error::Value`] for two layers of one name, as in a file they would be one.
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

/// Errors: [`Error::Value`] for two layers of one name, and unless both methods of the model lend the same layers.
pub(crate) fn check_layers<B: Backend>(model: &mut impl Adaptable<B>, verb: &'static str) -> Result<()> {
    distinct(model, verb)?;
    let names: Vec<String> = layer_names(model).into_iter().map(String::from).collect();
    let same = model.layers_mut().map(|(name, _)| name).eq(names.iter().map(String::as_str));
    Error::unless(same, verb, "layers_mut", "not the layers of `layers`", "the same layers in the same order")
}

#[cfg(feature = "svd")]
pub(crate) use insert::{insert_inactive, write_factors};
