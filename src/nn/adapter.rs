//! The low-rank update of one layer: `scaling·B·A`, with a bias of the update, DoRA magnitudes or a bias of the layer.

use super::init::room_for;
use super::{Linear, LoraConfig, dora};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// The low-rank update of one layer, `scaling·B·A`. Depending on its settings it also has a bias of the update (`lora_bias`),
/// the norms of the merged rows (DoRA), and a bias that replaces the layer's.
///
/// The factors may be padded to a larger rank than that of the settings. The padding is zero, and stays zero in training.
#[derive(Debug)]
pub struct Adapter<B: Backend> {
    pub(super) a: Param<B>,
    pub(super) b: Param<B>,
    pub(super) lora_bias: Option<Param<B>>,
    pub(super) magnitude: Option<Param<B>>,
    pub(super) bias: Option<Param<B>>,
    pub(super) config: LoraConfig,
    pub(super) strength: f32,
}

impl<B: Backend> Adapter<B> {
    /// A new adapter for a layer: initialises `A` and `B` as configured and magnitudes to the row norms of the merged weight, and
    /// copies the bias. Errors: [`Error::Value`].
    pub fn new(backend: &B, base: &Linear<B>, config: LoraConfig, rng: &mut Rng) -> Result<Self> {
        config.check()?;
        let Shape { rows: n, cols: k } = base.shape();
        let (a, b) = config.init.factors(backend, (n, k, config.rank), rng)?;
        let mut adapter = Self::from_tensors(a, b, config)?;
        if adapter.config.lora_bias {
            adapter.lora_bias = Some(Param::plus(Tensor::zeros(backend, (1, n))?));
        }
        if adapter.config.use_dora {
            adapter.magnitude = Some(Param::plus(dora::row_norms(backend, base, &adapter)?));
        }
        if adapter.config.bias != super::Bias::None {
            adapter.bias = base.bias().map(|bias| bias.tensor.try_clone(backend).map(Param::plus)).transpose()?;
        }
        Ok(adapter)
    }

    /// From `A r×k` and `B n×r`. Errors: [`Error::Shape`], [`Error::Value`].
    pub fn from_tensors(a: Tensor<B>, b: Tensor<B>, config: LoraConfig) -> Result<Self> {
        config.check()?;
        fits("a", a.shape(), (config.rank, a.cols()))?;
        fits("b", b.shape(), (b.rows(), config.rank))?;
        let (a, b) = (Param::new(a), Param::plus(b));
        Ok(Self { a, b, lora_bias: None, magnitude: None, bias: None, config, strength: 1.0 })
    }

    /// With a bias of the update, `1×n`.
    #[must_use]
    pub fn with_lora_bias(mut self, lora_bias: Tensor<B>) -> Self {
        (self.lora_bias, self.config.lora_bias) = (Some(Param::plus(lora_bias)), true);
        self
    }

    /// With the norms of the merged rows, `1×n`: DoRA.
    #[must_use]
    pub fn with_magnitude(mut self, magnitude: Tensor<B>) -> Self {
        (self.magnitude, self.config.use_dora) = (Some(Param::plus(magnitude)), true);
        self
    }

    /// With a bias, `1×n`, that replaces the layer's.
    #[must_use]
    pub fn with_bias(mut self, bias: Tensor<B>) -> Self {
        self.bias = Some(Param::plus(bias));
        self
    }

    /// `r×k`, with more rows if it is padded to a larger rank
    pub fn a(&self) -> &Param<B> {
        &self.a
    }

    /// `n×r`, with more columns if it is padded to a larger rank
    pub fn b(&self) -> &Param<B> {
        &self.b
    }

    /// `1×n`: the bias of the update.
    pub fn lora_bias(&self) -> Option<&Param<B>> {
        self.lora_bias.as_ref()
    }

    /// `1×n`: the norms of the merged rows (DoRA).
    pub fn magnitude(&self) -> Option<&Param<B>> {
        self.magnitude.as_ref()
    }

    /// `1×n`: the bias that replaces the layer's.
    pub fn bias(&self) -> Option<&Param<B>> {
        self.bias.as_ref()
    }

    /// Its settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The factor of the update: alpha and the rank combined by [`Scaling`](super::Scaling), times the scale of
    /// [`Adaptable::set_scale`](super::Adaptable::set_scale).
    pub fn scaling(&self) -> f32 {
        self.strength * self.config.scaling.of(self.config.alpha, self.config.rank)
    }

