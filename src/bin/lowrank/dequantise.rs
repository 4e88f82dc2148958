//! `lowrank dequantise`: a model of 4 or 8 bits as a plain one.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::checkpoint::{self, Checkpoint};

use crate::outputs::Out;
use crate::progress::watched;
use crate::values::Stored;

/// Make a plain model of one that bitsandbytes quantised
#[derive(clap::Args)]
pub(crate) struct Dequantise {
    /// The model: a .safetensors file, an index of shards, or a folder
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// How the weights are stored that were quantised [default: as they were before, or bf16]
    #[arg(long)]
    dtype: Option<Stored>,
    /// The plain model
    #[command(flatten)]
    out: Out,
}

impl Dequantise {
    pub(crate) fn run(self) -> Result<()> {
        let (out, base) = (self.out.begin(&[&self.model])?, Checkpoint::open(&self.model)?);
        let dtype = self.dtype.map(Into::into);
        let notes = out.write(|out| watched(base.bytes(), |watch| checkpoint::dequantise(&base, dtype, out, watch)))?;
        println!("{}:", self.out.out.display());
        base.note().into_iter().for_each(|note| println!("  {note}"));
        notes.iter().for_each(|note| println!("  {note}"));
        Ok(())
    }
}
