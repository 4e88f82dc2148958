//! `lowrank merge`: `W += scaling·B·A` for every module of an adapter.

use std::path::{Path, PathBuf};

use lowrank::Result;
use lowrank::adapter::Folder;
use lowrank::checkpoint::{self, Checkpoint};
use lowrank::quant::QuantKind;

use crate::count;
use crate::outputs::Out;
use crate::progress::watched;
use crate::values::{Names, Stored};

/// Merge an adapter into a checkpoint
#[derive(clap::Args)]
pub(crate) struct Merge {
    /// The model: a .safetensors file, an index of shards, or a folder
    #[arg(long, value_name = "PATH")]
    base: PathBuf,
    /// The adapter: a folder with adapter_config.json and adapter_model.safetensors
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The merged model
    #[command(flatten)]
    out: Out,
    /// The element type of all floats of the merged model; by default as in the base
    #[arg(long)]
    dtype: Option<Stored>,
    /// Also write a residue, with which `unmerge --residue` restores the base bit for bit
    #[arg(long, value_name = "FILE")]
    keep_residue: Option<PathBuf>,
    /// Write weights that become infinite or NaN, instead of refusing
    #[arg(long)]
    allow_non_finite: bool,
    /// Quantise the weights of a quantised base again once merged, instead of writing them in --dtype (bf16): nf4, fp4 or int8. This
    /// rounds the update; how much of it is printed
    #[arg(long, value_name = "TYPE", conflicts_with = "dtype")]
    requantise: Option<QuantKind>,
    #[command(flatten)]
    names: Names,
}

impl Merge {
    pub(crate) fn run(self) -> Result<()> {
        let inputs = [self.base.as_path(), &self.adapter];
        let out = self.out.begin(&inputs)?;
        let residue = self.keep_residue.iter().map(|path| self.out.begin_other(path, &inputs)).next().transpose()?;
        let (base, adapter) = (Checkpoint::open(&self.base)?, Folder::read(&self.adapter)?);
        let merge = |out: &Path, keep_residue: Option<&Path>| {
            let request = checkpoint::Merge {
                base: &base,
                adapter: &adapter,
                out,
                dtype: self.dtype.map(Into::into),
                keep_residue,
                allow_non_finite: self.allow_non_finite,
                names: &self.names.map,
                layout: self.names.layout,
                companions: Some(&self.adapter),
                requantise: self.requantise,
            };
            watched(base.bytes(), |watch| checkpoint::merge(&request, watch))
        };
        // The residue first: a merged model whose residue is missing could not be unmerged exactly.
        let notes = out.write(|out| match residue {
            Some(residue) => residue.write(|residue| merge(out, Some(residue))),
            None => merge(out, None),
        })?;
        println!("{}: {} merged", self.out.out.display(), count(adapter.modules().len(), "module"));
        base.note().into_iter().for_each(|note| println!("  {note}"));
        notes.iter().for_each(|note| println!("  {note}"));
        Ok(())
    }
}
