//! Hand-written kernels for low-rank (LoRA) updates.
//!
//! ```text
//! h = x·Aᵀ        y = x·Wᵀ + bias + scale·h·Bᵀ        W += scale·B·A
//! ```
//!
//! One trait, [`Backend`], and three implementations of its verbs: SIMD on the CPU ([`Cpu`]), WGSL through wgpu (feature
//! `webgpu`), PTX through cudarc (feature `cuda`). A low-rank update is more depth of the same sum of products, so the adapter
//! rides along in the product that the base layer needs anyway, and no backend makes a matrix of the weight's size.
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
//! drop(tape); // it borrows the layer
//!
//! layer.merge(&cpu)?; // W += scaling·B·A
//! layer.unmerge(&cpu)?; // and every bit is back
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! Where to begin:
//! - [`op`]: a request a verb, for those who link the kernels. The letters `m k n r` are explained there.
//! - [`nn`] on [`autograd`]: layers with adapters, Adam, a tape; enough to train a small network.
//! - `adapter` (feature `adapter`, there by default): the folders that PEFT reads and writes.
//! - `checkpoint` (feature `checkpoint`): merging into models on disk, and the program `lowrank` (feature `cli`).
//! - `examples/mnist_lora`: all of it in one run.
//!
//! To read the crate: [`op`] (what is asked) → [`backend`] (the seam) → `backend/cpu/lora.rs` (a verb, as the sums it is) →
//! `backend/cpu/gemm` (the engine) → `backend/cpu/simd` (sixteen lanes on any CPU).

#[cfg(feature = "adapter")]
pub mod adapter;
pub mod autograd;
pub mod backend;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
mod element;
mod error;
pub mod file;
#[cfg(feature = "mnist")]
pub mod mnist;
pub mod nn;
pub mod op;
pub mod quant;
pub mod random;
mod tensor;
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

/// The README's examples run with the tests.
#[cfg(all(doctest, feature = "adapter"))]
#[doc = include_str!("../README.md")]
struct Readme;
