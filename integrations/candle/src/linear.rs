//! A linear layer with adapters: `y = x·Wᵀ + bias + Σ scaling·(drop(x)·Aᵀ)·Bᵀ`, the sum over those that are active.

use std::ops::Range;

use candle_core::{DType, Device, Module, Tensor, Var};
use lowrank::adapter::{Factors, HostMatrix};
use lowrank::nn::LoraConfig;
use lowrank::op::Dropout;
use lowrank::random::Rng;

use crate::lend::Lent;
use crate::merge::{Undo, merge};
use crate::op::{Base, FrozenOp, LoraOp, Update, forward_tensor};
use crate::{Error, Result};

/// Which adapters take part in a forward pass.
#[derive(Clone, Copy, Debug, Default)]
pub enum Chosen<'p> {
    /// Those that are active.
    #[default]
    Active,
    /// These, added up; an empty list is the base model. A layer passes over a name that it does not have.
    Named(&'p [&'p str]),
    /// Of each range of rows (tokens) the adapter named beside it; rows in no range go through the base model. For passes without
    /// gradients.
    Rows(&'p [(Range<usize>, &'p str)]),
}

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass<'p> {
    /// Which adapters take part.
    pub adapters: Chosen<'p>,
    /// Whether candle's autograd can run backward through it.
    pub gradients: bool,
    /// Dropout takes part where a seed is given; the masks are a function of it.
    pub seed: Option<u64>,
    /// Gradient checkpointing: a layer of [`CausalLm`](crate::CausalLm) keeps its input alone for the backward pass, which runs the layer
    /// again. This takes less memory and more time, and gives the same bits. Where several adapters take part, nothing is different.
    pub checkpoint: bool,
}

impl Pass<'static> {
    /// The active adapters, no gradients, no dropout.
    pub fn inference() -> Self {
        Self::default()
    }

    /// The active adapters, with gradients, and dropout by this seed.
    pub fn training(seed: u64) -> Self {
        Self { gradients: true, seed: Some(seed), ..Self::default() }
    }
}

/// The update of one layer: `scaling·B·A`, in `f32`.
#[derive(Clone, Debug)]
pub struct Adapter {
    a: Var,
    b: Var,
    config: LoraConfig,
    strength: f32,
}

impl Adapter {
    /// For a layer with `k` inputs and `n` outputs: factors as the settings say.
    ///
    /// Errors: for settings out of range, and for DoRA and biases, which are not supported here.
    pub fn new((n, k): (usize, usize), config: &LoraConfig, rng: &mut Rng) -> Result<Self> {
        config.check()?;
        let cpu = <f32 as crate::lend::Elem>::cpu()?;
        let base = lowrank::nn::Linear::from_tensors(lowrank::Tensor::zeros(cpu, (n, k))?, None)?;
        let new = lowrank::nn::Adapter::new(cpu, &base, plain(config)?, rng)?;
        let var = |param: &lowrank::autograd::Param<lowrank::Cpu<f32>>| param.tensor().to_vec(cpu);
        Self::from_vecs((n, k), [var(new.a())?, var(new.b())?], config.clone())
    }

    /// From `A r×k` and `B n×r`, row by row.
    fn from_vecs((n, k): (usize, usize), [a, b]: [Vec<f32>; 2], config: LoraConfig) -> Result<Self> {
        let var = |vec, shape: (usize, usize)| Var::from_vec(vec, shape, &Device::Cpu);
        let config = plain(&config)?;
        Ok(Self { a: var(a, (config.rank, k))?, b: var(b, (n, config.rank))?, config, strength: 1.0 })
    }

    /// As a folder holds it. Errors: unless the factors fit the layer and the settings.
    pub(crate) fn from_factors((n, k): (usize, usize), factors: &Factors, config: LoraConfig) -> Result<Self> {
        let (a, b) = (factors.a.shape(), factors.b.shape());
        Error::unless(a == (config.rank, k).into(), "lora_A", a, lowrank::Shape::from((config.rank, k)))?;
        Error::unless(b == (n, config.rank).into(), "lora_B", b, lowrank::Shape::from((n, config.rank)))?;
        Self::from_vecs((n, k), [factors.a.values().to_vec(), factors.b.values().to_vec()], config)
    }

