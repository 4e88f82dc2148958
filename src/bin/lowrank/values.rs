//! What the flags of several subcommands may hold.

use clap::ValueEnum;
use lowrank::DType;
use lowrank::adapter::Keep;
use lowrank::checkpoint::Layout;

/// How numbers are stored.
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

/// How much is kept of every module.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Kept {
    /// So many singular values; all where there are fewer
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// As few singular values as hold this share of the sum of their squares, such as 0.95
    #[arg(long, value_name = "SHARE")]
    energy: Option<f64>,
}

impl Kept {
    pub(crate) fn keep(&self) -> Keep {
        match (self.rank, self.energy) {
            (Some(rank), _) => Keep::Rank(rank),
            (None, energy) => Keep::Energy(energy.unwrap_or(1.0)), // clap asks for one of the two
        }
    }
}

/// Which tensors of a model an adapter means, where the names do not tell.
#[derive(clap::Args)]
pub(crate) struct Names {
    /// What a module of the adapter is called in the model, or how its names begin there: model.language_model.=model.
    #[arg(long, value_name = "OLD=NEW", value_parser = renaming)]
    pub(crate) map: Vec<(String, String)>,
    /// How linear layers are stored, where nothing tells: out-in, or in-out as in GPT-2
    #[arg(long)]
    pub(crate) layout: Option<Layout>,
}

fn renaming(text: &str) -> Result<(String, String), String> {
    let halves = text.split_once('=').ok_or_else(|| format!("`{text}` has no `=`, want OLD=NEW"))?;
    Ok((halves.0.into(), halves.1.into()))
}
