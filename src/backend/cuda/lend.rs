//! Memory of cudarc's: lent, operands where they lie, for as long as the loan; or taken over as a tensor, and handed back.

use cudarc::driver::{CudaSlice, SyncOnDrop};

use super::driver::as_elements;
use super::{Buffer, Cuda, Memory, NAME};
use crate::element::{Element, Float};
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};

/// Memory of a `CudaView`, to be read; see [`Cuda::lend`].
pub struct Lent<'a, T: Element> {
    slice: Buffer<Memory, T>,
    /// cudarc's note of the loan, which it makes when this is dropped.
    _used: SyncOnDrop<'a>,
}

/// Memory of a `CudaViewMut`, to be written; see [`Cuda::lend_mut`].
pub struct LentMut<'a, T: Element>(Lent<'a, T>);

impl<'a, T: Element> Lent<'a, T> {
    pub(super) fn new(memory: Memory, len: usize, used: SyncOnDrop<'a>) -> Self {
        Self { slice: Buffer::new(memory, len), _used: used }
    }

    /// All of it, row after row. Errors: [`Error::Value`](crate::Error::Value) if it does not hold exactly as many elements.
    pub fn view<E: Float>(&self, shape: impl Into<Shape>) -> Result<MatRef<'_, Cuda<E>, T>> {
        MatRef::new(&self.slice, shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`. Errors: those of [`MatRef::strided`].
    pub fn view_strided<E: Float>(
        &self,
        shape: impl Into<Shape>,
        offset: usize,
        row_stride: usize,
    ) -> Result<MatRef<'_, Cuda<E>, T>> {
        MatRef::strided(&self.slice, shape, offset, row_stride)
    }
}

impl<'a, T: Element> LentMut<'a, T> {
    pub(super) fn new(memory: Memory, len: usize, used: SyncOnDrop<'a>) -> Self {
        Self(Lent::new(memory, len, used))
    }

    /// All of it, row after row, to be read. Errors: [`Error::Value`](crate::Error::Value) if it does not hold exactly as many elements.
    pub fn view<E: Float>(&self, shape: impl Into<Shape>) -> Result<MatRef<'_, Cuda<E>, T>> {
        self.0.view(shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`, to be read. Errors: those of [`MatRef::strided`].
    pub fn view_strided<E: Float>(
        &self,
        shape: impl Into<Shape>,
        offset: usize,
        row_stride: usize,
    ) -> Result<MatRef<'_, Cuda<E>, T>> {
        self.0.view_strided(shape, offset, row_stride)
    }

    /// All of it, row after row, to be written. Errors: [`Error::Value`](crate::Error::Value) if it does not hold exactly as many elements.
    pub fn view_mut<E: Float>(&mut self, shape: impl Into<Shape>) -> Result<MatMut<'_, Cuda<E>, T>> {
        MatMut::new(&mut self.0.slice, shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`, to be written; what lies between the rows is not.
    /// Errors: those of [`MatMut::strided`].
    pub fn view_strided_mut<E: Float>(
        &mut self,
        shape: impl Into<Shape>,
        offset: usize,
        row_stride: usize,
    ) -> Result<MatMut<'_, Cuda<E>, T>> {
        MatMut::strided(&mut self.0.slice, shape, offset, row_stride)
    }
}

impl<E: Float, T: Element> Tensor<Cuda<E>, T> {
    /// Takes over a slice of the backend's stream, without a copy. In an error the slice is freed.
    ///
    /// Errors: [`Error::Value`] for one of another stream, or if its length is not `rows · cols`.
    pub fn from_cuda_slice(gpu: &Cuda<E>, shape: impl Into<Shape>, slice: CudaSlice<T>) -> Result<Self> {
        let len = slice.len();
        Self::from_buffer(shape, Buffer::new(gpu.device.adopt(slice)?, len))
    }

    /// The slice that it lies in, row by row, without a copy.
    ///
    /// Errors: [`Error::Device`] if the backend's stream is each thread's own, and this is not the thread that it was made on. The
    /// tensor is freed then.
    pub fn into_cuda_slice(self) -> Result<CudaSlice<T>> {
        let Buffer { memory, len, .. } = self.into_buffer();
        let elsewhere = || Error::Device { backend: NAME, reason: "the tensor belongs to another thread's stream".into() };
        Ok(as_elements(memory.into_slice().ok_or_else(elsewhere)?, len))
    }
}