    /// Its parameters: `A`, `B`, then, of those that it has, the bias of the update, the magnitudes and the bias.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        [&self.a, &self.b].into_iter().chain(&self.lora_bias).chain(&self.magnitude).chain(&self.bias)
    }

    /// Its parameters, in the order of [`params`](Self::params).
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.lora_bias).chain(&mut self.magnitude).chain(&mut self.bias)
    }

    /// [`params_mut`](Self::params_mut) with names.
    #[cfg(feature = "adapter")]
    pub(super) fn named_params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Param<B>)> {
        let Self { a, b, lora_bias, magnitude, bias, .. } = self;
        let factors = [("lora_A", a), ("lora_B", b)].into_iter();
        let others = [("lora_bias", lora_bias), ("lora_magnitude", magnitude), ("bias", bias)];
        factors.chain(others.into_iter().filter_map(|(name, param)| Some((name, param.as_mut()?))))
    }

    /// The rank that the factors are padded to.
    pub fn room(&self) -> usize {
        self.a.tensor.rows()
    }

    /// `A` and `B` without padding, in host memory.
    pub(crate) fn trimmed(&self, backend: &B) -> Result<[Vec<B::Elem>; 2]> {
        self.has_rank()?;
        let (a, b) = (self.a.tensor.to_vec(backend)?, self.b.tensor.to_vec(backend)?);
        let (rank, room, k) = (self.config.rank, self.room(), self.a.tensor.cols());
        let b = b.chunks_exact(room).flat_map(|row| row.iter().take(rank).copied()).collect();
        Ok([a.into_iter().take(rank * k).collect(), b])
    }

    /// `A` and `B` padded to a larger rank; `None` if they have that rank already. They are new parameters, because an
    /// optimizer's moments have the old shape. Errors: [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub(super) fn padded_factors(&self, backend: &B, rank: usize) -> Result<Option<[Param<B>; 2]>> {
        if rank <= self.room() {
            return Ok(None);
        }
        let (n, k) = (self.b.tensor.rows(), self.a.tensor.cols());
        let [a, b] = self.trimmed(backend)?;
        let a = Tensor::from_slice(backend, (rank, k), &padded(&a, (self.config.rank, k), (rank, k))?)?;
        let b = Tensor::from_slice(backend, (n, rank), &padded(&b, (n, self.config.rank), (n, rank))?)?;
        let (mut a, mut b) = (Param::new(a), Param::plus(b));
        (a.trainable, b.trainable) = (self.a.trainable, self.b.trainable);
        Ok(Some([a, b]))
    }

    /// Errors: [`Error::Shape`] unless both factors have the same rank, and at least that of the settings.
    fn has_rank(&self) -> Result<()> {
        let (a, b, rank) = (self.a.tensor.shape(), self.b.tensor.shape(), self.config.rank);
        fits("a", a, (a.rows.max(rank), a.cols))?;
        fits("b", b, (b.rows, a.rows))
    }

    /// Errors: [`Error::Shape`] unless it is for a layer of this size, [`Error::Value`] if a tensor that the settings require is
    /// missing.
    pub(super) fn fits(&self, base: &Linear<B>) -> Result<()> {
        let Shape { rows: n, cols: k } = base.shape();
        let row =
            |name, param: &Option<Param<B>>| param.as_ref().map_or(Ok(()), |param| fits(name, param.tensor.shape(), (1, n)));
        fits("a", self.a.tensor.shape(), (self.room().max(self.config.rank), k))?;
        fits("b", self.b.tensor.shape(), (n, self.room()))?;
        row("lora_bias", &self.lora_bias)?;
        row("magnitude", &self.magnitude)?;
        row("bias", &self.bias)?;
        let LoraConfig { use_dora, lora_bias, .. } = self.config;
        Error::unless(self.magnitude.is_some() == use_dora, "lora", "magnitude", "missing", "there, for `use_dora`")?;
        Error::unless(self.lora_bias.is_some() == lora_bias, "lora", "lora_bias", "missing", "there, as the settings say")
    }
}

fn fits(name: &'static str, got: Shape, want: impl Into<Shape>) -> Result<()> {
    let want = want.into();
    if got == want { Ok(()) } else { Err(Error::Shape { verb: "lora", name, got, want }) }
}

/// A matrix padded with zero columns and rows. Errors: [`Error::TooLarge`], [`Error::OutOfMemory`].
pub(super) fn padded<E: Float>(matrix: &[E], (rows, cols): (usize, usize), to: (usize, usize)) -> Result<Vec<E>> {
    let to = Shape::from(to);
    let mut padded = room_for(to)?;
    padded.resize(to.elements()?, E::default());
    if cols > 0 {
        let rows = matrix.chunks_exact(cols).take(rows);
        padded.chunks_exact_mut(to.cols).zip(rows).for_each(|(to, from)| to[..cols].copy_from_slice(from));
    }
    Ok(padded)
}
