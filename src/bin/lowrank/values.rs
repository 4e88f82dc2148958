//! Arguments that several subcommands share.

use clap::ValueEnum;
use lowrank::DType;
use lowrank::adapter::Keep;
use lowrank::checkpoint::Layout;

/// An element type.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
}

impl From<Stored> for DType {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::F32 => DType::F32,
            Stored::F16 => DType::F16,
            Stored::Bf16 => DType::BF16,
        }
    }
}

/// How many singular values of every module are kept.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Kept {
    /// Keep this many singular values, or all if there are fewer
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// Keep the fewest singular values whose squares sum to this fraction of the sum of all squares, such as 0.95
    #[arg(long, value_name = "SHARE")]
    energy: Option<f64>,
}

impl Kept {
    pub(crate) fn keep(&self) -> Keep {
        match (self.rank, self.energy) {
            (Some(rank), _) => Keep::Rank(rank),
            (None, energy) => Keep::Energy(energy.unwrap_or(1.0)), // clap requires one of the two
        }
    }
}

/// How the modules of an adapter are found in the model, if names or shapes are ambiguous.
#[derive(clap::Args)]
pub(crate) struct Names {
    /// The name of a module in the adapter and in the model, or prefixes of such names: model.language_model.=model.
    #[arg(long, value_name = "OLD=NEW", value_parser = renaming)]
    pub(crate) map: Vec<(String, String)>,
    /// The layout of linear layers, if it cannot be found out: out-in, or in-out as in GPT-2
    #[arg(long)]
    pub(crate) layout: Option<Layout>,
}

fn renaming(text: &str) -> Result<(String, String), String> {
    let halves = text.split_once('=').ok_or_else(|| format!("`{text}` has no `=`, want OLD=NEW"))?;
    Ok((halves.0.into(), halves.1.into()))
}
