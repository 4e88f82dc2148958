//! Merging adapters into a whole model: into all layers, or, after an error, into none.

use super::{Adaptable, loras, loras_mut};
use crate::backend::Backend;
use crate::error::Result;
use crate::nn::Merge;

/// Merges these adapters in every layer that has them. After an error every layer is as before.
pub(super) fn merge<B: Backend, S: AsRef<str>>(
    model: &mut impl Adaptable<B>,
    backend: &B,
    names: &[S],
    how: Merge,
) -> Result<()> {
    let before: Vec<usize> = loras(model).map(|lora| lora.merged().count()).collect();
    let failed = model.layers_mut().find_map(|(layer, there)| {
        let merged = there.lora_mut().map_or(Ok(()), |lora| lora.merge_as(backend, names, how));
        merged.err().map(|error| error.in_layer(layer))
    });
    let Some(error) = failed else { return Ok(()) };
    for (lora, before) in loras_mut(model).zip(before) {
        lora.unmerge_down_to(backend, before)?;
    }
    Err(error)
}
