//! NVIDIA GPUs: hand-written kernels, shipped as PTX.
//!
//! ```text
//! lora.rs linear.rs dora.rs pointwise.rs   a verb, as a few launches
//!   ├─ products.rs                 y and dx, by whichever kernel
//!   ├─ operand.rs                  a view, as kernels take it
//!   └─ plan.rs hopper.rs           which kernel, how many blocks: pure arithmetic
//!        └─ device.rs              what a GPU must do: memory, and launches
//!             └─ driver.rs         one GPU, through NVIDIA's driver: an unsafe door
//!                  ├─ newer.rs     what bindings to older drivers lack: the other one
//!                  ├─ memory.rs    what it allocates, freed on whichever thread drops it
//!                  └─ lend.rs      what somebody lends, or hands over
//! kernels/*.cu                     the kernels, the same stems; kernels/ptx is what ships
//! ```
//!
//! The tests put another device under the same verbs: an interpreter that runs the shipped PTX on the CPU.
//!
//! # Graphs
//!
//! A verb's launches can be captured in a CUDA graph. It copies nothing to the device and waits for nothing: sizes and scalars are
//! parameters of kernels. The memory that a backward pass needs for a while (`dh`, and parts of sums, of which those of `dh` take
//! m·r/(128·k) as much as a 16-bit weight) is allocated and freed in the order of the stream, so that a graph has an allocation of
//! its own and nobody can free it. The rest is the caller's:
//!
//! - The stream must be one of its own, since the default stream cannot be captured, and cudarc must not track events, which would
//!   tie the graph to work before it.
//! - A graph knows operands by their addresses: each tensor that a captured verb names must live as long as the graph is launched.
//!   Nothing checks that; new contents are written with [`copy_from_slice`](crate::Tensor::copy_from_slice), between launches.
//! - No tensor begins during the capture, since its memory would be the graph's, and none that began before is dropped during it,
//!   since the driver would not free it then. A step of the tape allocates what it makes, so it is verbs that are captured.
//! - Nothing is copied during it: that is an error ([`Error::Device`]).
//!
//! ```no_run
//! use lowrank::cuda::cudarc::driver::{CudaContext, sys};
//! use lowrank::op::LoraMerge;
//! use lowrank::{Cuda, Tensor, bf16, op::Rounding};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = CudaContext::new(0)?;
//! // SAFETY: all of this program's work is on one stream.
//! unsafe { context.disable_event_tracking() };
//! let stream = context.new_stream()?;
//! let gpu = Cuda::<bf16>::from_stream(stream.clone())?;
//! let (a, b) = (Tensor::zeros(&gpu, (16, 4096))?, Tensor::zeros(&gpu, (4096, 16))?);
//! let mut w = Tensor::zeros(&gpu, (4096, 4096))?;
//!
//! stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
//! LoraMerge { a: (&a).into(), b: (&b).into(), scale: 2.0, rounding: Rounding::Nearest, w: w.view_mut() }.run(&gpu)?;
//! let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
//! let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;
//! graph.launch()?;
//! stream.synchronize()?;
//! # Ok(())
//! # }
//! ```

mod device;
mod dora;
mod driver;
pub mod hopper;
mod lend;
mod linear;
mod lora;
mod memory;
mod newer;
mod operand;
pub mod plan;
mod pointwise;
mod products;

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

pub use cudarc;
use cudarc::driver::{CudaStream, CudaView, CudaViewMut};
pub use device::{Arg, Device, Gpu, Launch, Tiles};
pub use driver::Driver;
pub use lend::{Lent, LentMut};
pub use memory::Memory;

use super::{Backend, Passes};
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};
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

/// PTX as GPUs from Hopper on run it: with the instructions by which launches of a verb overlap, which are comments to those before.
pub fn from_hopper_on(ptx: &str) -> String {
    let newer = ptx.replacen(".version 7.1", ".version 7.8", 1).replacen(".target sm_80", ".target sm_90", 1);
    newer.replace("//@ ", "")
}

