//! A linear layer with adapters: `y = x·Wᵀ + bias + Σ scaling·(x·Aᵀ)·Bᵀ`, the sum over those that are active.

use super::merge::Merged;
use super::{Adapter, Linear, dora};
use crate::autograd::{LoraParams, Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::error::{Error, Result};
use crate::op::Dropout;
use crate::tensor::Shape;

/// The name of an adapter that nobody named, as in PEFT.
pub const DEFAULT: &str = "default";

/// Which adapters take part in a forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Adapters<'a> {
    /// Those that are [active](LoraLinear::active).
    #[default]
    Active,
    /// These, added up in this order; an empty list is the base model. A layer passes over a name that it does not have:
    /// [`Adaptable::check_adapters`](super::Adaptable::check_adapters) refuses one that no layer has.
    Named(&'a [&'a str]),
}

/// What an adapter does to a layer.
#[derive(Debug)]
pub enum LayerAdapter<B: Backend> {
    /// Adds a low-rank update.
    Lora(Adapter<B>),
    /// Nothing, but has a bias `1×n` in place of the layer's: `bias = "all"`.
    Bias(Param<B>),
    /// Takes the layer's place: `modules_to_save`.
    Whole(Linear<B>),
}

impl<B: Backend> LayerAdapter<B> {
    /// The low-rank update, if it is one.
    pub fn adapter(&self) -> Option<&Adapter<B>> {
        match self {
            LayerAdapter::Lora(adapter) => Some(adapter),
            LayerAdapter::Bias(_) | LayerAdapter::Whole(_) => None,
        }
    }

    /// Its parameters.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        let (adapter, bias, whole) = match self {
            LayerAdapter::Lora(adapter) => (Some(adapter), None, None),
            LayerAdapter::Bias(bias) => (None, Some(bias), None),
            LayerAdapter::Whole(linear) => (None, None, Some(linear)),
        };
        adapter.into_iter().flat_map(Adapter::params).chain(bias).chain(whole.into_iter().flat_map(Linear::params))
    }

    /// Its parameters.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let (adapter, bias, whole) = match self {
            LayerAdapter::Lora(adapter) => (Some(adapter), None, None),
            LayerAdapter::Bias(bias) => (None, Some(bias), None),
            LayerAdapter::Whole(linear) => (None, None, Some(linear)),
        };
        adapter.into_iter().flat_map(Adapter::params_mut).chain(bias).chain(whole.into_iter().flat_map(Linear::params_mut))
    }

    /// What it has in place of the layer's bias.
    pub(super) fn bias(&self) -> Option<&Param<B>> {
        match self {
            LayerAdapter::Lora(adapter) => adapter.bias.as_ref(),
            LayerAdapter::Bias(bias) => Some(bias),
            LayerAdapter::Whole(linear) => linear.bias(),
        }
    }

    /// What takes the layer's place, if it does.
    fn whole(&self) -> Option<&Linear<B>> {
        match self {
            LayerAdapter::Whole(linear) => Some(linear),
            LayerAdapter::Lora(_) | LayerAdapter::Bias(_) => None,
        }
    }

    fn is_whole(&self) -> bool {
        self.whole().is_some()
    }

    fn set_trainable(&mut self, trainable: bool) {
        self.params_mut().for_each(|param| param.trainable = trainable);
    }

    /// What every insertion passes. Errors: [`Error::Value`] for a name that no adapter can have; those of `fits`.
    pub(super) fn check(&self, name: &str, base: &Linear<B>) -> Result<()> {
        check_name(name)?;
        self.fits(base)
    }

    /// Errors: [`Error::Shape`] unless it is for a layer of this size; [`Error::Value`] for a bias in place of none.
    pub(crate) fn fits(&self, base: &Linear<B>) -> Result<()> {
        let same = |name, got: Shape, want: Shape| {
            if got == want { Ok(()) } else { Err(Error::Shape { verb: "lora", name, got, want }) }
        };
        if let LayerAdapter::Lora(adapter) = self {
            adapter.fits(base)?;
        }
        if let LayerAdapter::Whole(linear) = self {
            same("weight", linear.shape(), base.shape())?;
        }
        match (self.bias(), base.bias()) {
            (Some(ours), Some(theirs)) => same("bias", ours.tensor.shape(), theirs.tensor.shape()),
            (Some(_), None) => Error::unless(false, "lora", "bias", "there", "missing, as the layer's is"),
            (None, _) => Ok(()),
        }
    }
}

