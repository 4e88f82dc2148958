//! Hand-written kernels for low-rank (LoRA) updates.
//!
//! ```text
//! h = x·Aᵀ        y = x·Wᵀ + bias + scale·h·Bᵀ        W += scale·B·A
//! ```
//!
//! The trait [`Backend`] has three implementations: SIMD on the CPU ([`Cpu`]), WGSL through wgpu (feature `webgpu`), and PTX
//! through cudarc (feature `cuda`). A low-rank update only adds depth to the sums of the base layer, so both are computed in
//! one pass over the output, and no backend stores a matrix of the size of the weight.
//!
//! ```
//! use lowrank::nn::{Adapter, Linear, LoraConfig, LoraLinear};
//! use lowrank::{Cpu, Tensor, autograd::Tape, random::Rng};
//!
//! let (cpu, mut rng) = (Cpu::<f32>::new()?, Rng::new(0));
//! let base = Linear::new(&cpu, 3, 4, &mut rng)?; // 3 inputs, 4 outputs
//! let adapter = Adapter::new(&cpu, &base, LoraConfig::new(2, 4.0), &mut rng)?; // rank 2, alpha 4
//! let mut layer = LoraLinear::new(base, adapter)?;
//!
//! let mut tape = Tape::new(&cpu);
//! let x = tape.input(Tensor::from_slice(&cpu, (1, 3), &[1.0, 2.0, 3.0])?);
//! let y = layer.forward(&mut tape, x, None)?;
//! assert_eq!(tape.value(y)?.to_vec(&cpu)?.len(), 4);
//! drop(tape); // the tape borrows the layer
//!
//! layer.merge(&cpu)?; // W += scaling·B·A
//! layer.unmerge(&cpu)?; // restores every bit of W
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! Modules:
//! - [`op`]: requests, one struct for each operation, to call the kernels from other code. It defines the letters `m k n r`.
//! - [`nn`] on [`autograd`]: layers with adapters, Adam, and a tape, to train a network.
//! - `adapter` (feature `adapter`, on by default): reads and writes the adapter folders of PEFT.
//! - `training` (feature `adapter`): saves a run of training, and resumes it.
//! - [`distributed`]: trains on several processes; gradients are summed over MPI, NCCL or threads.
//! - `checkpoint` (feature `checkpoint`): merges adapters into models on disk, as does the program `lowrank` (feature `cli`).
//! - `examples/mnist_lora` uses all of them.
//!
//! To read the source: [`op`] (requests) → [`backend`] (the interface of devices) → `backend/cpu/lora.rs` (a verb as a sum of
//! products) → `backend/cpu/gemm` (the engine) → `backend/cpu/simd` (vectors of sixteen lanes on any CPU).

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "adapter")]
pub mod adapter;
pub mod autograd;
pub mod backend;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod distributed;
mod element;
mod error;
#[doc(hidden)]
pub mod file;
pub mod nn;
pub mod op;
pub mod quant;
pub mod random;
mod tensor;
#[cfg(feature = "adapter")]
pub mod training;
mod view;

pub use backend::cpu::{Cpu, VectorUnit};
#[cfg(feature = "cuda")]
pub use backend::cuda::{self, Cuda};
#[cfg(feature = "webgpu")]
pub use backend::webgpu::WebGpu;
pub use backend::{Backend, Passes};
pub use element::{DType, Element, Float, bf16, f16};
pub use error::{Error, Result};
pub use tensor::{Shape, Tensor};
pub use view::{MatMut, MatRef};

/// Runs the examples of the README and of the pages in `docs/` as tests.
#[cfg(all(doctest, feature = "adapter"))]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/adapters.md")]
    struct Adapters;
    #[doc = include_str!("../docs/training.md")]
    struct Training;
    #[doc = include_str!("../docs/merging.md")]
    struct Merging;
}
