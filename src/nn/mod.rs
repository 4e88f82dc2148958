//! Layers on the tape: linear layers with and without adapters, and models made of them.
//!
//! A model that implements [`Adaptable`] has named adapters; [`Mlp`], a perceptron, is such a model.

mod adam;
mod adaptable;
mod adapter;
mod bank;
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
#[cfg(feature = "adapter")]
pub(crate) use adam::State as AdamState;
pub use adaptable::{Adaptable, AdapterStatus, LayerStatus, ParameterReport, Targets};
#[cfg(feature = "adapter")]
pub(crate) use adaptable::{check_layers, check_unmerged, distinct};
#[cfg(feature = "svd")]
pub(crate) use adaptable::{insert_inactive, write_factors};
pub use adapter::Adapter;
pub use bank::{AdapterBank, BankCounts, HostAdapter, HostUpdate, Mixed, MixedRows, Recipe, Sweep};
pub use config::{Bias, LoraConfig, Scaling};
pub use init::Init;
pub use layer::Layer;
pub use linear::Linear;
pub use lora::{Adapters, DEFAULT, LayerAdapter, LoraLinear};
pub use merge::{Merge, UnmergeCost};
pub use mlp::Mlp;
pub use residue::Residue;
