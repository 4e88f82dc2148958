//! What an adapter does to the tensors of a checkpoint.

use std::borrow::Cow;
use std::collections::BTreeMap;

use memmap2::Mmap;

use super::header::Entry;
use super::{Checkpoint, Shard, listed, number, refused};
use crate::adapter::{Factors, Folder, Principal, Role, module_of};
#[cfg(feature = "svd")]
use crate::adapter::{HostMatrix, inside};
use crate::element::DType;
use crate::error::{Error, Result};

/// What becomes of a tensor.
pub(super) enum Change<'f> {
    /// `W + scaling·B·A`.
    Update(Update<'f>),
    /// `(instead, or what is there) + scale·plus`, element by element.
    Set(Set<'f>),
}

/// What becomes of a weight.
pub(super) struct Update<'f> {
    /// Those of the weight as it is stored: turned around for one that is stored `in × out`.
    pub(super) factors: Cow<'f, Factors>,
    /// How long each row is in the end.
    pub(super) magnitudes: Option<&'f [f32]>,
    /// What the factors began with.
    pub(super) began_with: Option<Principal>,
}

/// What becomes of a bias, or of a tensor that is kept whole.
#[derive(Default)]
pub(super) struct Set<'f> {
    pub(super) instead: Option<&'f [f32]>,
    pub(super) plus: Option<(f32, &'f [f32])>,
}

/// A block of a tensor, changed.
pub(super) struct Changed {
    /// Its first element.
    pub(super) first: usize,
    pub(super) new: Vec<u8>,
    pub(super) finite: bool,
    /// How many bytes it had.
    pub(super) bytes: usize,
    /// What it was, and what undoing the change gives.
    pub(super) kept: Option<(Mmap, Vec<u8>)>,
    /// What its rows were multiplied with.
    pub(super) gains: Vec<f32>,
}

impl Change<'_> {
    /// Why it cannot be undone by what the merged tensor tells, if so.
    pub(super) fn hides(&self) -> Option<&'static str> {
        match self {
            Change::Update(update) if update.magnitudes.is_some() => Some("its rows were given other lengths"),
            Change::Set(set) if set.instead.is_some() => Some("the adapter has another in its place"),
            Change::Update(_) | Change::Set(_) => None,
        }
    }
}

/// The changes of an adapter, by the name of the tensor. Errors: [`Error::File`] for tensors that are missing or do not fit.
pub(super) fn changes<'f>(base: &Checkpoint, adapter: &'f Folder) -> Result<BTreeMap<String, Change<'f>>> {
    let names = || adapter.modules().keys().map(|module| format!("{module}.weight"));
    let targets = adapter.extras().values().map(|extra| extra.target.clone());
    let missing: Vec<String> = names().chain(targets).filter(|name| base.find(name).is_none()).collect();
    if !missing.is_empty() {
        return Err(refused(base.path(), format!("has no {}, which the adapter changes", listed(&missing))));
    }
    let mut changes = BTreeMap::new();
    for (name, factors) in names().zip(adapter.modules().values()) {
        let Some((shard, entry)) = base.find(&name) else { continue };
        let update = update(adapter, (shard, entry), factors)?;
        changes.insert(name, Change::Update(update));
    }
    for extra in adapter.extras().values().filter(|extra| extra.role != Role::Magnitude) {
        let Some((shard, entry)) = base.find(&extra.target) else { continue };
        fits(shard, entry, &extra.tensor.shape)?;
        let values = &extra.tensor.values[..];
        let there = changes.entry(extra.target.clone()).or_insert_with(|| Change::Set(Set::default()));
        match (there, extra.role, adapter.modules().get(module_of(&extra.target))) {
            (Change::Set(set), Role::Instead, _) => set.instead = Some(values),
            (Change::Set(set), _, Some(module)) => set.plus = Some((module.scaling, values)),
            _ => return Err(shard.refused(format!("`{}` is changed in two ways by the adapter", extra.target))),
        }
    }
    Ok(changes)
}

