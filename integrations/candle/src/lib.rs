//! LoRA for language models on candle: train, save, load, merge and serve PEFT adapters, on lowrank's kernels.

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
