//! The seam: what a device must be able to do. Everything above it is generic in `B: Backend` and names no device.

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

/// For which products a weight is [kept packed](Backend::keep_packed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// `y = x·Wᵀ`: serving.
    Forward,
    /// And `dx = dy·W`: training what comes before the layer.
    ForwardAndBackward,
}

/// A device, its memory, and the verbs of low-rank training.
///
/// Verbs take a [`Checked`] request: shapes fit, scalars are finite, nothing written is also read under another name. Any size
/// may be zero. A verb may return before the device is done; [`download`](Self::download) and
/// [`synchronize`](Self::synchronize) wait. The same request on the same device gives the same bits.
///
/// Memory that is dropped is kept for who asks for as much, within bounds: the steps of a training or decoding loop find what those
/// before them gave back. What a step works in does not outlive the backend, and so a backend borrows nothing (`'static`).
///
/// Callers build a request and [`run`](LoraForward::run) it; they need not call the verbs here. The trait is sealed: it grows with the
/// crate, and the backends are those of this crate.
pub trait Backend: sealed::Sealed + Sized + 'static {
    /// How weights and activations are stored. `Cpu<f32>` and `Cpu<bf16>` are two backends.
    type Elem: Float;
    /// Memory for elements `T` on this device, owned: it is freed with its owner.
    type Buffer<T: Element>;
    /// Memory for elements `T` on this device, owned or lent: what views look at. `[T]` on the CPU.
    type Slice<T: Element>: ?Sized + 'static;
    /// A weight in the order in which products read it; see [`Packed`](crate::op::Packed).
    type Panels: 'static;

    /// What it runs on, in words: `cpu (AVX-512, 2 threads)`.
    fn device(&self) -> String;

    /// Memory for `len` elements, all zero. Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;
    /// Memory for `len` elements, whatever is in it: for what a verb overwrites.
    fn unwritten<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>> {
        self.zeros(len)
    }
    /// New memory with a copy of `host`.
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buffer<T>>;
    /// Overwrites a buffer with as many elements from the host.
    fn write<T: Element>(&self, buffer: &mut Self::Buffer<T>, host: &[T]) -> Result<()>;
    /// Copies a buffer into as many elements on the host, once everything that writes it is done.
    fn download<T: Element>(&self, buffer: &Self::Buffer<T>, host: &mut [T]) -> Result<()>;
    /// Returns when every verb called so far is done.
    fn synchronize(&self) -> Result<()>;

    /// The memory of a buffer, to be read.
    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> &Self::Slice<T>;
    /// The memory of a buffer, to be written.
    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> &mut Self::Slice<T>;
    /// How many elements there are in it.
    fn slice_len<T: Element>(slice: &Self::Slice<T>) -> usize;
    /// Copies a matrix to one of the same shape, on the device.
    fn copy<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatMut<'_, Self, T>) -> Result<()>;

    /// A weight in the order in which products read it; nothing, on backends whose products read weights as they are.
    fn pack(&self, w: MatRef<'_, Self>, passes: Passes) -> Result<Self::Panels>;
    /// The panels that [`keep_packed`](Self::keep_packed) made of what is in a buffer.
    fn panels(_buffer: &Self::Buffer<Self::Elem>) -> Option<&Self::Panels> {
        None
    }

    /// Keeps a weight that stays as it is, a frozen one, also in the order in which products read it, so that they need not sort it
    /// anew each time. It costs the memory of `w` again for each pass, and lasts until `w` is next written; results keep their
    /// bits. Backends whose products read weights as they are do nothing. Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    fn keep_packed(&self, _w: &mut Tensor<Self>, _passes: Passes) -> Result<()> {
        Ok(())
    }

    /// Whether factors may be [another adapter's for each row](crate::op::Bank); otherwise requests that ask for it are refused.
    fn takes_banks(&self) -> bool {
        true
    }

    /// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    fn lora_forward(&self, op: Checked<LoraForward<'_, Self>>) -> Result<()>;
    /// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
    fn lora_backward(&self, op: Checked<LoraBackward<'_, Self>>) -> Result<()>;
    /// `W += scale·B·A`
    fn lora_merge(&self, op: Checked<LoraMerge<'_, Self>>) -> Result<()>;
    /// `norm = ‖W + scale·B·A‖` by rows
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

/// Who may implement [`Backend`].
pub(crate) mod sealed {
    /// Implemented for the backends of this crate alone.
    pub trait Sealed {}
}
