//! The experiment: trains a network, freezes it, trains adapters on its worst digit, and compares the results. Generic in the
//! backend; prints nothing.

use std::path::Path;

use crate::mnist::{DIGITS, Mnist, Split, shuffled_batches};
use lowrank::distributed::Communicator;
use lowrank::nn::{Adaptable, DEFAULT, Init, LoraConfig, Mlp, ParameterReport, Targets};
use lowrank::quant::{QuantKind, Quantised};
use lowrank::random::Rng;
use lowrank::{Backend, Error, Float, Result, adapter};

use crate::train::{Checkpoints, Job, train};
use crate::whole;

/// The settings of the experiment.
pub struct Settings {
    /// Seed of the initial weights and the shuffles.
    pub seed: u64,
    /// Sizes of the hidden layers.
    pub hidden: Vec<usize>,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images of a batch.
    pub batch: usize,
    /// Learning rate of Adam, in both phases.
    pub lr: f32,
    /// Rank of the adapters.
    pub rank: usize,
    /// Alpha of the adapters: the update is multiplied by alpha / rank.
    pub alpha: f32,
    /// Number of batches that the adapters are trained on.
    pub batches: usize,
    /// The digit to train them on; the worst if `None`.
    pub digit: Option<u8>,
    /// How the weights are quantised once they are trained, before the adapters; not at all if `None`.
    pub quantise: Option<QuantKind>,
    /// Where the run is saved, and resumed from; nowhere if `None`.
    pub checkpoints: Option<Checkpoints>,
}

impl Settings {
    /// What a resumed run must have in common with the one that was saved.
    fn describe(&self, sizes: &[usize], split: &Split) -> String {
        let Self { seed, epochs, batch, lr, rank, alpha, batches, digit, quantise, .. } = self;
        let digit = digit.map_or("worst".into(), |digit| digit.to_string());
        let quantise = quantise.map_or("not", QuantKind::name);
        format!(
            "seed {seed}, layers {sizes:?}, epochs {epochs}, batch {batch}, lr {lr}, rank {rank}, alpha {alpha}, batches {batches}, \
             digit {digit}, quantised {quantise}, images {} ({:016x})",
            split.len(),
            split.fingerprint()
        )
    }
}

/// The progress of a phase.
pub struct Progress {
    /// `training` or `tuning`
    pub phase: &'static str,
    /// Steps done.
    pub step: usize,
    /// Total number of steps.
    pub steps: usize,
    /// Mean loss of the last steps.
    pub loss: f32,
    /// Seconds since the phase began.
    pub seconds: f64,
}

