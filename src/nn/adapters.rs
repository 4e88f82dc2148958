//! What users do with the adapters of a model, by name.

use super::{Adapter, Bias, DEFAULT, Layer, LoraConfig, LoraLinear, Mlp, Targets, Tuned};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::Rng;

impl<B: Backend> Mlp<B> {
    /// Freezes the model and puts a new adapter beside each target, [`DEFAULT`] by name, in place of one of that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Value`]. Nothing is changed then.
    pub fn add_adapters(&mut self, backend: &B, targets: Targets<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        self.add_adapter(backend, DEFAULT, targets, config, rng)
    }

    /// Freezes the model and puts a new adapter of this name beside each target. The first of a model is active; others wait for
    /// [`set_active`](Self::set_active). One of the same name is replaced as a whole, in layers that are no targets as well.
    ///
    /// Errors: [`Error::NoSuchLayer`] for a target or a module to save, [`Error::Value`] for settings out of range, no target, or what
    /// [`insert_adapter`](Self::insert_adapter) refuses. Nothing is changed then.
    pub fn add_adapter(
        &mut self,
        backend: &B,
        name: &str,
        targets: Targets<'_>,
        config: &LoraConfig,
        rng: &mut Rng,
    ) -> Result<()> {
        let targets = self.resolve(targets)?;
        let saved = |layer: &str| config.modules_to_save.iter().any(|end| layer.ends_with(end.as_str()));
        for end in &config.modules_to_save {
            if !self.layers.iter().any(|(layer, _)| layer.ends_with(end.as_str())) {
                self.layer(end)?; // says which layers there are
            }
        }
        let mut parts = Vec::new();
        for (layer, there) in self.layers() {
            let base = there.base();
            let part = if saved(layer) {
                Tuned::Whole(base.try_clone(backend)?)
            } else if targets.iter().any(|target| target == layer) {
                Tuned::Lora(Adapter::new(backend, base, config.clone(), rng)?)
            } else if let (Bias::All, Some(bias)) = (config.bias, base.bias()) {
                Tuned::Bias(Param::plus(bias.tensor.try_clone(backend)?))
            } else {
                continue;
            };
            parts.push((layer.to_string(), part));
        }
        self.insert_as("add_adapter", name, parts, self.would_be_active(name))
    }

    /// Freezes the model and puts these updates beside the layers they name: the adapter [`DEFAULT`], in place of one of that name.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for none, and for a layer that holds a merged adapter. Nothing
    /// is changed then.
    pub fn set_adapters(&mut self, adapters: Vec<(String, Adapter<B>)>) -> Result<()> {
        let parts = adapters.into_iter().map(|(layer, adapter)| (layer, Tuned::Lora(adapter))).collect();
        self.insert_as("set_adapters", DEFAULT, parts, self.would_be_active(DEFAULT))
    }

    /// Freezes the model and gives it an adapter: what it does to the layers it names. One of the same name is replaced as a whole:
    /// it goes from the layers that the new one does not name. The new one is active if that was, or if no other is.
    ///
    /// Errors: [`Error::NoSuchLayer`], [`Error::Shape`]; [`Error::Value`] for no part, a name with a dot or a slash, a layer that holds a
    /// merged adapter, and for two active adapters that each bring a bias or a whole layer. Nothing is changed then.
    pub fn insert_adapter(&mut self, name: &str, parts: Vec<(String, Tuned<B>)>) -> Result<()> {
        self.insert_as("insert_adapter", name, parts, self.would_be_active(name))
    }

    /// Whether an adapter of this name is active once it is inserted.
    fn would_be_active(&self, name: &str) -> bool {
        let active = self.active_adapters();
        active.is_empty() || active.contains(&name)
    }

    /// [`insert_adapter`](Self::insert_adapter) of one that is not active.
    #[cfg(feature = "svd")]
    pub(crate) fn insert_waiting(&mut self, name: &str, parts: Vec<(String, Tuned<B>)>) -> Result<()> {
        self.insert_as("begin_with", name, parts, false)
    }

    fn insert_as(&mut self, verb: &'static str, name: &str, parts: Vec<(String, Tuned<B>)>, activate: bool) -> Result<()> {
        Error::unless(!parts.is_empty(), verb, "parts", "none", "at least one")?;
        let enabled = self.loras().all(LoraLinear::is_enabled);
        for (layer, part) in &parts {
            match self.layer(layer)? {
                Layer::Linear(linear) => part.check(name, linear)?,
                Layer::Lora(lora) => lora.check_insert(verb, name, part, activate)?,
            }
        }
        self.loras().filter(|lora| lora.part(name).is_some()).try_for_each(|lora| lora.unmerged(verb))?;
        self.freeze();
        let layers: Vec<String> = parts.iter().map(|(layer, _)| layer.clone()).collect();
        self.keep_in(&layers, name)?;
        for (layer, part) in parts {
            let Some(at) = self.layers.iter().position(|(known, _)| *known == layer) else { continue };
            if let (_, Layer::Lora(lora)) = &mut self.layers[at] {
                lora.insert(name, part, activate)?;
                continue;
            }
            let (layer, there) = self.layers.remove(at);
            let mut lora = LoraLinear::bare(there.into_base());
            lora.set_enabled(enabled)?;
            lora.insert(name, part, activate)?;
            self.layers.insert(at, (layer, Layer::Lora(lora)));
        }
        Ok(())
    }

    /// Takes an adapter away; the layers it had stay frozen. If it was active, no other becomes so (PEFT picks one): without another
    /// active one the model is the base model, until [`set_active`](Self::set_active).
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged.
    pub fn delete_adapter(&mut self, name: &str) -> Result<()> {
        self.known(&[name])?;
        self.unmerged("delete_adapter")?;
        self.keep_in(&[], name)
    }