fn update<'f>(adapter: &'f Folder, (shard, entry): (&Shard, &Entry), factors: &'f Factors) -> Result<Update<'f>> {
    let magnitudes = adapter.extras().get(&format!("{}.lora_magnitude_vector", module_of(&entry.name)));
    let magnitudes = magnitudes.map(|extra| &extra.tensor.values[..]);
    let (n, k, began_with) = (factors.b.rows(), factors.a.cols(), adapter.config().began_with());
    // Stored `in × out`. PEFT asks the class of a module; here its shape tells, and the setting where the two sides are alike.
    if adapter.config().fan_in_fan_out() && entry.shape == [k, n] {
        if magnitudes.is_some() || began_with.is_some() {
            let what = "is stored in × out (`fan_in_fan_out`), where `use_dora` and `init_lora_weights` by decomposition are not supported";
            return Err(shard.refused(format!("`{}` {what}", entry.name)));
        }
        fits(shard, entry, &[k, n])?;
        let Factors { a, b, scaling, dtype } = factors;
        let turned = Factors { a: b.transposed(), b: a.transposed(), scaling: *scaling, dtype: *dtype };
        return Ok(Update { factors: Cow::Owned(turned), magnitudes, began_with });
    }
    fits(shard, entry, &[n, k])?;
    Ok(Update { factors: Cow::Borrowed(factors), magnitudes, began_with })
}

fn fits(shard: &Shard, entry: &Entry, want: &[usize]) -> Result<(), Error> {
    if entry.shape != want {
        let want = want.iter().map(usize::to_string).collect::<Vec<_>>().join("×");
        return Err(shard.refused(format!("`{}` is {}, want {want} for the adapter", entry.name, entry.dimensions())));
    }
    if entry.float().is_none() {
        return Err(shard.refused(format!("`{}` holds {:?}, want F32, F16 or BF16 to be merged into", entry.name, entry.dtype)));
    }
    Ok(())
}

impl Set<'_> {
    /// Some elements, changed: from the first one on, so many.
    pub(super) fn block(
        &self,
        (shard, entry): (&Shard, &Entry),
        sign: f32,
        [first, len]: [usize; 2],
        [from, to]: [DType; 2],
        keeps: bool,
        mut new: Vec<u8>,
    ) -> Result<Changed> {
        let old = shard.read(entry, first * from.size(), len * from.size())?;
        let mut values = vec![0.0; len];
        number::widen(from, &old, &mut values);
        self.apply(sign, first, &mut values);
        let (finite, bytes) = (number::narrow(to, &values, &mut new), old.len());
        let kept = keeps.then(|| {
            let mut back = vec![0; bytes];
            number::widen(to, &new, &mut values);
            self.apply(-sign, first, &mut values);
            number::narrow(from, &values, &mut back);
            (old, back)
        });
        Ok(Changed { first, new, finite, bytes, kept, gains: Vec::new() })
    }

    /// Forth or back; what has another in its place does not come back.
    fn apply(&self, sign: f32, first: usize, values: &mut [f32]) {
        if let Some(instead) = self.instead {
            if sign < 0.0 {
                return;
            }
            values.copy_from_slice(&instead[first..][..values.len()]);
        }
        if let Some((scale, plus)) = self.plus {
            values.iter_mut().zip(&plus[first..]).for_each(|(value, plus)| *value += sign * scale * plus);
        }
    }
}

impl Update<'_> {
    /// The factors of the plain update, if these began with a part of the weight.
    #[cfg(feature = "svd")]
    pub(super) fn decomposed(&self, (shard, entry): (&Shard, &Entry), from: DType) -> Result<Option<Factors>> {
        let Some(part) = self.began_with else { return Ok(None) };
        let Factors { a, b, scaling, dtype } = (*self.factors).clone();
        let mut values = vec![0.0; entry.elements()];
        number::widen(from, &shard.read(entry, 0, entry.bytes)?, &mut values);
        let w = HostMatrix::new((b.rows(), a.cols()), values)?;
        let [a, b] = part.plain(&w, [a, b], scaling).map_err(|error| inside(&entry.name, error))?;
        Ok(Some(Factors { a, b, scaling, dtype }))
    }

    #[cfg(not(feature = "svd"))]
    pub(super) fn decomposed(&self, _: (&Shard, &Entry), _: DType) -> Result<Option<Factors>> {
        self.began_with.map_or(Ok(None), |part| Err(part.needs_svd()))
    }
}
