//! A linear layer with an adapter: `y = x·Wᵀ + bias + scaling·(x·Aᵀ)·Bᵀ`

use super::{Init, Linear};
use crate::autograd::{LoraParams, Param, Tape, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::op::{Dropout, LoraMerge, Rounding};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

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
    /// `init_lora_weights`: what `A` begins with
    pub init: Init,
}

impl LoraConfig {
    /// Scaling alpha / r, no dropout, kaiming-uniform: PEFT's defaults.
    pub fn new(rank: usize, alpha: f32) -> Self {
        Self { rank, alpha, scaling: Scaling::default(), dropout: 0.0, init: Init::KaimingUniform }
    }

    /// Errors: [`Error::Value`] for rank 0, an alpha that is not finite, a dropout outside `[0, 1)`, a deviation that is not
    /// finite.
    pub fn check(&self) -> Result<()> {
        Error::unless(self.rank > 0, "lora", "rank", self.rank, "at least 1")?;
        Error::unless(self.alpha.is_finite(), "lora", "alpha", self.alpha, "a finite number")?;
        Dropout::new(self.dropout, 0)?;
        match self.init {
            Init::Gaussian { std } => Error::unless(std.is_finite(), "lora", "std", std, "a finite number"),
            Init::KaimingUniform => Ok(()),
        }
    }
}

/// The two factors of an update `scaling·B·A`.
#[derive(Debug)]
pub struct Adapter<B: Backend> {
    a: Param<B>,
    b: Param<B>,
    config: LoraConfig,
}

impl<B: Backend> Adapter<B> {
    /// For a layer of `k` inputs and `n` outputs: `A` as the settings say, `B` zero. Errors: [`Error::Value`].
    pub fn new(backend: &B, k: usize, n: usize, config: LoraConfig, rng: &mut Rng) -> Result<Self> {
        config.check()?;
        let a = config.init.tensor(backend, (config.rank, k), rng)?;
        let b = Tensor::zeros(backend, (n, config.rank))?;
        Ok(Self { a: Param::new(a), b: Param::new(b), config })
    }

    /// From `A r×k` and `B n×r`. Errors: [`Error::Shape`], [`Error::Value`].
    pub fn from_tensors(a: Tensor<B>, b: Tensor<B>, config: LoraConfig) -> Result<Self> {
        config.check()?;
        let fits = |name, got: Shape, want: Shape| {
            if got == want { Ok(()) } else { Err(Error::Shape { verb: "lora", name, got, want }) }
        };
        fits("a", a.shape(), Shape::from((config.rank, a.cols())))?;
        fits("b", b.shape(), Shape::from((b.rows(), config.rank)))?;
        Ok(Self { a: Param::new(a), b: Param::new(b), config })
    }

    /// `r×k`
    pub fn a(&self) -> &Param<B> {
        &self.a
    }

    /// `n×r`
    pub fn b(&self) -> &Param<B> {
        &self.b
    }

    /// Its settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// What the update is multiplied with.
    pub fn scaling(&self) -> f32 {
        self.config.scaling.of(self.config.alpha, self.config.rank)
    }
}

/// A linear layer with an adapter that can be switched off, and merged into the weight.
#[derive(Debug)]
pub struct LoraLinear<B: Backend> {
    base: Linear<B>,
    adapter: Adapter<B>,
    enabled: bool,
    merged: bool,
}

impl<B: Backend> LoraLinear<B> {
    /// Freezes the layer and puts the adapter beside it. Errors: [`Error::Shape`] if the adapter is for another layer.
    pub fn new(mut base: Linear<B>, adapter: Adapter<B>) -> Result<Self> {
        adapter.fits(&base)?;
        base.params_mut().for_each(|param| param.trainable = false);
        Ok(Self { base, adapter, enabled: true, merged: false })
    }

    /// The layer without its adapter. Holds the update as well while [`merged`](Self::is_merged).
    pub fn base(&self) -> &Linear<B> {
        &self.base
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter<B> {
        &self.adapter
    }

    /// Takes the adapter away; the layer stays frozen.
    pub fn into_base(self) -> Linear<B> {
        self.base
    }

    /// The weight, the bias, `A` and `B`.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.base.params_mut().chain([&mut self.adapter.a, &mut self.adapter.b])
    }

    /// Puts another adapter in the place of this one. Errors: [`Error::Shape`]; [`Error::Value`] while merged.
    pub fn set_adapter(&mut self, adapter: Adapter<B>) -> Result<()> {
        Error::unless(!self.merged, "set_adapter", "adapter", "merged into the weight", "unmerged first")?;
        adapter.fits(&self.base)?;
        self.adapter = adapter;
        Ok(())
    }

    /// Whether the adapter takes part.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Switches the adapter on or off. Errors: [`Error::Value`] while merged.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        Error::unless(!self.merged, "set_enabled", "adapter", "merged into the weight", "unmerged first")?;
        self.enabled = enabled;
        Ok(())
    }

    /// Whether the weight holds the update.
    pub fn is_merged(&self) -> bool {
        self.merged
    }

    /// `W += scaling·B·A`. Merging what is merged does nothing.
    pub fn merge(&mut self, backend: &B) -> Result<()> {
        self.add_update(backend, true)
    }

    /// `W -= scaling·B·A`, which leaves each weight within a rounding of what it was. Does nothing if not merged.
    pub fn unmerge(&mut self, backend: &B) -> Result<()> {
        self.add_update(backend, false)
    }

    fn add_update(&mut self, backend: &B, merge: bool) -> Result<()> {
        if self.merged == merge {
            return Ok(());
        }
        let scale = if merge { self.adapter.scaling() } else { -self.adapter.scaling() };
        let (a, b, w) = (&self.adapter.a.tensor, &self.adapter.b.tensor, self.base.weight_mut());
        LoraMerge { a, b, scale, rounding: Rounding::Nearest, w }.run(backend)?;
        self.merged = merge;
        Ok(())
    }

    /// `y = x·Wᵀ + bias + scaling·(drop(x)·Aᵀ)·Bᵀ`, or the base layer while the adapter is off or merged.
    ///
    /// Dropout is for training: it takes part where `seed` is given, and the mask is a function of it.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, seed: Option<u64>) -> Result<Var> {
        if self.merged || !self.enabled {
            return self.base.forward(tape, x);
        }
        let Adapter { a, b, config } = &self.adapter;
        let seed = seed.filter(|_| config.dropout > 0.0);
        let dropout = seed.map(|seed| Dropout::new(config.dropout, seed)).transpose()?;
        let (w, bias, scale) = (self.base.weight(), self.base.bias(), self.adapter.scaling());
        tape.lora_linear(x, LoraParams { w, bias, a, b, scale, dropout })
    }
}

impl<B: Backend> Adapter<B> {
    /// Errors: [`Error::Shape`] unless it is for a layer of this size.
    pub(super) fn fits(&self, base: &Linear<B>) -> Result<()> {
        let (n, k) = (base.weight().tensor.rows(), base.weight().tensor.cols());
        let rank = self.config.rank;
        for (name, got, want) in [("a", self.a.tensor.shape(), (rank, k)), ("b", self.b.tensor.shape(), (n, rank))] {
            let want = Shape::from(want);
            if got != want {
                return Err(Error::Shape { verb: "lora", name, got, want });
            }
        }
        Ok(())
    }
}
