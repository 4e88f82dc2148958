//! `lowrank info`: describe a file or a folder.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lowrank::Result;
use lowrank::adapter::Folder;
use lowrank::adapter::formats::{Kind, Recognised, recognise, summary};
use lowrank::checkpoint::Checkpoint;

use crate::count;

/// Describe a file or a folder: its kind and its content
#[derive(clap::Args)]
pub(crate) struct Info {
    /// An adapter or a model in any format: a file, an index of shards, or a folder
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// List every module or tensor
    #[arg(long)]
    all: bool,
}

impl Info {
    pub(crate) fn run(self) -> Result<()> {
        let indexed = self.path.extension().is_some_and(|end| end == "json");
        match recognise(&self.path) {
            _ if indexed => self.checkpoint(),
            Ok(Recognised { kind: Kind::Peft, .. }) if self.path.is_dir() => self.adapter(),
            Ok(Recognised { kind: Kind::Checkpoint | Kind::Peft, .. }) => self.checkpoint(),
            Ok(found) => self.other(&found),
            // The error of the checkpoint reader is more precise.
            Err(error) if self.path.is_dir() => self.checkpoint().and(Err(error)),
            Err(error) => Err(error),
        }
    }

    /// Prints the kind of another format, advice, and the tensors if it has a readable header.
    fn other(&self, found: &Recognised) -> Result<()> {
        println!("{} is {}", found.path.display(), found.kind);
        println!("  {}", found.kind.advice(&found.path));
        match &found.kind {
            kind if kind.is_adapter() => {
                let (line, names) = summary(&self.path)?;
                println!("  {line}");
                names.iter().filter(|_| self.all).for_each(|name| println!("{name}"));
                Ok(())
            }
            Kind::Quantised(_) | Kind::AdapterInside | Kind::EmptyTensors | Kind::LyCoris => self.checkpoint(),
            _ => Ok(()),
        }
    }

    fn adapter(&self) -> Result<()> {
        let adapter = Folder::read(&self.path)?;
        let mut kinds: BTreeMap<(usize, String), usize> = BTreeMap::new();
        for factors in adapter.modules().values() {
            *kinds.entry((factors.rank(), format!("{}, {}", factors.scaling, factors.dtype))).or_default() += 1;
        }
        println!("adapter of {}, {} parameters", count(adapter.modules().len(), "module"), adapter.parameters());
        for ((rank, rest), count) in kinds {
            println!("  {count} of rank {rank}, scaling {rest}");
        }
        if !adapter.extras().is_empty() {
            println!("  {}: magnitudes, biases, whole modules", count(adapter.extras().len(), "other tensor"));
        }
        if let Some(part) = adapter.config().principal() {
            println!("  initialised with a part of the weights: {}", part.name());
        }
        if adapter.changes_nothing() {
            println!("  changes nothing: all of its updates are zero");
        }
        if self.all {
            for (name, factors) in adapter.modules() {
                println!("{name}  A {}  B {}  scaling {}", factors.a.shape(), factors.b.shape(), factors.scaling);
            }
            for (name, extra) in adapter.extras() {
                println!("{name}  {:?}", extra.tensor.shape);
            }
        }
        Ok(())
    }

    fn checkpoint(&self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.path)?;
        let mut kinds: BTreeMap<String, (usize, usize, usize)> = BTreeMap::new();
        for entry in checkpoint.entries() {
            let kind = kinds.entry(format!("{:?}", entry.dtype)).or_default();
            *kind = (kind.0 + 1, kind.1 + entry.elements(), kind.2 + entry.bytes);
        }
        let (tensors, files) = (count(checkpoint.entries().count(), "tensor"), count(checkpoint.files(), "file"));
        println!("checkpoint of {tensors} in {files}, {} bytes", checkpoint.bytes());
        for (dtype, (tensors, elements, bytes)) in kinds {
            println!("  {dtype}: {}, {elements} elements, {bytes} bytes", count(tensors, "tensor"));
        }
        match checkpoint.quantised_names() {
            Ok(names) if names.is_empty() => {}
            Ok(names) => println!("  {} weights are quantised; `lowrank dequantise` makes a plain model of it", names.len()),
            Err(error) => println!("  {error}"),
        }
        if self.all {
            checkpoint.entries().for_each(|entry| println!("{}  {:?} {}", entry.name, entry.dtype, entry.dimensions()));
        }
        Ok(())
    }
}
