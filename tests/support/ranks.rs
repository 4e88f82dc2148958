//! Training that several ranks do together, at a small size: for ranks that are threads and for ranks that are processes.
//!
//! The file needs nothing but lowrank, because the tests of `integrations/mpi` use it too.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use std::cell::Cell;
use std::thread;

use lowrank::autograd::{Gradients, Tape};
use lowrank::distributed::{BatchShare, Communicator, Sampler, SingleProcess, Threads, shard};
use lowrank::nn::{Adam, Adaptable, Adapter, DEFAULT, Init, Linear, LoraConfig, Mlp};
use lowrank::op::Labels;
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Result, Shape, Tensor};

pub const SIZES: [usize; 3] = [6, 8, 5];
/// The numbers of the adapters of [`model`], of rank 2.
pub const ELEMENTS: usize = 2 * (6 + 8) + 2 * (8 + 5);
/// The bytes of the one collective of a step: the gradients, a flag for each of the four factors, the loss, and the rows in two parts.
pub const STEP_BYTES: usize = 4 * (ELEMENTS + 4 + 3);

/// Runs a function on each rank, which are threads; the results are in the order of the ranks.
pub fn on_ranks<T: Send + 'static>(size: usize, run: impl Fn(Threads) -> T + Clone + Send + 'static) -> Vec<T> {
    let ranks = Threads::group(size).into_iter().map(|comm| {
        let run = run.clone();
        thread::spawn(move || run(comm))
    });
    ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
}

/// Counts the collectives of a communicator, and their bytes.
pub struct Counting<'c, C> {
    comm: &'c C,
    pub calls: Cell<usize>,
    pub bytes: Cell<usize>,
}

impl<'c, C: Communicator> Counting<'c, C> {
    pub fn new(comm: &'c C) -> Self {
        Self { comm, calls: Cell::new(0), bytes: Cell::new(0) }
    }

    /// The number of collectives, and of their bytes, since the last call.
    pub fn take(&self) -> (usize, usize) {
        (self.calls.take(), self.bytes.take())
    }

    fn count(&self, bytes: usize) {
        self.calls.set(self.calls.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
    }
}

impl<C: Communicator> Communicator for Counting<'_, C> {
    fn rank(&self) -> usize {
        self.comm.rank()
    }
    fn size(&self) -> usize {
        self.comm.size()
    }
    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        self.count(4 * values.len());
        self.comm.all_reduce(values)
    }
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.count(bytes.len());
        self.comm.broadcast(bytes, root)
    }
    fn barrier(&self) -> Result<()> {
        self.count(0);
        self.comm.barrier()
    }
}

/// A frozen network with an adapter on each layer; `B` is not zero, so that every factor gets a gradient.
pub fn model<B: Backend>(backend: &B, seed: u64) -> Mlp<B> {
    let rng = &mut Rng::new(seed);
    let model = Mlp::new(backend, &SIZES, rng).unwrap();
    let mut numbers = |shape: (usize, usize)| Init::Gaussian { std: 0.5 }.tensor(backend, shape, rng).unwrap();
    with_adapters(model, &mut numbers)
}

/// Adds an adapter of rank 2 to each layer; `numbers` makes its factors.
fn with_adapters<B: Backend>(mut model: Mlp<B>, numbers: &mut dyn FnMut((usize, usize)) -> Tensor<B>) -> Mlp<B> {
    let layers: Vec<(String, Shape)> = model.layers().map(|(name, layer)| (name.to_string(), layer.base().shape())).collect();
    let adapter = |(name, shape): (String, Shape)| {
        let (a, b) = (numbers((2, shape.cols)), numbers((shape.rows, 2)));
        (name, Adapter::from_tensors(a, b, LoraConfig::new(2, 4.0)).unwrap())
    };
    model.set_adapters(layers.into_iter().map(adapter).collect::<Vec<_>>()).unwrap();
    model
}

/// Sample `index`: its row and its label.
pub fn sample<E: Float>(index: usize) -> (Vec<E>, u32) {
    let mut rng = Rng::new(1000 + index as u64);
    let row = (0..SIZES[0]).map(|_| E::from_f32(rng.gaussian() as f32)).collect();
    (row, rng.below(SIZES[2]) as u32)
}

