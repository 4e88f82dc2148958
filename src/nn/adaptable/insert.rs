//! Adding adapters to the layers of a model.

use super::{Adaptable, Targets, check_layers, layer_mut, loras};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::{Adapter, Bias, LayerAdapter, LoraConfig, LoraLinear};
use crate::random::Rng;

/// The parts of a new adapter, by layer, following PEFT's rules.
pub(super) fn new_parts<B: Backend>(
    model: &impl Adaptable<B>,
    backend: &B,
    targets: Targets<'_>,
    config: &LoraConfig,
    rng: &mut Rng,
) -> Result<Vec<(String, LayerAdapter<B>)>> {
    check_targets(model, targets)?;
    let saved = |layer: &str| config.modules_to_save.iter().any(|end| layer.ends_with(end.as_str()));
    for end in &config.modules_to_save {
        if !model.layers().any(|(layer, _)| layer.ends_with(end.as_str())) {
            model.layer(end)?; // fails with `NoSuchLayer`, which lists the layers
        }
    }
    let mut parts = Vec::new();
    for (layer, there) in model.layers() {
        let base = there.base();
        let part = if saved(layer) {
            LayerAdapter::Whole(base.try_clone(backend)?)
        } else if targets.include(layer) {
            LayerAdapter::Lora(Adapter::new(backend, base, config.clone(), rng)?)
        } else if let (Bias::All, Some(bias)) = (config.bias, base.bias()) {
            LayerAdapter::Bias(Param::plus(bias.tensor.try_clone(backend)?))
        } else {
            continue;
        };
        parts.push((layer.to_string(), part));
    }
    Ok(parts)
}

impl Targets<'_> {
    fn include(self, layer: &str) -> bool {
        match self {
            Targets::All => true,
            Targets::Names(names) => names.iter().any(|name| is_or_ends_with(layer, name)),
        }
    }
}

/// True if a layer has this name, or a name that ends with a dot and this name.
fn is_or_ends_with(layer: &str, name: &str) -> bool {
    layer.strip_suffix(name).is_some_and(|above| above.is_empty() || above.ends_with('.'))
}

/// Errors: [`Error::Value`] for an empty list, [`Error::NoSuchLayer`] for a target that matches no layer.
fn check_targets<B: Backend>(model: &impl Adaptable<B>, targets: Targets<'_>) -> Result<()> {
    let Targets::Names(names) = targets else { return Ok(()) };
    Error::unless(!names.is_empty(), "add_adapter", "targets", "none", "at least one layer")?;
    let unknown = names.iter().find(|name| !model.layers().any(|(layer, _)| is_or_ends_with(layer, name)));
    unknown.map_or(Ok(()), |name| model.layer(name).map(|_| ()))
}

/// [`Adaptable::insert_adapter`], with `verb` as the method's name in errors.
pub(super) fn insert<B: Backend>(
    model: &mut impl Adaptable<B>,
    verb: &'static str,
    name: &str,
    parts: Vec<(String, LayerAdapter<B>)>,
) -> Result<()> {
    let active = model.active_adapters();
    let activate = active.is_empty() || active.contains(&name);
    insert_as(model, verb, name, parts, activate)
}

/// Inserts an adapter that is not active.
#[cfg(feature = "svd")]
pub(crate) fn insert_inactive<B: Backend>(
    model: &mut impl Adaptable<B>,
    verb: &'static str,
    name: &str,
    parts: Vec<(String, LayerAdapter<B>)>,
) -> Result<()> {
    insert_as(model, verb, name, parts, false)
}

fn insert_as<B: Backend>(
    model: &mut impl Adaptable<B>,
    verb: &'static str,
    name: &str,
    parts: Vec<(String, LayerAdapter<B>)>,
    activate: bool,
) -> Result<()> {
    Error::unless(!parts.is_empty(), verb, "parts", "none", "at least one")?;
    check_layers(model, verb)?;
    parts.iter().try_for_each(|(layer, part)| model.layer(layer)?.check_insert(verb, name, part, activate))?;
    loras(model).filter(|lora| lora.part(name).is_some()).try_for_each(|lora| lora.check_unmerged(verb))?;
    let enabled = loras(model).all(LoraLinear::is_enabled);
    model.freeze();
    let named = |layer: &str| parts.iter().any(|(known, _)| known == layer);
    let others = model.layers_mut().filter(|(layer, _)| !named(layer));
    others.filter_map(|(_, there)| there.lora_mut()).try_for_each(|lora| lora.remove(name))?;
    for (layer, part) in parts {
        layer_mut(model, &layer).map_or(Ok(()), |there| there.insert(name, part, activate, enabled))?;
    }
    Ok(())
}

/// Overwrites `A` and `B` of an adapter that is not merged.
#[cfg(feature = "svd")]
pub(crate) fn write_factors<B: Backend>(
    model: &mut impl Adaptable<B>,
    backend: &B,
    layer: &str,
    name: &str,
    [a, b]: [&[B::Elem]; 2],
) -> Result<()> {
    let there = layer_mut(model, layer).and_then(|there| there.lora_mut());
    if let Some((_, LayerAdapter::Lora(adapter))) = there.and_then(|lora| lora.parts.iter_mut().find(|(known, _)| known == name))
    {
        adapter.a.tensor.copy_from_slice(backend, a)?;
        adapter.b.tensor.copy_from_slice(backend, b)?;
    }
    Ok(())
}
