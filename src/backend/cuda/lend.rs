//! Memory of cudarc's: lent as operands, or adopted as a tensor and handed back, without copies.

use cudarc::driver::{CudaSlice, SyncOnDrop};

use super::driver::as_elements;
use super::{Buffer, Cuda, Memory, NAME};
use crate::element::{Element, Float};
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};

/// Memory of a `CudaView`, lent to be read; see [`Cuda::lend`].
pub struct Lent<'a, T: Element> {
    slice: Buffer<Memory, T>,
    /// cudarc's guard, which records the use when it is dropped.
    _used: SyncOnDrop<'a>,
}

/// Memory of a `CudaViewMut`, lent to be written; see [`Cuda::lend_mut`].
pub struct LentMut<'a, T: Element>(Lent<'a, T>);

impl<'a, T: Element> Lent<'a, T> {
    pub(super) fn new(memory: Memory, len: usize, used: SyncOnDrop<'a>) -> Self {
        Self { slice: Buffer::new(memory, len), _used: used }
    }

    /// All of the memory as a matrix, row by row. Errors: [`Error::Value`](crate::Error::Value) if the number of elements
    /// differs.
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

    /// All of the memory as a matrix to be read, row by row. Errors: [`Error::Value`](crate::Error::Value) if the number of
    /// elements differs.
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

    /// All of the memory as a matrix to be written, row by row. Errors: [`Error::Value`](crate::Error::Value) if the number of
    /// elements differs.
    pub fn view_mut<E: Float>(&mut self, shape: impl Into<Shape>) -> Result<MatMut<'_, Cuda<E>, T>> {
        MatMut::new(&mut self.0.slice, shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`, to be written; gaps between rows are not
    /// written. Errors: those of [`MatMut::strided`].
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
    /// Makes a tensor of a slice of the backend's stream, without a copy. On an error the slice is freed.
    ///
    /// Errors: [`Error::Value`] if the slice belongs to another stream, or if its length is not `rows · cols`.
    pub fn from_cuda_slice(gpu: &Cuda<E>, shape: impl Into<Shape>, slice: CudaSlice<T>) -> Result<Self> {
        let len = slice.len();
        Self::from_buffer(shape, Buffer::new(gpu.device.adopt(slice)?, len))
    }

    /// Hands over the tensor's memory as a slice, row by row, without a copy.
    ///
    /// Errors: [`Error::Device`] if the backend's stream is the per-thread default stream of another thread; the tensor is freed
    /// then.
    pub fn into_cuda_slice(self) -> Result<CudaSlice<T>> {
        let Buffer { memory, len, .. } = self.into_buffer();
        let elsewhere =
            || Error::Device { backend: NAME, reason: "the tensor belongs to the per-thread stream of another thread".into() };
        Ok(as_elements(memory.into_slice().ok_or_else(elsewhere)?, len))
    }
}
