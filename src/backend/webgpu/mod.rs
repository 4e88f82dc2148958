//! WebGPU: any GPU with Vulkan, Metal or DX12, and software Vulkan.
//!
//! ```text
//! lora.rs linear.rs      each verb as sums of products
//!   └─ sum.rs            init + scale·lhs·rhs + base_lhs·base_rhs, in pieces that fit a binding
//! pointwise.rs dora.rs copy.rs   verbs that pass over memory once
//!   └─ aliasing.rs       refuses launches that would read and write one buffer
//!   └─ plan.rs           tiles and pieces: pure functions of sizes and limits
//!   └─ shader.rs         the text of a kernel, assembled from shaders/*.wgsl
//!   └─ dispatch.rs       pipelines; launches, recorded and submitted in batches
//!   └─ cache.rs          a file of compiled pipelines for the next run
//! adapter.rs memory.rs   the adapter; its memory
//! lend.rs                buffers that the caller lends
//! clock.rs               time measured by the device
//! ```
//!
//! Every element of an output belongs to one invocation, or to slices that are added in a fixed order. There are no atomics, and
//! the same request on the same adapter gives the same bits.

mod adapter;
mod aliasing;
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
#[cfg(test)]
mod translations;

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use adapter::OpenOptions;
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

/// A backend on a GPU, whose weights and activations are stored as `E`: `f32`, or `f16` if the adapter supports it.
///
/// Verbs are recorded and submitted in batches of at most about 0.1 s of work for a slow GPU; [`download`](Backend::download) and
/// [`synchronize`](Backend::synchronize) submit and wait. Clones share the device and its memory.
pub struct WebGpu<E: Float> {
    gpu: Arc<Gpu>,
    limits: Limits,
    /// A buffer with the number 1.
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
    /// Opens the best adapter: a discrete GPU, else an integrated one, else software.
    ///
    /// `LOWRANK_ADAPTER` chooses another by its number or a part of its name; `WGPU_BACKEND` chooses `vulkan`, `metal` or `dx12`.
    /// Errors: [`Error::Unavailable`] if there is no adapter, or not that one, or it does not support `E`.
    pub fn new() -> Result<Self> {
        Self::open(OpenOptions::from_env())
    }

    /// Opens the adapter with this number, or the first with this text in its name. Errors: as [`new`](Self::new).
    pub fn with_adapter(name: &str) -> Result<Self> {
        Self::open(OpenOptions { adapter: Some(name.into()), ..OpenOptions::from_env() })
    }

    /// As [`new`](Self::new), with cooperative matrices, WGSL's access to tensor cores. Large f16 products use them, and
    /// accumulate in f32.
    ///
    /// They are an experimental feature of wgpu, whose drivers may have bugs that cannot be detected here, and this crate has
    /// used them on software Vulkan only; so they are opt-in. `LOWRANK_COOPERATIVE_MATRICES=1` enables them for every adapter
    /// that is opened.
    ///
    /// Errors: as [`new`](Self::new); [`Error::Unavailable`] if the adapter has no cooperative matrices, or none that can be
    /// used: its subgroups must have a single size, which they do not have on Metal, for example.
    pub fn with_cooperative_matrices() -> Result<Self> {
        Self::open(OpenOptions { matrices: true, ..OpenOptions::from_env() })
    }

    /// As [`new`](Self::new), with a file in which compiled pipelines are stored for the next run. `LOWRANK_PIPELINES=FILE` does
    /// the same for every adapter that is opened.
    ///
    /// A file that is missing, damaged, or of another adapter or driver is ignored and replaced. It is written, completely or not
    /// at all, by [`save_pipelines`](Self::save_pipelines) and when the last clone is dropped. Drivers trust its contents: **keep
    /// it where nobody else may write.** Most desktop drivers store pipelines themselves; this is for those that do not.
    ///
    /// Errors: as [`new`](Self::new); [`Error::Unavailable`] where wgpu has no pipeline caches (on Metal and DX12);
    /// [`Error::File`] if the file exists and cannot be read.
    pub fn with_pipelines(file: &Path) -> Result<Self> {
        Self::open(OpenOptions { pipelines: Some(file.into()), ..OpenOptions::from_env() })
    }

