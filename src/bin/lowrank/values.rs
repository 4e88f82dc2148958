//! What the flags of several subcommands may hold.

use clap::ValueEnum;
use lowrank::DType;
use lowrank::adapter::Keep;

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
