//! LoRA for language models on candle: train, save, load, merge and serve PEFT adapters, on lowrank's kernels.

mod attention;
pub mod chat;
mod config;
pub mod data;
mod error;
mod gate;
pub mod gguf;
mod lend;
mod linear;
mod loss;
mod merge;
mod model;
mod norm;
mod numeric;
mod op;
mod rope;
pub mod schedule;

pub use config::{CONFIG_FILE, Family, ModelConfig, RopeScaling};
pub use error::{Error, Result};
pub use linear::{Adapter, Chosen, LoraLinear, Pass};
pub use model::{Cache, CausalLm, PROJECTIONS, Tokens};
