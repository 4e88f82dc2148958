//! Merging an adapter into a checkpoint on disk, and unmerging it: `W += scale·B·A`, with biases, magnitudes and replaced
//! tensors.

use std::path::Path;

use rayon::prelude::*;

use super::change::{Change, Changed};
use super::convert::Convert;
use super::header::Entry;
use super::layout::Layout;
use super::model::ConfigEdit;
use super::names::Place;
use super::plan::{Options, Plan, check_shapes_kept};
use super::quantise::merge_quantised;
use super::residue::{ResidueReader, ResidueWriter, Restored};
use super::rewrite::{Edit, Pass, rewrite};
use super::weight::{BLOCKS, MergeMode, Weight};
use super::{Checkpoint, Shard, Watch, refused};
use crate::adapter::formats::Kind;
use crate::adapter::{CONFIG_FILE, Folder, Principal};
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::quant::QuantKind;

/// The arguments of [`merge`].
#[derive(Clone, Copy, Debug)]
pub struct Merge<'m> {
    /// The model.
    pub base: &'m Checkpoint,
    /// The adapter. The weight of its module `x` is the tensor `x.weight`, or the tensor of that name in another version of
    /// transformers.
    pub adapter: &'m Folder,
    /// The path of the new checkpoint: a file if `base` was opened as one, else a folder that does not exist yet.
    pub out: &'m Path,
    /// The element type of all float tensors of the new checkpoint, also written to its `config.json`. `None`: as in `base`.
    pub dtype: Option<DType>,
    /// The path of a residue to write: the file with which [`unmerge`] can restore the weights exactly.
    pub keep_residue: Option<&'m Path>,
    /// If true, weights that become infinite or NaN are written instead of refused.
    pub allow_non_finite: bool,
    /// Pairs of the name of a module in the adapter, or a prefix of names, and its name in the checkpoint.
    pub names: &'m [(String, String)],
    /// The layout of linear layers, for models where it cannot be found out.
    pub layout: Option<Layout>,
    /// A folder, such as the adapter's, whose tokenizer, chat template and generation config replace those of the base, if the
    /// new checkpoint is a folder.
    pub companions: Option<&'m Path>,
    /// How weights that were quantised are quantised again once the adapter is merged; else they are written in `dtype`, `bf16` by
    /// default. Weights that were not are not.
    pub requantise: Option<QuantKind>,
}

impl<'m> Merge<'m> {
    /// A merge with every other setting at its default.
    pub fn new(base: &'m Checkpoint, adapter: &'m Folder, out: &'m Path) -> Self {
        let (dtype, keep_residue, layout, companions, requantise) = Default::default();
        Self { base, adapter, out, dtype, keep_residue, allow_non_finite: false, names: &[], layout, companions, requantise }
    }
}

/// The arguments of [`unmerge`].
#[derive(Clone, Copy, Debug)]
pub struct Unmerge<'m> {
    /// The merged model.
    pub merged: &'m Checkpoint,
    /// The adapter that was merged into it.
    pub adapter: &'m Folder,
    /// The path of the new checkpoint: a file if `merged` was opened as one, else a folder that does not exist yet.
    pub out: &'m Path,
    /// The residue that [`merge`] wrote.
    pub residue: Option<&'m Path>,
    /// See [`Merge::names`].
    pub names: &'m [(String, String)],
    /// See [`Merge::layout`].
    pub layout: Option<Layout>,
}

impl<'m> Unmerge<'m> {
    /// An unmerge with every other setting at its default.
    pub fn new(merged: &'m Checkpoint, adapter: &'m Folder, out: &'m Path) -> Self {
        Self { merged, adapter, out, residue: None, names: &[], layout: None }
    }
}

/// Writes a checkpoint with an adapter merged into it: `W + scale·B·A`, summed in `f32` and rounded once. Returns notes for the
/// user, a sentence each: names that were mapped, new tensors, files that were not copied.
///
/// With magnitudes (DoRA) every row is then scaled to its norm. Biases are added to or replaced, and whole modules replaced. All
/// other tensors are copied byte for byte; names, metadata and the order of tensors are kept. For an adapter that was
/// [initialised with a part of the weights](crate::adapter::Principal) each weight is decomposed again. An output head that
/// shares the weight of the embedding gets a weight of its own if the adapter changes only one of the two.
///
/// The weights of a model that bitsandbytes quantised are dequantised, merged in `f32`, and written dense, or quantised again with
/// [`Merge::requantise`].
///
/// Errors: [`Error::File`] for modules whose weight is missing or ambiguous, shapes that do not fit, results that are not finite,
/// and failures of the disk; [`Error::Value`] for a residue together with another `dtype`; [`Error::Unsupported`] for a residue
/// of an adapter with [`Principal`]; [`Error::Interrupted`]. Nothing is written then.
pub fn merge(request: &Merge<'_>, watch: Watch<'_>) -> Result<Vec<String>> {
    if matches!(request.base.kind(), Kind::Quantised(_)) && !request.base.states()?.is_empty() {
        return merge_quantised(request, watch);
    }
    merge_plain(request, watch)
}

