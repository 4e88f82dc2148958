//! A linear layer with adapters: `y = x·Wᵀ + bias + Σ scaling·(x·Aᵀ)·Bᵀ`, summed over the active adapters.

use super::merge::Merged;
use super::{Adapter, Linear, dora};
use crate::autograd::{LoraParams, Param, Tape, Var};
use crate::backend::{Backend, Passes};
use crate::error::{Error, Result};
use crate::op::Dropout;
use crate::tensor::Shape;

/// The name of an adapter that was added without a name, as in PEFT.
pub const DEFAULT: &str = "default";

/// The adapters that a forward pass uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Adapters<'a> {
    /// The [active](LoraLinear::active) ones.
    #[default]
    Active,
    /// These, summed in this order; an empty list is the base model. A layer ignores names that it does not have;
    /// [`Adaptable::check_adapters`](super::Adaptable::check_adapters) refuses a name that no layer has.
    Named(&'a [&'a str]),
}

/// The part of an adapter that belongs to one layer.
#[derive(Debug)]
pub enum LayerAdapter<B: Backend> {
    /// Adds a low-rank update.
    Lora(Adapter<B>),
    /// Replaces the layer's bias, `1×n`: `bias = "all"`.
    Bias(Param<B>),
    /// Replaces the whole layer: `modules_to_save`.
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

    /// Its parameters, to be changed.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let (adapter, bias, whole) = match self {
            LayerAdapter::Lora(adapter) => (Some(adapter), None, None),
            LayerAdapter::Bias(bias) => (None, Some(bias), None),
            LayerAdapter::Whole(linear) => (None, None, Some(linear)),
        };
        adapter.into_iter().flat_map(Adapter::params_mut).chain(bias).chain(whole.into_iter().flat_map(Linear::params_mut))
    }

    /// [`params_mut`](Self::params_mut) with names.
    #[cfg(feature = "adapter")]
    fn named_params_mut(&mut self) -> Vec<(&'static str, &mut Param<B>)> {
        match self {
            LayerAdapter::Lora(adapter) => adapter.named_params_mut().collect(),
            LayerAdapter::Bias(bias) => vec![("bias", bias)],
            LayerAdapter::Whole(linear) => linear.named_params_mut().collect(),
        }
    }

    /// The bias that replaces the layer's, if there is one.
    pub(super) fn bias(&self) -> Option<&Param<B>> {
        match self {
            LayerAdapter::Lora(adapter) => adapter.bias.as_ref(),
            LayerAdapter::Bias(bias) => Some(bias),
            LayerAdapter::Whole(linear) => linear.bias(),
        }
    }

    /// The layer that replaces the base layer, if there is one.
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

    /// Checks a part before it is inserted. Errors: [`Error::Value`] for a name that an adapter cannot have; those of `fits`.
    pub(super) fn check(&self, name: &str, base: &Linear<B>) -> Result<()> {
        check_name(name)?;
        self.fits(base)
    }

    /// Errors: [`Error::Shape`] unless it is for a layer of this size; [`Error::Value`] for a bias where the layer has none.
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
            (Some(_), None) => Error::unless(false, "lora", "bias", "set", "none, since the layer has no bias"),
            (None, _) => Ok(()),
        }
    }
}

/// A linear layer with named adapters. Some of them are active; all of them can be disabled, or merged into the weight.
///
/// While adapters are merged, neither their parameters nor the weight can be borrowed mutably, because exact unmerging relies on
/// both.
#[derive(Debug)]
pub struct LoraLinear<B: Backend> {
    pub(super) base: Linear<B>,
    pub(super) parts: Vec<(String, LayerAdapter<B>)>,
    active: Vec<String>,
    enabled: bool,
    pub(super) merged: Vec<Merged<B>>,
}

impl<B: Backend> LoraLinear<B> {
    /// Freezes the layer and adds an active adapter named [`DEFAULT`]. Errors: [`Error::Shape`] if the adapter does not fit the
    /// layer.
    pub fn new(base: Linear<B>, adapter: Adapter<B>) -> Result<Self> {
        adapter.fits(&base)?;
        let mut layer = Self::without_adapters(base);
        layer.freeze();
        layer.insert(DEFAULT, LayerAdapter::Lora(adapter), true)?;
        Ok(layer)
    }

    /// A layer without adapters; nothing is frozen.
    pub(super) fn without_adapters(base: Linear<B>) -> Self {
        Self { base, parts: Vec::new(), active: Vec::new(), enabled: true, merged: Vec::new() }
    }

    pub(super) fn freeze(&mut self) {
        self.base.params_mut().for_each(|param| param.trainable = false);
    }

    /// The layer without its adapters. Its weight includes the updates that are [`merged`](Self::merged).
    pub fn base(&self) -> &Linear<B> {
        &self.base
    }

