//! An adapter into a checkpoint on disk, and out of it again: `W += scale·B·A`, and what goes with it.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::change::{Change, Changed, Set, Update, changes};
use super::convert::Convert;
use super::header::Entry;
use super::residue::{Keeper, Restored, Restorer};
use super::rewrite::{Edit, Pass, rewrite};
use super::weight::{BLOCK, Weight};
use super::{Checkpoint, Shard, Watch, refused};
use crate::adapter::{CONFIG_FILE, Folder, Principal};
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};

/// Blocks that are merged side by side, then written in their order.
const BLOCKS: usize = 8;

/// What to [`merge`].
#[derive(Debug)]
pub struct Merge<'m> {
    /// The model.
    pub base: &'m Checkpoint,
    /// What is merged into it. The weight of its module `x` is the tensor `x.weight`.
    pub adapter: &'m Folder,
    /// The new checkpoint: a file if `base` was opened as one, else a folder that is not there yet.
    pub out: &'m Path,
    /// The element type of all float tensors of the new checkpoint, which its `config.json` names as well; as in `base` by default.
    pub dtype: Option<DType>,
    /// A file for what rounding would keep [`unmerge`] from restoring.
    pub keep_residue: Option<&'m Path>,
    /// Whether weights that become infinite or NaN are written.
    pub allow_non_finite: bool,
}

/// Writes a checkpoint with an adapter merged into it: `W + scale·B·A`, summed in `f32` and rounded once.
///
/// With magnitudes (DoRA) every row is then given its length; biases are added to or replaced, whole modules replaced. Tensors that
/// are not targets are copied as bytes; names, metadata and the order of everything stay. One weight at a time is decomposed for an
/// adapter that [began with a part of it](crate::adapter::Principal).
///
/// Errors: [`Error::File`] for modules without a weight, tensors that do not fit, results that are not finite, and what the disk
/// refuses; [`Error::Value`] for a residue of weights that change their type; [`Error::Unsupported`] for a residue of decomposed
/// weights; [`Error::Interrupted`]. Nothing is written then.
pub fn merge(request: &Merge<'_>, mut watch: Watch<'_>) -> Result<()> {
    let Merge { base, adapter, out, dtype, keep_residue, allow_non_finite } = *request;
    base.is_plain_model()?;
    let mut updates = Updates::new(base, adapter, 1.0)?;
    updates.convert = Convert(dtype);
    updates.allow_non_finite = allow_non_finite;
    let Some(path) = keep_residue else {
        return rewrite(base, out, &mut updates, &mut watch)?.publish();
    };
    Error::unless(
        dtype.is_none(),
        "merge",
        "dtype",
        "set",
        "absent where a residue is kept: rounded weights cannot be restored",
    )?;
    decomposes_nothing(adapter)?;
    let rows = |change: &Change<'_>| matches!(change, Change::Update(update) if update.magnitudes.is_some());
    let targets = updates.changes.iter().filter_map(|(name, change)| Some((base.find(name)?.1, rows(change))));
    let targets: Vec<(&Entry, bool)> = targets.collect();
    let mut merged = None;
    let residue = Keeper::stage(path, &targets, |keeper| {
        let mut updates = Updates { residue: Residue::Keep(keeper), ..updates };
        merged = Some(rewrite(base, out, &mut updates, &mut watch)?);
        Ok(())
    })?;
    residue.publish()?;
    merged.map_or(Ok(()), |merged| merged.publish())
}