/// [`merge`] into a model that is not quantised.
pub(super) fn merge_plain(request: &Merge<'_>, mut watch: Watch<'_>) -> Result<Vec<String>> {
    let Merge { base, adapter, out, dtype, keep_residue, allow_non_finite, names, layout, companions, requantise } = *request;
    let want = "absent for a model that is not quantised: `quantise` the merged one";
    Error::unless(requantise.is_none(), "merge", "requantise", "set", want)?;
    base.check_plain_model()?;
    let mut updates = Updates::new(base, adapter, 1.0, Options { names, layout })?;
    let mut notes = std::mem::take(&mut updates.plan.notes);
    updates.convert = Convert(dtype);
    updates.companions = companions;
    updates.allow_non_finite = allow_non_finite;
    let Some(path) = keep_residue else {
        let (staged, more) = rewrite(base, out, &mut updates, &mut watch)?;
        notes.extend(more);
        return staged.publish().map(|()| notes);
    };
    Error::unless(
        dtype.is_none(),
        "merge",
        "dtype",
        "set",
        "absent if a residue is kept, because rounded weights cannot be restored",
    )?;
    check_no_decomposition(adapter)?;
    check_shapes_kept(&updates.plan, base)?;
    let changes = updates.plan.changes.iter();
    let targets = changes.filter_map(|(name, change)| Some((base.find(name)?.1, change.gains().unwrap_or(0))));
    let targets: Vec<(&Entry, usize)> = targets.collect();
    let mut merged = None;
    let residue = ResidueWriter::stage(path, &targets, |writer| {
        let mut updates = Updates { residue: Residue::Keep(writer), ..updates };
        merged = Some(rewrite(base, out, &mut updates, &mut watch)?);
        Ok(())
    })?;
    residue.publish()?;
    if let Some((staged, more)) = merged {
        staged.publish()?;
        notes.extend(more);
    }
    Ok(notes)
}

/// Writes a checkpoint with an adapter taken out of it: `W - scale·B·A`. Returns notes for the user.
///
/// With the residue that [`merge`] wrote, every tensor is restored bit for bit; without it, within rounding.
///
/// Errors: those of [`merge`]; also [`Error::File`] if the residue does not belong to this checkpoint and adapter, or if there is
/// no residue and a change cannot be undone without it: a replaced tensor, or rows that were scaled (DoRA).
pub fn unmerge(request: &Unmerge<'_>, mut watch: Watch<'_>) -> Result<Vec<String>> {
    let Unmerge { merged, adapter, out, residue, names, layout } = *request;
    merged.check_plain_model()?;
    check_no_decomposition(adapter)?;
    let mut updates = Updates::new(merged, adapter, -1.0, Options { names, layout })?;
    let reader = residue.map(ResidueReader::open).transpose()?;
    if let Some(reader) = &reader {
        reader.covers(updates.plan.changes.keys())?;
        updates.allow_non_finite = true; // the original weights may not be finite
        updates.residue = Residue::Restore(reader);
    }
    let irreversible = updates.plan.changes.iter().find_map(|(name, change)| Some((name, change.irreversible()?)));
    if let (Some((name, why)), None) = (irreversible, residue) {
        return Err(refused(merged.path(), format!("`{name}` cannot be restored without the residue of the merge: {why}")));
    }
    check_shapes_kept(&updates.plan, merged)?;
    updates.plan.config = ConfigEdit::default();
    let (staged, more) = rewrite(merged, out, &mut updates, &mut watch)?;
    staged.publish()?;
    Ok(updates.plan.notes.into_iter().chain(more).collect())
}

/// Errors: [`Error::Unsupported`] for an adapter whose update is computed from the weights before merging.
fn check_no_decomposition(adapter: &Folder) -> Result<()> {
    let value = |part: Principal| format!("\"{}\" for a merge that is to be undone", part.name());
    adapter.config().principal().map_or(Ok(()), |part| {
        Err(Error::Unsupported { path: CONFIG_FILE.into(), field: "init_lora_weights", value: value(part) })
    })
}

