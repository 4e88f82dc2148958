//! `lowrank extract`: extract an adapter from the difference of two checkpoints.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::checkpoint::{self, Checkpoint, Layout};

use crate::count;
use crate::outputs::Out;
use crate::progress::watched;
use crate::values::{Kept, Stored};

/// Extract an adapter from a fine-tuned model, by truncated singular value decomposition of the change
#[derive(clap::Args)]
pub(crate) struct Extract {
    /// The model before fine-tuning
    #[arg(long, value_name = "PATH")]
    base: PathBuf,
    /// The model after fine-tuning
    #[arg(long, value_name = "PATH")]
    tuned: PathBuf,
    #[command(flatten)]
    kept: Kept,
    /// The adapter's folder
    #[command(flatten)]
    out: Out,
    /// The element type of the adapter
    #[arg(long, default_value = "f32")]
    dtype: Stored,
    /// Ignore changes of biases, norms and embeddings, which an adapter cannot hold, instead of refusing
    #[arg(long)]
    leave_others: bool,
    /// The layout of layers with the names of GPT-2's, if there is no config.json: out-in, or in-out
    #[arg(long)]
    layout: Option<Layout>,
}

impl Extract {
    pub(crate) fn run(self) -> Result<()> {
        let out = self.out.begin_adapter(&[&self.base, &self.tuned])?;
        let (base, tuned) = (Checkpoint::open(&self.base)?, Checkpoint::open(&self.tuned)?);
        let (keep, dtype, leave_others) = (self.kept.keep(), self.dtype.into(), self.leave_others);
        let request = checkpoint::Extract { base: &base, tuned: &tuned, keep, dtype, leave_others, layout: self.layout };
        let checkpoint::Extracted { adapter, omitted } = watched(base.bytes(), |watch| checkpoint::extract(&request, watch))?;
        out.write(|out| adapter.write(out))?;
        let modules = count(adapter.modules().len(), "module");
        println!("{}: {modules}, {} parameters", self.out.out.display(), adapter.parameters());
        omitted.iter().for_each(|change| println!("  not in the adapter: {change}"));
        Ok(())
    }
}
