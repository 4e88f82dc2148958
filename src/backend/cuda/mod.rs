//! NVIDIA GPUs: hand-written kernels, shipped as PTX.
//!
//! ```text
//! lora.rs linear.rs dora.rs pointwise.rs   one function per verb: its launches
//!   ├─ products.rs                 the launches of y and dx
//!   ├─ operand.rs                  a view as kernel arguments
//!   ├─ kernel.rs                   the kernels' names and parameters
//!   └─ plan.rs hopper.rs           which kernel, how many blocks: pure functions of sizes
//!        └─ device.rs              the trait of a GPU: memory and launches
//!             └─ driver.rs         one GPU through NVIDIA's driver; a door for unsafe code
//!                  ├─ newer.rs     driver functions that older bindings lack; the other door
//!                  ├─ memory.rs    allocations, which any thread may drop
//!                  └─ lend.rs      memory that the caller lends or gives away
//! kernels/*.cu                     the kernels, under the names of their verbs; kernels/ptx is the PTX that ships
//! ```
//!
//! In the tests the verbs run on another device: an interpreter that runs the shipped PTX on the CPU.
//!
//! # Graphs
//!
//! The launches of a verb can be captured in a CUDA graph: a verb copies nothing to the device and waits for nothing; sizes and
//! scalars are kernel parameters. Scratch memory of the backward pass (`dh`, and partial sums; those of `dh` take m·r/(128·k) of
//! the bytes of a 16-bit weight) is allocated and freed in stream order, so that the graph has an allocation of its own, which
//! nobody can free early. The caller sees to the rest:
//!
//! - The stream must not be the default stream, which cannot be captured, and cudarc must not track events, which would make the
//!   graph depend on earlier work.
//! - A graph contains the addresses of its operands: each tensor of a captured verb must live as long as the graph is launched.
//!   This is not checked. New contents are written with [`copy_from_slice`](crate::Tensor::copy_from_slice), between launches.
//! - No tensor may be created during the capture, since its memory would belong to the graph, and no earlier tensor dropped during
//!   it, since the driver would not free it. A step of the tape allocates its results, so capture verbs, not steps.
//! - Copies during the capture are refused ([`Error::Device`]).
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
mod driver_error;
#[doc(hidden)]
pub mod hopper;
mod kernel;
mod lend;
mod linear;
mod lora;
mod memory;
mod newer;
mod operand;
#[doc(hidden)]
pub mod plan;
mod pointwise;
mod products;
#[cfg(test)]
mod sources;

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

pub use cudarc;
use cudarc::driver::{CudaStream, CudaView, CudaViewMut};
#[doc(hidden)]
pub use device::{Arg, Device, Gpu, Launch, Tiles};
pub use driver::Driver;
#[doc(hidden)]
pub use kernel::Kernel;
pub use lend::{Lent, LentMut};
pub use memory::Memory;
#[cfg(feature = "nccl")]
pub(crate) use newer::nccl_is_installed;

use super::verbs::for_each_verb;
use super::{Backend, Passes};
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};
use kernel::Params;
use plan::Plan;

/// The name of this backend in errors.
const NAME: &str = "cuda";

/// PTX of all kernels for one element type, for GPUs from Ampere (`sm_80`) on.
pub fn ptx(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => include_str!(concat!(env!("OUT_DIR"), "/f32.ptx")),
        DType::F16 => include_str!(concat!(env!("OUT_DIR"), "/f16.ptx")),
        DType::BF16 => include_str!(concat!(env!("OUT_DIR"), "/bf16.ptx")),
    }
}

/// PTX of the additional kernels for Hopper (`sm_90a` only), which exist for 16-bit elements. `None` for `f32`.
pub fn hopper_ptx(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => None,
        DType::F16 => Some(include_str!(concat!(env!("OUT_DIR"), "/hopper-f16.ptx"))),
        DType::BF16 => Some(include_str!(concat!(env!("OUT_DIR"), "/hopper-bf16.ptx"))),
    }
}

/// Adapts PTX of [`ptx`] to GPUs from Hopper on: enables the instructions that let launches of a verb overlap, which are comments
/// in it.
pub fn from_hopper_on(ptx: &str) -> String {
    let newer = ptx.replacen(".version 7.1", ".version 7.8", 1).replacen(".target sm_80", ".target sm_90", 1);
    newer.replace("//@ ", "")
}

/// A backend on a GPU, whose weights and activations are stored as `E`.
///
/// Verbs return before the GPU has finished; copies wait. A copy from the host returns when the GPU has read it, and so after all
/// earlier work. A training step copies its inputs and labels, so the GPU is idle for some µs at its start, until the first
/// launches arrive; a step that reads its loss has waited anyway.
///
/// Operands may start at any element. Kernels that load 16 bytes at once are used where rows start and end at multiples of 16
/// bytes; other operands take slower kernels for any shape. On Hopper, outputs that are accumulated into use the kernels for
/// earlier GPUs.
///
/// Products round `f32` factors beside 16-bit weights to the weights' type, to the nearest, in each call (in f16, values beyond
/// 65504 become infinite); merging and row norms use them in `f32`.
pub struct Cuda<E: Float, D: Device = Driver> {
    device: D,
    element: PhantomData<E>,
}

/// `len` elements in device memory: an allocation, or memory that is lent.
pub struct Buffer<M, T> {
    memory: M,
    len: usize,
    element: PhantomData<T>,
}

impl<M, T> Buffer<M, T> {
    fn new(memory: M, len: usize) -> Self {
        Self { memory, len, element: PhantomData }
    }

