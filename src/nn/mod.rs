//! Layers on the tape: a linear layer, the same with an adapter, and a perceptron of them.

mod adam;
mod init;
mod linear;
mod lora;
mod mlp;

pub use adam::Adam;
pub use init::Init;
pub use linear::Linear;
pub use lora::{Adapter, LoraConfig, LoraLinear, Scaling};
pub use mlp::{Layer, Mlp, ParameterReport, Targets};
