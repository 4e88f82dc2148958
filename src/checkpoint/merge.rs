//! An adapter into a checkpoint on disk, and out of it again: `W += scale·B·A`, and what goes with it.

use std::path::Path;

use rayon::prelude::*;

use super::change::{Change, Changed};
use super::convert::Convert;
use super::header::Entry;
use super::layout::Layout;
use super::model::ConfigEdit;
use super::names::Place;
use super::plan::{Known, Plan, keeps_shapes};
use super::quantise::merge_quantised;
use super::residue::{Keeper, Restored, Restorer};
use super::rewrite::{Edit, Pass, rewrite};
use super::weight::{BLOCKS, MergeMode, Weight};
use super::{Checkpoint, Shard, Watch, refused};
use crate::adapter::formats::Kind;
use crate::adapter::{CONFIG_FILE, Folder, Principal};
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::quant::QuantKind;

/// What to [`merge`].
#[derive(Clone, Copy, Debug)]
pub struct Merge<'m> {
    /// The model.
    pub base: &'m Checkpoint,
    /// What is merged into it. The weight of its module `x` is the tensor `x.weight`, or one that is called so in other versions.
    pub adapter: &'m Folder,
    /// The new checkpoint: a file if `base` was opened as one, else a folder that is not there yet.
    pub out: &'m Path,
    /// The element type of all float tensors of the new checkpoint, which its `config.json` names as well; as in `base` by default.
    pub dtype: Option<DType>,
    /// A file for what rounding would keep [`unmerge`] from restoring.
    pub keep_residue: Option<&'m Path>,
    /// Whether weights that become infinite or NaN are written.
    pub allow_non_finite: bool,
    /// Names of modules of the adapter, or beginnings of them, and what they are in the checkpoint.
    pub names: &'m [(String, String)],
    /// How linear layers are stored, where nothing tells.
    pub layout: Option<Layout>,
    /// A folder, such as the adapter's, whose tokenizer, chat template and generation config take the place of the base's, where the
    /// new checkpoint is a folder.
    pub companions: Option<&'m Path>,
    /// How weights that were quantised are quantised again once the adapter is merged; else they are written in `dtype`, `bf16` by
    /// default. Weights that were not are not.
    pub requantise: Option<QuantKind>,
}

impl<'m> Merge<'m> {
    /// With every other setting at its default.
    pub fn new(base: &'m Checkpoint, adapter: &'m Folder, out: &'m Path) -> Self {
        let (dtype, keep_residue, layout, companions, requantise) = Default::default();
        Self { base, adapter, out, dtype, keep_residue, allow_non_finite: false, names: &[], layout, companions, requantise }
    }
}

/// What to [`unmerge`].
#[derive(Clone, Copy, Debug)]
pub struct Unmerge<'m> {
    /// The merged model.
    pub merged: &'m Checkpoint,
    /// What was merged into it.
    pub adapter: &'m Folder,
    /// The new checkpoint: a file if `merged` was opened as one, else a folder that is not there yet.
    pub out: &'m Path,
    /// What [`merge`] kept.
    pub residue: Option<&'m Path>,
    /// As in [`Merge`].
    pub names: &'m [(String, String)],
    /// As in [`Merge`].
    pub layout: Option<Layout>,
}

impl<'m> Unmerge<'m> {
    /// With every other setting at its default.
    pub fn new(merged: &'m Checkpoint, adapter: &'m Folder, out: &'m Path) -> Self {
        Self { merged, adapter, out, residue: None, names: &[], layout: None }
    }
}

