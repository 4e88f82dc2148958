//! The settings of an adapter, in PEFT's terms.

use super::Init;
use crate::error::{Error, Result};

/// How `scaling` comes from alpha and the rank.
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
    /// What the update is multiplied with.
    pub fn of(self, alpha: f32, rank: usize) -> f32 {
        match self {
            Scaling::Raw => alpha,
            Scaling::AlphaOverRank => alpha / rank as f32,
            Scaling::AlphaOverSqrtRank => alpha / (rank as f32).sqrt(),
        }
    }
}

/// Which biases an adapter brings along, trained with it and used in place of the base model's while it is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Those of every layer of the model.
    All,
    /// Those of the layers it adapts.
    LoraOnly,
}

/// The settings of an adapter, in PEFT's terms.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `r`: at least 1
    pub rank: usize,
    /// `lora_alpha`
    pub alpha: f32,
    /// How the two make the scaling.
    pub scaling: Scaling,
    /// `lora_dropout`: how likely the adapter does not see an input, in training
    pub dropout: f32,
    /// `init_lora_weights`: what `A` and `B` begin with
    pub init: Init,
    /// `use_dora`: the merged weight is scaled, row by row, to a length that is trained
    pub use_dora: bool,
    /// `lora_bias`: the update has a bias of its own, multiplied with the scaling as well
    pub lora_bias: bool,
    /// `bias`: which biases of the model are trained
    pub bias: Bias,
    /// `modules_to_save`: the ends of the names of layers that are copied and trained whole
    pub modules_to_save: Vec<String>,
}

impl LoraConfig {
    /// Scaling alpha / r, no dropout, kaiming-uniform, nothing but `A` and `B`: PEFT's defaults.
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

    /// Errors: [`Error::Value`] for rank 0, an alpha that is not finite, a dropout outside `[0, 1)`, a deviation that is not
    /// finite, an odd rank where the factors begin orthogonal, a bias of the update beside DoRA (PEFT has no such adapter).
    pub fn check(&self) -> Result<()> {
        Error::unless(self.rank > 0, "lora", "rank", self.rank, "at least 1")?;
        Error::unless(self.alpha.is_finite(), "lora", "alpha", self.alpha, "a finite number")?;
        Error::unless(!(self.use_dora && self.lora_bias), "lora", "lora_bias", "set beside `use_dora`", "one of the two")?;
        let dropout = (0.0..1.0).contains(&self.dropout);
        Error::unless(dropout, "lora", "lora_dropout", self.dropout, "at least 0 and below 1")?;
        self.init.check(self.rank)
    }
}