/// A linear layer with adapters by name, of which some are active; they can be switched off, and merged into the weight.
///
/// What is merged, and the weight it is in, is not handed out to be changed: unmerging relies on it.
#[derive(Debug)]
pub struct LoraLinear<B: Backend> {
    pub(super) base: Linear<B>,
    pub(super) parts: Vec<(String, LayerAdapter<B>)>,
    active: Vec<String>,
    enabled: bool,
    pub(super) merged: Vec<Merged<B>>,
}

impl<B: Backend> LoraLinear<B> {
    /// Freezes the layer and puts an adapter beside it, named [`DEFAULT`] and active. Errors: [`Error::Shape`] if the adapter is
    /// for another layer.
    pub fn new(base: Linear<B>, adapter: Adapter<B>) -> Result<Self> {
        adapter.fits(&base)?;
        let mut layer = Self::without_adapters(base);
        layer.freeze();
        layer.insert(DEFAULT, LayerAdapter::Lora(adapter), true)?;
        Ok(layer)
    }

    /// No adapter yet, and nothing frozen.
    pub(super) fn without_adapters(base: Linear<B>) -> Self {
        Self { base, parts: Vec::new(), active: Vec::new(), enabled: true, merged: Vec::new() }
    }

    pub(super) fn freeze(&mut self) {
        self.base.params_mut().for_each(|param| param.trainable = false);
    }

    /// The layer without its adapters. Holds the update of those that are [`merged`](Self::merged).
    pub fn base(&self) -> &Linear<B> {
        &self.base
    }