/// A phase of training.
#[derive(Debug)]
pub struct Phase {
    /// The loss of every step.
    pub losses: Vec<f32>,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The results of a model on the test images.
#[derive(Debug, PartialEq)]
pub struct Score {
    /// The logits, with a row for each image.
    pub logits: Vec<f32>,
    /// Wrongly classified images of each digit.
    pub errors: [usize; DIGITS],
    /// The fraction of correctly classified images.
    pub accuracy: f64,
}

/// The model in full precision, beside one that is quantised.
#[derive(Debug)]
pub struct Full {
    /// How the other is quantised.
    pub kind: QuantKind,
    /// Results without adapters.
    pub base: Score,
    /// Results with adapters that were trained over it in the same way.
    pub on: Score,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Bytes of the quantised weights.
    pub quantised_bytes: usize,
}

/// The results of the experiment.
#[derive(Debug)]
pub struct Outcome {
    /// Results of the base model, quantised if that is asked for.
    pub base: Score,
    /// The model before it was quantised, if it was.
    pub full: Option<Full>,
    /// The digit that the adapters were trained on.
    pub digit: u8,
    /// Results with the adapters enabled.
    pub on: Score,
    /// Results with the adapters disabled.
    pub off: Score,
    /// Results of a new model with the same base, after saving and loading the adapters.
    pub reloaded: Score,
    /// Results with the adapters merged.
    pub merged: Score,
    /// The largest change of a logit by merging, relative to the largest logit.
    pub merged_difference: f64,
    /// The change that rounding can explain.
    pub merged_tolerance: f64,
    /// Parameters of the model and of the adapters.
    pub params: ParameterReport,
    /// The training of the base model.
    pub pretrain: Phase,
    /// The training of the adapters.
    pub tune: Phase,
    /// True if every weight and bias of the base model has the same bits after training the adapters.
    pub base_unchanged: bool,
    /// The weights and biases of the base model, then A and B of each adapter.
    pub weights: Vec<Vec<f32>>,
}

/// Runs the experiment; the adapters are saved to `dir`. With several ranks all train together; rank 0 saves, and has the results, and
/// the others get `None`. Errors: those of the crate.
pub fn run<B: Backend, C: Communicator>(
    (backend, comm): (&B, &C),
    mnist: &Mnist,
    settings: &Settings,
    dir: &Path,
    watch: &mut dyn FnMut(&Progress),
) -> Result<Option<Outcome>> {
    LoraConfig::new(settings.rank, settings.alpha).check()?; // fail now, not after minutes of training
    settings.digit.map_or(Ok(()), |digit| shown(&mnist.train, digit).map(drop))?;
    settings.checkpoints.as_ref().map_or(Ok(()), |checkpoints| checkpoints.check(comm))?;
    let rng = &mut Rng::new(settings.seed);
    let pixels = mnist.train.images().rows() * mnist.train.images().cols();
    let sizes: Vec<usize> = [&[pixels], &settings.hidden[..], &[DIGITS]].concat();
    let mut mlp = Mlp::new(backend, &sizes, rng)?;

    let batches = (0..settings.epochs).flat_map(|_| shuffled_batches(mnist.train.all(), settings.batch, rng)).collect();
    let (split, checkpoints) = (&mnist.train, settings.checkpoints.as_ref());
    let described = settings.describe(&sizes, split);
    let (lr, rng_now) = (settings.lr, rng.clone());
    let job =
        Job { phase: "training", file: "training", split, batches, lr, checkpoints, settings: described.clone(), rng: rng_now };
    let pretrain = train((backend, comm), &mut mlp, job, watch)?;
    let mut base = score(backend, &mlp, &mnist.test)?;
    let digit = settings.digit.unwrap_or_else(|| worst(&base.errors));
    let digit = of_rank_0(comm, digit)?;
    let tuning = Tuning { settings, described: &described, digit, split };
    let mut full = None;
    if let Some(kind) = settings.quantise {
        let mut model = copy(backend, &mlp)?;
        tuning.run((backend, comm), &mut model, "tuning-full", &mut rng.clone(), watch)?;
        let on = score(backend, &model, &mnist.test)?;
        let [bytes, quantised_bytes] = quantise(backend, &mut mlp, kind)?;
        let quantised = score(backend, &mlp, &mnist.test)?;
        full = Some(Full { kind, base: std::mem::replace(&mut base, quantised), on, bytes, quantised_bytes });
    }
    let before = weights(backend, &mlp)?;

    let tune = tuning.run((backend, comm), &mut mlp, "tuning", rng, watch)?;
    if comm.rank() != 0 {
        return Ok(None);
    }
    let params = mlp.parameter_report();

    let on = score(backend, &mlp, &mnist.test)?;
    let base_unchanged = same_bits(&before, &weights(backend, &mlp)?);
    mlp.set_adapters_enabled(false)?;
    let off = score(backend, &mlp, &mnist.test)?;
    whole::uninterrupted(|| adapter::save(backend, &mlp, dir))?;

    // A new model, which gets the adapters from the files.
    let mut again = copy(backend, &mlp)?;
    adapter::load(backend, &mut again, dir)?;
    let reloaded = score(backend, &again, &mnist.test)?;
    again.merge_adapters(backend)?;
    let merged = score(backend, &again, &mnist.test)?;

    Ok(Some(Outcome {
        merged_difference: difference(&on.logits, &merged.logits),
        merged_tolerance: tolerance::<B::Elem>(&sizes),
        weights: [before, adapter_weights(backend, &mlp)?].concat(),
        base,
        digit,
        on,
        off,
        reloaded,
        merged,
        full,
        params,
        pretrain,
        tune,
        base_unchanged,
    }))
}

/// How adapters are trained on images of one digit.
struct Tuning<'t> {
    settings: &'t Settings,
    described: &'t str,
    digit: u8,
    split: &'t Split,
}

impl Tuning<'_> {
    /// Adds adapters, and trains them.
    fn run<B: Backend, C: Communicator>(
        &self,
        (backend, comm): (&B, &C),
        mlp: &mut Mlp<B>,
        file: &'static str,
        rng: &mut Rng,
        watch: &mut dyn FnMut(&Progress),
    ) -> Result<Phase> {
        let Self { settings, digit, split, .. } = *self;
        let config = LoraConfig { init: Init::Gaussian { std: 1.0 }, ..LoraConfig::new(settings.rank, settings.alpha) };
        mlp.add_adapters(backend, Targets::All, &config, rng)?;
        let batches = batches_of(split, digit, settings, rng)?;
        let described = format!("{}, tuned on digit {digit}", self.described);
        let (lr, checkpoints, rng) = (settings.lr, settings.checkpoints.as_ref(), rng.clone());
        let job = Job { phase: "tuning", file, split, batches, lr, checkpoints, settings: described, rng };
        train((backend, comm), mlp, job, watch)
    }
}

/// The digit of rank 0: with other CPUs, another rank's scores may differ in the last bits.
fn of_rank_0(comm: &impl Communicator, digit: u8) -> Result<u8> {
    let mut digit = [digit];
    comm.broadcast(&mut digit, 0)?;
    Ok(digit[0])
}

