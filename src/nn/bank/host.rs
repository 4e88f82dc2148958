//! An adapter in host memory.

use std::collections::BTreeMap;

use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::nn::{Adaptable, Adapter, LayerAdapter};
use crate::op::Bank;

/// The low-rank updates of an adapter in host memory, by the name of the layer; a layer that it does not name stays as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostAdapter {
    /// The updates.
    pub updates: BTreeMap<String, HostUpdate>,
}

/// `scaling·B·A` of one layer, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostUpdate {
    /// `r×k`, row by row
    pub a: Vec<f32>,
    /// `n×r`, row by row
    pub b: Vec<f32>,
    /// Factor of the update: `alpha / r` in the LoRA paper.
    pub scaling: f32,
}

impl HostAdapter {
    /// A copy of an adapter of a model.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::InLayer`] for one that does more than add low-rank updates: DoRA, biases, layers
    /// that it replaces.
    pub fn of_model<B: Backend>(backend: &B, model: &impl Adaptable<B>, name: &str) -> Result<Self> {
        model.check_adapters(&[name])?;
        let mut updates = BTreeMap::new();
        for (layer, there) in model.layers() {
            let Some(part) = there.lora().and_then(|lora| lora.part(name)) else { continue };
            let adapter = plain(part).map_err(|error| error.in_layer(layer))?;
            let [a, b] = adapter.trimmed(backend)?.map(|numbers| numbers.into_iter().map(Float::to_f32).collect());
            updates.insert(layer.into(), HostUpdate { a, b, scaling: adapter.scaling() });
        }
        Ok(Self { updates })
    }

    /// Errors: [`Error::NoSuchLayer`]; [`Error::InLayer`] for factors that do not fit, and a rank above the bank's.
    pub(super) fn check<B: Backend>(&self, layers: &[(String, Bank<B>)]) -> Result<()> {
        for (layer, HostUpdate { a, b, scaling }) in &self.updates {
            let Some((_, bank)) = layers.iter().find(|(known, _)| known == layer) else {
                let known: Vec<&str> = layers.iter().map(|(known, _)| known.as_str()).collect();
                return Err(Error::NoSuchLayer { name: layer.clone(), known: known.join(", ") });
            };
            bank.check(a, b, *scaling).map_err(|error| error.in_layer(layer))?;
        }
        Ok(())
    }
}

/// The update of a layer, if that is all there is. Errors: [`Error::Value`].
pub(super) fn plain<B: Backend>(part: &LayerAdapter<B>) -> Result<&Adapter<B>> {
    let more = |got| Error::unless(false, "bank", "adapter", got, "one that adds low-rank updates alone");
    let Some(adapter) = part.adapter() else {
        return Err(more("one with a bias or a layer in place of the model's").err().unwrap_or(Error::Interrupted));
    };
    for (there, got) in [
        (adapter.magnitude().is_some(), "one with magnitudes (DoRA)"),
        (adapter.lora_bias().is_some(), "one with a bias of the update"),
        (adapter.bias().is_some(), "one with a bias in place of the layer's"),
    ] {
        if there {
            more(got)?;
        }
    }
    Ok(adapter)
}
