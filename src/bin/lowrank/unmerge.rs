//! `lowrank unmerge`: take a merged adapter out of a checkpoint, exactly if its residue was kept.

use std::path::{Path, PathBuf};

use lowrank::Result;
use lowrank::adapter::Folder;
use lowrank::checkpoint::{self, Checkpoint};

use crate::count;
use crate::outputs::Out;
use crate::progress::watched;
use crate::values::Names;

/// Take a merged adapter out of a checkpoint
#[derive(clap::Args)]
pub(crate) struct Unmerge {
    /// The merged model: a .safetensors file, an index of shards, or a folder
    #[arg(long, visible_alias = "merged", value_name = "PATH")]
    base: PathBuf,
    /// The adapter that was merged into it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The model without the adapter
    #[command(flatten)]
    out: Out,
    /// The residue that `merge --keep-residue` wrote: with it the result is equal to the base bit for bit, without it within
    /// rounding
    #[arg(long, value_name = "FILE")]
    residue: Option<PathBuf>,
    #[command(flatten)]
    names: Names,
}

impl Unmerge {
    pub(crate) fn run(self) -> Result<()> {
        let residue = self.residue.as_deref();
        let inputs: Vec<&Path> = [self.base.as_path(), &self.adapter].into_iter().chain(residue).collect();
        let out = self.out.begin(&inputs)?;
        let (merged, adapter) = (Checkpoint::open(&self.base)?, Folder::read(&self.adapter)?);
        let (names, layout) = (self.names.map.as_slice(), self.names.layout);
        let notes = out.write(|out| {
            let request = checkpoint::Unmerge { merged: &merged, adapter: &adapter, out, residue, names, layout };
            watched(merged.bytes(), |watch| checkpoint::unmerge(&request, watch))
        })?;
        let how = match residue {
            Some(_) => "bit for bit",
            None => "within rounding, because no residue was given",
        };
        println!("{}: {} unmerged, {how}", self.out.out.display(), count(adapter.modules().len(), "module"));
        notes.iter().for_each(|note| println!("  {note}"));
        Ok(())
    }
}
