//! Layers on the tape: a linear layer, the same with adapters, and models of them.
//!
//! A model that implements [`Adaptable`] has adapters by name; [`Mlp`], a perceptron, is one.

mod adam;
mod adaptable;
mod adapter;
mod config;
mod dora;
mod init;
mod layer;
mod linear;
mod lora;
mod merge;
mod mlp;
mod residue;

pub use adam::Adam;
pub use adaptable::{Adaptable, AdapterStatus, LayerStatus, ParameterReport, Targets};
#[cfg(feature = "adapter")]
pub(crate) use adaptable::{check_layers, distinct, unmerged};
#[cfg(feature = "svd")]
pub(crate) use adaptable::{insert_inactive, write_factors};
pub use adapter::Adapter;
pub use config::{Bias, LoraConfig, Scaling};
pub use init::Init;
pub use layer::Layer;
pub use linear::Linear;
pub use lora::{Adapters, DEFAULT, LoraLinear, Tuned};
pub use merge::{Kept, Merge};
pub use mlp::Mlp;
pub use residue::Residue;