    /// The adapters, in the order they were added.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &LayerAdapter<B>)> {
        self.parts.iter().map(|(name, part)| (name.as_str(), part))
    }

    /// The part of an adapter that belongs to this layer, if there is one.
    pub fn part(&self, name: &str) -> Option<&LayerAdapter<B>> {
        self.parts().find(|(known, _)| *known == name).map(|(_, part)| part)
    }

    /// The low-rank update of an adapter, if it has one here.
    pub fn adapter(&self, name: &str) -> Option<&Adapter<B>> {
        self.part(name).and_then(LayerAdapter::adapter)
    }

    /// Prepacks the frozen weight; see [`Backend::keep_packed`].
    pub fn keep_packed(&mut self, backend: &B, passes: Passes) -> Result<()> {
        self.base.keep_packed(backend, passes)
    }

    /// The layer without its adapters; it stays frozen, and a merged update stays in the weight.
    pub fn into_base(mut self) -> Linear<B> {
        self.base.keep_dense();
        self.base
    }

    /// The name of the active or merged adapter that replaces the layer, if there is one.
    pub(super) fn whole(&self) -> Option<&str> {
        let here = |name: &str| self.active.iter().any(|active| active == name) || self.merged().any(|merged| merged == name);
        self.parts().find(|(name, part)| part.is_whole() && here(name)).map(|(name, _)| name)
    }

    /// Removes all adapters. Called only while none is merged: a merged update would stay in the weight.
    pub(super) fn unload(&mut self) {
        self.parts.clear();
        self.active.clear();
        self.merged.clear();
        self.enabled = true;
    }

    /// Removes all adapters and keeps the merged result: the weight with its updates, or the layer that replaces it.
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

    /// The weight, the bias, and the parameters of the adapters. While adapters are merged, those and the base layer are left
    /// out.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let Self { base, parts, merged, .. } = self;
        let base = merged.is_empty().then_some(base).into_iter().flat_map(Linear::params_mut);
        let free = parts.iter_mut().filter(|(name, _)| !merged.iter().any(|merged| merged.name() == name));
        base.chain(free.flat_map(|(_, part)| part.params_mut()))
    }

    /// The weight, the bias, and the parameters of the adapters, with names that are unique in this layer: `weight`,
    /// `default.lora_A`.
    #[cfg(feature = "adapter")]
    pub(super) fn named_params_mut(&mut self) -> impl Iterator<Item = (String, &mut Param<B>)> {
        let base = self.base.named_params_mut().map(|(name, param)| (name.to_string(), param));
        let parts = self.parts.iter_mut().flat_map(|(adapter, part)| {
            part.named_params_mut().into_iter().map(move |(name, param)| (format!("{adapter}.{name}"), param))
        });
        base.chain(parts)
    }

    /// Adds an adapter to this layer, or replaces the one of that name here. Only active adapters are trainable. To replace an
    /// adapter in all layers of a model, use [`Adaptable::insert_adapter`](super::Adaptable::insert_adapter).
    ///
    /// Errors: [`Error::Shape`]; [`Error::Value`] for a name with a dot or a slash, while an adapter is merged, or for adapters
    /// that cannot be active together.
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

    /// Returns the errors that [`insert`](Self::insert) would, with `verb` as the method's name.
    pub(super) fn check_insert(&self, verb: &'static str, name: &str, part: &LayerAdapter<B>, active: bool) -> Result<()> {
        self.check_unmerged(verb)?;
        part.check(name, &self.base)?;
        let others = self.active.iter().filter(|known| active && *known != name).filter_map(|name| self.part(name));
        check_compatible(verb, others.chain([part]))
    }

    /// Removes an adapter, if the layer has it. Errors: [`Error::Value`] while an adapter is merged.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.check_unmerged("remove")?;
        self.parts.retain(|(known, _)| known != name);
        self.active.retain(|known| known != name);
        Ok(())
    }

    /// The names of the active adapters, in the order in which they are summed.
    pub fn active(&self) -> &[String] {
        &self.active
    }

    /// Makes these adapters the active ones; only they are trainable. Names that this layer does not have are ignored.
    ///
    /// Errors: [`Error::Value`] while an adapter is merged, for two that each replace the layer's bias, or for one that replaces
    /// the whole layer together with another.
    #[doc(alias = "set_adapter")]
    pub fn set_active<S: AsRef<str>>(&mut self, names: &[S]) -> Result<()> {
        self.check_activate("set_active", names)?;
        self.active.clear();
        for name in names.iter().map(S::as_ref) {
            if self.part(name).is_some() && !self.active.iter().any(|active| active == name) {
                self.active.push(name.into());
            }
        }
        self.mark_trainable(None);
        Ok(())
    }

    pub(super) fn check_activate<S: AsRef<str>>(&self, verb: &'static str, names: &[S]) -> Result<()> {
        self.check_unmerged(verb)?;
        check_compatible(verb, names.iter().filter_map(|name| self.part(name.as_ref())))
    }

    fn mark_trainable(&mut self, only: Option<&str>) {
        for (name, part) in &mut self.parts {
            if only.is_none_or(|only| only == name) {
                part.set_trainable(self.active.contains(name));
            }
        }
    }

    /// False while the adapters are disabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Enables or disables the adapters. Errors: [`Error::Value`] while an adapter is merged.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        self.check_unmerged("set_enabled")?;
        self.enabled = enabled;
        Ok(())
    }

    /// Multiplies the scaling that the settings of an adapter give by `scale`, if the layer has it. It is not saved with the
    /// adapter.
    /// Errors: [`Error::Value`] while an adapter is merged, or unless `scale` is finite.
    pub fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.check_unmerged("set_scale")?;
        Error::unless(scale.is_finite(), "set_scale", "scale", scale, "a finite number")?;
        if let Some((_, LayerAdapter::Lora(adapter))) = self.parts.iter_mut().find(|(known, _)| known == name) {
            adapter.strength = scale;
        }
        Ok(())
    }

    /// True while an adapter is merged.
    pub fn is_merged(&self) -> bool {
        !self.merged.is_empty()
    }

    /// The names of the merged adapters, in the order in which they were merged.
    pub fn merged(&self) -> impl Iterator<Item = &str> {
        self.merged.iter().map(Merged::name)
    }

    /// Errors: [`Error::Value`] while an adapter is merged.
    pub(super) fn check_unmerged(&self, verb: &'static str) -> Result<()> {
        let Some(merged) = self.merged.last() else { return Ok(()) };
        Error::unless(false, verb, "adapter", format_args!("`{}`, merged into the weight", merged.name()), "unmerged first")
    }

    /// The output of the base layer plus those of the active adapters that are not merged; of the base layer only while adapters
    /// are disabled.
    ///
    /// `seed` is for training: with it dropout is applied, and the masks are a function of it.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        self.forward_as(tape, x, seed, &self.active)
    }

    /// [`forward`](Self::forward) with the adapters that the caller chooses, active or not.
    ///
    /// Errors: those of the tape. For [`Adapters::Named`] also [`Error::Value`] while an adapter is merged, or for two adapters
    /// that cannot be active together; see [`set_active`](Self::set_active).
    pub fn forward_with<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, adapters: Adapters<'_>) -> Result<Var> {
        match adapters {
            Adapters::Active => self.forward(tape, x, seed),
            Adapters::Named(names) => {
                self.check_activate("forward", names)?;
                self.forward_as(tape, x, seed, names)
            }
        }
    }

    fn forward_as<'m, S: AsRef<str>>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>, active: &[S]) -> Result<Var> {
        let parts = || self.computing(active);
        let base = parts().find_map(LayerAdapter::whole).unwrap_or(&self.base);
        let bias = parts().find_map(LayerAdapter::bias).or(base.bias());
        let mut y = None;
        for (place, adapter) in parts().filter_map(LayerAdapter::adapter).enumerate() {
            // Each adapter has its own mask: its place goes to the high bits, as seeds of layers and steps differ in the low
            // ones.
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

    /// The parts that `forward` computes with: of the adapters in `active` those that are not merged, and of the merged ones
    /// those that replace the layer, because a replacement is not written into the base weight.
    fn computing<'m, S: AsRef<str>>(&'m self, active: &[S]) -> impl Iterator<Item = &'m LayerAdapter<B>> {
        let free = |name: &&S| self.enabled && self.merged().all(|merged| merged != name.as_ref());
        let free = active.iter().filter(free).filter_map(|name| self.part(name.as_ref()));
        let merged = self.merged().filter_map(|name| self.part(name)).filter(|part| part.is_whole());
        free.chain(merged)
    }

    /// The part of an adapter that belongs to this layer, to be overwritten; `None` while any adapter is merged.
    pub(super) fn part_mut(&mut self, name: &str) -> Option<&mut LayerAdapter<B>> {
        let part = self.parts.iter_mut().find(|(known, _)| known == name).map(|(_, part)| part);
        part.filter(|_| self.merged.is_empty())
    }
}

/// Errors: [`Error::Value`] for adapters that cannot be active together in a layer: only one can replace the bias, and one that
/// replaces the whole layer cannot be combined with others.
fn check_compatible<'p, B: Backend + 'p>(verb: &'static str, parts: impl Iterator<Item = &'p LayerAdapter<B>>) -> Result<()> {
    let parts: Vec<_> = parts.collect();
    let whole = parts.iter().any(|part| part.is_whole());
    Error::unless(!whole || parts.len() == 1, verb, "adapter", "combined with one that replaces the layer", "one of the two")?;
    let biases = parts.iter().filter(|part| part.bias().is_some()).count();
    Error::unless(biases <= 1, verb, "adapter", "one of several that replace the bias", "only one such adapter")
}

/// Errors: [`Error::Value`] for a name that is not valid for an adapter in PEFT, or for a folder.
fn check_name(name: &str) -> Result<()> {
    let fine = !name.is_empty() && !name.contains(['.', '/', '\\', '\0']);
    Error::unless(fine, "adapter", "name", name, "a name without dots and slashes")
}