/// The gradients of the mean loss over some samples, and that loss; nothing without samples.
pub fn gradients<B: Backend>(backend: &B, model: &Mlp<B>, samples: &[usize]) -> (Gradients<B>, BatchShare) {
    let (rows, labels): (Vec<Vec<B::Elem>>, Vec<u32>) = samples.iter().map(|&index| sample(index)).unzip();
    gradients_of(backend, model, &rows.concat(), &labels)
}

fn gradients_of<B: Backend>(backend: &B, model: &Mlp<B>, rows: &[B::Elem], labels: &[u32]) -> (Gradients<B>, BatchShare) {
    if labels.is_empty() {
        return (Gradients::default(), BatchShare::default());
    }
    let mut tape = Tape::new(backend);
    let x = tape.input(Tensor::from_slice(backend, (labels.len(), SIZES[0]), rows).unwrap());
    let logits = model.forward(&mut tape, x, None).unwrap();
    let loss = tape.cross_entropy(logits, &Labels::new(backend, SIZES[2], labels).unwrap()).unwrap();
    let loss = loss.to_vec(backend).unwrap()[0];
    (tape.backward().unwrap(), BatchShare { rows: labels.len(), loss })
}

/// The bits of the adapters.
pub fn bits<B: Backend>(backend: &B, model: &Mlp<B>) -> Vec<u32> {
    let params = model.adapters(DEFAULT).flat_map(|(_, adapter)| adapter.params());
    params.flat_map(|param| param.tensor().to_vec(backend).unwrap()).map(|x| x.to_f32().to_bits()).collect()
}

/// Averages the gradients of this rank's share of a batch over all ranks, clips them, and makes a step. Returns the loss and the
/// norm.
pub fn finish_step<B: Backend>(
    (backend, comm): (&B, &impl Communicator),
    (model, adam): (&mut Mlp<B>, &mut Adam<B>),
    (mut gradients, share): (Gradients<B>, BatchShare),
) -> Result<(f32, f64)> {
    let whole = gradients.all_reduce_mean(backend, model.params_mut(), share, comm)?;
    let norm = gradients.clip(backend, 0.5)?;
    adam.step(backend, model.params_mut(), &gradients)?;
    Ok((whole.loss, norm))
}

/// One step of training on a batch: this rank's share, the mean over all ranks, clipping, Adam. Returns the loss and the norm.
pub fn step<B: Backend>(
    (backend, comm): (&B, &impl Communicator),
    (model, adam): (&mut Mlp<B>, &mut Adam<B>),
    batch: &[usize],
) -> Result<(f32, f64)> {
    let mine = gradients(backend, model, &batch[shard(batch.len(), comm.rank(), comm.size())]);
    finish_step((backend, comm), (model, adam), mine)
}

/// How a run is changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    Nothing,
    /// About half of the numbers of the samples are the next `f32`, as this seed says.
    Ulp(u64),
    /// A fault, to see that it is noticed: rank 1 computes the share of rank 0.
    WrongShare,
    /// A fault, to see that it is noticed: at the end, one bit of one parameter of rank 1 differs.
    Drift,
}

/// What a run ends with: the bits of the adapters, and the loss and the norm of each step.
pub type Trained = (Vec<u32>, Vec<(f32, f64)>);

/// Trains for some steps on batches of 7 of 23 samples.
pub fn trained<E: Float>(comm: &impl Communicator, steps: usize) -> Trained {
    trained_with::<E>(comm, steps, Change::Nothing)
}

/// [`trained`], with a change.
pub fn trained_with<E: Float>(comm: &impl Communicator, steps: usize, change: Change) -> Trained {
    let backend = &cpu::<E>();
    let (mut model, mut adam, mut sampler) = (model(backend, 3), Adam::new(1e-2).unwrap(), Sampler::new(23, 7, 5).unwrap());
    let rank = if change == Change::WrongShare && comm.rank() == 1 { 0 } else { comm.rank() };
    let mut losses = Vec::new();
    for _ in 0..steps {
        let batch = sampler.next_batch();
        let mine = &batch[shard(batch.len(), rank, comm.size())];
        let (rows, labels): (Vec<Vec<E>>, Vec<u32>) = mine.iter().map(|&index| changed_sample(index, change)).unzip();
        let mine = gradients_of(backend, &model, &rows.concat(), &labels);
        losses.push(finish_step((backend, comm), (&mut model, &mut adam), mine).unwrap());
    }
    let mut bits = bits(backend, &model);
    if change == Change::Drift && comm.rank() == 1 {
        bits[3] ^= 1;
    }
    (bits, losses)
}

