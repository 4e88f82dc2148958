//! `lowrank info`: what an adapter or a checkpoint holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lowrank::Result;
use lowrank::adapter::{CONFIG_FILE, Folder};
use lowrank::checkpoint::Checkpoint;

/// Say what an adapter or a checkpoint holds
#[derive(clap::Args)]
pub(crate) struct Info {
    /// An adapter's folder, a .safetensors file, an index of shards, or a folder
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Name every module or tensor
    #[arg(long)]
    all: bool,
}

impl Info {
    pub(crate) fn run(self) -> Result<()> {
        if self.path.join(CONFIG_FILE).exists() { self.adapter() } else { self.checkpoint() }
    }

    fn adapter(&self) -> Result<()> {
        let adapter = Folder::read(&self.path)?;
        let mut kinds: BTreeMap<(usize, String), usize> = BTreeMap::new();
        for factors in adapter.modules().values() {
            *kinds.entry((factors.rank(), format!("{}, {}", factors.scaling, factors.dtype))).or_default() += 1;
        }
        println!("adapter of {} modules, {} parameters", adapter.modules().len(), adapter.parameters());
        for ((rank, rest), count) in kinds {
            println!("  {count} of rank {rank}, scaling {rest}");
        }
        if !adapter.extras().is_empty() {
            println!("  {} tensors beside factors: magnitudes, biases, whole modules", adapter.extras().len());
        }
        if let Some(part) = adapter.config().began_with() {
            println!("  began with a part of the weights: {}", part.name());
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
        let (tensors, files) = (checkpoint.entries().count(), checkpoint.files());
        println!("checkpoint of {tensors} tensors in {files} files, {} bytes", checkpoint.bytes());
        for (dtype, (tensors, elements, bytes)) in kinds {
            println!("  {dtype}: {tensors} tensors, {elements} elements, {bytes} bytes");
        }
        if self.all {
            checkpoint.entries().for_each(|entry| println!("{}  {:?} {}", entry.name, entry.dtype, entry.dimensions()));
        }
        Ok(())
    }
}
