//! `lowrank extract`: an adapter out of the difference of two checkpoints.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::checkpoint::{self, Checkpoint, Layout};

use crate::outputs::Out;
use crate::progress::watched;
use crate::values::{Kept, Stored};

/// Make an adapter of what tuning changed, by truncated singular value decomposition
#[derive(clap::Args)]
pub(crate) struct Extract {
    /// The model before it was tuned
    #[arg(long, value_name = "PATH")]
    base: PathBuf,
    /// The same model after
    #[arg(long, value_name = "PATH")]
    tuned: PathBuf,
    #[command(flatten)]
    kept: Kept,
    /// The adapter's folder
    #[command(flatten)]
    out: Out,
    /// How the adapter is stored
    #[arg(long, default_value = "f32")]
    dtype: Stored,
    /// Leave changed biases, norms and embeddings, which an adapter cannot hold, as they are in the base
    #[arg(long)]
    leave_others: bool,
    /// How layers with the names of GPT-2's are stored, where no config.json tells: out-in, or in-out
    #[arg(long)]
    layout: Option<Layout>,
}

impl Extract {
    pub(crate) fn run(self) -> Result<()> {
        let out = self.out.begin_adapter(&[&self.base, &self.tuned])?;
        let (base, tuned) = (Checkpoint::open(&self.base)?, Checkpoint::open(&self.tuned)?);
        let (keep, dtype, leave_others) = (self.kept.keep(), self.dtype.into(), self.leave_others);
        let request = checkpoint::Extract { base: &base, tuned: &tuned, keep, dtype, leave_others, layout: self.layout };
        let checkpoint::Extracted { adapter, left } = watched(base.bytes(), |watch| checkpoint::extract(&request, watch))?;
        adapter.write(out.path())?;
        out.publish()?;
        println!("{}: {} modules, {} parameters", self.out.out.display(), adapter.modules().len(), adapter.parameters());
        left.iter().for_each(|left| println!("  left: {left}"));
        Ok(())
    }
}