    /// The memory; with a [`Driver`], a [`Memory`], which holds a slice of cudarc's.
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
    /// Opens the GPU with this number, on its default stream. Errors: [`Error::Unavailable`] without a driver, or without that
    /// GPU.
    ///
    /// Dropped memory stays with the process, for later allocations: the GPU's default pool is set to release nothing to the
    /// system.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Self::on(Driver::open(ordinal, E::DTYPE)?))
    }

    /// Runs verbs on a stream of the caller's, in order with other work there. The driver's memory pool is not reconfigured: by
    /// default the driver releases unused memory at each synchronisation, which makes later allocations slow
    /// (`CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`).
    ///
    /// A tensor belongs to the stream of the backend that made it. Verbs of a backend on another stream refuse it
    /// ([`Error::Device`]), since nothing would order the work of the two.
    ///
    /// The stream may be the per-thread default stream (`CudaContext::per_thread_stream`), which is another stream on each
    /// thread. The backend, and verbs on its tensors, then work only on the thread that calls this function ([`Error::Device`] on
    /// others), and a tensor that another thread drops waits for all work of the GPU.
    ///
    /// Errors: [`Error::Device`] if the kernels cannot be loaded, [`Error::Unavailable`] if the GPU is too old for them.
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

    /// Lends memory of the caller's for verbs to read: nothing is copied, allocated, retained or freed. It must belong to the
    /// stream of this backend. With a per-thread default stream, its contents must have been made on this thread's stream, or be
    /// waited for.
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

    /// Lends memory of the caller's for verbs to write; otherwise as [`lend`](Self::lend).
    pub fn lend_mut<'a, T: Element>(&'a self, view: &'a mut CudaViewMut<'_, T>) -> Result<LentMut<'a, T>> {
        self.device.lend_mut(view)
    }
}

impl<E: Float, D: Device> Cuda<E, D> {
    /// A backend on any device that runs the kernels of [`ptx`]`(E::DTYPE)`.
    pub fn on(device: D) -> Self {
        Self { device, element: PhantomData }
    }

    /// The device.
    pub fn on_device(&self) -> &D {
        &self.device
    }

    /// Launches a kernel, unless its grid is empty.
    fn launch<'a>(&self, plan: Plan, params: impl Params<'a, D::Memory>) -> Result<()> {
        self.chain().launch(plan, params)
    }

    /// Starts a chain of launches of one verb, with nothing between them: scratch memory is allocated before, and freed after.
    fn chain(&self) -> Chain<'_, D> {
        Chain { device: &self.device, has_previous: false }
    }

    /// Scratch memory for one verb, not initialised. It is freed in stream order.
    fn scratch(&self, rows: usize, cols: usize) -> Result<Buffer<D::Memory, f32>> {
        self.unwritten(Shape { rows, cols }.elements()?)
    }
}

/// The launches of one verb. Each launch but the first may overlap the previous one.
struct Chain<'c, D> {
    device: &'c D,
    has_previous: bool,
}

impl<D: Device> Chain<'_, D> {
    /// Launches a kernel, unless its grid is empty.
    fn launch<'a, P: Params<'a, D::Memory>>(&mut self, plan: Plan, params: P) -> Result<()> {
        debug_assert!(P::KERNELS.contains(&plan.kernel), "{} has other parameters", plan.kernel);
        if plan.grid == 0 {
            return Ok(());
        }
        self.device.launch(Launch::new(plan, params.into_args(), std::mem::replace(&mut self.has_previous, true)))
    }
}

/// Bytes of `len` elements. Errors: [`Error::TooLarge`] if they cannot be addressed.
fn bytes<T: Element>(len: usize) -> Result<usize> {
    let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
    bytes.ok_or(Error::TooLarge { shape: Shape { rows: len, cols: 1 }, limit: "this machine can address" })
}

fn same_len(verb: &'static str, host: usize, buffer: usize) -> Result<()> {
    Error::unless(host == buffer, verb, "host", host, "as many elements as the buffer")
}

impl<E: Float, D: Device> super::sealed::Sealed for Cuda<E, D> {}

/// The function of each verb, by its name.
mod table {
    pub(super) use super::dora::{magnitude, magnitude_backward, row_norm as lora_row_norm};
    pub(super) use super::linear::{backward as linear_backward, forward as linear_forward};
    pub(super) use super::lora::{backward as lora_backward, forward as lora_forward, merge as lora_merge};
    pub(super) use super::pointwise::{accumulate, adam, add, cross_entropy, dropout_forward, relu, relu_backward};
}

/// Methods of [`Backend`] that call these functions.
macro_rules! delegate {
    ($($verb:ident: $Request:ident,)*) => {
        $(fn $verb(&self, op: Checked<$Request<'_, Self>>) -> Result<()> {
            table::$verb(self, op.into_inner())
        })*
    };
}

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

    /// The interpreter in the tests refuses reads of memory that was never written.
    fn unwritten<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        Ok(Buffer::new(self.device.alloc(bytes::<T>(len)?)?, len))
    }

    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>> {
        let mut memory = self.device.alloc(size_of_val(host))?;
        self.device.write(&mut memory, bytemuck::must_cast_slice(host))?;
        Ok(Buffer::new(memory, host.len()))
    }

    fn write<T: Element>(&self, buffer: &mut Self::Buffer<T>, host: &[T]) -> Result<()> {
        same_len("write", host.len(), buffer.len)?;
        self.device.write(&mut buffer.memory, bytemuck::must_cast_slice(host))
    }

    fn download<T: Element>(&self, buffer: &Self::Buffer<T>, host: &mut [T]) -> Result<()> {
        same_len("download", host.len(), buffer.len)?;
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

    for_each_verb!(delegate);
}
