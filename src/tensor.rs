//! Rows × columns on a device. A `Tensor` exists only with a buffer as long as its shape says.

use std::fmt;

use crate::backend::Backend;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::view::{MatMut, MatRef};

/// Rows × columns of a row-major matrix. A vector, such as a bias, is one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// How many rows.
    pub rows: usize,
    /// How many columns; elements of one row lie side by side.
    pub cols: usize,
}

impl Shape {
    /// `rows × cols` as a number of elements, if that number and both sides can be addressed: one side may be 0, and the other is
    /// still a number that is computed with.
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

/// A row-major matrix in the memory of a backend `B`; its numbers are `B::Elem` unless said otherwise.
pub struct Tensor<B: Backend, T: Element = <B as Backend>::Elem> {
    shape: Shape,
    buffer: B::Buffer<T>,
}

impl<B: Backend, T: Element> Tensor<B, T> {
    /// All zeros. Errors: [`Error::TooLarge`], [`Error::OutOfMemory`].
    pub fn zeros(backend: &B, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        Ok(Self { shape, buffer: backend.zeros(shape.elements()?)? })
    }

    /// Whatever the memory holds: for what a verb overwrites.
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

    /// Takes a buffer that already is on the device. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn from_buffer(shape: impl Into<Shape>, buffer: B::Buffer<T>) -> Result<Self> {
        let shape = shape.into();
        holds("buffer", B::slice_len(B::slice(&buffer)), shape)?;
        Ok(Self { shape, buffer })
    }

    /// The buffer alone.
    pub fn into_buffer(self) -> B::Buffer<T> {
        self.buffer
    }

    /// A copy in host memory, row by row; waits until everything that writes it is done.
    pub fn to_vec(&self, backend: &B) -> Result<Vec<T>> {
        let mut host = vec![T::default(); B::slice_len(B::slice(&self.buffer))];
        backend.download(&self.buffer, &mut host)?;
        Ok(host)
    }

    /// Copies the elements to `host`, row by row; waits until everything that writes them is done.
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

    /// A tensor of its own with the same bits; they stay on the device.
    ///
    /// Errors: [`Error::OutOfMemory`], [`Error::Device`].
    pub fn try_clone(&self, backend: &B) -> Result<Self> {
        let mut clone = Self::unwritten(backend, self.shape)?;
        clone.view_mut().copy_from(backend, self.view())?;
        Ok(clone)
    }

    /// The matrix, to be read.
    pub fn view(&self) -> MatRef<'_, B, T> {
        MatRef::all(B::slice(&self.buffer), self.shape)
    }

    /// The matrix, to be written.
    pub fn view_mut(&mut self) -> MatMut<'_, B, T> {
        MatMut::all(B::slice_mut(&mut self.buffer), self.shape)
    }

    /// Rows × columns.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// How many columns.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// The device memory, for a launch of the caller's own.
    pub fn buffer(&self) -> &B::Buffer<T> {
        &self.buffer
    }

    /// The memory a verb writes. Crate-private: a caller could swap in a shorter buffer, and launches rely on the length.
    pub(crate) fn buffer_mut(&mut self) -> &mut B::Buffer<T> {
        &mut self.buffer
    }
}

/// Errors: [`Error::Value`] unless there are as many elements as the shape has.
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
