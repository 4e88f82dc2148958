//! `lowrank convert`: the same numbers in another element type.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::checkpoint::{self, Checkpoint};

use crate::outputs::Out;
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
    /// The new file or folder
    #[command(flatten)]
    out: Out,
}

impl Convert {
    pub(crate) fn run(self) -> Result<()> {
        let out = self.out.begin(&[&self.path])?;
        let checkpoint = Checkpoint::open(&self.path)?;
        watched(checkpoint.bytes(), |watch| checkpoint::convert(&checkpoint, self.dtype.into(), out.path(), watch))?;
        out.publish()?;
        println!("{}: {} tensors", self.out.out.display(), checkpoint.entries().count());
        Ok(())
    }
}
