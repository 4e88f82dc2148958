//! WebGPU: any GPU that Vulkan, Metal or DX12 reaches, and software Vulkan.
//!
//! ```text
//! lora.rs linear.rs      a verb, as the sums of products it is
//!   └─ sum.rs            init + scale·lhs·rhs + base_lhs·more_rhs, in pieces that fit a binding
//! pointwise.rs dora.rs copy.rs   one pass over memory
//!   └─ apart.rs          no launch reads and writes one buffer
//!   └─ plan.rs           sizes and limits → tiles and pieces; pure
//!   └─ shader.rs         the text of a kernel, out of shaders/*.wgsl
//!   └─ dispatch.rs       pipelines made once, launches recorded, many submitted together
//!   └─ cache.rs          compiled pipelines in a file, for the next run
//! adapter.rs memory.rs   which adapter; its buffers
//! lend.rs                buffers of the caller's
//! clock.rs               how long the device takes
//! ```
//!
//! Every element of an output belongs to one invocation, or to slices that are added up in a fixed order: there are no
//! atomics, and the same request on the same adapter gives the same bits.

mod adapter;
mod apart;
mod cache;
mod clock;
mod copy;
mod dispatch;
mod dora;
mod lend;
mod linear;
mod lora;
mod memory;
mod plan;
mod pointwise;
mod rows;
mod shader;
mod sum;

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use adapter::Wanted;
pub use dispatch::Counts;
use dispatch::{Binding, Command, Gpu, Launch};
pub use lend::{Lent, LentMut};
pub use memory::{Buffer, Slice};
pub use plan::Limits;

use super::{Backend, Passes};
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::view::{MatMut, MatRef};

/// A GPU as a backend whose weights and activations are stored as `E`: `f32`, or `f16` where the adapter has it.
///
/// Verbs are recorded and submitted together, at the latest when they are some 0.1 s of work for a slow GPU;
/// [`download`](Backend::download) and [`synchronize`](Backend::synchronize) submit and wait. Clones share the device and its memory.
pub struct WebGpu<E: Float> {
    gpu: Arc<Gpu>,
    limits: Limits,
    /// The number 1.
    one: Arc<Buffer<f32>>,
    element: PhantomData<E>,
}

impl<E: Float> Clone for WebGpu<E> {
    fn clone(&self) -> Self {
        Self { gpu: self.gpu.clone(), limits: self.limits, one: self.one.clone(), element: PhantomData }
    }
}

impl<E: Float> fmt::Debug for WebGpu<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WebGpu<{}>({})", E::DTYPE, self.gpu.name)
    }
}

impl<E: Float> WebGpu<E> {
    /// The best adapter of this machine: a discrete GPU before an integrated one before software.
    ///
    /// `LOWRANK_ADAPTER` asks for another, by its number or a part of its name; `WGPU_BACKEND` for `vulkan`, `metal` or
    /// `dx12`. Errors: [`Error::Unavailable`] if there is no adapter, or not that one, or it does not compute in `E`.
    pub fn new() -> Result<Self> {
        Self::open(Wanted::by_environment())
    }

    /// The adapter with this number, or the first with this in its name. Errors: as [`new`](Self::new).
    pub fn with_adapter(name: &str) -> Result<Self> {
        Self::open(Wanted { adapter: Some(name.into()), ..Wanted::by_environment() })
    }

    /// As [`new`](Self::new), with cooperative matrices: what tensor cores are to WGSL. Large products of f16 are made in them, and
    /// summed in f32.
    ///
    /// They are an experiment of wgpu's, whose drivers may have bugs that nothing here can catch, and this crate's use of them has
    /// been run on software Vulkan alone; so they are there for who asks. `LOWRANK_COOPERATIVE_MATRICES=1` asks wherever an adapter
    /// is opened. Errors: as [`new`](Self::new); [`Error::Unavailable`] if the adapter has none, or none that can be used: the width
    /// of its subgroups must be one number, which it is not on Metal, for one.
    pub fn with_cooperative_matrices() -> Result<Self> {
        Self::open(Wanted { matrices: true, ..Wanted::by_environment() })
    }

