//! Matrices in the memory of a device. The buffer of a `Tensor` always has as many elements as its shape.

use std::fmt;

use crate::backend::Backend;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::view::{MatMut, MatRef};

/// The shape of a row-major matrix, rows × columns. A vector, such as a bias, is one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns; the elements of a row are contiguous.
    pub cols: usize,
}

impl Shape {
    /// The number of elements, `rows · cols`. Errors: [`Error::TooLarge`] if this number, `rows` or `cols` is more than the
    /// machine can address.
    pub fn elements(self) -> Result<usize> {
        let fits = self.rows.checked_mul(self.cols).filter(|&n| n.max(self.rows).max(self.cols) <= isize::MAX as usize / 8);
        fits.ok_or(Error::TooLarge { shape: self, limit: "this machine can address" })
    }
}

impl From<(usize, usize)> for Shape {
    fn from((rows, cols): (usize, usize)) -> Self {
        Self { rows, cols }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}×{}", self.rows, self.cols)
    }
}

/// A row-major matrix in memory of a backend `B`. The element type is that of the backend, `B::Elem`, unless `T` names another.
pub struct Tensor<B: Backend, T: Element = <B as Backend>::Elem> {
    shape: Shape,
    buffer: B::Buffer<T>,
}

impl<B: Backend, T: Element> Tensor<B, T> {
    /// A matrix of zeros. Errors: [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn zeros(backend: &B, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        Ok(Self { shape, buffer: backend.zeros(shape.elements()?)? })
    }

    /// A matrix with undefined elements, for a verb to overwrite.
    pub(crate) fn unwritten(backend: &B, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        Ok(Self { shape, buffer: backend.unwritten(shape.elements()?)? })
    }

    /// A copy of `host`, row by row. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn from_slice(backend: &B, shape: impl Into<Shape>, host: &[T]) -> Result<Self> {
        let shape = shape.into();
        holds("host", host.len(), shape)?;
        Ok(Self { shape, buffer: backend.upload(host)? })
    }

    /// A matrix that owns a buffer on the device. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn from_buffer(shape: impl Into<Shape>, buffer: B::Buffer<T>) -> Result<Self> {
        let shape = shape.into();
        holds("buffer", B::slice_len(B::slice(&buffer)), shape)?;
        Ok(Self { shape, buffer })
    }

    /// The buffer of the matrix.
    pub fn into_buffer(self) -> B::Buffer<T> {
        self.buffer
    }

    /// A copy in host memory, row by row. Waits for all verbs that write this tensor.
    pub fn to_vec(&self, backend: &B) -> Result<Vec<T>> {
        let mut host = vec![T::default(); B::slice_len(B::slice(&self.buffer))];
        backend.download(&self.buffer, &mut host)?;
        Ok(host)
    }

    /// Copies the elements to `host`, row by row. Waits for all verbs that write this tensor.
    ///
    /// Errors: [`Error::Value`] if the length of `host` is not `rows · cols`.
    pub fn copy_to_slice(&self, backend: &B, host: &mut [T]) -> Result<()> {
        holds("host", host.len(), self.shape)?;
        backend.download(&self.buffer, host)
    }

    /// Overwrites the elements with those of `host`. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn copy_from_slice(&mut self, backend: &B, host: &[T]) -> Result<()> {
        holds("host", host.len(), self.shape)?;
        backend.write(&mut self.buffer, host)
    }

    /// A new tensor with the same elements, copied on the device.
    ///
    /// Errors: [`Error::OutOfMemory`], [`Error::Device`].
    pub fn try_clone(&self, backend: &B) -> Result<Self> {
        let mut clone = Self::unwritten(backend, self.shape)?;
        clone.view_mut().copy_from(backend, self.view())?;
        Ok(clone)
    }

    /// A view for reading.
    pub fn view(&self) -> MatRef<'_, B, T> {
        MatRef::all(B::slice(&self.buffer), self.shape)
    }

    /// A view for writing.
    pub fn view_mut(&mut self) -> MatMut<'_, B, T> {
        MatMut::all(B::slice_mut(&mut self.buffer), self.shape)
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// The memory on the device, for kernels of the caller.
    pub fn buffer(&self) -> &B::Buffer<T> {
        &self.buffer
    }

    /// The memory, to be written. Crate-private, because a caller could swap in a shorter buffer, and launches rely on the
    /// length.
    pub(crate) fn buffer_mut(&mut self) -> &mut B::Buffer<T> {
        &mut self.buffer
    }
}

/// `Err` unless `len` is the number of elements of the shape.
fn holds(name: &'static str, len: usize, shape: Shape) -> Result<()> {
    let want = shape.elements()?;
    if len == want {
        return Ok(());
    }
    Err(Error::Value { verb: "tensor", name, got: format!("{len} elements"), want: format!("{want}, for {shape}").into() })
}

impl<B: Backend, T: Element> fmt::Debug for Tensor<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor<{}>({})", std::any::type_name::<T>(), self.shape)
    }
}