/// Quantises every weight. Gives the bytes that they took, and take.
fn quantise<B: Backend>(backend: &B, mlp: &mut Mlp<B>, kind: QuantKind) -> Result<[usize; 2]> {
    let mut bytes = [0; 2];
    for (_, layer) in mlp.layers_mut() {
        bytes[0] += layer.base().weight().count() * size_of::<B::Elem>();
        layer.quantise(backend, kind)?;
        bytes[1] += layer.base().quantised().map_or(0, Quantised::bytes);
    }
    Ok(bytes)
}

/// The images of a digit. Errors: [`Error::Value`] if there are none.
fn shown(split: &Split, digit: u8) -> Result<Vec<usize>> {
    let rows = split.of_digit(digit);
    if rows.is_empty() {
        let got = format!("{digit}, which no training image shows");
        return Err(Error::Value { verb: "mnist_lora", name: "digit", got, want: "a digit of the training images".into() });
    }
    Ok(rows)
}

/// Batches of one digit: its images in random order, shuffled again each time all have been used.
fn batches_of(split: &Split, digit: u8, settings: &Settings, rng: &mut Rng) -> Result<Vec<Vec<usize>>> {
    let (rows, mut batches) = (shown(split, digit)?, Vec::new());
    while batches.len() < settings.batches {
        batches.extend(shuffled_batches(rows.clone(), settings.batch, rng));
    }
    batches.truncate(settings.batches);
    Ok(batches)
}

/// Test images of a forward pass: enough for the CPU's blocked regime.
const SCORED: usize = 1000;

fn score<B: Backend>(backend: &B, mlp: &Mlp<B>, split: &Split) -> Result<Score> {
    let mut logits = Vec::with_capacity(split.len() * DIGITS);
    for rows in split.all().chunks(SCORED) {
        let (x, _) = split.batch(backend, rows)?;
        logits.extend(mlp.predict(backend, x)?.into_iter().map(Float::to_f32));
    }
    let mut errors = [0; DIGITS];
    for (row, &label) in logits.chunks_exact(DIGITS).zip(split.labels()) {
        errors[usize::from(label)] += usize::from(largest(row) != usize::from(label));
    }
    let accuracy = 1.0 - errors.iter().sum::<usize>() as f64 / split.len().max(1) as f64;
    Ok(Score { logits, errors, accuracy })
}

/// The largest difference, relative to the largest number.
pub fn difference(a: &[f32], b: &[f32]) -> f64 {
    let largest = a.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let apart = a.iter().zip(b).fold(0.0f32, |apart, (a, b)| apart.max((a - b).abs()));
    f64::from(apart) / f64::from(largest.max(f32::MIN_POSITIVE))
}

/// How far apart rounding may bring two ways to the same logits. The errors of a sum of n terms walk at random, to about √n
/// units; the sums have as many terms as a layer has inputs, one layer after another. 8 is room for terms that cancel.
fn tolerance<E: Float>(sizes: &[usize]) -> f64 {
    let terms: usize = sizes.iter().rev().skip(1).sum();
    8.0 * E::DTYPE.unit_roundoff() * (terms as f64).sqrt()
}

/// The index of the largest element, the first of equal ones.
fn largest(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// The digit with the most errors, the first of equal ones.
fn worst(errors: &[usize; DIGITS]) -> u8 {
    (1..DIGITS).fold(0, |worst, digit| if errors[digit] > errors[worst] { digit } else { worst }) as u8
}

/// The weight and the bias of every layer; what quantised weights stand for.
fn weights<B: Backend>(backend: &B, mlp: &Mlp<B>) -> Result<Vec<Vec<f32>>> {
    let params = mlp.layers().flat_map(|(_, layer)| layer.base().params());
    let dense = params.map(|param| Ok(param.tensor().to_vec(backend)?.into_iter().map(Float::to_f32).collect()));
    let quantised = mlp.layers().filter_map(|(_, layer)| layer.base().quantised());
    dense.chain(quantised.map(|w| Ok(w.to_host(backend)?.dequantise()))).collect()
}

/// A and B of every layer that has an adapter.
fn adapter_weights<B: Backend>(backend: &B, mlp: &Mlp<B>) -> Result<Vec<Vec<f32>>> {
    let params = mlp.adapters(DEFAULT).flat_map(|(_, adapter)| adapter.params());
    params.map(|param| Ok(param.tensor().to_vec(backend)?.into_iter().map(Float::to_f32).collect())).collect()
}

/// True if the elements have the same bits; unlike `==`, this distinguishes 0 and -0.
pub fn same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let bits = |weights: &[Vec<f32>]| -> Vec<Vec<u32>> {
        weights.iter().map(|weight| weight.iter().map(|w| w.to_bits()).collect()).collect()
    };
    bits(a) == bits(b)
}

/// A model with the same base weights and no adapters.
fn copy<B: Backend>(backend: &B, mlp: &Mlp<B>) -> Result<Mlp<B>> {
    Mlp::from_layers(mlp.layers().map(|(_, layer)| layer.base().try_clone(backend)).collect::<Result<_>>()?)
}
