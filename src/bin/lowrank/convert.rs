//! `lowrank convert`: the same numbers in another element type or another format.

use std::path::PathBuf;

use clap::ValueEnum;
use lowrank::adapter::formats::{Base, Hints, Modules};
use lowrank::checkpoint::{self, Checkpoint};
use lowrank::{Error, Result};

use crate::progress::watched;
use crate::values::Stored;

/// Store an adapter in another format, or the floats of an adapter or a checkpoint in another type
#[derive(clap::Args)]
pub(crate) struct Convert {
    /// An adapter of any format `info` knows; or, without --to, a model or an adapter in safetensors
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The type; numbers that are more than it can hold are refused
    #[arg(long, required_unless_present = "to")]
    dtype: Option<Stored>,
    /// The format of the new adapter
    #[arg(long, value_name = "FORMAT")]
    to: Option<Format>,
    /// The model that the adapter is for: names modules, checks shapes, tells the order of rows
    #[arg(long, value_name = "PATH", requires = "to")]
    base: Option<PathBuf>,
    /// The adapter's lora_alpha, where its format does not tell it
    #[arg(long, value_name = "LORA_ALPHA", requires = "to")]
    alpha: Option<f64>,
    /// Which model of a pipeline the adapter is for: lora_unet, lora_te, … in kohya's names, unet, text_encoder, … in diffusers'
    #[arg(long, requires = "to")]
    prefix: Option<String>,
    /// The name of a module in the adapter, and in the model; may be given several times
    #[arg(long, value_name = "OLD=NEW", requires = "to", value_parser = pair)]
    map: Vec<(String, String)>,
    /// A file for kohya and gguf, a folder for peft and mlx-lm; without --to a file for a file, else a new folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

/// A format that adapters are written in.
#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Format {
    Peft,
    MlxLm,
    Kohya,
    Gguf,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(old, new)| !old.is_empty() && !new.is_empty());
    pair.map(|(old, new)| (old.to_string(), new.to_string())).ok_or_else(|| "want OLD=NEW".into())
}

impl Convert {
    pub(crate) fn run(self) -> Result<()> {
        let Some(format) = self.to else { return self.retyped() };
        let base = self.base.as_deref().map(Base::read).transpose()?;
        let hints = Hints { base, alpha: self.alpha, prefix: self.prefix.clone(), map: self.map.clone() };
        let mut modules = Modules::read(&self.path, &hints)?;
        if let Some(dtype) = self.dtype {
            modules = modules.stored_as(dtype.into());
        }
        match (format, &hints.base) {
            (Format::Peft, _) => modules.write_peft(&self.out)?,
            (Format::MlxLm, _) => modules.write_mlx_lm(&self.out)?,
            (Format::Kohya, _) => modules.write_kohya(&self.out, self.prefix.as_deref())?,
            (Format::Gguf, Some(base)) => modules.write_gguf(&self.out, base)?,
            (Format::Gguf, None) => {
                let want = "the folder of the model, whose config.json tells the architecture and the heads";
                return Err(Error::Value { verb: "convert", name: "base", got: "missing".into(), want: want.into() });
            }
        }
        println!("{}: {} modules", self.out.display(), modules.len());
        if !modules.others().is_empty() {
            println!("  left in {}: updates for {}", self.path.display(), modules.others().join(", "));
        }
        Ok(())
    }

    fn retyped(&self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.path)?;
        let Some(dtype) = self.dtype else { return Ok(()) }; // clap asks for one of the two
        watched(checkpoint.bytes(), |watch| checkpoint::convert(&checkpoint, dtype.into(), &self.out, watch))?;
        println!("{}: {} tensors", self.out.display(), checkpoint.entries().count());
        Ok(())
    }
}