    /// Writes the pipelines compiled so far to the file of [`with_pipelines`](Self::with_pipelines), if there is one and it lacks
    /// any. Errors: [`Error::File`]; [`Error::Device`] if the driver does not return them.
    pub fn save_pipelines(&self) -> Result<()> {
        self.gpu.cache.as_ref().map_or(Ok(()), |cache| cache.save())
    }

    fn open(options: OpenOptions) -> Result<Self> {
        Self::from_gpu(adapter::open(options)?)
    }

    /// A backend on a device of the caller's. Errors: [`Error::Unavailable`] if it was created without the features that `E`
    /// needs.
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let name = device.adapter_info().name;
        Self::from_gpu(Gpu::new(device, queue, name, 0)?)
    }

    fn from_gpu(gpu: Gpu) -> Result<Self> {
        let unavailable = |reason: &str| Err(Error::Unavailable { backend: "webgpu", reason: reason.into() });
        match E::DTYPE {
            DType::F32 => {}
            DType::F16 if gpu.device.features().contains(wgpu::Features::SHADER_F16) => {}
            DType::F16 => return unavailable(&format!("{} does not support f16", gpu.name)),
            DType::BF16 => return unavailable("WGSL has no bf16"),
        }
        let limits = memory::limits_of(&gpu);
        if gpu.matrix > 0 && !limits.supports_matrices() {
            return unavailable(&format!(
                "{}: its cooperative matrices cannot be used, for example because the size of its subgroups varies",
                gpu.name
            ));
        }
        let gpu = Arc::new(gpu);
        let one = Buffer::unwritten(&gpu, 1)?;
        one.write(&[1.0])?;
        Ok(Self { gpu, limits, one: Arc::new(one), element: PhantomData })
    }

    /// Plans for an adapter with smaller limits. Limits above this adapter's have no effect.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits: self.limits.min(limits), ..self }
    }

    /// The limits that launches are planned for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The device, for pipelines of the caller's.
    pub fn wgpu_device(&self) -> &wgpu::Device {
        &self.gpu.device
    }

    /// The queue. Commands and uploads that this backend has recorded but not submitted come after what is submitted here; use
    /// [`record`](Self::record) for commands between verbs.
    pub fn wgpu_queue(&self) -> &wgpu::Queue {
        &self.gpu.queue
    }

    /// Records commands of the caller's, after the verbs recorded so far and before later ones.
    ///
    /// They see the contents of this backend's buffers ([`Buffer::raw`]) as those verbs leave them, and must not call this
    /// backend. They are submitted together with verbs: if they fail, those verbs fail too, and every later call returns
    /// [`Error::Device`] with the reason.
    pub fn record(&self, commands: impl Fn(&mut wgpu::CommandEncoder) + Send + 'static) {
        memory::lock(&self.gpu.batch).commands.push(Command::Record(Box::new(commands)));
    }

    /// The number of submissions so far. A training step that reads back its loss is one.
    pub fn submissions(&self) -> u64 {
        self.counts().submissions
    }

    /// The numbers of operations that this backend and its clones have requested of the device.
    pub fn counts(&self) -> Counts {
        self.gpu.counts()
    }

    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        self.gpu.launch(E::DTYPE, self.limits.threads(), launch)
    }

    /// A binding for operands that a shader does not read: something must be bound.
    fn placeholder(&self) -> Binding<'_> {
        Binding::all(self.one.raw())
    }

    /// A binding for these bytes of a buffer, and the number of elements of `size` bytes in it before them: a binding must start
    /// at a multiple of the adapter's alignment.
    fn window<'a>(&'a self, buffer: &'a wgpu::Buffer, bytes: Range<u64>, size: u64) -> (Binding<'a>, u32) {
        if bytes.is_empty() {
            return (self.placeholder(), 0);
        }
        let first = bytes.start / self.alignment() * self.alignment();
        (Binding { buffer, bytes: first..bytes.end.next_multiple_of(4) }, ((bytes.start - first) / size) as u32)
    }

    /// Offsets of bindings are multiples of this.
    fn alignment(&self) -> u64 {
        u64::from(self.gpu.device.limits().min_storage_buffer_offset_alignment)
    }
}

impl<E: Float> super::sealed::Sealed for WebGpu<E> {}

impl<E: Float> Backend for WebGpu<E> {
    type Elem = E;
    type Buffer<T: Element> = Buffer<T>;
    type Slice<T: Element> = Slice<T>;
    /// There are no prepacked weights.
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
