//! Merging an adapter into the weight, and taking it out again to the bit.

use super::dora::Rows;
use super::residue::Residue;
use super::{Adapter, LayerAdapter, LoraLinear};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op::{LoraMerge, Rounding};
use crate::tensor::Tensor;

/// How updates are added to weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Refuse a merge that gives numbers which are not finite, before anything is changed.
    pub safe: bool,
    /// How the sums are rounded to the element type.
    pub rounding: Rounding,
}

impl Default for Merge {
    /// Safe, to the nearest.
    fn default() -> Self {
        Self { safe: true, rounding: Rounding::Nearest }
    }
}

/// An adapter that is in the weight, and what brings the weight back.
#[derive(Debug)]
pub(super) struct Merged<B: Backend> {
    name: String,
    how: Merge,
    residue: Residue<B::Elem>,
    rows: Option<Rows>,
    /// The bias before, where the adapter changes it.
    bias: Option<Vec<B::Elem>>,
}

impl<B: Backend> Merged<B> {
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// What exact unmerging costs while adapters are merged, on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnmergeCost {
    /// How many weights are kept because rounding does not give them back.
    pub weights: usize,
    /// How much memory all that is kept takes.
    pub bytes: usize,
}

impl<B: Backend> LoraLinear<B> {
    /// `W += scaling·B·A` for every active adapter. What is merged already stays merged once.
    ///
    /// Errors: those of [`merge_as`](Self::merge_as).
    pub fn merge(&mut self, backend: &B) -> Result<()> {
        let names = self.active().to_vec();
        self.merge_as(backend, &names, Merge::default())
    }

    /// Merges these adapters, in this order, on top of those that are merged. A name that this layer does not have is passed over.
    ///
    /// One that takes the layer's place does so from then on; the weight stays.
    ///
    /// Errors: [`Error::Value`] while adapters are off, for a bias of the update where the layer has no bias, and, if the merge is to be
    /// safe, for numbers that are not finite; [`Error::Shape`] for a parameter that another one has taken the place of. Nothing is
    /// changed then.
    pub fn merge_as<S: AsRef<str>>(&mut self, backend: &B, names: &[S], how: Merge) -> Result<()> {
        Error::unless(self.is_enabled(), "merge", "adapter", "switched off", "switched on first")?;
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

    /// Takes every merged adapter out of the weight, which then is what it was, bit for bit.
    pub fn unmerge(&mut self, backend: &B) -> Result<()> {
        self.unmerge_down_to(backend, 0)
    }

    /// Takes out what was merged last, until this many are left.
    pub(super) fn unmerge_down_to(&mut self, backend: &B, left: usize) -> Result<()> {
        while self.merged.len() > left {
            self.pop(backend)?;
        }
        Ok(())
    }

    /// Takes one merged adapter out; the weight is then what it would be had only the others been merged. Does nothing if it is
    /// not merged.
    pub fn unmerge_one(&mut self, backend: &B, name: &str) -> Result<()> {
        let Some(at) = self.merged.iter().position(|merged| merged.name == name) else { return Ok(()) };
        let above: Vec<_> = self.merged[at + 1..].iter().map(|merged| (merged.name.clone(), merged.how)).collect();
        self.unmerge_down_to(backend, at)?;
        above.into_iter().try_for_each(|(name, how)| self.push(backend, &name, how))
    }

    /// What exact unmerging costs just now.
    pub fn kept(&self) -> UnmergeCost {
        let bytes = |merged: &Merged<B>| {
            let bias = merged.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]));
            merged.residue.bytes() + bias + merged.rows.as_ref().map_or(0, Rows::bytes)
        };
        let weights = self.merged.iter().map(|merged| merged.residue.len()).sum();
        UnmergeCost { weights, bytes: self.merged.iter().map(bytes).sum() }
    }

    /// Puts an adapter on top of the stack.
    fn push(&mut self, backend: &B, name: &str, how: Merge) -> Result<()> {
        let part = self.parts.iter().find(|(known, _)| known == name).map(|(_, part)| part);
        let Some(part) = part.filter(|_| !self.merged.iter().any(|merged| merged.name == name)) else { return Ok(()) };
        part.fits(&self.base)?; // who holds its parameters can put others in their place
        let stands_alone = match part {
            LayerAdapter::Whole(_) => self.merged.is_empty(),
            LayerAdapter::Lora(_) | LayerAdapter::Bias(_) => true,
        };
        let alone = stands_alone && self.whole().is_none_or(|whole| whole == name);
        Error::unless(alone, "merge", "adapter", format!("`{name}` beside one that takes the layer's place"), "one of the two")?;
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

    /// Takes the adapter on top of the stack out.
    fn pop(&mut self, backend: &B) -> Result<()> {
        let Some(Merged { name, residue, rows, bias, .. }) = self.merged.last() else { return Ok(()) };
        let part = self.parts.iter().find(|(known, _)| known == name).map(|(_, part)| part);
        if let Some(LayerAdapter::Lora(adapter)) = part {
            let w = self.base.weight_mut();
            take_update(backend, w, adapter, rows.as_ref())?;
            if residue.len() > 0 {
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

/// Adds an update to a weight and finds what taking it away would not restore. After an error the weight is as it was.
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
        take_update(backend, w, adapter, rows)?;
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

/// Takes an update from a weight, up to rounding: to the nearest, whichever way it was merged.
fn take_update<B: Backend>(backend: &B, w: &mut Tensor<B>, adapter: &Adapter<B>, rows: Option<&Rows>) -> Result<()> {
    match rows {
        Some(rows) => rows.unmerge(backend, adapter, w),
        None => lora_merge(backend, w, adapter, -adapter.scaling(), Rounding::Nearest),
    }
}

fn lora_merge<B: Backend>(backend: &B, w: &mut Tensor<B>, adapter: &Adapter<B>, scale: f32, rounding: Rounding) -> Result<()> {
    LoraMerge { a: (&adapter.a.tensor).into(), b: (&adapter.b.tensor).into(), scale, rounding, w: w.view_mut() }.run(backend)
}

/// What the bias of a layer becomes, if the part changes it.
fn new_bias<B: Backend>(backend: &B, base: Option<&Param<B>>, part: &LayerAdapter<B>) -> Result<Option<Vec<B::Elem>>> {
    let (own, update) = match part {
        LayerAdapter::Whole(_) => (None, None),
        LayerAdapter::Bias(bias) => (Some(bias), None),
        LayerAdapter::Lora(adapter) => (adapter.bias.as_ref(), adapter.lora_bias.as_ref().map(|bias| (bias, adapter.scaling()))),
    };
    let Some((update, scale)) = update else { return own.map(|own| own.tensor.to_vec(backend)).transpose() };
    let Some(base) = own.or(base) else {
        return Err(Error::Value { verb: "merge", name: "bias", got: "missing".into(), want: "there, for a `lora_bias`".into() });
    };
    let (base, update) = (base.tensor.to_vec(backend)?, update.tensor.to_vec(backend)?);
    let sum = |(base, update): (B::Elem, B::Elem)| B::Elem::from_f32(base.to_f32() + scale * update.to_f32());
    Ok(Some(base.into_iter().zip(update).map(sum).collect()))
}

/// The same error, with the name of the adapter.
fn named(error: Error, adapter: &str) -> Error {
    match error {
        Error::Value { verb: verb @ "merge", name, got, want } => {
            Error::Value { verb, name, got: format!("{got} with `{adapter}` in it"), want }
        }
        other => other,
    }
}
