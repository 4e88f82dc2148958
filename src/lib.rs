//! Hand-written kernels for low-rank (LoRA) updates.

#[cfg(feature = "adapter")]
pub mod adapter;
pub mod autograd;
pub mod backend;
mod element;
mod error;
pub mod file;
#[cfg(feature = "mnist")]
pub mod mnist;
pub mod nn;
pub mod op;
pub mod random;
mod tensor;

pub use backend::Backend;
pub use backend::cpu::{Cpu, VectorUnit};
#[cfg(feature = "cuda")]
pub use backend::cuda::{self, Cuda};
pub use element::{DType, Element, Float, bf16, f16};
pub use error::{Error, Result};
pub use tensor::{Shape, Tensor};
