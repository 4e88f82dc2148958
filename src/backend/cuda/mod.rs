//! NVIDIA GPUs: hand-written kernels, shipped as PTX.
//!
//! ```text
//! lora.rs linear.rs dora.rs pointwise.rs   a verb, as a few launches
//!   └─ plan.rs hopper.rs           which kernel, how many blocks: pure arithmetic
//!        └─ device.rs              what a GPU must do: memory, and launches
//!             └─ driver.rs         one GPU, through NVIDIA's driver: the only unsafe door
//! kernels/*.cu                     the kernels, the same stems; kernels/ptx is what ships
//! ```
//!
//! The tests put another device under the same verbs: an interpreter that runs the shipped PTX on the CPU.

mod device;
mod dora;
mod driver;
pub mod hopper;
mod linear;
mod lora;
pub mod plan;
mod pointwise;

use std::marker::PhantomData;
use std::sync::Arc;

pub use cudarc;
use cudarc::driver::CudaStream;
pub use device::{Arg, Device, Gpu, Launch, Tiles};
pub use driver::Driver;

use super::Backend;
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::tensor::{Shape, Tensor};
use plan::Plan;

/// What errors call this backend.
const NAME: &str = "cuda";

/// The PTX of every kernel for one element type, for GPUs from Ampere (`sm_80`) on.
pub fn ptx(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => include_str!(concat!(env!("OUT_DIR"), "/f32.ptx")),
        DType::F16 => include_str!(concat!(env!("OUT_DIR"), "/f16.ptx")),
        DType::BF16 => include_str!(concat!(env!("OUT_DIR"), "/bf16.ptx")),
    }
}

/// The PTX of the kernels for Hopper alone (`sm_90a`), which 16-bit elements have besides.
pub fn hopper_ptx(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => None,
        DType::F16 => Some(include_str!(concat!(env!("OUT_DIR"), "/hopper-f16.ptx"))),
        DType::BF16 => Some(include_str!(concat!(env!("OUT_DIR"), "/hopper-bf16.ptx"))),
    }
}

/// A GPU as a backend whose weights and activations are stored as `E`.
pub struct Cuda<E: Float, D: Device = Driver> {
    device: D,
    element: PhantomData<E>,
}

/// `len` elements in the memory of a device.
pub struct Buffer<M, T> {
    memory: M,
    len: usize,
    element: PhantomData<T>,
}

impl<M, T> Buffer<M, T> {
    /// The memory itself; with a [`Driver`], a slice of cudarc's.
    pub fn memory(&self) -> &M {
        &self.memory
    }
}

impl<E: Float> Cuda<E> {
    /// The GPU with that number, on its default stream. Errors: [`Error::Unavailable`] without a driver, or without that GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Self::on(Driver::open(ordinal, E::DTYPE)?))
    }

    /// Shares a stream of the caller's, and its context. Errors: [`Error::Device`] if the kernels cannot be loaded there.
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self::on(Driver::from_stream(stream, E::DTYPE)?))
    }
}

impl<E: Float, D: Device> Cuda<E, D> {
    /// On any device that runs the kernels of [`ptx`]`(E::DTYPE)`.
    pub fn on(device: D) -> Self {
        Self { device, element: PhantomData }
    }

    /// Runs a kernel, unless its grid is empty.
    fn launch(&self, plan: Plan, args: Vec<Arg<'_, D::Memory>>) -> Result<()> {
        if plan.grid == 0 { Ok(()) } else { self.device.launch(Launch::new(plan, args)) }
    }

    /// Memory for what lives during one verb; nothing is written there.
    fn scratch(&self, rows: usize, cols: usize) -> Result<Buffer<D::Memory, f32>> {
        let len = Shape { rows, cols }.elements()?;
        Ok(Buffer { memory: self.device.alloc(4 * len)?, len, element: PhantomData })
    }
}

/// Where a tensor lies.
fn memory<E: Float, D: Device, T: Element>(tensor: &Tensor<Cuda<E, D>, T>) -> &D::Memory {
    &tensor.buffer().memory
}

/// Where a tensor lies that a kernel writes.
fn memory_mut<E: Float, D: Device, T: Element>(tensor: &mut Tensor<Cuda<E, D>, T>) -> &mut D::Memory {
    &mut tensor.buffer_mut().memory
}

/// An operand that a kernel reads.
fn read<E: Float, D: Device, T: Element>(tensor: &Tensor<Cuda<E, D>, T>) -> Arg<'_, D::Memory> {
    Arg::Read(&tensor.buffer().memory)
}