fn changed_sample<E: Float>(index: usize, change: Change) -> (Vec<E>, u32) {
    let (mut row, label) = sample::<E>(index);
    if let Change::Ulp(seed) = change {
        let mut rng = Rng::new(seed * 1000 + index as u64);
        for x in &mut row {
            let up = rng.below(2) as u32;
            *x = E::from_f32(f32::from_bits(x.to_f32().to_bits() + up));
        }
    }
    (row, label)
}

pub fn cpu<E: Float>() -> Cpu<E> {
    Cpu::new().unwrap().with_threads(1).unwrap()
}

/// The largest difference between two lists of bits of `f32`.
pub fn apart(a: &[u32], b: &[u32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (f32::from_bits(a) - f32::from_bits(b)).abs()).fold(0.0, f32::max)
}

/// How far apart rounding may bring the adapters and the losses of two runs of so many steps.
///
/// Ranks add the rows of a batch in another order. A sum in another order is the exact sum of terms that differ by at most
/// `depth + 2` units in the last place, so it does what changing the data by so many units does. The bound is that number, for the
/// longest sum, times the largest of what sixteen changes of the data by one unit do, with the same optimizer over the same steps.
pub fn rounding(steps: usize) -> (f32, f32) {
    let depth = SIZES.into_iter().max().unwrap() as f32;
    let one = trained::<f32>(&SingleProcess, steps);
    let (mut adapters, mut losses) = (0f32, 0f32);
    for seed in 1..=16 {
        let other = trained_with::<f32>(&SingleProcess, steps, Change::Ulp(seed));
        adapters = adapters.max(apart(&one.0, &other.0));
        losses = losses.max(losses_apart(&one.1, &other.1));
    }
    ((depth + 2.0) * adapters, (depth + 2.0) * losses)
}

/// The largest difference between the losses of two runs.
pub fn losses_apart(a: &[(f32, f64)], b: &[(f32, f64)]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a.0 - b.0).abs()).fold(0.0, f32::max)
}

/// Whole numbers from `-most` to `most`.
pub fn whole(rng: &mut Rng, count: usize, most: usize) -> Vec<f32> {
    (0..count).map(|_| rng.below(2 * most + 1) as f32 - most as f32).collect()
}

/// One step on whole numbers, of 8 rows: with 1, 2, 4 or 8 ranks nothing is rounded before the optimizer, so all give the same bits.
pub fn exact_step(comm: &impl Communicator, change: Change) -> Vec<u32> {
    const ROWS: usize = 8;
    let (backend, rng) = (&cpu::<f32>(), &mut Rng::new(7));
    let mut numbers = |shape: (usize, usize)| Tensor::from_slice(backend, shape, &whole(rng, shape.0 * shape.1, 2)).unwrap();
    let layers = SIZES.windows(2).map(|pair| Linear::from_tensors(numbers((pair[1], pair[0])), None).unwrap()).collect();
    let mut model = with_adapters(Mlp::from_layers(layers).unwrap(), &mut numbers);
    let (x, dy) = (whole(rng, ROWS * SIZES[0], 3), whole(rng, ROWS * SIZES[2], 4));

    let rank = if change == Change::WrongShare && comm.rank() == 1 { 0 } else { comm.rank() };
    let rows = shard(ROWS, rank, comm.size());
    let share = BatchShare { rows: rows.len(), loss: 1.0 };
    let part = |all: &[f32], cols: usize, by: f32| {
        let part: Vec<f32> = all[rows.start * cols..rows.end * cols].iter().map(|x| x * by).collect();
        Tensor::from_slice(backend, (rows.len(), cols), &part).unwrap()
    };
    let mut tape = Tape::new(backend);
    let input = tape.input(part(&x, SIZES[0], 1.0));
    let y = model.forward(&mut tape, input, None).unwrap();
    tape.seed(y, part(&dy, SIZES[2], 1.0 / rows.len() as f32)).unwrap();
    let mut gradients = tape.backward().unwrap();
    gradients.all_reduce_mean(backend, model.params_mut(), share, comm).unwrap();
    Adam::new(1e-2).unwrap().step(backend, model.params_mut(), &gradients).unwrap();
    bits(backend, &model)
}
