//! `lowrank compress`: reduce the rank of an adapter.

use std::path::PathBuf;

use lowrank::Result;
use lowrank::adapter::{self, Folder};

use crate::outputs::Out;
use crate::values::Kept;

/// Reduce the rank of an adapter, by its best approximation
#[derive(clap::Args)]
pub(crate) struct Compress {
    /// The adapter's folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    kept: Kept,
    /// The new adapter's folder
    #[command(flatten)]
    out: Out,
}

impl Compress {
    pub(crate) fn run(self) -> Result<()> {
        let out = self.out.begin_adapter(&[&self.adapter])?;
        let adapter = Folder::read(&self.adapter)?;
        let compressed = adapter::compress(&adapter, self.kept.keep())?;
        out.write(|out| compressed.write(out))?;
        println!("{}: {} parameters of {}", self.out.out.display(), compressed.parameters(), adapter.parameters());
        Ok(())
    }
}