/// An operand that may be missing.
fn read_if<'a, E: Float, D: Device>(tensor: Option<&'a Tensor<Cuda<E, D>>>) -> Arg<'a, D::Memory> {
    tensor.map_or(Arg::Null, read)
}

/// An operand that a kernel writes.
fn write<E: Float, D: Device, T: Element>(tensor: &mut Tensor<Cuda<E, D>, T>) -> Arg<'_, D::Memory> {
    Arg::Write(&mut tensor.buffer_mut().memory)
}

fn as_long(verb: &'static str, host: usize, buffer: usize) -> Result<()> {
    Error::unless(host == buffer, verb, "host", host, "as many elements as the buffer")
}

impl<E: Float, D: Device> Backend for Cuda<E, D> {
    type Elem = E;
    type Buffer<T: Element> = Buffer<D::Memory, T>;

    fn device(&self) -> String {
        format!("{NAME} ({})", self.device.name())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        Ok(Buffer { memory: self.device.zeros(len * size_of::<T>())?, len, element: PhantomData })
    }

    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>> {
        let mut memory = self.device.alloc(size_of_val(host))?;
        self.device.write(&mut memory, bytemuck::must_cast_slice(host))?;
        Ok(Buffer { memory, len: host.len(), element: PhantomData })
    }

    fn write<T: Element>(&self, buffer: &mut Self::Buffer<T>, host: &[T]) -> Result<()> {
        as_long("write", host.len(), buffer.len)?;
        self.device.write(&mut buffer.memory, bytemuck::must_cast_slice(host))
    }

    fn download<T: Element>(&self, buffer: &Self::Buffer<T>, host: &mut [T]) -> Result<()> {
        as_long("download", host.len(), buffer.len)?;
        self.device.read(&buffer.memory, bytemuck::must_cast_slice_mut(host))
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    fn buffer_len<T: Element>(buffer: &Self::Buffer<T>) -> usize {
        buffer.len
    }

    fn lora_forward(&self, op: Checked<LoraForward<'_, Self>>) -> Result<()> {
        lora::forward(self, op.into_inner())
    }
    fn lora_backward(&self, op: Checked<LoraBackward<'_, Self>>) -> Result<()> {
        lora::backward(self, op.into_inner())
    }
    fn lora_merge(&self, op: Checked<LoraMerge<'_, Self>>) -> Result<()> {
        lora::merge(self, op.into_inner())
    }
    fn lora_row_norm(&self, op: Checked<LoraRowNorm<'_, Self>>) -> Result<()> {
        dora::row_norm(self, op.into_inner())
    }
    fn magnitude(&self, op: Checked<Magnitude<'_, Self>>) -> Result<()> {
        dora::magnitude(self, op.into_inner())
    }
    fn magnitude_backward(&self, op: Checked<MagnitudeBackward<'_, Self>>) -> Result<()> {
        dora::magnitude_backward(self, op.into_inner())
    }
    fn linear_forward(&self, op: Checked<LinearForward<'_, Self>>) -> Result<()> {
        linear::forward(self, op.into_inner())
    }
    fn linear_backward(&self, op: Checked<LinearBackward<'_, Self>>) -> Result<()> {
        linear::backward(self, op.into_inner())
    }
    fn relu(&self, op: Checked<Relu<'_, Self>>) -> Result<()> {
        pointwise::relu(self, op.into_inner())
    }
    fn relu_backward(&self, op: Checked<ReluBackward<'_, Self>>) -> Result<()> {
        pointwise::relu_backward(self, op.into_inner())
    }
    fn dropout_forward(&self, op: Checked<DropoutForward<'_, Self>>) -> Result<()> {
        pointwise::dropout_forward(self, op.into_inner())
    }
    fn add(&self, op: Checked<Add<'_, Self>>) -> Result<()> {
        pointwise::add(self, op.into_inner())
    }
    fn accumulate(&self, op: Checked<Accumulate<'_, Self>>) -> Result<()> {
        pointwise::accumulate(self, op.into_inner())
    }
    fn cross_entropy(&self, op: Checked<CrossEntropy<'_, Self>>) -> Result<()> {
        pointwise::cross_entropy(self, op.into_inner())
    }
    fn adam(&self, op: Checked<Adam<'_, Self>>) -> Result<()> {
        pointwise::adam(self, op.into_inner())
    }
}
