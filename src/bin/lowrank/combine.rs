//! `lowrank combine`: combine several adapters into one.

use std::path::{Path, PathBuf};

use lowrank::adapter::{self, CombinationType, Folder, MajoritySign};
use lowrank::{Error, Result};

use crate::outputs::Out;

/// Combine adapters into one, with the algorithms of PEFT's add_weighted_adapter
#[derive(clap::Args)]
pub(crate) struct Combine {
    /// The folders of the adapters
    #[arg(required = true, value_name = "DIR")]
    adapters: Vec<PathBuf>,
    /// A weight for each adapter, which may be negative, such as 0.7,-0.3; all 1 by default
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true)]
    weights: Vec<f64>,
    /// The algorithm: linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, magnitude_prune
    /// or magnitude_prune_svd
    #[arg(long = "type", value_name = "TYPE", default_value = "svd")]
    combination_type: CombinationType,
    /// The fraction of elements that pruning keeps
    #[arg(long)]
    density: Option<f64>,
    /// How the ties types elect a sign: total or frequency
    #[arg(long)]
    majority_sign_method: Option<MajoritySign>,
    /// The rank of the result, for the svd types; by default the largest rank of the adapters
    #[arg(long)]
    svd_rank: Option<usize>,
    /// The seed of the dare types, which prune at random
    #[arg(long)]
    seed: Option<u64>,
    /// The new adapter's folder
    #[command(flatten)]
    out: Out,
}

impl Combine {
    pub(crate) fn run(self) -> Result<()> {
        let inputs: Vec<&Path> = self.adapters.iter().map(PathBuf::as_path).collect();
        let out = self.out.begin_adapter(&inputs)?;
        let folders = self.adapters.iter().map(|dir| Folder::read(dir)).collect::<Result<Vec<_>>>()?;
        let weights = if self.weights.is_empty() { vec![1.0; folders.len()] } else { self.weights };
        if weights.len() != folders.len() {
            let got = format!("{} numbers", weights.len());
            return Err(Error::Value { verb: "combine", name: "weights", got, want: "one for each adapter".into() });
        }
        let parts: Vec<(&Folder, f64)> = folders.iter().zip(weights).collect();
        let how = adapter::Combine {
            density: self.density,
            majority_sign_method: self.majority_sign_method,
            svd_rank: self.svd_rank,
            seed: self.seed,
            ..adapter::Combine::new(self.combination_type)
        };
        let combined = adapter::combine(&parts, &how)?;
        out.write(|out| combined.write(out))?;
        println!("{}: {} adapters in {} parameters", self.out.out.display(), folders.len(), combined.parameters());
        Ok(())
    }
}