/// A GPU as a backend whose weights and activations are stored as `E`.
///
/// Verbs return before the GPU is done, copies do not: one from the host waits until the GPU has read it, and so for all that was
/// asked before. A training step copies its inputs and its labels, so the GPU is idle as it begins, until the first launches come
/// (some µs); a step that reads its loss has waited anyway.
///
/// Operands may lie anywhere. Kernels that load 16 bytes at once take them where rows begin and end at multiples of that; elsewhere
/// kernels for any shape do, which are slower. On Hopper an output that is added to is made by the kernels of other GPUs.
///
/// Factors in `f32` beside 16-bit weights are rounded to the weights' type where products take them, to the nearest and anew each
/// time (in f16 what is beyond 65504 becomes infinite); merging and the lengths of rows take them as they are.
pub struct Cuda<E: Float, D: Device = Driver> {
    device: D,
    element: PhantomData<E>,
}

/// `len` elements in the memory of a device; where views look at memory that is lent, that.
pub struct Buffer<M, T> {
    memory: M,
    len: usize,
    element: PhantomData<T>,
}

impl<M, T> Buffer<M, T> {
    fn new(memory: M, len: usize) -> Self {
        Self { memory, len, element: PhantomData }
    }

    /// The memory itself; with a [`Driver`], [`Memory`] that is a slice of cudarc's.
    pub fn memory(&self) -> &M {
        &self.memory
    }
}

impl<E: Float, D: Device> fmt::Debug for Cuda<E, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda<{}>({})", E::DTYPE, self.device.name())
    }
}

impl<E: Float> Cuda<E> {
    /// The GPU with that number, on its default stream. Errors: [`Error::Unavailable`] without a driver, or without that GPU.
    ///
    /// Memory that is dropped stays with this program, for who asks next: the GPU's default pool is told to give none back to the
    /// system by itself.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Self::on(Driver::open(ordinal, E::DTYPE)?))
    }

    /// Shares a stream of the caller's, and its context: verbs are launched there, in order with whatever else is. The pool from which
    /// the driver allocates stays as the caller has it; as the driver has it, memory that nobody holds goes back to the system whenever
    /// somebody waits for the stream, and fresh memory is slow (`CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`).
    ///
    /// A tensor belongs to the stream of the backend that made it, and verbs of a backend on another stream refuse it
    /// ([`Error::Device`]): nobody would order what the two do.
    ///
    /// The stream may be the one that each thread has of its own (`CudaContext::per_thread_stream`). Its name means another stream on
    /// each thread, so the backend, and verbs on its tensors, then work on the thread that calls this alone ([`Error::Device`] on
    /// others), and a tensor that another thread drops waits for all work of the GPU's.
    ///
    /// Errors: [`Error::Device`] if the kernels cannot be loaded there, [`Error::Unavailable`] if the GPU is older than they are.
    ///
    /// ```no_run
    /// use lowrank::cuda::cudarc::driver::CudaContext;
    /// use lowrank::{Cuda, bf16};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let stream = CudaContext::new(0)?.new_stream()?;
    /// let gpu = Cuda::<bf16>::from_stream(stream)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self::on(Driver::from_stream(stream, E::DTYPE)?))
    }

    /// Memory of the caller's, to be read by verbs: nothing is copied, allocated or kept, and nothing of it freed. It must lie on the
    /// stream of this backend. On a stream that each thread has of its own, what this thread's stream has to see must have been made
    /// there, or waited for.
    ///
    /// Errors: [`Error::Value`] for memory of another stream.
    ///
    /// ```no_run
    /// use lowrank::cuda::cudarc::driver::CudaContext;
    /// use lowrank::{Cuda, Tensor, op::LinearForward};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let stream = CudaContext::new(0)?.new_stream()?;
    /// let gpu = Cuda::<f32>::from_stream(stream.clone())?;
    /// let x = stream.clone_htod(&[1.0f32, 2.0])?; // 1×2
    /// let mut qkv = stream.alloc_zeros::<f32>(9)?; // outputs of three layers in a row of 1×9
    /// let w = Tensor::from_slice(&gpu, (3, 2), &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0])?;
    ///
    /// let (x, mut qkv) = (x.as_view(), qkv.as_view_mut());
    /// let (x, mut qkv) = (gpu.lend(&x)?, gpu.lend_mut(&mut qkv)?);
    /// let k = qkv.view_mut::<f32>((1, 9))?.column_range(3..6)?;
    /// LinearForward { x: x.view((1, 2))?, w: (&w).into(), bias: None, y: k.into() }.run(&gpu)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn lend<'a, T: Element>(&'a self, view: &'a CudaView<'_, T>) -> Result<Lent<'a, T>> {
        self.device.lend(view)
    }

    /// Memory of the caller's, to be written by verbs; else as [`lend`](Self::lend).
    pub fn lend_mut<'a, T: Element>(&'a self, view: &'a mut CudaViewMut<'_, T>) -> Result<LentMut<'a, T>> {
        self.device.lend_mut(view)
    }
}