    /// As [`new`](Self::new), with a file in which compiled pipelines wait for the next run. `LOWRANK_PIPELINES=FILE` asks for it
    /// wherever an adapter is opened.
    ///
    /// A file that is not there, damaged, or of another adapter or driver is not used, and replaced. It is written by
    /// [`save_pipelines`](Self::save_pipelines) and when the last clone is dropped, whole or not at all. Drivers trust what is in
    /// it: **keep it where nobody else may write.** Most desktop drivers keep pipelines themselves; this is for those that do not.
    ///
    /// Errors: as [`new`](Self::new); [`Error::Unavailable`] where wgpu keeps none (on Metal and DX12); [`Error::File`] if the file
    /// is there and cannot be read.
    pub fn with_pipelines(file: &Path) -> Result<Self> {
        Self::open(Wanted { pipelines: Some(file.into()), ..Wanted::by_environment() })
    }

    /// Writes the pipelines compiled so far into the file that they wait in for the next run, if there is one and it lacks any.
    /// Errors: [`Error::File`]; [`Error::Device`] if the driver does not give them.
    pub fn save_pipelines(&self) -> Result<()> {
        self.gpu.cache.as_ref().map_or(Ok(()), |cache| cache.save())
    }

    fn open(wanted: Wanted) -> Result<Self> {
        Self::from_gpu(adapter::open(wanted)?)
    }

    /// A device that the program already has. Errors: [`Error::Unavailable`] if it was not made with what `E` needs.
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let name = device.adapter_info().name;
        Self::from_gpu(Gpu::new(device, queue, name, 0)?)
    }

    fn from_gpu(gpu: Gpu) -> Result<Self> {
        let unavailable = |reason: &str| Err(Error::Unavailable { backend: "webgpu", reason: reason.into() });
        match E::DTYPE {
            DType::F32 => {}
            DType::F16 if gpu.device.features().contains(wgpu::Features::SHADER_F16) => {}
            DType::F16 => return unavailable(&format!("{} does not compute in f16", gpu.name)),
            DType::BF16 => return unavailable("WGSL has no bf16"),
        }
        let limits = memory::limits_of(&gpu);
        if gpu.matrix > 0 && !limits.plans_matrices() {
            return unavailable(&format!("{}: no tile is made of its cooperative matrices; its subgroups vary, say", gpu.name));
        }
        let gpu = Arc::new(gpu);
        let one = Buffer::unwritten(&gpu, 1)?;
        one.write(&[1.0])?;
        Ok(Self { gpu, limits, one: Arc::new(one), element: PhantomData })
    }

    /// Plans for a poorer adapter than this one: what is larger than it has stays as it is.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits: self.limits.min(limits), ..self }
    }

    /// What launches are planned for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The device, for pipelines of the caller's own.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.gpu.device
    }

    /// The queue. What this backend has recorded but not submitted, uploads too, comes after what is submitted here; what
    /// should come between verbs goes through [`record`](Self::record).
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.gpu.queue
    }

    /// Puts the caller's own commands behind the verbs recorded so far, and before those to come.
    ///
    /// They see the contents of this backend's buffers ([`Buffer::raw`]) as those verbs leave them, and must not call this backend.
    /// They are submitted together with verbs, so an error of theirs takes those along: from then on everything is
    /// [`Error::Device`], with its reason.
    pub fn record(&self, commands: impl Fn(&mut wgpu::CommandEncoder) + Send + 'static) {
        memory::lock(&self.gpu.batch).commands.push(Command::Record(Box::new(commands)));
    }

    /// How many times recorded work was handed to the device so far. A training step that reads back its loss is one.
    pub fn submissions(&self) -> u64 {
        self.counts().submissions
    }

    /// How often this backend and its clones asked something of the device so far.
    pub fn counts(&self) -> Counts {
        self.gpu.counts()
    }

    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        self.gpu.launch(E::DTYPE, self.limits.threads(), launch)
    }

    /// What is bound where a shader reads nothing: something must be.
    fn unread(&self) -> Binding<'_> {
        Binding::all(self.one.raw())
    }

    /// A binding that sees these bytes of a buffer, and how many elements of `size` bytes it sees before them: it begins where the
    /// adapter allows one to begin.
    fn window<'a>(&'a self, buffer: &'a wgpu::Buffer, bytes: Range<u64>, size: u64) -> (Binding<'a>, u32) {
        if bytes.is_empty() {
            return (self.unread(), 0);
        }
        let first = bytes.start / self.alignment() * self.alignment();
        (Binding { buffer, bytes: first..bytes.end.next_multiple_of(4) }, ((bytes.start - first) / size) as u32)
    }

    /// Bytes between two places where a binding may begin.
    fn alignment(&self) -> u64 {
        u64::from(self.gpu.device.limits().min_storage_buffer_offset_alignment)
    }
}

