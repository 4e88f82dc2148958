//! Initialising an adapter with the principal part of the weights (PiSSA, OLoRA): `W -= scaling·B·A`.

use super::compress::inside;
use super::{HostMatrix, Principal, olora, pissa};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::nn::{Adaptable, Adapter, LayerAdapter, LoraConfig, Merge, Scaling, check_unmerged, insert_inactive, write_factors};
use crate::tensor::Tensor;

/// Moves the principal part of each adapted weight into the factors of an adapter: `W -= scaling·B·A`. The outputs of the model stay
/// the same, up to rounding.
///
/// The part is also added as a second adapter, named `start`, with `A` and `-B`, which is merged; unmerging it restores every bit of the
/// weights. The learned update is the sum of the two adapters, of twice the rank. [`save`](super::save) writes both, and
/// [`combine`](super::combine) by `cat`, with a weight of 1 each, makes one adapter of them that any model can load.
///
/// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] for a rank above the smaller dimension of a weight, for DoRA, a weight or a scaling
/// that cannot be decomposed, a name that exists or has a dot, and while an adapter is merged or adapters are disabled. Nothing is
/// changed then.
pub fn init_from_weight<B: Backend>(
    backend: &B,
    model: &mut impl Adaptable<B>,
    name: &str,
    start: &str,
    part: Principal,
) -> Result<()> {
    model.check_adapters(&[name])?;
    check_unmerged(model, "init_from_weight")?;
    let taken = model.adapter_names().contains(&start);
    Error::unless(!taken, "init_from_weight", "start", format!("`{start}`, which exists"), "a new name")?;
    let mut numbers = Vec::new();
    for (layer, adapter) in model.adapters(name) {
        let w = &model.layer(layer)?.base().weight().tensor;
        numbers.push((layer.to_string(), factors(backend, w, adapter, part)?));
    }

    let mut starts = Vec::new();
    for (layer, (a, b, config)) in &numbers {
        let negated: Vec<B::Elem> = b.values().iter().map(|b| B::Elem::from_f32(-b)).collect();
        let (a, b) = (upload(backend, a)?, Tensor::from_slice(backend, b.shape(), &negated)?);
        starts.push((layer.clone(), LayerAdapter::Lora(Adapter::from_tensors(a, b, config.clone())?)));
    }
    insert_inactive(model, "init_from_weight", start, starts)?;
    if let Err(error) = model.merge_as(backend, &[start], Merge::default()) {
        model.delete_adapter(start)?;
        return Err(error);
    }
    for (layer, (a, b, _)) in numbers {
        write_factors(model, backend, &layer, name, [&narrow::<B::Elem>(&a), &narrow::<B::Elem>(&b)])?;
    }
    Ok(())
}

/// `A` and `B` of the principal part, and the settings of an adapter with these factors.
fn factors<B: Backend>(
    backend: &B,
    w: &Tensor<B>,
    adapter: &Adapter<B>,
    part: Principal,
) -> Result<(HostMatrix, HostMatrix, LoraConfig)> {
    let there = adapter.config();
    Error::unless(!there.use_dora, "init_from_weight", "use_dora", "set", "an adapter without magnitudes")?;
    Error::unless(adapter.room() == there.rank, "init_from_weight", "room", adapter.room(), "the rank, as when it was added")?;
    let usual = there.scaling.of(there.alpha, there.rank);
    Error::unless(adapter.scaling() == usual, "init_from_weight", "scale", adapter.scaling() / usual, "1, as when it was added")?;
    let (a, b) = part.of(&host(backend, w)?, there.rank, adapter.scaling())?;
    let config = LoraConfig { scaling: there.scaling, ..LoraConfig::new(there.rank, there.alpha) };
    Ok((a, b, config))
}

impl Principal {
    /// The initial factors `A₀` and `B₀` of an adapter for this weight.
    fn of(self, w: &HostMatrix, rank: usize, scaling: f32) -> Result<(HostMatrix, HostMatrix)> {
        match self {
            Principal::Pissa => pissa(w, rank, scaling.into()),
            Principal::Olora => olora(w, rank),
        }
    }

    /// The factors of the equivalent plain adapter, of rank 2r: `[A; A₀]` and `[B, -B₀]`.
    ///
    /// Errors: [`Error::Value`] for a weight or a scaling that cannot be decomposed.
    pub(crate) fn plain(self, w: &HostMatrix, [a, b]: [HostMatrix; 2], scaling: f32) -> Result<[HostMatrix; 2]> {
        let rank = a.rows();
        let (a0, b0) = self.of(w, rank, scaling)?;
        let over = [a.values(), a0.values()].concat();
        let rows = b.values().chunks_exact(rank).zip(b0.values().chunks_exact(rank));
        let beside = rows.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|b0| -b0))).collect();
        Ok([HostMatrix::new((2 * rank, a.cols()), over)?, HostMatrix::new((b.rows(), 2 * rank), beside)?])
    }
}

/// The factors and settings of the plain adapter that is equivalent to that of a folder. Errors: those of [`Principal::plain`].
pub(super) fn plain<B: Backend>(
    (backend, layer, w): (&B, &str, &Tensor<B>),
    factors: [HostMatrix; 2],
    config: LoraConfig,
    part: Principal,
) -> Result<([HostMatrix; 2], LoraConfig)> {
    let scaling = config.scaling.of(config.alpha, config.rank);
    let factors = part.plain(&host(backend, w)?, factors, scaling).map_err(|error| inside(layer, error))?;
    Ok((factors, LoraConfig { rank: 2 * config.rank, alpha: scaling, scaling: Scaling::Raw, ..config }))
}

fn host<B: Backend>(backend: &B, w: &Tensor<B>) -> Result<HostMatrix> {
    HostMatrix::new(w.shape(), w.to_vec(backend)?.into_iter().map(Float::to_f32).collect())
}

fn narrow<E: Float>(matrix: &HostMatrix) -> Vec<E> {
    matrix.values().iter().map(|&x| E::from_f32(x)).collect()
}

fn upload<B: Backend>(backend: &B, matrix: &HostMatrix) -> Result<Tensor<B>> {
    Tensor::from_slice(backend, matrix.shape(), &narrow::<B::Elem>(matrix))
}
