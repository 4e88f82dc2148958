//! The settings of an adapter, with PEFT's names.

use super::Init;
use crate::error::{Error, Result};

/// How `scaling`, the factor of the update, is computed from alpha and the rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scaling {
    /// alpha
    Raw,
    /// alpha / r, as in the paper
    #[default]
    AlphaOverRank,
    /// alpha / √r: rank-stabilised, PEFT's `use_rslora`
    AlphaOverSqrtRank,
}

impl Scaling {
    /// The factor of the update.
    pub fn of(self, alpha: f32, rank: usize) -> f32 {
        match self {
            Scaling::Raw => alpha,
            Scaling::AlphaOverRank => alpha / rank as f32,
            Scaling::AlphaOverSqrtRank => alpha / (rank as f32).sqrt(),
        }
    }
}

/// The biases that are part of an adapter. They are trained with it, and replace those of the base model while it is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// The biases of every layer of the model.
    All,
    /// The biases of the layers that get an update.
    LoraOnly,
}

/// The settings of an adapter; each field names its counterpart in PEFT's `LoraConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `r`: at least 1
    pub rank: usize,
    /// `lora_alpha`
    pub alpha: f32,
    /// How alpha and the rank give the scaling: `use_rslora`
    pub scaling: Scaling,
    /// `lora_dropout`: the probability that an input element of the adapter is dropped in training
    pub dropout: f32,
    /// `init_lora_weights`: the initial values of `A` and `B`
    pub init: Init,
    /// `use_dora`: each row of the merged weight is scaled to a trained norm
    pub use_dora: bool,
    /// `lora_bias`: the update has a bias of its own, which is multiplied by the scaling too
    pub lora_bias: bool,
    /// `bias`: the biases of the model that are trained
    pub bias: Bias,
    /// `modules_to_save`: layers whose names end with one of these are copied and trained whole
    pub modules_to_save: Vec<String>,
}

impl LoraConfig {
    /// PEFT's defaults: scaling alpha / r, no dropout, Kaiming-uniform `A`, no DoRA and no biases.
    pub fn new(rank: usize, alpha: f32) -> Self {
        Self {
            rank,
            alpha,
            scaling: Scaling::default(),
            dropout: 0.0,
            init: Init::KaimingUniform,
            use_dora: false,
            lora_bias: false,
            bias: Bias::None,
            modules_to_save: Vec::new(),
        }
    }

    /// Checks the settings. Errors: [`Error::Value`] for rank 0, an alpha that is not finite, a dropout outside `[0, 1)`, those of
    /// [`Init::check`], and `lora_bias` together with DoRA (PEFT has no such adapter).
    pub fn check(&self) -> Result<()> {
        Error::unless(self.rank > 0, "lora", "rank", self.rank, "at least 1")?;
        Error::unless(self.alpha.is_finite(), "lora", "alpha", self.alpha, "a finite number")?;
        Error::unless(!(self.use_dora && self.lora_bias), "lora", "lora_bias", "set beside `use_dora`", "one of the two")?;
        let dropout = (0.0..1.0).contains(&self.dropout);
        Error::unless(dropout, "lora", "lora_dropout", self.dropout, "at least 0 and below 1")?;
        self.init.check(self.rank)
    }
}
