//! Buffers that the caller lends: views of them are operands like any other, without copies.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use super::WebGpu;
use super::dispatch::Gpu;
use super::memory::{HeldSlice, Slice};
use crate::element::{Element, Float};
use crate::error::{Error, Result};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};

/// A range of a buffer, lent to be read; see [`WebGpu::lend`].
pub struct Lent<'a, T: Element> {
    slice: HeldSlice<T>,
    lender: PhantomData<&'a wgpu::Buffer>,
}

/// A range of a buffer, lent to be read and written; see [`WebGpu::lend_mut`].
pub struct LentMut<'a, T: Element> {
    slice: HeldSlice<T>,
    lender: PhantomData<&'a wgpu::Buffer>,
}

impl<E: Float> WebGpu<E> {
    /// Lends a range of bytes of a buffer of [`wgpu_device`](Self::wgpu_device), as elements `T` that verbs read. Nothing is
    /// copied, and the buffer is neither resized nor destroyed. It needs the usage `STORAGE` and no other.
    ///
    /// Verbs are recorded first and submitted later. They see the buffer's contents at the time of the submission; the caller's
    /// commands that go through [`record`](Self::record) are executed in the order of the calls. Call
    /// [`synchronize`](crate::Backend::synchronize) before the buffer is mapped, destroyed, or written by commands that are
    /// submitted elsewhere.
    ///
    /// WebGPU does not allow a launch to read and write the same buffer, even at different offsets: a verb whose output lies in
    /// the buffer of an operand that it reads is refused.
    ///
    /// Errors: [`Error::Value`] if the range is not inside the buffer, not of whole elements, or ends in the last two bytes of a
    /// buffer whose size is not a multiple of four, which no shader can access; if the buffer lacks the usage; if it belongs to
    /// another device. Wgpu distinguishes the devices of one `wgpu::Instance`. Of a buffer of another instance it knows only a
    /// number, so that only a size or usage that differs from this device's buffer of that number is detected.
    pub fn lend<'a, T: Element>(&self, buffer: &'a wgpu::Buffer, bytes: Range<u64>) -> Result<Lent<'a, T>> {
        Ok(Lent { slice: lent(&self.gpu, "lend", buffer, bytes)?, lender: PhantomData })
    }

    /// Lends a range of bytes of a buffer, as elements `T` that verbs read and write; see [`lend`](Self::lend), with the same
    /// errors.
    ///
    /// A `wgpu::Buffer` is a handle that can be cloned, so the compiler cannot see whether the same bytes are lent twice. Two
    /// outputs of one verb that share bytes are refused.
    pub fn lend_mut<'a, T: Element>(&self, buffer: &'a wgpu::Buffer, bytes: Range<u64>) -> Result<LentMut<'a, T>> {
        Ok(LentMut { slice: lent(&self.gpu, "lend_mut", buffer, bytes)?, lender: PhantomData })
    }
}

fn lent<T: Element>(gpu: &Gpu, verb: &'static str, buffer: &wgpu::Buffer, bytes: Range<u64>) -> Result<HeldSlice<T>> {
    let (size, end, element) = (buffer.size(), bytes.end, size_of::<T>() as u64);
    let refused = |name, got, want: String| Err(Error::Value { verb, name, got, want: want.into() });
    if bytes.start > end || end > size {
        return refused("bytes", format!("{bytes:?}"), format!("within the buffer's 0..{size}"));
    }
    if [bytes.start, end].iter().any(|byte| byte % element != 0) {
        return refused("bytes", format!("{bytes:?}"), format!("whole elements of {element} bytes"));
    }
    if end.next_multiple_of(4) > size {
        let want = format!("an end of at most {}, since shaders access whole words of a buffer of {size} bytes", size / 4 * 4);
        return refused("bytes", format!("{bytes:?}"), want);
    }
    if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
        let got = format!("a buffer with the usages {:?}", buffer.usage());
        return refused("buffer", got, "one with the usage STORAGE".into());
    }
    if size >= 4 && !gpu.owns(buffer)? {
        let want = format!("one of the device of this backend, {}", gpu.name);
        return refused("buffer", "a buffer of another device, or destroyed".into(), want);
    }
    Ok(Slice::new(buffer.clone(), (bytes.start / element) as usize, ((end - bytes.start) / element) as usize))
}

/// The views that both kinds of lent memory offer for reading.
macro_rules! lent {
    ($lent:ident) => {
        impl<T: Element> $lent<'_, T> {
            /// All of the memory as a matrix, row by row. Errors: [`Error::Value`] if the number of elements differs.
            pub fn view<E: Float>(&self, shape: impl Into<Shape>) -> Result<MatRef<'_, WebGpu<E>, T>> {
                let slice: &Slice<T> = &self.slice;
                MatRef::new(slice, shape)
            }

            /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`.
            ///
            /// Errors: [`Error::Value`] if rows overlap, or the matrix reaches beyond the memory.
            pub fn view_strided<E: Float>(
                &self,
                shape: impl Into<Shape>,
                offset: usize,
                row_stride: usize,
            ) -> Result<MatRef<'_, WebGpu<E>, T>> {
                let slice: &Slice<T> = &self.slice;
                MatRef::strided(slice, shape, offset, row_stride)
            }
        }

        impl<T: Element> fmt::Debug for $lent<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let slice: &Slice<T> = &self.slice;
                write!(f, "{}({} × {})", stringify!($lent), slice.len(), std::any::type_name::<T>())
            }
        }
    };
}

lent!(Lent);
lent!(LentMut);

impl<T: Element> LentMut<'_, T> {
    /// All of the memory as a matrix to be written, row by row. Errors: [`Error::Value`] if the number of elements differs.
    pub fn view_mut<E: Float>(&mut self, shape: impl Into<Shape>) -> Result<MatMut<'_, WebGpu<E>, T>> {
        let slice: &mut Slice<T> = &mut self.slice;
        MatMut::new(slice, shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j`, to be written. Gaps between rows are not
    /// written.
    ///
    /// Errors: [`Error::Value`] if rows overlap, or the matrix reaches beyond the memory.
    pub fn view_strided_mut<E: Float>(
        &mut self,
        shape: impl Into<Shape>,
        offset: usize,
        row_stride: usize,
    ) -> Result<MatMut<'_, WebGpu<E>, T>> {
        let slice: &mut Slice<T> = &mut self.slice;
        MatMut::strided(slice, shape, offset, row_stride)
    }
}