    /// As a folder holds it. The strength is not part of it.
    pub(crate) fn to_factors(&self) -> Result<Factors> {
        let matrix = |var: &Var| -> Result<HostMatrix> {
            let values = Lent::new(var.as_tensor()).slice::<f32>()?.to_vec();
            Ok(HostMatrix::new(var.dims2()?, values)?)
        };
        let scaling = self.config.scaling.of(self.config.alpha, self.config.rank);
        Ok(Factors { a: matrix(&self.a)?, b: matrix(&self.b)?, scaling, dtype: lowrank::DType::F32 })
    }

    /// `r×k`
    pub fn a(&self) -> &Var {
        &self.a
    }

    /// `n×r`
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// Its settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// What the update is multiplied with: what alpha and the rank make, times what [`LoraLinear::set_scale`] says.
    pub fn scaling(&self) -> f32 {
        self.strength * self.config.scaling.of(self.config.alpha, self.config.rank)
    }
}

/// The settings, if they ask for nothing but `A` and `B`.
fn plain(config: &LoraConfig) -> Result<LoraConfig> {
    let refuse = |name, set: bool| Error::unless(!set, name, "set", "not set: lowrank-candle trains A and B alone");
    refuse("use_dora", config.use_dora)?;
    refuse("lora_bias", config.lora_bias)?;
    refuse("bias", config.bias != lowrank::nn::Bias::None)?;
    refuse("modules_to_save", !config.modules_to_save.is_empty())?;
    Ok(config.clone())
}

/// One adapter with its dropout in a pass, or none.
pub(crate) type Single<'s> = Option<(&'s Adapter, Option<Dropout>)>;

/// A linear layer with a frozen weight, and adapters by name of which some are active.
///
/// As a candle [`Module`] it computes with the active adapters, and gradients reach their `A` and `B`. No gradient of the weight is
/// ever made.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lowrank::{nn::LoraConfig, random::Rng};
/// use lowrank_candle::LoraLinear;
///
/// let weight = Tensor::randn(0f32, 1.0, (8, 4), &Device::Cpu)?; // 4 inputs, 8 outputs
/// let mut layer = LoraLinear::new(weight, None)?;
/// layer.add("default", &LoraConfig::new(2, 4.0), &mut Rng::new(0))?;
/// let x = Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu)?;
/// let gradients = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
/// let adapter = layer.adapter("default").unwrap();
/// assert!(gradients.get(adapter.b()).is_some());
/// # Ok::<(), lowrank_candle::Error>(())
/// ```
#[derive(Debug)]
pub struct LoraLinear {
    base: Base,
    parts: Vec<(String, Adapter)>,
    active: Vec<String>,
    enabled: bool,
    merged: Vec<(String, Undo)>,
    /// Distinguishes the dropout masks of the layers of a model.
    salt: u64,
}

