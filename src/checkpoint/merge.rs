//! `W += scale·B·A` on disk: an adapter into a checkpoint, and out of it again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::convert::Convert;
use super::header::Entry;
use super::residue::{Keeper, Restorer};
use super::rewrite::{Edit, Pass, rewrite};
use super::{Checkpoint, Shard, Watch, listed, number, refused};
use crate::adapter::{Factors, Folder};
use crate::backend::cpu::Cpu;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::op::{LoraMerge, Rounding};
use crate::tensor::Tensor;

/// Elements of a weight that are merged at once: 1 MiB of `f32`, which stays in L2 from its widening to its rounding.
const BLOCK: usize = 1 << 18;
/// Blocks that are merged side by side, then written in their order.
const BLOCKS: usize = 8;

/// What to [`merge`].
#[derive(Debug)]
pub struct Merge<'m> {
    /// The model.
    pub base: &'m Checkpoint,
    /// What is added to it. The weight of its module `x` is the tensor `x.weight`.
    pub adapter: &'m Folder,
    /// The new checkpoint: a file if `base` was opened as one, else a folder that is not there yet.
    pub out: &'m Path,
    /// The element type of all float tensors of the new checkpoint; as in `base` by default.
    pub dtype: Option<DType>,
    /// A file for what rounding would keep [`unmerge`] from restoring.
    pub keep_residue: Option<&'m Path>,
    /// Whether weights that become infinite or NaN are written.
    pub allow_non_finite: bool,
}

/// Writes a checkpoint with an adapter merged into it: `W + scale·B·A`, summed in `f32` and rounded once.
///
/// Tensors that are not targets are copied as bytes; names, metadata and the order of everything stay. Errors:
/// [`Error::File`] for modules without a weight, weights that do not fit, results that are not finite, and what the disk
/// refuses; [`Error::Value`] for a residue of weights that change their type; [`Error::Interrupted`]. Nothing is written then.
pub fn merge(request: &Merge<'_>, mut watch: Watch<'_>) -> Result<()> {
    let Merge { base, adapter, out, dtype, keep_residue, allow_non_finite } = *request;
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
    let targets: Vec<&Entry> = updates.modules.keys().filter_map(|name| Some(base.find(name)?.1)).collect();
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
/// With the residue that [`merge`] kept, every weight is bit for bit what it was; without, it is that within rounding.
/// Errors: as [`merge`]; also [`Error::File`] if the residue does not belong to this checkpoint and adapter.
pub fn unmerge(merged: &Checkpoint, adapter: &Folder, out: &Path, residue: Option<&Path>, mut watch: Watch<'_>) -> Result<()> {
    let mut updates = Updates::new(merged, adapter, -1.0)?;
    let restorer = residue.map(Restorer::open).transpose()?;
    if let Some(restorer) = &restorer {
        restorer.covers(updates.modules.keys())?;
        updates.allow_non_finite = true; // what comes back is what was there
        updates.residue = Residue::Restore(restorer);
    }
    rewrite(merged, out, &mut updates, &mut watch)?.publish()
}

/// What is done about the weights that rounding does not restore.
enum Residue<'r> {
    None,
    Keep(&'r mut Keeper),
    Restore(&'r Restorer),
}

/// The updates of a checkpoint, by the name of the tensor they change.
struct Updates<'r> {
    cpu: Cpu<f32>,
    modules: BTreeMap<String, &'r Factors>,
    sign: f32,
    convert: Convert,
    residue: Residue<'r>,
    allow_non_finite: bool,
}

impl<'r> Updates<'r> {
    fn new(base: &Checkpoint, adapter: &'r Folder, sign: f32) -> Result<Self> {
        let modules: BTreeMap<String, &Factors> =
            adapter.modules().iter().map(|(module, factors)| (format!("{module}.weight"), factors)).collect();
        let missing: Vec<String> = modules.keys().filter(|name| base.find(name).is_none()).cloned().collect();
        if !missing.is_empty() {
            return Err(refused(base.path(), format!("has no {}, which the adapter updates", listed(&missing))));
        }
        for (name, factors) in &modules {
            let Some((shard, entry)) = base.find(name) else { continue };
            let (n, k) = (factors.b.rows(), factors.a.cols());
            if entry.shape != [n, k] {
                return Err(shard.refused(format!("`{name}` is {}, want {n}×{k} for the adapter", entry.dimensions())));
            }
            if entry.float().is_none() {
                return Err(shard.refused(format!("`{name}` holds {:?}, want F32, F16 or BF16 to be merged into", entry.dtype)));
            }
        }
        let (convert, residue) = (Convert(None), Residue::None);
        Ok(Self { cpu: Cpu::new()?, modules, sign, convert, residue, allow_non_finite: false })
    }
}

impl Edit for Updates<'_> {
    fn dtype(&self, entry: &Entry) -> Dtype {
        self.convert.dtype(entry)
    }

    fn write(&mut self, shard: &Shard, entry: &Entry, pass: &mut Pass<'_, '_>) -> Result<()> {
        let (Some(&factors), Some(from)) = (self.modules.get(&entry.name), entry.float()) else {
            return self.convert.write(shard, entry, pass);
        };
        let to = self.convert.0.unwrap_or(from);
        let keeps = matches!(self.residue, Residue::Keep(_));
        let weight = Weight::new(&self.cpu, factors, self.sign * factors.scaling, [from, to], keeps)?;
        let mut restored = match &mut self.residue {
            Residue::Restore(restorer) => Some(restorer.tensor(entry)?),
            Residue::Keep(keeper) => {
                keeper.begin(entry);
                None
            }
            Residue::None => None,
        };
        for blocks in weight.blocks().chunks(BLOCKS) {
            let buffers: Vec<_> = blocks.iter().map(|&block| (block, pass.buffer(weight.elements(block) * to.size()))).collect();
            let updated = buffers.into_par_iter().map(|(block, new)| weight.update(&self.cpu, (shard, entry), block, new));
            for Updated { first, mut new, finite, bytes, kept } in updated.collect::<Result<Vec<_>>>()? {
                if !finite && !self.allow_non_finite {
                    return Err(shard.refused(format!("`{}` is not finite once merged; nothing was written", entry.name)));
                }
                if let Some(restored) = &mut restored {
                    restored.patch(first, &mut new);
                }
                if let (Residue::Keep(keeper), Some((old, back))) = (&mut self.residue, kept) {
                    keeper.compare(first, &old, &back);
                }
                pass.write(new)?;
                pass.done(bytes)?;
            }
        }
        if let Residue::Keep(keeper) = &mut self.residue {
            keeper.end()?;
        }
        restored.map_or(Ok(()), |restored| restored.end())
    }
}

