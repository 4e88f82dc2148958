//! Batches of requests through one base model, each request with its adapter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use lowrank::adapter::{Factors, Folder, HostMatrix};
use lowrank::autograd::Tape;
use lowrank::nn::{Adaptable, AdapterBank, Mlp};
use lowrank::random::Rng;
use lowrank::{Cpu, DType, Error, Result, Tensor};

/// Sizes of the model, the adapters and the requests.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub adapters: usize,
    pub slots: usize,
    pub rows: usize,
    pub batches: usize,
    pub width: usize,
    pub layers: usize,
    pub rank: usize,
    pub skew: f64,
    pub seed: u64,
}

/// Measurements.
#[derive(Debug)]
pub struct Served {
    tokens: usize,
    /// Of each batch, sorted.
    times: Vec<Duration>,
    hits: u64,
    pub loads: u64,
}

impl Served {
    pub fn tokens_a_second(&self) -> f64 {
        self.tokens as f64 / self.times.iter().sum::<Duration>().as_secs_f64()
    }

    /// Seconds of a batch, of which a share of all took no longer.
    pub fn latency(&self, share: f64) -> f64 {
        let at = (self.times.len() as f64 * share) as usize;
        self.times.get(at.min(self.times.len().saturating_sub(1))).map_or(0.0, Duration::as_secs_f64)
    }

    /// Share of the adapters of all batches that were in a slot.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.loads).max(1) as f64
    }
}

/// Serves batches, the first of which are not timed.
pub fn serve(cpu: &Cpu<f32>, settings: Settings) -> Result<Served> {
    let Settings { adapters, slots, rows, batches, width, layers, rank, skew, seed } = settings;
    let (rng, folder) = (&mut Rng::new(seed), tempfile::tempdir().map_err(|error| unwritable(Path::new("a folder"), &error))?);
    let model = Mlp::new(cpu, &vec![width; layers + 1], rng)?;
    let names: Vec<String> = (0..adapters).map(|i| format!("adapter{i}")).collect();
    for name in &names {
        write_adapter(&model, &folder.path().join(name), rank, rng)?;
    }
    let mut bank = AdapterBank::new(cpu, &model, slots.min(adapters).max(1), rank)?;
    let (mut requests, demand) = (VecDeque::new(), Demand::new(adapters, skew));
    let mut served = Served { tokens: 0, times: Vec::new(), hits: 0, loads: 0 };
    let (bar, warm) = (bar(batches), batches.div_ceil(10));
    let mut before = bank.counts();
    for batch in 0..warm + batches {
        while requests.len() < rows {
            requests.push_back(demand.next(rng));
        }
        let numbers: Vec<f32> = (0..rows * width).map(|_| rng.unit() as f32 - 0.5).collect();
        let began = Instant::now();
        let taken = take(&mut requests, rows, bank.slots());
        let asked: Vec<Option<&str>> = taken.iter().map(|&adapter| Some(names[adapter].as_str())).collect();
        let fetch = |name: &str| Folder::read(&folder.path().join(name))?.host_adapter();
        let assigned = bank.assign(cpu, &asked, fetch)?;
        let mut tape = Tape::new(cpu);
        let x = tape.input(Tensor::from_slice(cpu, (asked.len(), width), &numbers[..asked.len() * width])?);
        let y = model.forward_mixed(&mut tape, x, None, bank.mixed(&assigned)?)?;
        tape.value(y)?.to_vec(cpu)?;
        let time = began.elapsed();
        if batch < warm {
            before = bank.counts();
            continue;
        }
        served.tokens += asked.len();
        served.times.push(time);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let after = bank.counts();
    (served.hits, served.loads) = (after.hits - before.hits, after.loads - before.loads);
    served.times.sort_unstable();
    Ok(served)
}

/// Requests in the order they came, as many as a batch has rows and their adapters find slots.
fn take(requests: &mut VecDeque<usize>, rows: usize, slots: usize) -> Vec<usize> {
    let (mut taken, mut adapters) = (Vec::new(), BTreeSet::new());
    while let Some(&next) = requests.front() {
        if taken.len() == rows || (adapters.len() == slots && !adapters.contains(&next)) {
            break;
        }
        adapters.insert(next);
        taken.extend(requests.pop_front());
    }
    taken
}

/// The distribution of requests: the share of adapter i is proportional to 1/i^skew.
struct Demand {
    /// The sum of the shares up to each.
    sums: Vec<f64>,
}

impl Demand {
    fn new(adapters: usize, skew: f64) -> Self {
        let mut sum = 0.0;
        let shares = (0..adapters).map(|i| 1.0 / (i as f64 + 1.0).powf(skew));
        Self {
            sums: shares
                .map(|share| {
                    sum += share;
                    sum
                })
                .collect(),
        }
    }

    fn next(&self, rng: &mut Rng) -> usize {
        let at = rng.unit() * self.sums.last().copied().unwrap_or(0.0);
        self.sums.partition_point(|&sum| sum <= at).min(self.sums.len().saturating_sub(1))
    }
}

/// A folder as PEFT writes it, with random factors for every layer.
fn write_adapter(model: &Mlp<Cpu<f32>>, dir: &Path, rank: usize, rng: &mut Rng) -> Result<()> {
    let mut modules = BTreeMap::new();
    for (layer, there) in model.layers() {
        let (n, k) = (there.base().weight().tensor().rows(), there.base().weight().tensor().cols());
        let mut matrix = |rows: usize, cols: usize| {
            HostMatrix::new((rows, cols), (0..rows * cols).map(|_| 0.02 * rng.gaussian() as f32).collect())
        };
        let (a, b) = (matrix(rank, k)?, matrix(n, rank)?);
        modules.insert(layer.to_string(), Factors { a, b, scaling: 1.0, dtype: DType::F32 });
    }
    std::fs::create_dir_all(dir).map_err(|error| unwritable(dir, &error))?;
    Folder::new(None, modules)?.write(dir)
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    Error::File { path: path.into(), reason: error.to_string() }
}

/// A bar on a terminal, nothing elsewhere.
fn bar(batches: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(batches as u64);
    match ProgressStyle::with_template("{bar:30} {pos}/{len} batches, {per_sec}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