/// Writes a checkpoint with an adapter merged into it: `W + scale·B·A`, summed in `f32` and rounded once. Gives what the caller should
/// know, a sentence each: names that were mapped, tensors that are new, what was left.
///
/// With magnitudes (DoRA) every row is then given its length; biases are added to or replaced, whole modules replaced. Tensors that
/// are not targets are copied as bytes; names, metadata and the order of everything stay. One weight at a time is decomposed for an
/// adapter that [began with a part of it](crate::adapter::Principal). A head that shares the embedding's weight gets one of its own if
/// the adapter changes one of the two.
///
/// Of a model that bitsandbytes quantised the weights are dequantised, merged in `f32`, and written dense, or quantised again if that is
/// asked for.
///
/// Errors: [`Error::File`] for modules without a weight or with several that could be meant, tensors that do not fit, results that are
/// not finite, and what the disk refuses; [`Error::Value`] for a residue of weights that change their type; [`Error::Unsupported`] for
/// a residue of decomposed weights; [`Error::Interrupted`]. Nothing is written then.
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
    base.is_plain_model()?;
    let mut updates = Updates::new(base, adapter, 1.0, Known { names, layout })?;
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
        "absent where a residue is kept: rounded weights cannot be restored",
    )?;
    decomposes_nothing(adapter)?;
    keeps_shapes(&updates.plan, base)?;
    let changes = updates.plan.changes.iter();
    let targets = changes.filter_map(|(name, change)| Some((base.find(name)?.1, change.gains().unwrap_or(0))));
    let targets: Vec<(&Entry, usize)> = targets.collect();
    let mut merged = None;
    let residue = Keeper::stage(path, &targets, |keeper| {
        let mut updates = Updates { residue: Residue::Keep(keeper), ..updates };
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

/// Writes a checkpoint with an adapter taken out of it: `W - scale·B·A`. Gives what the caller should know.
///
/// With the residue that [`merge`] kept, every tensor is bit for bit what it was; without, it is that within rounding.
/// Errors: as [`merge`]; also [`Error::File`] if the residue does not belong to this checkpoint and adapter, or there is none and a
/// merged tensor does not tell what it was: one that was replaced, or whose rows were given other lengths.
pub fn unmerge(request: &Unmerge<'_>, mut watch: Watch<'_>) -> Result<Vec<String>> {
    let Unmerge { merged, adapter, out, residue, names, layout } = *request;
    merged.is_plain_model()?;
    decomposes_nothing(adapter)?;
    let mut updates = Updates::new(merged, adapter, -1.0, Known { names, layout })?;
    let restorer = residue.map(Restorer::open).transpose()?;
    if let Some(restorer) = &restorer {
        restorer.covers(updates.plan.changes.keys())?;
        updates.allow_non_finite = true; // what comes back is what was there
        updates.residue = Residue::Restore(restorer);
    }
    let hidden = updates.plan.changes.iter().find_map(|(name, change)| Some((name, change.hides()?)));
    if let (Some((name, why)), None) = (hidden, residue) {
        return Err(refused(merged.path(), format!("`{name}` cannot be restored without the residue of the merge: {why}")));
    }
    keeps_shapes(&updates.plan, merged)?;
    updates.plan.config = ConfigEdit::default();
    let (staged, more) = rewrite(merged, out, &mut updates, &mut watch)?;
    staged.publish()?;
    Ok(updates.plan.notes.into_iter().chain(more).collect())
}

/// Errors: [`Error::Unsupported`] for an adapter whose update takes the weights as they were before they were merged.
fn decomposes_nothing(adapter: &Folder) -> Result<()> {
    let value = |part: Principal| format!("\"{}\" where a merge is to be undone", part.name());
    adapter.config().began_with().map_or(Ok(()), |part| {
        Err(Error::Unsupported { path: CONFIG_FILE.into(), field: "init_lora_weights", value: value(part) })
    })
}

/// What is done about the elements that rounding does not restore.
enum Residue<'r> {
    None,
    Keep(&'r mut Keeper),
    Restore(&'r Restorer),
}

/// The changes of a checkpoint, forth or back.
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
    fn new(base: &'r Checkpoint, adapter: &'r Folder, sign: f32, known: Known<'r>) -> Result<Self> {
        let (convert, residue) = (Convert(None), Residue::None);
        let (cpu, mut plan) = (Cpu::new()?, Plan::new(base, adapter, known)?);
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
            Some(change) => Entry::made(&entry.name, stored.dtype, change.shape.clone()),
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
            Residue::Restore(restorer) => Some(restorer.tensor(entry, change.gains())?),
            Residue::Keep(keeper) => {
                keeper.begin(entry);
                None
            }
            Residue::None => None,
        };
        let keeps = matches!(self.residue, Residue::Keep(_));
        let way = MergeMode { sign: self.sign, dtypes: [from, self.convert.0.unwrap_or(from)], keeps };
        let Self { cpu, residue, allow_non_finite, .. } = self;
        let target = Target { place: (shard, entry), way, pass, residue, restored, allow_non_finite: *allow_non_finite };
        target.change(cpu, change)
    }
}

/// A tensor that is changed, block by block.
struct Target<'t, 'p, 'w, 'r> {
    place: Place<'t>,
    way: MergeMode,
    pass: &'t mut Pass<'p, 'w>,
    residue: &'t mut Residue<'r>,
    restored: Option<Restored>,
    allow_non_finite: bool,
}

impl Target<'_, '_, '_, '_> {
    fn change(mut self, cpu: &Cpu<f32>, change: &Change<'_>) -> Result<()> {
        let kept = self.restored.as_mut().map(Restored::take_gains).unwrap_or_default();
        let weight = Weight::new(cpu, (change, self.place), self.way, &kept)?;
        let columns = weight.column_gains(cpu)?;
        let weight = weight.with_column_gains(&columns);
        if let Residue::Keep(keeper) = &mut *self.residue {
            keeper.keep_gains(&columns);
        }
        for blocks in weight.blocks().chunks(BLOCKS) {
            let buffer = |&block| (block, self.pass.buffer(weight.elements(block) * self.way.dtypes[1].size()));
            let buffers: Vec<_> = blocks.iter().map(buffer).collect();
            let changed = buffers.into_par_iter().map(|(block, new)| weight.update(cpu, block, new));
            changed.collect::<Result<Vec<_>>>()?.into_iter().try_for_each(|changed| self.put(changed))?;
        }
        self.end()
    }

    /// The next block.
    fn put(&mut self, changed: Changed) -> Result<()> {
        let Changed { first, mut new, finite, bytes, kept, gains } = changed;
        if !finite && !self.allow_non_finite {
            let (shard, entry) = self.place;
            return Err(shard.refused(format!("`{}` is not finite once merged; nothing was written", entry.name)));
        }
        if let Some(restored) = &mut self.restored {
            restored.patch(first, &mut new);
        }
        if let (Residue::Keep(keeper), Some((old, back))) = (&mut *self.residue, kept) {
            keeper.compare(first, &old, &back);
            keeper.keep_gains(&gains);
        }
        self.pass.write(new)?;
        self.pass.done(bytes)
    }

    fn end(self) -> Result<()> {
        if let Residue::Keep(keeper) = self.residue {
            keeper.end()?;
        }
        self.restored.map_or(Ok(()), Restored::end)
    }
}