impl<E: Float> super::sealed::Sealed for WebGpu<E> {}

impl<E: Float> Backend for WebGpu<E> {
    type Elem = E;
    type Buffer<T: Element> = Buffer<T>;
    type Slice<T: Element> = Slice<T>;
    /// Shaders read weights as they are.
    type Panels = ();

    fn device(&self) -> String {
        format!("webgpu ({})", self.gpu.name)
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::zeros(&self.gpu, len)
    }

    fn unwritten<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::unwritten(&self.gpu, len)
    }

    fn upload<T: Element>(&self, host: &[T]) -> Result<Buffer<T>> {
        let buffer = Buffer::unwritten(&self.gpu, host.len())?;
        buffer.write(host)?;
        Ok(buffer)
    }

    fn write<T: Element>(&self, buffer: &mut Buffer<T>, host: &[T]) -> Result<()> {
        buffer.write(host)
    }

    fn download<T: Element>(&self, buffer: &Buffer<T>, host: &mut [T]) -> Result<()> {
        buffer.read(host)
    }

    fn synchronize(&self) -> Result<()> {
        self.gpu.synchronize()
    }

    fn slice<T: Element>(buffer: &Buffer<T>) -> &Slice<T> {
        buffer.slice()
    }

    fn slice_mut<T: Element>(buffer: &mut Buffer<T>) -> &mut Slice<T> {
        buffer.slice_mut()
    }

    fn slice_len<T: Element>(slice: &Slice<T>) -> usize {
        slice.len()
    }

    fn copy<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatMut<'_, Self, T>) -> Result<()> {
        self.copy_matrix(from, to.into_ref())
    }

    fn pack(&self, _w: MatRef<'_, Self>, _passes: Passes) -> Result<()> {
        Ok(())
    }

    fn lora_forward(&self, op: Checked<LoraForward<'_, Self>>) -> Result<()> {
        self.lora_forward_sums(op.into_inner())
    }
    fn lora_backward(&self, op: Checked<LoraBackward<'_, Self>>) -> Result<()> {
        self.lora_backward_sums(op.into_inner())
    }
    fn lora_merge(&self, op: Checked<LoraMerge<'_, Self>>) -> Result<()> {
        self.lora_merge_sums(op.into_inner())
    }
    fn lora_row_norm(&self, op: Checked<LoraRowNorm<'_, Self>>) -> Result<()> {
        self.lora_row_norm_bands(op.into_inner())
    }
    fn magnitude(&self, op: Checked<Magnitude<'_, Self>>) -> Result<()> {
        self.magnitude_pass(op.into_inner())
    }
    fn magnitude_backward(&self, op: Checked<MagnitudeBackward<'_, Self>>) -> Result<()> {
        self.magnitude_backward_pass(op.into_inner())
    }
    fn linear_forward(&self, op: Checked<LinearForward<'_, Self>>) -> Result<()> {
        self.linear_forward_sums(op.into_inner())
    }
    fn linear_backward(&self, op: Checked<LinearBackward<'_, Self>>) -> Result<()> {
        self.linear_backward_sums(op.into_inner())
    }
    fn relu(&self, op: Checked<Relu<'_, Self>>) -> Result<()> {
        self.relu_pass(op.into_inner())
    }
    fn relu_backward(&self, op: Checked<ReluBackward<'_, Self>>) -> Result<()> {
        self.relu_backward_pass(op.into_inner())
    }
    fn dropout_forward(&self, op: Checked<DropoutForward<'_, Self>>) -> Result<()> {
        self.dropout_pass(op.into_inner())
    }
    fn add(&self, op: Checked<Add<'_, Self>>) -> Result<()> {
        self.add_pass(op.into_inner())
    }
    fn accumulate(&self, op: Checked<Accumulate<'_, Self>>) -> Result<()> {
        self.accumulate_pass(op.into_inner())
    }
    fn cross_entropy(&self, op: Checked<CrossEntropy<'_, Self>>) -> Result<()> {
        self.cross_entropy_pass(op.into_inner())
    }
    fn adam(&self, op: Checked<Adam<'_, Self>>) -> Result<()> {
        self.adam_sum(op.into_inner())
    }
}
