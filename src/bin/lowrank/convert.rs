//! `lowrank convert`: the same numbers in another element type.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::checkpoint::{self, Checkpoint};

use crate::progress::watched;
use crate::values::Stored;

/// Store the floats of an adapter or a checkpoint in another type
#[derive(clap::Args)]
pub(crate) struct Convert {
    /// A .safetensors file, an index of shards, or a folder: of a model or an adapter
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The type; numbers that are more than it can hold are refused
    #[arg(long)]
    dtype: Stored,
    /// A file for a file, else a new folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

impl Convert {
    pub(crate) fn run(self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.path)?;
        watched(checkpoint.bytes(), |watch| checkpoint::convert(&checkpoint, self.dtype.into(), &self.out, watch))?;
        println!("{}: {} tensors", self.out.display(), checkpoint.entries().count());
        Ok(())
    }
}