    /// Takes an adapter away from all layers but these. A layer that has no other is a plain one again, and stays frozen.
    fn keep_in(&mut self, layers: &[String], name: &str) -> Result<()> {
        let others = self.layers.iter_mut().filter(|(layer, _)| !layers.contains(layer));
        others.filter_map(|(_, there)| there.lora_mut()).try_for_each(|lora| lora.remove(name))?;
        let bare = |(name, layer)| match layer {
            Layer::Lora(lora) if lora.parts.is_empty() => (name, Layer::Linear(lora.into_base())),
            other => (name, other),
        };
        self.layers = std::mem::take(&mut self.layers).into_iter().map(bare).collect();
        Ok(())
    }

    /// Takes every adapter away; the layers that had one stay frozen. Errors: [`Error::Value`] while one is merged.
    pub fn unload(&mut self) -> Result<()> {
        self.unmerged("unload")?;
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

    /// The names of all adapters, in the order of the layers that have them.
    pub fn adapter_names(&self) -> Vec<&str> {
        unique(self.loras().flat_map(|lora| lora.parts().map(|(name, _)| name)))
    }

    /// The names of those that take part.
    pub fn active_adapters(&self) -> Vec<&str> {
        unique(self.loras().flat_map(|lora| lora.active().iter().map(String::as_str)))
    }

    /// Makes these adapters take part, added up in this order, and no others; only they are trainable.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged, or for two that each bring a bias or a whole layer.
    /// Nothing is changed then.
    #[doc(alias = "set_adapter")]
    pub fn set_active(&mut self, names: &[&str]) -> Result<()> {
        self.known(names)?;
        self.loras().try_for_each(|lora| lora.can_activate(names))?;
        self.loras_mut().try_for_each(|lora| lora.set_active(names))
    }

    /// Switches the adapters on or off. Errors: [`Error::Value`] while one is merged.
    pub fn set_adapters_enabled(&mut self, enabled: bool) -> Result<()> {
        self.unmerged("set_adapters_enabled")?;
        self.loras_mut().try_for_each(|lora| lora.set_enabled(enabled))
    }

    /// Makes the scaling of an adapter `scale` times what its settings say. Not saved: the files have the settings.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged, or unless `scale` is finite.
    pub fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.known(&[name])?;
        self.unmerged("set_scale")?;
        self.loras_mut().try_for_each(|lora| lora.set_scale(name, scale))
    }

    /// Makes room for a larger rank in an adapter, so that [`swap_adapter`](Self::swap_adapter) can put others of up to that rank in
    /// its place. What it computes stays the same.
    ///
    /// Its `A` and `B` are new parameters then, unless there was as much room.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] while one is merged; [`Error::TooLarge`], [`Error::OutOfMemory`]. Nothing is
    /// changed then.
    pub fn reserve_rank(&mut self, backend: &B, name: &str, rank: usize) -> Result<()> {
        self.known(&[name])?;
        self.unmerged("reserve_rank")?;
        let roomier = |lora: &LoraLinear<B>| lora.adapter(name).map_or(Ok(None), |adapter| adapter.roomier(backend, rank));
        let factors = self.loras().map(roomier).collect::<Result<Vec<_>>>()?;
        for (lora, factors) in self.loras_mut().zip(factors) {
            if let (Some(Tuned::Lora(adapter)), Some(factors)) = (lora.part_mut(name), factors) {
                [adapter.a, adapter.b] = factors;
            }
        }
        Ok(())
    }

    /// The layers that an adapter adds an update to, and the updates.
    pub fn adapters<'s>(&'s self, name: &'s str) -> impl Iterator<Item = (&'s str, &'s Adapter<B>)> {
        self.layers().filter_map(move |(layer, there)| Some((layer, there.adapter(name)?)))
    }

    /// Overwrites `A` and `B` of an adapter that is not merged.
    #[cfg(feature = "svd")]
    pub(crate) fn write_factors(&mut self, backend: &B, layer: &str, name: &str, [a, b]: [&[B::Elem]; 2]) -> Result<()> {
        let there = self.layers.iter_mut().find(|(known, _)| known == layer).and_then(|(_, there)| there.lora_mut());
        if let Some((_, Tuned::Lora(adapter))) = there.and_then(|lora| lora.parts.iter_mut().find(|(known, _)| known == name)) {
            adapter.a.tensor.copy_from_slice(backend, a)?;
            adapter.b.tensor.copy_from_slice(backend, b)?;
        }
        Ok(())
    }

    /// Errors: [`Error::NoSuchAdapter`] for the first of these that no layer has.
    pub(crate) fn known(&self, names: &[&str]) -> Result<()> {
        let known = self.adapter_names();
        match names.iter().find(|name| !known.contains(name)) {
            Some(name) => Err(Error::NoSuchAdapter { name: name.to_string(), known: known.join(", ") }),
            None => Ok(()),
        }
    }

    pub(crate) fn unmerged(&self, verb: &'static str) -> Result<()> {
        self.loras().try_for_each(|lora| lora.unmerged(verb))
    }

    fn resolve(&self, targets: Targets<'_>) -> Result<Vec<String>> {
        let none = matches!(targets, Targets::Names([]));
        Error::unless(!none, "add_adapter", "targets", "none", "at least one layer")?;
        match targets {
            Targets::All => Ok(self.layers.iter().map(|(name, _)| name.clone()).collect()),
            Targets::Names(names) => names.iter().map(|name| self.layer(name).map(|_| name.to_string())).collect(),
        }
    }
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
