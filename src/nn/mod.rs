//! Layers on the tape: a linear layer, the same with adapters, and a perceptron of them.

mod adam;
mod adapter;
mod adapters;
mod config;
mod dora;
mod init;
mod linear;
mod lora;
mod merge;
mod merged;
mod mixed;
mod mlp;
mod residue;
mod status;
mod swap;

pub use adam::Adam;
pub use adapter::Adapter;
pub use config::{Bias, LoraConfig, Scaling};
pub use init::Init;
pub use linear::Linear;
pub use lora::{DEFAULT, LoraLinear, Tuned};
pub use merge::{Kept, Merge};
pub use mlp::{Layer, Mlp, Targets};
pub use status::{AdapterStatus, LayerStatus, ParameterReport};
