//! `lowrank convert`: convert to another element type or another format.

use std::path::PathBuf;

use clap::ValueEnum;
use lowrank::adapter::formats::{Base, Hints, Modules};
use lowrank::checkpoint::{self, Checkpoint};
use lowrank::{Error, Result};

use crate::count;
use crate::outputs::Out;
use crate::progress::watched;
use crate::values::Stored;

/// Convert an adapter to another format, or the floats of an adapter or a checkpoint to another type
#[derive(clap::Args)]
pub(crate) struct Convert {
    /// An adapter in any format that `info` recognises; without --to, a model or an adapter in safetensors
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The new type; values that overflow it are refused
    #[arg(long, required_unless_present = "to")]
    dtype: Option<Stored>,
    /// The format of the new adapter
    #[arg(long, value_name = "FORMAT")]
    to: Option<Format>,
    /// The model that the adapter is for; gives the names of modules, their shapes and the order of rows
    #[arg(long, value_name = "PATH", requires = "to")]
    base: Option<PathBuf>,
    /// The adapter's lora_alpha, for formats that do not contain it
    #[arg(long, value_name = "LORA_ALPHA", requires = "to")]
    alpha: Option<f64>,
    /// The model of a pipeline that the adapter is for: lora_unet, lora_te, … for kohya, unet, text_encoder, … for diffusers
    #[arg(long, requires = "to")]
    prefix: Option<String>,
    /// The name of a module in the adapter and in the model; can be given several times
    #[arg(long, value_name = "OLD=NEW", requires = "to", value_parser = pair)]
    map: Vec<(String, String)>,
    /// A file for kohya and gguf, a folder for peft and mlx-lm; without --to a file for a file, else a new folder
    #[command(flatten)]
    out: Out,
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
        let Some(format) = self.to else { return self.convert_dtype() };
        let out = self.out.begin(&[&self.path])?;
        let base = self.base.as_deref().map(Base::read).transpose()?;
        let hints = Hints { base, alpha: self.alpha, prefix: self.prefix.clone(), map: self.map.clone() };
        let mut modules = Modules::read(&self.path, &hints)?;
        if let Some(dtype) = self.dtype {
            modules = modules.stored_as(dtype.into());
        }
        out.write(|out| match (format, &hints.base) {
            (Format::Peft, _) => modules.write_peft(out),
            (Format::MlxLm, _) => modules.write_mlx_lm(out),
            (Format::Kohya, _) => modules.write_kohya(out, self.prefix.as_deref()),
            (Format::Gguf, Some(base)) => modules.write_gguf(out, base),
            (Format::Gguf, None) => {
                let want = "the folder of the model, whose config.json has the architecture and the number of heads";
                Err(Error::Value { verb: "convert", name: "base", got: "missing".into(), want: want.into() })
            }
        })?;
        println!("{}: {}", self.out.out.display(), count(modules.len(), "module"));
        if !modules.others().is_empty() {
            println!("  not converted: updates for {} in {}", modules.others().join(", "), self.path.display());
        }
        Ok(())
    }

    fn convert_dtype(&self) -> Result<()> {
        let out = self.out.begin(&[&self.path])?;
        let checkpoint = Checkpoint::open(&self.path)?;
        let Some(dtype) = self.dtype else { return Ok(()) }; // unreachable: clap requires --dtype without --to
        let bytes = checkpoint.bytes();
        out.write(|out| watched(bytes, |watch| checkpoint::convert(&checkpoint, dtype.into(), out, watch)))?;
        println!("{}: {}", self.out.out.display(), count(checkpoint.entries().count(), "tensor"));
        Ok(())
    }
}
