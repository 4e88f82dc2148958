//! Supervised fine-tuning: an adapter of a model learns the answers of conversations.

mod checkpoint;
mod report;

use candle_core::Tensor;
use lowrank::random::philox;
use serde::{Deserialize, Serialize};

pub use report::{plot, progress_bar};

use crate::adamw::{Factor, Rates, norm};
use crate::data::{Batch, BatchSettings, Batches, Dataset};
use crate::lend::on_threads;
use crate::schedule::{Decay, Schedule, Warmup};
use crate::{Adaptable, CausalLm, Error, Pass, Result};

/// How an adapter is trained. The names are those of transformers' `TrainingArguments`, where it has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sft {
    /// `learning_rate`: the highest of the run
    pub lr: f64,
    /// `warmup_steps` or `warmup_ratio`
    pub warmup: Warmup,
    /// `lr_scheduler_type`
    pub decay: Decay,
    /// Batches, epochs, packing and the order.
    pub batches: BatchSettings,
    /// `gradient_accumulation_steps`: batches in a step of the optimizer; the last step of an epoch may have fewer
    pub accumulate: usize,
    /// `max_grad_norm`: gradients are scaled down to this length over all factors; none: they are not
    pub clip: Option<f64>,
    /// `weight_decay`: AdamW's
    pub weight_decay: f32,
    /// LoRA+: how many times the learning rate of `A` that of `B` is; 1 is plain LoRA
    pub loraplus_lr_ratio: f32,
    /// `gradient_checkpointing`: takes less memory and more time, see [`Pass::checkpoint`]
    #[serde(default)]
    pub checkpoint: bool,
    /// The seed of dropout.
    pub seed: u64,
}

impl Default for Sft {
    /// One epoch of batches of 4 rows, cosine from 2e-4 after 3 % of warm-up, gradients clipped to 1.
    fn default() -> Self {
        Self {
            lr: 2e-4,
            warmup: Warmup::Ratio(0.03),
            decay: Decay::Cosine,
            batches: BatchSettings { rows: 4, packing: None, epochs: 1, shuffle: Some(0) },
            accumulate: 1,
            clip: Some(1.0),
            weight_decay: 0.0,
            loraplus_lr_ratio: 1.0,
            checkpoint: false,
            seed: 0,
        }
    }
}

/// What a step of the optimizer did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The step; the first is 0.
    pub index: usize,
    /// The epoch; the first is 0.
    pub epoch: usize,
    /// The mean loss of the tokens that are trained on, before the step.
    pub loss: f64,
    /// The length of the gradient over all factors, before it was clipped.
    pub gradient_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// How many tokens went through the model.
    pub tokens: usize,
}

/// A run: an adapter in training.
///
/// ```no_run
/// use candle_core::DType;
/// use lowrank_candle::{Adaptable, CausalLm, LoraConfig, Rng, TargetModules};
/// use lowrank_candle::chat::{Answers, Chat};
/// use lowrank_candle::data::{Dataset, Encoding, TooLong, read_conversations};
/// use lowrank_candle::sft::{Sft, Trainer};
///
/// let mut model = CausalLm::from_dir("Qwen2-0.5B-Instruct", DType::F32)?;
/// let config = LoraConfig { dropout: 0.05, ..LoraConfig::new(6, 8.0) };
/// model.add_adapter("default", TargetModules::AllLinear, &config, &mut Rng::new(0))?;
///
/// let chat = Chat::from_dir("Qwen2-0.5B-Instruct")?;
/// let encoding = Encoding { answers: Answers::All, max_len: 512, too_long: TooLong::Truncate };
/// let data = Dataset::encode(&chat, &read_conversations("train.jsonl")?, &encoding)?;
/// let mut trainer = Trainer::new(&model, &data, Sft::default())?;
/// while let Some(step) = trainer.step()? {
///     println!("{} {:.4}", step.index, step.loss);
/// }
/// model.save_adapter("default", "out")?;
/// # Ok::<(), lowrank_candle::Error>(())
/// ```
pub struct Trainer<'t> {
    model: &'t CausalLm,
    adapter: String,
    settings: Sft,
    schedule: Schedule,
    batches: Batches<'t>,
    factors: Vec<Factor>,
    step: usize,
}

impl<'t> Trainer<'t> {
    /// A run of the model's active adapter on this data.
    ///
    /// Errors: [`Error::Setting`] for settings out of range, unless one adapter is active and none is merged, and for data with longer
    /// conversations than the model has positions.
    pub fn new(model: &'t CausalLm, data: &'t Dataset, settings: Sft) -> Result<Self> {
        let active = model.active_adapters();
        let [adapter] = active[..] else {
            return Err(Error::setting("active adapters", active.len(), "one: the one to be trained"));
        };
        crate::peft::check_unmerged(model)?;
        let off = model.layers().any(|(_, layer)| !layer.is_enabled());
        Error::unless(!off, "adapters", "switched off", "switched on, to be trained")?;
        check(&settings)?;
        let longest = data.examples().iter().map(|example| example.ids.len()).max().unwrap_or(0);
        let room = model.config().max_positions;
        Error::unless(
            longest <= room,
            "data",
            format!("a conversation of {longest} tokens"),
            format!("at most the model's {room}"),
        )?;
        let batches = Batches::new(data, settings.batches)?;
        let schedule = Schedule::new(settings.lr, steps(&batches, settings.accumulate), settings.warmup, settings.decay)?;
        let mut factors = Vec::new();
        for (layer, there) in model.adapters(adapter) {
            for (end, var, is_b) in [("lora_A", there.a(), false), ("lora_B", there.b(), true)] {
                factors.push(Factor::new(format!("{layer}.{end}"), var.clone(), is_b)?);
            }
        }
        Ok(Self { model, adapter: adapter.into(), settings, schedule, batches, factors, step: 0 })
    }

