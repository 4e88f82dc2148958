//! The interface of devices. All code above it is generic in `B: Backend` and names no device.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "webgpu")]
pub mod webgpu;

use crate::element::{Element, Float};
use crate::error::Result;
use crate::op::{
    Accumulate, Adam, Add, Checked, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward,
    LoraMerge, LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::tensor::Tensor;
use crate::view::{MatMut, MatRef};

/// The products for which a weight is [prepacked](Backend::keep_packed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// `y = x·Wᵀ`, for inference.
    Forward,
    /// `y = x·Wᵀ` and `dx = dy·W`, for training of layers in front of this one.
    ForwardAndBackward,
}

/// A device, its memory, and the operations ("verbs") of low-rank training.
///
/// Callers build a request, such as [`LoraForward`], and [`run`](LoraForward::run) it; they need not call the verbs of this
/// trait. A verb takes a [`Checked`] request: shapes fit, scalars are finite, and no output is also an input. Any dimension may
/// be zero. On a GPU, a verb may return before the device is done; [`download`](Self::download) and
/// [`synchronize`](Self::synchronize) wait for it. The same request on the same device gives the same bits.
///
/// Dropped buffers go to a bounded pool, from which the next allocation of the same size is served, so loops in a steady state
/// do not allocate. A backend borrows nothing (`'static`).
///
/// The trait is sealed: only this crate implements it.
pub trait Backend: sealed::Sealed + Sized + 'static {
    /// The element type of weights and activations. `Cpu<f32>` and `Cpu<bf16>` are two backends.
    type Elem: Float;
    /// Owned memory for elements `T` on this device.
    type Buffer<T: Element>;
    /// Memory for elements `T` on this device, owned or lent, which views borrow. `[T]` on the CPU.
    type Slice<T: Element>: ?Sized + 'static;
    /// The panels of a prepacked weight; see [`Packed`](crate::op::Packed).
    type Panels: 'static;

    /// A description of the device for people, such as `cpu (AVX-512, 2 threads)`.
    fn device(&self) -> String;

    /// A buffer of `len` zeros. Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;
    /// A buffer of `len` undefined elements, for a verb to overwrite.
    fn unwritten<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        self.zeros(len)
    }
    /// A new buffer with a copy of `host`.
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>>;
    /// Overwrites a buffer with `host`, which must have its length.
    fn write<T: Element>(&self, buffer: &mut Self::Buffer<T>, host: &[T]) -> Result<()>;
    /// Copies a buffer to `host`, which must have its length, after all verbs that write the buffer are done.
    fn download<T: Element>(&self, buffer: &Self::Buffer<T>, host: &mut [T]) -> Result<()>;
    /// Waits until every verb called so far is done.
    fn synchronize(&self) -> Result<()>;

    /// The memory of a buffer, for reading.
    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> &Self::Slice<T>;
    /// The memory of a buffer, for writing.
    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> &mut Self::Slice<T>;
    /// Number of elements.
    fn slice_len<T: Element>(slice: &Self::Slice<T>) -> usize;
    /// `to = from`, of the same shape, on the device.
    fn copy<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatMut<'_, Self, T>) -> Result<()>;

    /// Packs a weight. Empty panels on backends whose kernels read weights unpacked (WebGPU, CUDA).
    fn pack(&self, w: MatRef<'_, Self>, passes: Passes) -> Result<Self::Panels>;
    /// The panels that [`keep_packed`](Self::keep_packed) attached to a buffer.
    fn panels(_buffer: &Self::Buffer<Self::Elem>) -> Option<&Self::Panels> {
        None
    }

    /// Prepacks a frozen weight: attaches panels to `w`, so that products need not pack it again. The panels take as much
    /// memory as `w` for each pass, and are dropped when `w` is next written. Results have the same bits with them and without.
    /// Does nothing on backends whose kernels read weights unpacked (WebGPU, CUDA). Errors:
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    fn keep_packed(&self, _w: &mut Tensor<Self>, _passes: Passes) -> Result<()> {
        Ok(())
    }

    /// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    fn lora_forward(&self, op: Checked<LoraForward<'_, Self>>) -> Result<()>;
    /// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
    fn lora_backward(&self, op: Checked<LoraBackward<'_, Self>>) -> Result<()>;
    /// `W += scale·B·A`
    fn lora_merge(&self, op: Checked<LoraMerge<'_, Self>>) -> Result<()>;
    /// `norm = ‖W + scale·B·A‖`, row by row
    fn lora_row_norm(&self, op: Checked<LoraRowNorm<'_, Self>>) -> Result<()>;
    /// `y = (magnitude / norm)·z + bias`
    fn magnitude(&self, op: Checked<Magnitude<'_, Self>>) -> Result<()>;
    /// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
    fn magnitude_backward(&self, op: Checked<MagnitudeBackward<'_, Self>>) -> Result<()>;

    /// `y = x·Wᵀ + bias`
    fn linear_forward(&self, op: Checked<LinearForward<'_, Self>>) -> Result<()>;
    /// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
    fn linear_backward(&self, op: Checked<LinearBackward<'_, Self>>) -> Result<()>;
    /// `y = max(x, 0)`
    fn relu(&self, op: Checked<Relu<'_, Self>>) -> Result<()>;
    /// `dx = dy` where `y > 0`, else 0
    fn relu_backward(&self, op: Checked<ReluBackward<'_, Self>>) -> Result<()>;
    /// `y = drop(x)`
    fn dropout_forward(&self, op: Checked<DropoutForward<'_, Self>>) -> Result<()>;
    /// `y += x`
    fn add(&self, op: Checked<Add<'_, Self>>) -> Result<()>;
    /// `y += scale·x`, in `f32`
    fn accumulate(&self, op: Checked<Accumulate<'_, Self>>) -> Result<()>;
    /// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / m`
    fn cross_entropy(&self, op: Checked<CrossEntropy<'_, Self>>) -> Result<()>;
    /// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
    fn adam(&self, op: Checked<Adam<'_, Self>>) -> Result<()>;
}

/// The supertrait that seals [`Backend`].
pub(crate) mod sealed {
    /// Implemented only for the backends of this crate.
    pub trait Sealed {}
}
