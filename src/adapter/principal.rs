//! Adapters that begin with a part of the weight they adapt: `W -= scaling·B·A`.

use super::{HostMatrix, olora, pissa};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::nn::{Adapter, LoraConfig, Merge, Mlp, Tuned};
use crate::tensor::Tensor;

/// Which part of a weight an adapter begins with: PEFT's `init_lora_weights` of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// The greatest singular values, shared between `A` and `B` (F. Meng et al., 2024).
    Pissa,
    /// The first columns of `Q` and rows of `R` in `W = Q·R` (K. Büyükakyüz, 2024).
    Olora,
}

/// Moves the principal part of each weight that an adapter adapts into the adapter: `W -= scaling·B·A`, and the model computes
/// what it did.
///
/// The part is kept as an adapter of its own, named `start`, with `-B`, and merged: unmerging it brings back every bit of the
/// weights. So what was learned is the sum of the two adapters, a plain one of twice the rank: [`save`](super::save) writes
/// both, and [`combine`](super::combine) by `cat`, with a weight of 1 each, makes one folder of them that any model loads.
///
/// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] for a rank above the sides of a weight, for DoRA, a weight or a scaling
/// that cannot be decomposed, a name that is taken or has a dot, and while an adapter is merged or off. Nothing is changed then.
pub fn begin_with<B: Backend>(backend: &B, model: &mut Mlp<B>, name: &str, start: &str, part: Principal) -> Result<()> {
    model.known(&[name])?;
    model.unmerged("begin_with")?;
    let taken = model.adapter_names().contains(&start);
    Error::unless(!taken, "begin_with", "start", format!("`{start}`, which is there"), "a new name")?;
    let mut numbers = Vec::new();
    for (layer, adapter) in model.adapters(name) {
        let w = &model.layer(layer)?.base().weight().tensor;
        numbers.push((layer.to_string(), factors(backend, w, adapter, part)?));
    }

    let mut starts = Vec::new();
    for (layer, (a, b, config)) in &numbers {
        let minus: Vec<B::Elem> = b.values().iter().map(|b| B::Elem::from_f32(-b)).collect();
        let (a, b) = (up(backend, a)?, Tensor::from_slice(backend, b.shape(), &minus)?);
        starts.push((layer.clone(), Tuned::Lora(Adapter::from_tensors(a, b, config.clone())?)));
    }
    model.insert_waiting(start, starts)?;
    if let Err(error) = model.merge_as(backend, &[start], Merge::default()) {
        model.delete_adapter(start)?;
        return Err(error);
    }
    for (layer, (a, b, _)) in numbers {
        model.write_factors(backend, &layer, name, [&narrow::<B::Elem>(&a), &narrow::<B::Elem>(&b)])?;
    }
    Ok(())
}

/// `A` and `B` of the part, and the settings of an adapter that has just them.
fn factors<B: Backend>(
    backend: &B,
    w: &Tensor<B>,
    adapter: &Adapter<B>,
    part: Principal,
) -> Result<(HostMatrix, HostMatrix, LoraConfig)> {
    let there = adapter.config();
    Error::unless(!there.use_dora, "begin_with", "use_dora", "set", "an adapter without magnitudes")?;
    Error::unless(adapter.room() == there.rank, "begin_with", "room", adapter.room(), "the rank, as when it was added")?;
    let usual = there.scaling.of(there.alpha, there.rank);
    Error::unless(adapter.scaling() == usual, "begin_with", "scale", adapter.scaling() / usual, "1, as when it was added")?;
    let host = w.to_vec(backend)?.into_iter().map(Float::to_f32).collect();
    let host = HostMatrix::new(w.shape(), host)?;
    let scaling = f64::from(adapter.scaling());
    let (a, b) = match part {
        Principal::Pissa => pissa(&host, there.rank, scaling)?,
        Principal::Olora => olora(&host, there.rank)?,
    };
    let config = LoraConfig { scaling: there.scaling, ..LoraConfig::new(there.rank, there.alpha) };
    Ok((a, b, config))
}

fn narrow<E: Float>(matrix: &HostMatrix) -> Vec<E> {
    matrix.values().iter().map(|&x| E::from_f32(x)).collect()
}

fn up<B: Backend>(backend: &B, matrix: &HostMatrix) -> Result<Tensor<B>> {
    Tensor::from_slice(backend, matrix.shape(), &narrow::<B::Elem>(matrix))
}