/// Writes a checkpoint with an adapter taken out of it: `W - scale·B·A`.
///
/// With the residue that [`merge`] kept, every tensor is bit for bit what it was; without, it is that within rounding.
/// Errors: as [`merge`]; also [`Error::File`] if the residue does not belong to this checkpoint and adapter, or there is none and a
/// merged tensor does not tell what it was: one that was replaced, or whose rows were given other lengths.
pub fn unmerge(merged: &Checkpoint, adapter: &Folder, out: &Path, residue: Option<&Path>, mut watch: Watch<'_>) -> Result<()> {
    merged.is_plain_model()?;
    decomposes_nothing(adapter)?;
    let mut updates = Updates::new(merged, adapter, -1.0)?;
    let restorer = residue.map(Restorer::open).transpose()?;
    if let Some(restorer) = &restorer {
        restorer.covers(updates.changes.keys())?;
        updates.allow_non_finite = true; // what comes back is what was there
        updates.residue = Residue::Restore(restorer);
    }
    let hidden = updates.changes.iter().find_map(|(name, change)| Some((name, change.hides()?)));
    if let (Some((name, why)), None) = (hidden, residue) {
        return Err(refused(merged.path(), format!("`{name}` cannot be restored without the residue of the merge: {why}")));
    }
    rewrite(merged, out, &mut updates, &mut watch)?.publish()
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
    changes: BTreeMap<String, Change<'r>>,
    sign: f32,
    convert: Convert,
    residue: Residue<'r>,
    allow_non_finite: bool,
}

impl<'r> Updates<'r> {
    fn new(base: &Checkpoint, adapter: &'r Folder, sign: f32) -> Result<Self> {
        let (convert, residue) = (Convert(None), Residue::None);
        let (cpu, changes) = (Cpu::new()?, changes(base, adapter)?);
        Ok(Self { cpu, changes, sign, convert, residue, allow_non_finite: false })
    }
}

impl Edit for Updates<'_> {
    fn dtype(&self, entry: &Entry) -> Dtype {
        self.convert.dtype(entry)
    }

    fn asked(&self) -> Option<DType> {
        self.convert.0
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        let (Some(change), Some(from)) = (self.changes.get(&entry.name), entry.float()) else {
            return self.convert.write(shard, entry, pass);
        };
        let dtypes = [from, self.convert.0.unwrap_or(from)];
        let restored = match &mut self.residue {
            Residue::Restore(restorer) => Some(restorer.tensor(entry)?),
            Residue::Keep(keeper) => {
                keeper.begin(entry);
                None
            }
            Residue::None => None,
        };
        let Self { cpu, sign, residue, allow_non_finite, .. } = self;
        let mut target =
            Target { place: (shard, entry), dtypes, sign: *sign, pass, residue, restored, allow_non_finite: *allow_non_finite };
        match change {
            Change::Set(set) => target.set(set)?,
            Change::Update(update) => target.update(cpu, update)?,
        }
        target.end()
    }
}

/// A tensor that is changed, block by block.
struct Target<'t, 'p, 'w, 'r> {
    place: (&'t Shard, &'t Entry),
    dtypes: [DType; 2],
    sign: f32,
    pass: &'t mut Pass<'p, 'w>,
    residue: &'t mut Residue<'r>,
    restored: Option<Restored>,
    allow_non_finite: bool,
}

impl Target<'_, '_, '_, '_> {
    fn keeps(&self) -> bool {
        matches!(self.residue, Residue::Keep(_))
    }

    fn set(&mut self, set: &Set<'_>) -> Result<()> {
        let total = self.place.1.elements();
        for first in (0..total).step_by(BLOCK) {
            let len = BLOCK.min(total - first);
            let new = self.pass.buffer(len * self.dtypes[1].size());
            let changed = set.block(self.place, self.sign, [first, len], self.dtypes, self.keeps(), new)?;
            self.put(changed)?;
        }
        Ok(())
    }

    fn update(&mut self, cpu: &Cpu<f32>, update: &Update<'_>) -> Result<()> {
        let decomposed = update.decomposed(self.place, self.dtypes[0])?;
        let factors = decomposed.as_ref().unwrap_or(&*update.factors);
        let gains = self.restored.as_mut().map(Restored::take_gains).unwrap_or_default();
        let weight = Weight::new(cpu, factors, (self.sign, self.dtypes, self.keeps()), (update.magnitudes, &gains))?;
        for blocks in weight.blocks().chunks(BLOCKS) {
            let buffer = |&block| (block, self.pass.buffer(weight.elements(block) * self.dtypes[1].size()));
            let buffers: Vec<_> = blocks.iter().map(buffer).collect();
            let place = self.place;
            let changed = buffers.into_par_iter().map(|(block, new)| weight.update(cpu, place, block, new));
            changed.collect::<Result<Vec<_>>>()?.into_iter().try_for_each(|changed| self.put(changed))?;
        }
        Ok(())
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
