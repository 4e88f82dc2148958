//! lowrank itself, and those who are quickly built: the products of other crates on the CPU, a naive shader on WebGPU.

#[cfg(feature = "products")]
mod composed;
#[cfg(feature = "products")]
mod faer;
#[cfg(feature = "products")]
mod gemm;
#[cfg(feature = "products")]
mod matrixmultiply;
#[cfg(feature = "webgpu")]
mod naive;
pub(crate) mod ours;
#[cfg(feature = "products")]
mod products;
#[cfg(feature = "products")]
mod rten;
#[cfg(feature = "webgpu")]
mod shaders;
pub(crate) mod unfused;

#[cfg(feature = "products")]
pub use products::Products;
#[cfg(feature = "webgpu")]
pub use shaders::Shaders;
