//! LoRA for language models on candle: train, save, load, merge and serve PEFT adapters, on lowrank's kernels.
//!
//! Where to begin:
//! - [`CausalLm`]: Llama, Qwen2 and Qwen3, from a folder of Hugging Face's or a GGUF file. Every operation of it has a backward pass.
//! - [`Adaptable`]: adapters of a model by name, of [`CausalLm`] and of models of one's own that are made of [`LoraLinear`].
//! - [`sft`]: training on conversations; [`chat`] and [`data`] make tokens of them.
//! - [`Shared`]: adapters merged into a live model of candle-transformers, as it is.
//!
//! All of it runs on the CPU, in candle's memory: the weights of a [`LoraLinear`] are candle's tensors, and its factors are candle's
//! [`Var`](candle_core::Var)s in `f32`, whatever the weights are. candle's autograd runs backward through it, and no gradient of a frozen
//! weight is ever made.
//!
//! Set `CANDLE_NUM_THREADS=1`: candle's second thread pool spins while it waits, and takes the time of rayon's threads.

mod adamw;
mod attention;
pub mod chat;
mod config;
pub mod data;
mod error;
mod gate;
mod generate;
pub mod gguf;
mod lend;
mod linear;
mod loss;
mod merge;
mod model;
mod norm;
mod numeric;
mod op;
#[cfg(test)]
mod op_tests;
mod peft;
mod rope;
pub mod schedule;
pub mod sft;
mod shared;

pub use config::{CONFIG_FILE, Family, ModelConfig, RopeScaling};
pub use error::{Error, Result};
pub use generate::Sampling;
pub use linear::{Adapter, Chosen, LoraLinear, Pass};
pub use lowrank::adapter::{AdapterConfig, TargetModules};
pub use lowrank::nn::{LoraConfig, ParameterReport};
pub use lowrank::random::Rng;
pub use model::{Cache, CausalLm, PROJECTIONS, Tokens};
pub use peft::Adaptable;
pub use shared::Shared;

pub use lowrank;

/// The README's examples are compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
