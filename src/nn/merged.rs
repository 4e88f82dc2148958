//! Adapters of a whole model merged and unmerged.

use super::{Kept, Layer, Merge, Mlp};
use crate::backend::Backend;
use crate::error::Result;

impl<B: Backend> Mlp<B> {
    /// Merges the active adapters into the weights, safely, rounding to the nearest. What is merged already stays merged once.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as).
    pub fn merge_adapters(&mut self, backend: &B) -> Result<()> {
        let active: Vec<String> = self.active_adapters().into_iter().map(String::from).collect();
        self.merge_all(backend, &active, Merge::default())
    }

    /// Merges these adapters, active or not, in this order, on top of those that are merged.
    ///
    /// Errors: [`NoSuchAdapter`](crate::Error::NoSuchAdapter); [`InLayer`](crate::Error::InLayer) while adapters are off, for a bias of
    /// the update where a layer has no bias, and, if the merge is to be safe, for numbers that would not be finite. Nothing is changed
    /// then.
    pub fn merge_as(&mut self, backend: &B, names: &[&str], how: Merge) -> Result<()> {
        self.known(names)?;
        self.merge_all(backend, names, how)
    }

    fn merge_all<S: AsRef<str>>(&mut self, backend: &B, names: &[S], how: Merge) -> Result<()> {
        let before: Vec<usize> = self.loras().map(|lora| lora.merged().count()).collect();
        let failed = self.layers.iter_mut().find_map(|(layer, there)| {
            let merged = there.lora_mut().map_or(Ok(()), |lora| lora.merge_as(backend, names, how));
            merged.err().map(|error| error.in_layer(layer))
        });
        let Some(error) = failed else { return Ok(()) };
        for (lora, before) in self.loras_mut().zip(before) {
            lora.unmerge_down_to(backend, before)?;
        }
        Err(error)
    }

    /// Takes every merged adapter out of the weights, which then are what they were, bit for bit.
    pub fn unmerge_adapters(&mut self, backend: &B) -> Result<()> {
        self.loras_mut().try_for_each(|lora| lora.unmerge(backend))
    }

    /// Takes one merged adapter out of the weights, which then are what they would be had only the others been merged.
    ///
    /// Errors: [`NoSuchAdapter`](crate::Error::NoSuchAdapter).
    pub fn unmerge_adapter(&mut self, backend: &B, name: &str) -> Result<()> {
        self.known(&[name])?;
        self.loras_mut().try_for_each(|lora| lora.unmerge_one(backend, name))
    }

    /// Merges the active adapters and takes all away: a plain model that does what this one did.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as). Nothing is changed then.
    pub fn merge_and_unload(&mut self, backend: &B) -> Result<()> {
        self.merge_adapters(backend)?;
        let layers = std::mem::take(&mut self.layers).into_iter();
        let plain = |layer: Layer<B>| match layer {
            Layer::Linear(linear) => linear,
            Layer::Lora(lora) => lora.into_tuned(),
        };
        self.layers = layers.map(|(name, layer)| (name, Layer::Linear(plain(layer)))).collect();
        Ok(())
    }

    /// What exact unmerging costs just now, over all layers.
    pub fn kept(&self) -> Kept {
        let sum = |sum: Kept, kept: Kept| Kept { weights: sum.weights + kept.weights, bytes: sum.bytes + kept.bytes };
        self.loras().map(|lora| lora.kept()).fold(Kept::default(), sum)
    }
}
