//! `lowrank unmerge`: the checkpoint without the adapter, exactly if its residue was kept.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::adapter::Folder;
use lowrank::checkpoint::{self, Checkpoint};

use crate::progress::watched;

/// Take a merged adapter out of a checkpoint
#[derive(clap::Args)]
pub(crate) struct Unmerge {
    /// The merged model, which the adapter is taken out of: a .safetensors file, an index of shards, or a folder
    #[arg(long, visible_alias = "merged", value_name = "PATH")]
    base: PathBuf,
    /// The adapter that was merged into it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The model without it: a file for a file, else a new folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// What `merge --keep-residue` wrote: with it the result is the base bit for bit, without it within rounding
    #[arg(long, value_name = "FILE")]
    residue: Option<PathBuf>,
}

impl Unmerge {
    pub(crate) fn run(self) -> Result<()> {
        let (merged, adapter) = (Checkpoint::open(&self.base)?, Folder::read(&self.adapter)?);
        let residue = self.residue.as_deref();
        watched(merged.bytes(), |watch| checkpoint::unmerge(&merged, &adapter, &self.out, residue, watch))?;
        let how = match residue {
            Some(_) => "bit for bit",
            None => "within rounding, because no residue was given",
        };
        println!("{}: {} modules unmerged, {how}", self.out.display(), adapter.modules().len());
        Ok(())
    }
}