/// The residue of a merge: none, one that is written, or one that is applied.
enum Residue<'r> {
    None,
    Keep(&'r mut ResidueWriter),
    Restore(&'r ResidueReader),
}

/// The changes of a checkpoint: merging (sign 1) or unmerging (sign -1).
struct Updates<'r> {
    cpu: Cpu<f32>,
    plan: Plan<'r>,
    sign: f32,
    convert: Convert,
    residue: Residue<'r>,
    allow_non_finite: bool,
    companions: Option<&'r Path>,
}

impl<'r> Updates<'r> {
    fn new(base: &'r Checkpoint, adapter: &'r Folder, sign: f32, options: Options<'r>) -> Result<Self> {
        let (convert, residue) = (Convert(None), Residue::None);
        let (cpu, mut plan) = (Cpu::new()?, Plan::new(base, adapter, options)?);
        if sign < 0.0 {
            plan.notes.retain(|note| note.starts_with("names: "));
        }
        Ok(Self { cpu, plan, sign, convert, residue, allow_non_finite: false, companions: None })
    }
}

impl Edit for Updates<'_> {
    fn stored(&self, entry: &Entry) -> Entry {
        let stored = self.convert.stored(entry);
        match self.plan.changes.get(&entry.name) {
            Some(change) => Entry::new(&entry.name, stored.dtype, change.shape.clone()),
            None => stored,
        }
    }

    fn added(&self) -> &[Entry] {
        &self.plan.added
    }

    fn config(&self) -> ConfigEdit {
        ConfigEdit { dtype: self.convert.0, ..self.plan.config.clone() }
    }

    fn companions(&self) -> Option<&Path> {
        self.companions
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        let (Some(change), Some(from)) = (self.plan.changes.get(&entry.name), entry.float()) else {
            return self.convert.write(shard, entry, pass);
        };
        let restored = match &mut self.residue {
            Residue::Restore(reader) => Some(reader.tensor(entry, change.gains())?),
            Residue::Keep(writer) => {
                writer.begin(entry);
                None
            }
            Residue::None => None,
        };
        let keeps = matches!(self.residue, Residue::Keep(_));
        let mode = MergeMode { sign: self.sign, dtypes: [from, self.convert.0.unwrap_or(from)], keeps };
        let Self { cpu, residue, allow_non_finite, .. } = self;
        let target = Target { place: (shard, entry), mode, pass, residue, restored, allow_non_finite: *allow_non_finite };
        target.change(cpu, change)
    }
}

/// A tensor that is changed block by block.
struct Target<'t, 'p, 'w, 'r> {
    place: Place<'t>,
    mode: MergeMode,
    pass: &'t mut Pass<'p, 'w>,
    residue: &'t mut Residue<'r>,
    restored: Option<Restored>,
    allow_non_finite: bool,
}

impl Target<'_, '_, '_, '_> {
    fn change(mut self, cpu: &Cpu<f32>, change: &Change<'_>) -> Result<()> {
        let kept = self.restored.as_mut().map(Restored::take_gains).unwrap_or_default();
        let weight = Weight::new(cpu, (change, self.place), self.mode, &kept)?;
        let columns = weight.column_gains(cpu)?;
        let weight = weight.with_column_gains(&columns);
        if let Residue::Keep(writer) = &mut *self.residue {
            writer.keep_gains(&columns);
        }
        for blocks in weight.blocks().chunks(BLOCKS) {
            let buffer = |&block| (block, self.pass.buffer(weight.elements(block) * self.mode.dtypes[1].size()));
            let buffers: Vec<_> = blocks.iter().map(buffer).collect();
            let changed = buffers.into_par_iter().map(|(block, new)| weight.update(cpu, block, new));
            changed.collect::<Result<Vec<_>>>()?.into_iter().try_for_each(|changed| self.put(changed))?;
        }
        self.end()
    }

    /// Writes the next block.
    fn put(&mut self, changed: Changed) -> Result<()> {
        let Changed { first, mut new, finite, bytes, kept, gains } = changed;
        if !finite && !self.allow_non_finite {
            let (shard, entry) = self.place;
            return Err(shard.refused(format!("`{}` is not finite after merging; nothing was written", entry.name)));
        }
        if let Some(restored) = &mut self.restored {
            restored.patch(first, &mut new);
        }
        if let (Residue::Keep(writer), Some([old, back])) = (&mut *self.residue, kept) {
            writer.compare(first, &old, &back);
            writer.keep_gains(&gains);
        }
        self.pass.write(new)?;
        self.pass.done(bytes)
    }

    fn end(self) -> Result<()> {
        if let Residue::Keep(writer) = self.residue {
            writer.end()?;
        }
        self.restored.map_or(Ok(()), Restored::end)
    }
}