    /// How many steps the run has.
    pub fn steps(&self) -> usize {
        self.schedule.steps()
    }

    /// How many steps are done.
    pub fn done(&self) -> usize {
        self.step
    }

    /// The next step of the optimizer; `None` at the end of the run.
    ///
    /// Errors: for a loss or a gradient that is not finite. The adapter is as it was before the step then.
    pub fn step(&mut self) -> Result<Option<Step>> {
        let batches = next_group(&mut self.batches, self.settings.accumulate);
        if batches.is_empty() {
            return Ok(None);
        }
        let counted = batches.iter().map(Batch::counted).sum::<usize>().max(1) as f32;
        let (mut loss, mut gradients) = (0.0, None);
        for (at, batch) in batches.iter().enumerate() {
            let pass = Pass { checkpoint: self.settings.checkpoint, ..Pass::training(self.seed_of(at)) };
            let (part, new) = on_threads(|| {
                let loss = self.model.loss(&batch.tokens, &batch.labels, counted, &pass)?;
                Ok::<_, Error>((loss.to_scalar::<f32>()?, self.gradients(&loss)?))
            })?;
            loss += f64::from(part);
            gradients = Some(added(gradients, new)?);
        }
        let gradients = gradients.unwrap_or_default();
        let norm = norm(&gradients)?;
        let finite = loss.is_finite() && norm.is_finite();
        Error::unless(
            finite,
            "loss",
            format!("{loss} in step {}, with a gradient of {norm}", self.step),
            "finite; a smaller `lr` may help",
        )?;
        let factor = self.settings.clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0)) as f32;
        let lr = self.schedule.rate(self.step);
        let rates = Rates { lr, weight_decay: self.settings.weight_decay, loraplus: self.settings.loraplus_lr_ratio };
        for (to, gradient) in self.factors.iter_mut().zip(&gradients) {
            to.step(gradient, factor, &rates, self.step as u64 + 1)?;
        }
        let tokens = batches.iter().map(|batch| batch.tokens.ids().len()).sum();
        let step = Step { index: self.step, epoch: self.batches.epoch(), loss, gradient_norm: norm, lr, tokens };
        self.step += 1;
        Ok(Some(step))
    }

    /// The seed of the dropout of a batch of this step.
    fn seed_of(&self, batch: usize) -> u64 {
        let (seed, step) = (self.settings.seed, self.step as u64);
        let words = philox([seed as u32, (seed >> 32) as u32], [step as u32, (step >> 32) as u32, batch as u32, 0]);
        u64::from(words[0]) | u64::from(words[1]) << 32
    }

    /// The gradients of the factors.
    fn gradients(&self, loss: &Tensor) -> Result<Vec<Tensor>> {
        let mut gradients = loss.backward()?;
        let of = |factor: &Factor| match gradients.remove(factor.var.as_tensor()) {
            Some(gradient) => Ok(gradient.contiguous()?),
            None => Ok(factor.var.zeros_like()?),
        };
        self.factors.iter().map(of).collect()
    }
}

/// Gradients, added to those of the batches before.
fn added(before: Option<Vec<Tensor>>, new: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let Some(before) = before else { return Ok(new) };
    before.iter().zip(&new).map(|(before, new)| Ok((before + new)?)).collect()
}

/// The mean loss of the answers of some conversations, in batches of `rows`; without dropout.
pub fn evaluate(model: &CausalLm, data: &Dataset, rows: usize) -> Result<f64> {
    let settings = BatchSettings { rows, packing: None, epochs: 1, shuffle: None };
    let (mut sum, mut counted) = (0.0, 0);
    for batch in Batches::new(data, settings)? {
        let loss = model.loss(&batch.tokens, &batch.labels, 1.0, &Pass::inference())?;
        sum += f64::from(loss.to_scalar::<f32>()?);
        counted += batch.counted();
    }
    Ok(sum / counted.max(1) as f64)
}

fn check(settings: &Sft) -> Result<()> {
    Error::unless(settings.accumulate > 0, "accumulate", settings.accumulate, "1 or more")?;
    let clip = settings.clip.unwrap_or(1.0);
    Error::unless(clip.is_finite() && clip > 0.0, "clip", clip, "a positive number")?;
    let (decay, ratio) = (settings.weight_decay, settings.loraplus_lr_ratio);
    Error::unless(decay.is_finite() && decay >= 0.0, "weight_decay", decay, "a number that is not negative")?;
    Error::unless(ratio.is_finite() && ratio > 0.0, "loraplus_lr_ratio", ratio, "a positive number")
}

/// The batches of the next step: of one epoch, and at most `accumulate`.
fn next_group(batches: &mut Batches<'_>, accumulate: usize) -> Vec<Batch> {
    let mut group: Vec<Batch> = batches.next().into_iter().collect();
    while !group.is_empty() && group.len() < accumulate {
        let mut ahead = batches.clone();
        match ahead.next() {
            Some(batch) if ahead.epoch() == batches.epoch() => group.push(batch),
            _ => break,
        }
        *batches = ahead;
    }
    group
}

/// How many steps a run has.
fn steps(batches: &Batches<'_>, accumulate: usize) -> usize {
    let mut each: Vec<usize> = Vec::new(); // batches of each epoch
    let mut ahead = batches.clone();
    while ahead.next().is_some() {
        each.resize(ahead.epoch() + 1, 0);
        each[ahead.epoch()] += 1;
    }
    each.into_iter().map(|batches| batches.div_ceil(accumulate)).sum()
}