    /// The adapters, in the order they were added.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &LayerAdapter<B>)> {
        self.parts.iter().map(|(name, part)| (name.as_str(), part))
    }

    /// What an adapter does here, if anything.
    pub fn part(&self, name: &str) -> Option<&LayerAdapter<B>> {
        self.parts().find(|(known, _)| *known == name).map(|(_, part)| part)
    }

    /// The low-rank update of this name, if there is one.
    pub fn adapter(&self, name: &str) -> Option<&Adapter<B>> {
        self.part(name).and_then(LayerAdapter::adapter)
    }

    /// Keeps the frozen weight packed; see [`Backend::keep_packed`].
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.base.keep_packed(backend, passes)
    }

    /// Takes every adapter away; the layer stays frozen.
    pub fn into_base(mut self) -> Linear<B> {
        self.base.keep_dense();
        self.base
    }

    /// The name of the one that takes the layer's place just now: active or merged.
    pub(super) fn whole(&self) -> Option<&str> {
        let here = |name: &str| self.active.iter().any(|active| active == name) || self.merged().any(|merged| merged == name);
        self.parts().find(|(name, part)| part.is_whole() && here(name)).map(|(name, _)| name)
    }

    /// Takes every adapter away, in place. Only while nothing is merged: what is in the weight would stay.
    pub(super) fn unload(&mut self) {
        self.parts.clear();
        self.active.clear();
        self.merged.clear();
        self.enabled = true;
    }

    /// Takes every adapter away and keeps what is merged: the weight with the updates, or what takes the layer's place.
    pub(super) fn unload_merged(&mut self) {
        let whole = self.whole().map(String::from);
        let at = self.parts.iter().position(|(name, _)| Some(name) == whole.as_ref());
        if let Some((_, LayerAdapter::Whole(linear))) = at.map(|at| self.parts.swap_remove(at)) {
            self.base = linear;
            self.freeze();
        }
        self.base.keep_dense();
        self.unload();
    }

    /// The weight, the bias, and the parameters of the adapters: all that is not merged.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let Self { base, parts, merged, .. } = self;
        let base = merged.is_empty().then_some(base).into_iter().flat_map(Linear::params_mut);
        let free = parts.iter_mut().filter(|(name, _)| !merged.iter().any(|merged| merged.name() == name));
        base.chain(free.flat_map(|(_, part)| part.params_mut()))
    }

    /// Puts an adapter beside the layer, in place of one of the same name. Only what is active is trainable. What an adapter of that
    /// name does to other layers of a model stays: [`Adaptable::insert_adapter`](super::Adaptable::insert_adapter) replaces it as a whole.
    ///
    /// Errors: [`Error::Shape`]; [`Error::Value`] for a name with a dot or a slash, while an adapter is merged, or for active ones that
    /// exclude each other.
    pub fn insert(&mut self, name: &str, part: LayerAdapter<B>, active: bool) -> Result<()> {
        self.check_insert("insert", name, &part, active)?;
        match self.parts.iter_mut().find(|(known, _)| known == name) {
            Some((_, there)) => *there = part,
            None => self.parts.push((name.into(), part)),
        }
        if active && !self.active.iter().any(|known| known == name) {
            self.active.push(name.into());
        }
        self.mark_trainable(Some(name));
        Ok(())
    }

    /// The errors of [`insert`](Self::insert), said of what was called.
    pub(super) fn check_insert(&self, verb: &'static str, name: &str, part: &LayerAdapter<B>, active: bool) -> Result<()> {
        self.unmerged(verb)?;
        part.check(name, &self.base)?;
        let others = self.active.iter().filter(|known| active && *known != name).filter_map(|name| self.part(name));
        together(verb, others.chain([part]))
    }

    /// Takes an adapter away, if it is there. Errors: [`Error::Value`] while one is merged.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.unmerged("remove")?;
        self.parts.retain(|(known, _)| known != name);
        self.active.retain(|known| known != name);
        Ok(())
    }

    /// The names of those that take part, in the order they are added up.
    pub fn active(&self) -> &[String] {
        &self.active
    }

    /// Makes these take part, and no others; only they are trainable. A name that this layer does not have is passed over.
    ///
    /// Errors: [`Error::Value`] while an adapter is merged, or for two that each have a bias in place of the layer's, or one that
    /// takes the layer's place beside another.
    #[doc(alias = "set_adapter")]
    pub fn set_active<S: AsRef<str>>(&mut self, names: &[S]) -> Result<()> {
        self.can_activate("set_active", names)?;
        self.active.clear();
        for name in names.iter().map(S::as_ref) {
            if self.part(name).is_some() && !self.active.iter().any(|active| active == name) {
                self.active.push(name.into());
            }
        }
        self.mark_trainable(None);
        Ok(())
    }

    pub(super) fn can_activate<S: AsRef<str>>(&self, verb: &'static str, names: &[S]) -> Result<()> {
        self.unmerged(verb)?;
        together(verb, names.iter().filter_map(|name| self.part(name.as_ref())))
    }

    fn mark_trainable(&mut self, only: Option<&str>) {
        for (name, part) in &mut self.parts {
            if only.is_none_or(|only| only == name) {
                part.set_trainable(self.active.contains(name));
            }
        }
    }

    /// Whether the active adapters take part.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Switches the adapters on or off. Errors: [`Error::Value`] while one is merged.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        self.unmerged("set_enabled")?;
        self.enabled = enabled;
        Ok(())
    }

    /// Makes the scaling of an adapter `scale` times what its settings say, if it is there: how strong it is, as long as the model
    /// lives. Errors: [`Error::Value`] while one is merged, or unless `scale` is finite.
    pub fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.unmerged("set_scale")?;
        Error::unless(scale.is_finite(), "set_scale", "scale", scale, "a finite number")?;
        if let Some((_, LayerAdapter::Lora(adapter))) = self.parts.iter_mut().find(|(known, _)| known == name) {
            adapter.strength = scale;
        }
        Ok(())
    }

    /// Whether the weight holds an update.
    pub fn is_merged(&self) -> bool {
        !self.merged.is_empty()
    }

    /// The names of those that are in the weight, in the order they were merged.
    pub fn merged(&self) -> impl Iterator<Item = &str> {
        self.merged.iter().map(Merged::name)
    }

    pub(super) fn unmerged(&self, verb: &'static str) -> Result<()> {
        let Some(merged) = self.merged.last() else { return Ok(()) };
        Error::unless(false, verb, "adapter", format_args!("`{}`, merged into the weight", merged.name()), "unmerged first")
    }

    /// The base layer, and what the active adapters add that is not merged; the base layer alone while they are off.
    ///
    /// Dropout is for training: it takes part where `seed` is given, and the masks are a function of it.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        self.forward_as(tape, x, seed, &self.active)
    }

    /// [`forward`](Self::forward) with the adapters that the caller chooses, active or not.
    ///
    /// Errors: those of the tape. For [named](Adapters::Named) ones also [`Error::Value`] while an adapter is merged, or for two that
    /// cannot be active together: see [`set_active`](Self::set_active).
    pub fn forward_with<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, adapters: Adapters<'_>) -> Result<Var> {
        match adapters {
            Adapters::Active => self.forward(tape, x, seed),
            Adapters::Named(names) => {
                self.can_activate("forward", names)?;
                self.forward_as(tape, x, seed, names)
            }
        }
    }

    fn forward_as<'m, S: AsRef<str>>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, active: &[S]) -> Result<Var> {
        let parts = || self.taking_part(active);
        let base = parts().find_map(LayerAdapter::whole).unwrap_or(&self.base);
        let bias = parts().find_map(LayerAdapter::bias).or(base.bias());
        let mut y = None;
        for (place, adapter) in parts().filter_map(LayerAdapter::adapter).enumerate() {
            // Each has a mask of its own; the seeds of layers and steps differ in their lower bits.
            let seed = seed.filter(|_| adapter.config.dropout > 0.0).map(|seed| seed ^ ((place as u64) << 48));
            let dropout = seed.map(|seed| Dropout::new(adapter.config.dropout, seed)).transpose()?;
            if let Some(magnitude) = &adapter.magnitude {
                y = Some(dora::forward(tape, x, (base, bias), (adapter, magnitude), (dropout, y))?);
                continue;
            }
            let first = y.is_none();
            let (w, bias) = (first.then(|| base.layer_weight()), bias.filter(|_| first));
            let (a, b, lora_bias, scale) = (&adapter.a, &adapter.b, adapter.lora_bias.as_ref(), adapter.scaling());
            let update = tape.lora_linear(x, LoraParams { w, bias, a, b, lora_bias, scale, dropout })?;
            y = Some(y.map_or(Ok(update), |y| tape.add(y, update))?);
        }
        y.map_or_else(|| tape.linear(x, base.layer_weight(), bias), Ok)
    }

    /// What has a say in the output: those of the active ones that are not merged, and one that takes the layer's place, merged or not.
    fn taking_part<'m, S: AsRef<str>>(&'m self, active: &[S]) -> impl Iterator<Item = &'m LayerAdapter<B>> {
        let free = |name: &&S| self.enabled && self.merged().all(|merged| merged != name.as_ref());
        let free = active.iter().filter(free).filter_map(|name| self.part(name.as_ref()));
        let merged = self.merged().filter_map(|name| self.part(name)).filter(|part| part.is_whole());
        free.chain(merged)
    }

    /// What an adapter does here, to be overwritten; only while nothing is merged.
    pub(super) fn part_mut(&mut self, name: &str) -> Option<&mut LayerAdapter<B>> {
        let part = self.parts.iter_mut().find(|(known, _)| known == name).map(|(_, part)| part);
        part.filter(|_| self.merged.is_empty())
    }
}

/// Errors: [`Error::Value`] for adapters that cannot be active together in a layer: of two biases in place of the layer's only one can
/// be used, and a whole layer leaves nothing for others to add to.
fn together<'p, B: Backend + 'p>(verb: &'static str, parts: impl Iterator<Item = &'p LayerAdapter<B>>) -> Result<()> {
    let parts: Vec<_> = parts.collect();
    let whole = parts.iter().any(|part| part.is_whole());
    Error::unless(!whole || parts.len() == 1, verb, "adapter", "beside one that takes the layer's place", "one of the two")?;
    let biases = parts.iter().filter(|part| part.bias().is_some()).count();
    Error::unless(biases <= 1, verb, "adapter", "one of several with a bias of their own", "one such")
}

/// Errors: [`Error::Value`] for what PEFT cannot call an adapter, or a folder cannot be called.
fn check_name(name: &str) -> Result<()> {
    let fine = !name.is_empty() && !name.contains(['.', '/', '\\', '\0']);
    Error::unless(fine, "adapter", "name", name, "a name without dots and slashes")
}
