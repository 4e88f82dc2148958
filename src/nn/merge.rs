//! Merging adapters into the weight of a layer, and exact unmerging.
//!
//! Merging adds the update to the weight. To be able to unmerge, it also subtracts the update once from the merged weight, and
//! keeps those elements that rounding does not restore (the residue). Merged adapters are a stack: unmerging one takes out all
//! above it, and merges those again.

use super::dora::Rows;
use super::residue::Residue;
use super::{Adapter, LayerAdapter, LoraLinear};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op::{LoraMerge, Rounding};
use crate::tensor::Tensor;

/// Options of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// If true, a merge whose results are not all finite is refused, and nothing is changed. PEFT's `safe_merge`.
    pub safe: bool,
    /// How sums are rounded to the element type.
    pub rounding: Rounding,
}

impl Default for Merge {
    /// Safe, rounded to the nearest.
    fn default() -> Self {
        Self { safe: true, rounding: Rounding::Nearest }
    }
}

/// A merged adapter, with the data that unmerging needs.
#[derive(Debug)]
pub(super) struct Merged<B: Backend> {
    name: String,
    how: Merge,
    residue: Residue<B::Elem>,
    /// The gains of the rows, for DoRA.
    rows: Option<Rows>,
    /// The layer's bias before the merge, if the adapter changes it.
    bias: Option<Vec<B::Elem>>,
}

impl<B: Backend> Merged<B> {
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// The host memory that exact unmerging takes while adapters are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnmergeCost {
    /// Number of stored weights: those that subtracting the update does not restore, because of rounding.
    pub weights: usize,
    /// Bytes of host memory, for these weights, saved biases and DoRA's gains.
    pub bytes: usize,
}

impl<B: Backend> LoraLinear<B> {
    /// `W += scaling·B·A` for every active adapter that is not merged yet.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as).
    pub fn merge(&mut self, backend: &B) -> Result<()> {
        let names = self.active().to_vec();
        self.merge_as(backend, &names, Merge::default())
    }

    /// Merges these adapters, in this order, on top of those that are merged. Names that this layer does not have are ignored.
    ///
    /// Merging an adapter that replaces the layer leaves the weight as it is: until it is unmerged, `forward` uses the
    /// replacement.
    ///
    /// Errors: [`Error::Value`] while adapters are disabled, for a bias of the update where the layer has no bias, for an adapter
    /// that replaces the layer together with another, and, with [`Merge::safe`], for results that are not finite;
    /// [`Error::Shape`] for a parameter whose shape the caller has changed. Nothing is changed then.
    pub fn merge_as<S: AsRef<str>>(&mut self, backend: &B, names: &[S], how: Merge) -> Result<()> {
        Error::unless(self.is_enabled(), "merge", "adapter", "disabled", "enabled first, see `set_adapters_enabled`")?;
        let before = self.merged.len();
        for name in names {
            if let Err(error) = self.push(backend, name.as_ref(), how) {
                self.unmerge_down_to(backend, before)?;
                self.drop_dense(backend)?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes all merged adapters out of the weight, which is then equal to the original one, bit for bit.
    pub fn unmerge(&mut self, backend: &B) -> Result<()> {
        self.unmerge_down_to(backend, 0)
    }

    /// Unmerges the adapters that were merged last, until `left` are merged.
    pub(super) fn unmerge_down_to(&mut self, backend: &B, left: usize) -> Result<()> {
        while self.merged.len() > left {
            self.pop(backend)?;
        }
        Ok(())
    }

    /// Takes one merged adapter out; the weight is then what it would be if only the others had been merged. Does nothing if it
    /// is not merged.
    pub fn unmerge_one(&mut self, backend: &B, name: &str) -> Result<()> {
        let Some(at) = self.merged.iter().position(|merged| merged.name == name) else { return Ok(()) };
        let above: Vec<_> = self.merged[at + 1..].iter().map(|merged| (merged.name.clone(), merged.how)).collect();
        self.unmerge_down_to(backend, at)?;
        above.into_iter().try_for_each(|(name, how)| self.push(backend, &name, how))
    }

    /// The host memory that exact unmerging takes at present.
    pub fn kept(&self) -> UnmergeCost {
        let bytes = |merged: &Merged<B>| {
            let bias = merged.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]));
            merged.residue.bytes() + bias + merged.rows.as_ref().map_or(0, Rows::bytes)
        };
        let weights = self.merged.iter().map(|merged| merged.residue.len()).sum();
        UnmergeCost { weights, bytes: self.merged.iter().map(bytes).sum() }
    }

    /// Merges an adapter, on top of the stack. Does nothing if it is merged already.
    fn push(&mut self, backend: &B, name: &str, how: Merge) -> Result<()> {
        let part = self.parts.iter().find(|(known, _)| known == name).map(|(_, part)| part);
        let Some(part) = part.filter(|_| !self.merged.iter().any(|merged| merged.name == name)) else { return Ok(()) };
        part.fits(&self.base)?; // again, as `params_mut` lets a caller replace parameters
        let mergeable = match part {
            LayerAdapter::Whole(_) => self.merged.is_empty(),
            LayerAdapter::Lora(_) | LayerAdapter::Bias(_) => true,
        };
        let compatible = mergeable && self.whole().is_none_or(|whole| whole == name);
        let got = || format!("`{name}` combined with one that replaces the layer");
        Error::unless(compatible, "merge", "adapter", got(), "one of the two")?;
        let bias = new_bias(backend, self.base.bias(), part)?;
        let finite = bias.as_ref().is_none_or(|bias| bias.iter().all(|x| x.to_f32().is_finite()));
        Error::unless(finite || !how.safe, "merge", "bias", format!("not finite with `{name}` in it"), "finite numbers")?;
        let (mut residue, mut rows) = (Residue::between(&[], &[]), None);
        if let LayerAdapter::Lora(adapter) = part {
            let w = self.base.dense_mut(backend)?;
            rows = adapter.magnitude.as_ref().map(|magnitude| Rows::of(backend, w, adapter, magnitude)).transpose()?;
            residue = add_update(backend, w, adapter, rows.as_ref(), how).map_err(|error| named(error, name))?;
        }
        let mut before = None;
        if let (Some(bias), Some(param)) = (bias, self.base.bias_mut()) {
            before = Some(param.to_vec(backend)?);
            param.copy_from_slice(backend, &bias)?;
        }
        self.merged.push(Merged { name: name.into(), how, residue, rows, bias: before });
        Ok(())
    }

