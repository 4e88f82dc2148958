//! Training on several processes: each computes a shard of the batch, and the gradients are averaged over all of them.
//!
//! A [`Communicator`] connects the processes ("ranks"). [`SingleProcess`] is the one of a program that runs alone, [`Threads`]
//! connects the threads of one process, `Nccl` (feature `nccl`) GPUs, and the package `lowrank-mpi` has one for MPI.
//!
//! A step on each rank: compute the gradients of [`shard`] of the batch, average them with
//! [`Gradients::all_reduce_mean`](crate::autograd::Gradients::all_reduce_mean) (one collective), clip, and let the optimizer make
//! its step. All ranks then have the same gradients, so their parameters keep the same bits.
//!
//! ```
//! use lowrank::autograd::Tape;
//! use lowrank::distributed::{BatchShare, Communicator, Threads, broadcast_params, check_replicas, shard};
//! use lowrank::nn::{Adam, Adaptable, LoraConfig, Mlp, Targets};
//! use lowrank::{Cpu, Result, Tensor, op::Labels, random::Rng};
//!
//! fn train(comm: &impl Communicator) -> Result<f32> {
//!     let (cpu, rng) = (Cpu::<f32>::new()?.with_threads(1)?, &mut Rng::new(0));
//!     let mut model = Mlp::new(&cpu, &[2, 3], rng)?;
//!     model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), rng)?;
//!     broadcast_params(&cpu, model.params_mut(), 0, comm)?; // the parameters of rank 0
//!     let (mut adam, mut loss) = (Adam::new(1e-2)?, 0.0);
//!     let (x, labels) = ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 1, 2]); // a batch of three rows
//!     for step in 0..4 {
//!         let rows = shard(3, comm.rank(), comm.size());
//!         let mut tape = Tape::new(&cpu);
//!         let input = tape.input(Tensor::from_slice(&cpu, (rows.len(), 2), &x[2 * rows.start..2 * rows.end])?);
//!         let logits = model.forward(&mut tape, input, None)?;
//!         let mine = tape.cross_entropy(logits, &Labels::new(&cpu, 3, &labels[rows.clone()])?)?.to_vec(&cpu)?[0];
//!         let mut gradients = tape.backward()?;
//!         let share = BatchShare { rows: rows.len(), loss: mine };
//!         loss = gradients.all_reduce_mean(&cpu, model.params_mut(), share, comm)?.loss; // of all three rows
//!         gradients.clip(&cpu, 1.0)?;
//!         adam.step(&cpu, model.params_mut(), &gradients)?;
//!         if step % 2 == 1 {
//!             check_replicas(&cpu, model.params_mut(), comm)?;
//!         }
//!     }
//!     Ok(loss)
//! }
//!
//! let ranks: Vec<_> = Threads::group(2).into_iter().map(|comm| std::thread::spawn(move || train(&comm))).collect();
//! let losses: Vec<f32> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Result<_>>()?;
//! assert_eq!(losses[0].to_bits(), losses[1].to_bits());
//! # Ok::<(), lowrank::Error>(())
//! ```

mod all_reduce;
mod files;
#[cfg(feature = "nccl")]
mod nccl;
mod replicas;
mod sampler;
mod single;
mod threads;

pub use all_reduce::BatchShare;
pub use files::broadcast_file;
#[cfg(feature = "nccl")]
pub use nccl::{Nccl, NcclId};
pub use replicas::{broadcast_params, check_replicas};
pub use sampler::{Sampler, SamplerPosition, shard};
pub use single::SingleProcess;
pub use threads::Threads;

#[cfg(feature = "adapter")]
pub(crate) use replicas::Fingerprint;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Connects the processes of a run. Each is a rank, `0..size`.
///
/// `all_reduce`, `broadcast` and `barrier` are collectives: every rank must call the same ones, in the same order, with the same
/// number of elements. A rank that returns early with an error leaves the others waiting, so a program should end all ranks
/// then, as `lowrank-mpi` does.
///
/// `all_reduce` must give every rank the same bits.
pub trait Communicator {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// The number of processes.
    fn size(&self) -> usize;

    /// Replaces each element by its sum over all ranks. Errors: [`Error::Device`] of the engine.
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;

    /// Replaces the bytes of every rank by those of `root`. Errors: [`Error::Device`] of the engine; [`Error::Value`] unless
    /// `root` is a rank.
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()>;

    /// Waits until every rank has called it. Errors: [`Error::Device`] of the engine.
    fn barrier(&self) -> Result<()>;

    /// [`all_reduce`](Self::all_reduce) of a tensor on a device. By default the elements are copied to the host and back; an
    /// engine that reaches the device's memory sums them there.
    fn all_reduce_tensor<B: Backend>(&self, backend: &B, mut values: Tensor<B, f32>) -> Result<Tensor<B, f32>> {
        let mut host = values.to_vec(backend)?;
        self.all_reduce(&mut host)?;
        values.copy_from_slice(backend, &host)?;
        Ok(values)
    }
}

/// A number of each rank, by rank: one collective. The number travels as four whole numbers of 16 bits, which `f32` holds, and
/// every rank adds zeros to those of the others.
pub(crate) fn gather(comm: &impl Communicator, number: u64) -> Result<Vec<u64>> {
    let mut words = vec![0.0; 4 * comm.size()];
    for (at, word) in words[4 * comm.rank()..][..4].iter_mut().enumerate() {
        *word = f32::from((number >> (16 * at)) as u16);
    }
    comm.all_reduce(&mut words)?;
    let whole = |words: &[f32]| words.iter().rev().fold(0, |number, &word| (number << 16) | u64::from(word as u16));
    Ok(words.chunks_exact(4).map(whole).collect())
}

/// Errors: [`Error::Value`] unless `root` is a rank.
pub(crate) fn check_root(root: usize, size: usize) -> Result<()> {
    Error::unless(root < size, "broadcast", "root", root, "a rank, less than the number of ranks")
}