impl LoraLinear {
    /// A layer without adapters, from a weight `n×k` and a bias of `n` elements, which stay in candle's memory.
    ///
    /// Errors: unless both are in the memory of the CPU, of one type (f32, f16 or bf16), and fit.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (n, dtype) = (weight.dims2()?.0, weight.dtype());
        Error::unless(weight.device().is_cpu(), "device", "a GPU", "the CPU")?;
        let known = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        Error::unless(known, "dtype", dtype.as_str(), "f32, f16 or bf16")?;
        if let Some(bias) = &bias {
            let fits = bias.dims() == [n] && bias.dtype() == dtype;
            let got = format!("{:?} of {}", bias.dims(), bias.dtype().as_str());
            Error::unless(fits, "bias", got, format!("[{n}] of {}", dtype.as_str()))?;
        }
        let base = Base {
            w: weight.contiguous()?.detach(),
            bias: bias.map(|bias| Ok::<_, Error>(bias.contiguous()?.detach())).transpose()?,
        };
        Ok(Self { base, parts: Vec::new(), active: Vec::new(), enabled: true, merged: Vec::new(), salt: 0 })
    }

    /// From a linear layer of candle's, whose tensors it shares. Errors: those of [`new`](Self::new).
    pub fn wrap(linear: &candle_nn::Linear) -> Result<Self> {
        Self::new(linear.weight().clone(), linear.bias().cloned())
    }

    /// The same layer, whose dropout masks differ from those of a layer with another number.
    pub(crate) fn numbered(self, number: u64) -> Self {
        Self { salt: number, ..self }
    }

    /// `n×k`: the weight. Holds the update of those that are [`merged`](Self::merged).
    pub fn weight(&self) -> &Tensor {
        &self.base.w
    }

    /// `n`: the bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.base.bias.as_ref()
    }

    /// Outputs × inputs.
    pub fn shape(&self) -> (usize, usize) {
        self.base.w.dims2().unwrap_or_default() // `new` saw two dimensions
    }

    /// How many numbers the layer has, without adapters.
    pub fn count(&self) -> usize {
        self.base.w.elem_count() + self.base.bias.as_ref().map_or(0, Tensor::elem_count)
    }

    /// The adapters, in the order they were added.
    pub fn adapters(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        self.parts.iter().map(|(name, adapter)| (name.as_str(), adapter))
    }

    /// The adapter of this name, if the layer has it.
    pub fn adapter(&self, name: &str) -> Option<&Adapter> {
        self.adapters().find(|(known, _)| *known == name).map(|(_, adapter)| adapter)
    }

    /// The names of those that take part.
    pub fn active(&self) -> &[String] {
        &self.active
    }

    /// The names of those that are in the weight, in the order they were merged.
    pub fn merged(&self) -> impl Iterator<Item = &str> {
        self.merged.iter().map(|(name, _)| name.as_str())
    }

    /// A new adapter, in place of one of this name, and active.
    ///
    /// Errors: for settings out of range, a name with a dot or a slash, and while an adapter is merged.
    pub fn add(&mut self, name: &str, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        let adapter = Adapter::new(self.shape(), config, rng)?;
        self.insert(name, adapter, true)
    }

    /// Puts an adapter beside the layer, in place of one of this name.
    ///
    /// Errors: unless it fits the layer; for a name with a dot or a slash; while an adapter is merged.
    pub fn insert(&mut self, name: &str, adapter: Adapter, active: bool) -> Result<()> {
        self.check_insert(name, &adapter)?;
        match self.parts.iter_mut().find(|(known, _)| known == name) {
            Some((_, there)) => *there = adapter,
            None => self.parts.push((name.into(), adapter)),
        }
        if active && !self.active.iter().any(|known| known == name) {
            self.active.push(name.into());
        }
        Ok(())
    }

    /// The errors of [`insert`](Self::insert).
    pub(crate) fn check_insert(&self, name: &str, adapter: &Adapter) -> Result<()> {
        self.unmerged()?;
        let fine = !name.is_empty() && !name.contains(['.', '/', '\\']);
        Error::unless(fine, "adapter", format!("`{name}`"), "a name without a dot or a slash")?;
        let ((n, k), r) = (self.shape(), adapter.config.rank);
        let fits = adapter.a.dims() == [r, k] && adapter.b.dims() == [n, r];
        Error::unless(
            fits,
            "adapter",
            format!("A {:?} and B {:?}", adapter.a.dims(), adapter.b.dims()),
            format!("[{r}, {k}] and [{n}, {r}]"),
        )
    }

    /// Takes an adapter away, if it is there. Errors: while one is merged.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.unmerged()?;
        self.parts.retain(|(known, _)| known != name);
        self.active.retain(|known| known != name);
        Ok(())
    }

    /// Makes these take part, and no others. A name that this layer does not have is passed over. Errors: while one is merged.
    pub fn set_active(&mut self, names: &[&str]) -> Result<()> {
        self.unmerged()?;
        self.active.clear();
        for name in names {
            if self.adapter(name).is_some() && !self.active.iter().any(|active| active == name) {
                self.active.push(name.to_string());
            }
        }
        Ok(())
    }

    /// Whether the active adapters take part.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Switches the adapters on or off. Errors: while one is merged.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        self.unmerged()?;
        self.enabled = enabled;
        Ok(())
    }

    /// Makes the scaling of an adapter `scale` times what its settings say, if it is there. Not saved. Errors: while one is merged, or
    /// unless `scale` is finite.
    pub fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        self.unmerged()?;
        Error::unless(scale.is_finite(), "scale", scale, "a finite number")?;
        if let Some((_, adapter)) = self.parts.iter_mut().find(|(known, _)| known == name) {
            adapter.strength = scale;
        }
        Ok(())
    }

    /// `W += scaling·B·A` for these adapters, on top of those that are merged. One that is merged stays merged once; a name that this
    /// layer does not have is passed over. Tensors that share the memory of the weight see it.
    ///
    /// Errors: while adapters are off, and for numbers that would not be finite. Nothing is changed then.
    pub fn merge(&mut self, names: &[&str]) -> Result<()> {
        Error::unless(self.enabled, "adapters", "switched off", "switched on first")?;
        let before = self.merged.len();
        for name in names {
            if self.merged().any(|merged| merged == *name) {
                continue;
            }
            let Some(adapter) = self.adapter(name) else { continue };
            match merge(&self.base.w, adapter.a.as_tensor(), adapter.b.as_tensor(), adapter.scaling()) {
                Ok(undo) => self.merged.push((name.to_string(), undo)),
                Err(error) => {
                    self.unmerge_down_to(before)?;
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Takes every merged adapter out of the weight, which then is what it was, bit for bit.
    pub fn unmerge(&mut self) -> Result<()> {
        self.unmerge_down_to(0)
    }

    /// Takes out what was merged last, until this many are left.
    pub(crate) fn unmerge_down_to(&mut self, left: usize) -> Result<()> {
        while self.merged.len() > left {
            if let Some((_, undo)) = self.merged.last() {
                undo.run(&self.base.w)?;
            }
            self.merged.pop();
        }
        Ok(())
    }

    /// Takes every adapter away; what is merged stays in the weight for good.
    pub(crate) fn unload(&mut self) {
        self.parts.clear();
        self.active.clear();
        self.merged.clear();
        self.enabled = true;
    }

    /// Errors: while an adapter is merged.
    pub(crate) fn unmerged(&self) -> Result<()> {
        let merged = self.merged.last().map(|(name, _)| format!("`{name}`, merged into the weight"));
        merged.map_or(Ok(()), |merged| Err(Error::setting("adapter", merged, "unmerged first")))
    }

    /// The adapters among these that take part and are not merged.
    fn chosen<'s, S: AsRef<str>>(&'s self, names: &'s [S]) -> impl Iterator<Item = &'s Adapter> {
        let free = |name: &&S| self.enabled && !self.merged().any(|merged| merged == name.as_ref());
        names.iter().filter(free).filter_map(|name| self.adapter(name.as_ref()))
    }

    /// The forward pass: `x` is `…×k`, and the result `…×n`.
    ///
    /// Errors: for an `x` that does not fit; for adapters by rows in a pass with gradients; for named adapters while one is merged.
    pub fn forward_with(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (k, dtype) = (self.shape().1, self.base.w.dtype());
        let fits = x.dims().last() == Some(&k) && x.dtype() == dtype;
        let got = || format!("{:?} of {}", x.dims(), x.dtype().as_str());
        Error::unless(fits, "x", got(), format!("[…, {k}] of {}", dtype.as_str()))?;
        if !matches!(pass.adapters, Chosen::Active) {
            self.unmerged()?;
        }
        let adapters: Vec<&Adapter> = match pass.adapters {
            Chosen::Active => self.chosen(&self.active).collect(),
            Chosen::Named(names) => self.chosen(names).collect(),
            Chosen::Rows(rows) if !pass.gradients => return self.forward_rows(x, rows),
            Chosen::Rows(_) => {
                return Err(Error::setting("adapters", "chosen by rows", "active or named, in a pass with gradients"));
            }
        };
        if pass.gradients { self.forward_tracked(x, &adapters, pass.seed) } else { self.forward_untracked(x, &adapters) }
    }

    /// The frozen part.
    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    /// What takes part in a pass with gradients, if it is one active adapter or none.
    pub(crate) fn single(&self, pass: &Pass<'_>) -> Result<Option<Single<'_>>> {
        if !matches!(pass.adapters, Chosen::Active) {
            return Ok(None);
        }
        let mut chosen = self.chosen(&self.active);
        let (adapter, more) = (chosen.next(), chosen.next().is_some());
        let update = |adapter| Ok::<_, Error>((adapter, self.dropout(adapter, 0, pass.seed)?));
        Ok(if more { None } else { Some(adapter.map(update).transpose()?) })
    }

    /// The dropout of the adapter at a place among those that take part.
    fn dropout(&self, adapter: &Adapter, place: u64, seed: Option<u64>) -> Result<Option<Dropout>> {
        let p = adapter.config.dropout;
        let seed = seed.filter(|_| p > 0.0).map(|seed| seed ^ (self.salt << 32) ^ (place << 56));
        Ok(seed.map(|seed| Dropout::new(p, seed)).transpose()?)
    }

    fn forward_tracked(&self, x: &Tensor, adapters: &[&Adapter], seed: Option<u64>) -> Result<Tensor> {
        let x = x.contiguous()?;
        let Some((first, others)) = adapters.split_first() else { return Ok(x.apply_op1(FrozenOp(self.base.clone()))?) };
        let update = |base, place: u64, adapter: &Adapter| -> Result<Tensor> {
            let dropout = self.dropout(adapter, place, seed)?;
            Ok(x.apply_op3(adapter.a.as_tensor(), adapter.b.as_tensor(), LoraOp::new(base, adapter.scaling(), dropout))?)
        };
        let mut y = update(Some(self.base.clone()), 0, first)?;
        for (place, adapter) in others.iter().enumerate() {
            y = (y + update(None, place as u64 + 1, adapter)?)?;
        }
        Ok(y)
    }

    fn forward_untracked(&self, x: &Tensor, adapters: &[&Adapter]) -> Result<Tensor> {
        let rows = x.elem_count() / self.shape().1.max(1);
        let updates: Vec<Update<'_>> = adapters.iter().map(|adapter| adapter.update(0..rows)).collect();
        Ok(forward_tensor(x, &self.base, &updates)?)
    }

    fn forward_rows(&self, x: &Tensor, rows: &[(Range<usize>, &str)]) -> Result<Tensor> {
        let all = x.elem_count() / self.shape().1.max(1);
        let beyond = rows.iter().find(|(rows, _)| rows.end > all);
        Error::unless(beyond.is_none(), "rows", format!("{:?}", beyond.map(|(rows, _)| rows)), format!("within 0..{all}"))?;
        let update = |(rows, name): &(Range<usize>, &str)| Some(self.adapter(name)?.update(rows.clone()));
        let updates: Vec<Update<'_>> = rows.iter().filter(|_| self.enabled).filter_map(update).collect();
        Ok(forward_tensor(x, &self.base, &updates)?)
    }
}

impl Adapter {
    fn update(&self, rows: Range<usize>) -> Update<'_> {
        Update { rows, a: self.a.as_tensor(), b: self.b.as_tensor(), scale: self.scaling() }
    }
}

impl Module for LoraLinear {
    /// The active adapters, with gradients, without dropout.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_with(x, &Pass { gradients: true, ..Pass::inference() })?)
    }
}
