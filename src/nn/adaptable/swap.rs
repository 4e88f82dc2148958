//! Hotswap: the tensors of an adapter are overwritten in place by those of another, so no device memory is allocated.

use super::{Adaptable, loras, loras_mut};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::adapter::padded;
use crate::nn::{Adapter, LayerAdapter, LoraLinear};
use crate::tensor::Tensor;

/// [`Adaptable::swap_adapter`] after its checks: the adapter exists and none is merged.
pub(super) fn swap<B: Backend>(
    model: &mut impl Adaptable<B>,
    backend: &B,
    name: &str,
    parts: &[(String, LayerAdapter<B>)],
) -> Result<()> {
    let here: Vec<(&str, &LoraLinear<B>)> = model
        .layers()
        .filter_map(|(layer, there)| Some((layer, there.lora().filter(|lora| lora.part(name).is_some())?)))
        .collect();
    if let Some((layer, _)) = parts.iter().find(|(layer, _)| !here.iter().any(|(known, _)| known == layer)) {
        let known: Vec<&str> = here.iter().map(|(known, _)| *known).collect();
        return Err(Error::NoSuchLayer { name: layer.clone(), known: known.join(", ") });
    }
    let new = |layer: &str| parts.iter().find(|(known, _)| known == layer).map(|(_, part)| part);
    for (layer, lora) in here {
        let (there, new) = (lora.part(name), new(layer));
        there.into_iter().chain(new).try_for_each(|part| part.fits(lora.base()))?;
        there.map_or(Ok(()), |there| check(there, new))?;
    }
    for (layer, there) in model.layers_mut() {
        if let Some(part) = there.lora_mut().and_then(|lora| lora.part_mut(name)) {
            overwrite(backend, part, new(layer))?;
        }
    }
    Ok(())
}

/// [`Adaptable::reserve_rank`] after its checks: the adapter exists and none is merged.
pub(super) fn reserve_rank<B: Backend>(model: &mut impl Adaptable<B>, backend: &B, name: &str, rank: usize) -> Result<()> {
    let padded = |lora: &LoraLinear<B>| lora.adapter(name).map_or(Ok(None), |adapter| adapter.padded_factors(backend, rank));
    let factors = loras(model).map(padded).collect::<Result<Vec<_>>>()?;
    for (lora, factors) in loras_mut(model).zip(factors) {
        if let (Some(LayerAdapter::Lora(adapter)), Some(factors)) = (lora.part_mut(name), factors) {
            [adapter.a, adapter.b] = factors;
        }
    }
    Ok(())
}

/// Checks that `new` can be written into the tensors of `there`; the shapes of both fit the layer. Errors: [`Error::Value`].
fn check<B: Backend>(there: &LayerAdapter<B>, new: Option<&LayerAdapter<B>>) -> Result<()> {
    let same = |holds, name| Error::unless(holds, "swap_adapter", name, "in one of the two adapters", "in both or neither");
    match (there, new) {
        (LayerAdapter::Lora(there), Some(LayerAdapter::Lora(new))) => {
            same(there.magnitude.is_some() == new.magnitude.is_some(), "magnitude")?;
            same(there.lora_bias.is_some() == new.lora_bias.is_some(), "lora_bias")?;
            same(there.bias.is_some() == new.bias.is_some(), "bias")?;
            let (rank, room) = (new.config.rank, there.room());
            Error::unless(rank <= room, "swap_adapter", "rank", rank, "no larger than the room, see reserve_rank")
        }
        (LayerAdapter::Lora(there), None) => {
            same(there.magnitude.is_none(), "magnitude")?;
            same(there.bias.is_none(), "bias")
        }
        (LayerAdapter::Bias(_), Some(LayerAdapter::Bias(_))) => Ok(()),
        (LayerAdapter::Whole(there), Some(LayerAdapter::Whole(new))) => {
            same(there.bias().is_some() == new.bias().is_some(), "bias")
        }
        _ => same(false, "layer"),
    }
}

fn overwrite<B: Backend>(backend: &B, there: &mut LayerAdapter<B>, new: Option<&LayerAdapter<B>>) -> Result<()> {
    if let LayerAdapter::Lora(there) = there {
        there.strength = 1.0;
    }
    if let (LayerAdapter::Lora(there), Some(LayerAdapter::Lora(new))) = (&mut *there, new) {
        return overwrite_adapter(backend, there, new);
    }
    let mut params = there.params_mut();
    match new {
        Some(new) => params.zip(new.params()).try_for_each(|(there, new)| write(backend, there, &new.tensor)),
        None => params.try_for_each(|there| {
            let zeros = vec![B::Elem::default(); there.count()];
            there.tensor.copy_from_slice(backend, &zeros)
        }),
    }
}

fn overwrite_adapter<B: Backend>(backend: &B, there: &mut Adapter<B>, new: &Adapter<B>) -> Result<()> {
    let [a, b] = new.trimmed(backend)?;
    let ((n, k), rank, room) = ((there.b.tensor.rows(), there.a.tensor.cols()), new.config.rank, there.room());
    there.a.tensor.copy_from_slice(backend, &padded(&a, (rank, k), (room, k))?)?;
    there.b.tensor.copy_from_slice(backend, &padded(&b, (n, rank), (n, room))?)?;
    for (there, new) in there.params_mut().zip(new.params()).skip(2) {
        write(backend, there, &new.tensor)?; // lora_bias, magnitude, bias
    }
    there.config = new.config.clone();
    Ok(())
}

fn write<B: Backend>(backend: &B, there: &mut Param<B>, new: &Tensor<B>) -> Result<()> {
    there.tensor.copy_from_slice(backend, &new.to_vec(backend)?)
}
