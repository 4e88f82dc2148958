//! `lowrank quantise`: the weights of a model in 4 or 8 bits.

use std::path::PathBuf;

use lowrank::checkpoint::{self, Checkpoint};
use lowrank::quant::{Blocks, QuantKind};
use lowrank::{Error, Result};

use crate::outputs::Out;
use crate::progress::watched;

/// Quantise the weights of a model, as bitsandbytes does
#[derive(clap::Args)]
pub(crate) struct Quantise {
    /// The model: a .safetensors file, an index of shards, or a folder
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// nf4, fp4 or int8
    #[arg(long = "type", value_name = "TYPE")]
    kind: QuantKind,
    /// Elements of a block, of nf4 and fp4: a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Keep the scales of nf4 and fp4 in f32, instead of quantising them as well
    #[arg(long)]
    single: bool,
    /// A module that stays as it is, by its name or the last part of it; heads and embeddings always do
    #[arg(long, value_name = "MODULE")]
    skip: Vec<String>,
    /// The quantised model
    #[command(flatten)]
    out: Out,
}

impl Quantise {
    pub(crate) fn run(self) -> Result<()> {
        let (kind, out) = (self.kind()?, self.out.begin(&[&self.model])?);
        let base = Checkpoint::open(&self.model)?;
        let notes = out.write(|out| {
            let request = checkpoint::Quantise { base: &base, kind, out, skip: &self.skip };
            watched(base.bytes(), |watch| checkpoint::quantise(&request, watch))
        })?;
        println!("{}:", self.out.out.display());
        base.note().into_iter().for_each(|note| println!("  {note}"));
        notes.iter().for_each(|note| println!("  {note}"));
        Ok(())
    }

    fn kind(&self) -> Result<QuantKind> {
        let blocks = Blocks { len: self.block.unwrap_or(64), double: !self.single };
        match self.kind {
            QuantKind::Nf4(_) => Ok(QuantKind::Nf4(blocks)),
            QuantKind::Fp4(_) => Ok(QuantKind::Fp4(blocks)),
            kind if self.block.is_none() && !self.single => Ok(kind),
            kind => {
                let (got, want) = (format!("set, for {kind}"), "absent: only nf4 and fp4 have blocks".into());
                Err(Error::Value { verb: "quantise", name: "block or single", got, want })
            }
        }
    }
}