impl<E: Float, D: Device> Cuda<E, D> {
    /// On any device that runs the kernels of [`ptx`]`(E::DTYPE)`.
    pub fn on(device: D) -> Self {
        Self { device, element: PhantomData }
    }

    /// What it runs on.
    pub fn on_device(&self) -> &D {
        &self.device
    }

    /// Runs a kernel, unless its grid is empty.
    fn launch(&self, plan: Plan, args: Vec<Arg<'_, D::Memory>>) -> Result<()> {
        self.chain().launch(plan, args)
    }

    /// Several launches of one verb, with nothing between them: what they need is allocated before, and freed after.
    fn chain(&self) -> Chain<'_, D> {
        Chain { device: &self.device, begun: false }
    }

    /// Memory for what lives during one verb; nothing is written there. It goes back in the order of the stream.
    fn scratch(&self, rows: usize, cols: usize) -> Result<Buffer<D::Memory, f32>> {
        self.unwritten(Shape { rows, cols }.elements()?)
    }
}

/// Launches of one verb. Each but the first may overlap the one before it.
struct Chain<'c, D> {
    device: &'c D,
    begun: bool,
}

impl<D: Device> Chain<'_, D> {
    /// Runs a kernel, unless its grid is empty.
    fn launch(&mut self, plan: Plan, args: Vec<Arg<'_, D::Memory>>) -> Result<()> {
        if plan.grid == 0 {
            return Ok(());
        }
        self.device.launch(Launch::new(plan, args, std::mem::replace(&mut self.begun, true)))
    }
}

/// Bytes of so many elements. Errors: [`Error::TooLarge`] if they cannot be addressed.
fn bytes<T: Element>(len: usize) -> Result<usize> {
    let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
    bytes.ok_or(Error::TooLarge { shape: Shape { rows: len, cols: 1 }, limit: "this machine can address" })
}

fn as_long(verb: &'static str, host: usize, buffer: usize) -> Result<()> {
    Error::unless(host == buffer, verb, "host", host, "as many elements as the buffer")
}

impl<E: Float, D: Device> super::sealed::Sealed for Cuda<E, D> {}

impl<E: Float, D: Device> Backend for Cuda<E, D> {
    type Elem = E;
    type Buffer<T: Element> = Buffer<D::Memory, T>;
    type Slice<T: Element> = Buffer<D::Memory, T>;
    type Panels = ();

    fn device(&self) -> String {
        format!("{NAME} ({})", self.device.name())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        Ok(Buffer::new(self.device.zeros(bytes::<T>(len)?)?, len))
    }

    /// The interpreter in the tests watches that nobody reads what no verb wrote.
    fn unwritten<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        Ok(Buffer::new(self.device.alloc(bytes::<T>(len)?)?, len))
    }

    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>> {
        let mut memory = self.device.alloc(size_of_val(host))?;
        self.device.write(&mut memory, bytemuck::must_cast_slice(host))?;
        Ok(Buffer::new(memory, host.len()))
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

    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> &Self::Slice<T> {
        buffer
    }

    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> &mut Self::Slice<T> {
        buffer
    }

    fn slice_len<T: Element>(slice: &Self::Slice<T>) -> usize {
        slice.len
    }

    fn copy<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatMut<'_, Self, T>) -> Result<()> {
        operand::copy(self, from, to)
    }

    fn pack(&self, _w: MatRef<'_, Self>, _passes: Passes) -> Result<()> {
        Ok(())
    }

    fn takes_banks(&self) -> bool {
        false
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