    /// Unmerges the adapter on top of the stack.
    fn pop(&mut self, backend: &B) -> Result<()> {
        let Some(Merged { name, residue, rows, bias, .. }) = self.merged.last() else { return Ok(()) };
        let part = self.parts.iter().find(|(known, _)| known == name).map(|(_, part)| part);
        if let Some(LayerAdapter::Lora(adapter)) = part {
            let w = self.base.weight_mut();
            subtract_update(backend, w, adapter, rows.as_ref())?;
            if !residue.is_empty() {
                let mut host = w.to_vec(backend)?;
                residue.restore(&mut host);
                w.copy_from_slice(backend, &host)?;
            }
        }
        if let (Some(before), Some(param)) = (bias, self.base.bias_mut()) {
            param.copy_from_slice(backend, before)?;
        }
        self.merged.pop();
        self.drop_dense(backend)
    }

    /// Of a quantised layer, once nothing is merged any more, the quantised weight is all that is left.
    fn drop_dense(&mut self, backend: &B) -> Result<()> {
        if self.merged.is_empty() { self.base.drop_dense(backend) } else { Ok(()) }
    }
}

/// Adds an update to a weight, and returns the elements that subtracting it would not restore. After an error the weight is as
/// before.
fn add_update<B: Backend>(
    backend: &B,
    w: &mut Tensor<B>,
    adapter: &Adapter<B>,
    rows: Option<&Rows>,
    how: Merge,
) -> Result<Residue<B::Elem>> {
    let original = w.to_vec(backend)?;
    let mut add = || {
        match rows {
            Some(rows) => rows.merge(backend, adapter, how.rounding, w)?,
            None => lora_merge(backend, w, adapter, adapter.scaling(), how.rounding)?,
        }
        let merged = w.to_vec(backend)?;
        let finite = merged.iter().all(|x| x.to_f32().is_finite());
        Error::unless(finite || !how.safe, "merge", "weight", "not finite", "finite numbers")?;
        subtract_update(backend, w, adapter, rows)?;
        let residue = Residue::between(&original, &w.to_vec(backend)?);
        w.copy_from_slice(backend, &merged)?;
        Ok(residue)
    };
    match add() {
        Ok(residue) => Ok(residue),
        Err(error) => {
            w.copy_from_slice(backend, &original)?;
            Err(error)
        }
    }
}

/// Subtracts an update from a weight. Always rounds to the nearest, also where merging rounded stochastically.
fn subtract_update<B: Backend>(backend: &B, w: &mut Tensor<B>, adapter: &Adapter<B>, rows: Option<&Rows>) -> Result<()> {
    match rows {
        Some(rows) => rows.unmerge(backend, adapter, w),
        None => lora_merge(backend, w, adapter, -adapter.scaling(), Rounding::Nearest),
    }
}

fn lora_merge<B: Backend>(backend: &B, w: &mut Tensor<B>, adapter: &Adapter<B>, scale: f32, rounding: Rounding) -> Result<()> {
    LoraMerge { a: (&adapter.a.tensor).into(), b: (&adapter.b.tensor).into(), scale, rounding, w: w.view_mut() }.run(backend)
}

/// The bias of a layer after a merge, if the part changes it.
fn new_bias<B: Backend>(backend: &B, base: Option<&Param<B>>, part: &LayerAdapter<B>) -> Result<Option<Vec<B::Elem>>> {
    let (own, update) = match part {
        LayerAdapter::Whole(_) => (None, None),
        LayerAdapter::Bias(bias) => (Some(bias), None),
        LayerAdapter::Lora(adapter) => (adapter.bias.as_ref(), adapter.lora_bias.as_ref().map(|bias| (bias, adapter.scaling()))),
    };
    let Some((update, scale)) = update else { return own.map(|own| own.tensor.to_vec(backend)).transpose() };
    let Some(base) = own.or(base) else {
        return Err(Error::Value {
            verb: "merge",
            name: "bias",
            got: "missing".into(),
            want: "set, since the adapter has a `lora_bias`".into(),
        });
    };
    let (base, update) = (base.tensor.to_vec(backend)?, update.tensor.to_vec(backend)?);
    let sum = |(base, update): (B::Elem, B::Elem)| B::Elem::from_f32(base.to_f32() + scale * update.to_f32());
    Ok(Some(base.into_iter().zip(update).map(sum).collect()))
}

/// Adds the name of the adapter to an error of merging.
fn named(error: Error, adapter: &str) -> Error {
    match error {
        Error::Value { verb: verb @ "merge", name, got, want } => {
            Error::Value { verb, name, got: format!("{got} with `{adapter}` in it"), want }
        }
        other => other,
    }
}