/// A weight on its way through memory, in blocks of rows that do not depend on the number of threads.
struct Weight<'f> {
    factors: &'f Factors,
    scale: f32,
    a: Tensor<Cpu<f32>>,
    dtypes: [DType; 2],
    /// Whether blocks are kept as they were, and as they come back.
    keeps: bool,
    /// Blocks of `f32` that are not in use: fresh pages cost more than the sums.
    spare: Mutex<Vec<Tensor<Cpu<f32>>>>,
}

/// A block of rows, merged.
struct Updated {
    /// Its first element.
    first: usize,
    new: Vec<u8>,
    finite: bool,
    /// How many bytes it had.
    bytes: usize,
    /// What it was, and what taking the update out of it gives.
    kept: Option<(Mmap, Vec<u8>)>,
}

/// The first row, and how many.
type Block = [usize; 2];

impl<'f> Weight<'f> {
    fn new(cpu: &Cpu<f32>, factors: &'f Factors, scale: f32, dtypes: [DType; 2], keeps: bool) -> Result<Self> {
        let a = Tensor::from_slice(cpu, factors.a.shape(), factors.a.values())?;
        Ok(Self { factors, scale, a, dtypes, keeps, spare: Mutex::default() })
    }

    fn blocks(&self) -> Vec<Block> {
        let (n, rows) = (self.factors.b.rows(), (BLOCK / self.a.cols().max(1)).max(1));
        (0..n).step_by(rows).map(|first| [first, rows.min(n - first)]).collect()
    }

    fn elements(&self, [_, rows]: Block) -> usize {
        rows * self.a.cols()
    }

    /// `new = W + scale·B·A` for the rows of a block.
    fn update(&self, cpu: &Cpu<f32>, (shard, entry): (&Shard, &Entry), block: Block, mut new: Vec<u8>) -> Result<Updated> {
        let [from, to] = self.dtypes;
        let (first, len) = (block[0] * self.a.cols(), self.elements(block));
        let old = shard.read(entry, first * from.size(), len * from.size())?;
        let finite = self.add(cpu, block, self.scale, [from, to], &old, &mut new)?;
        let bytes = old.len();
        let kept = if self.keeps {
            let mut back = vec![0; bytes];
            self.add(cpu, block, -self.scale, [to, from], &new, &mut back)?;
            Some((old, back))
        } else {
            None
        };
        Ok(Updated { first, new, finite, bytes, kept })
    }

    /// `new = old + scale·B·A`, summed in `f32` and rounded once. Says whether all of it is finite.
    fn add(
        &self,
        cpu: &Cpu<f32>,
        [first, rows]: Block,
        scale: f32,
        dtypes: [DType; 2],
        old: &[u8],
        new: &mut [u8],
    ) -> Result<bool> {
        let (r, shape) = (self.factors.rank(), (rows, self.a.cols()).into());
        let b = Tensor::from_slice(cpu, (rows, r), &self.factors.b.values()[first * r..(first + rows) * r])?;
        let spare = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = spare().pop().filter(|w| w.shape() == shape);
        let mut w = fits.map_or_else(|| Tensor::zeros(cpu, shape), Ok)?;
        number::widen(dtypes[0], old, w.buffer_mut());
        LoraMerge { a: &self.a, b: &b, scale, rounding: Rounding::Nearest, w: &mut w }.run(cpu)?;
        let finite = number::narrow(dtypes[1], w.buffer(), new);
        spare().push(w);
        Ok(finite)
    }
}
