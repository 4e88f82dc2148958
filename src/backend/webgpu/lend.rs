//! Buffers that the caller lends: views of them are operands like any other, and nothing of them is copied.

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

/// A range of a buffer of the caller's, to be read; see [`WebGpu::lend`].
pub struct Lent<'a, T: Element> {
    slice: HeldSlice<T>,
    lender: PhantomData<&'a wgpu::Buffer>,
}

/// A range of a buffer of the caller's, to be read and written; see [`WebGpu::lend_mut`].
pub struct LentMut<'a, T: Element> {
    slice: HeldSlice<T>,
    lender: PhantomData<&'a wgpu::Buffer>,
}

impl<E: Float> WebGpu<E> {
    /// Borrows these bytes of a buffer of [`wgpu_device`](Self::wgpu_device), as elements `T` that verbs read. They are not copied, and
    /// the buffer is neither resized nor destroyed. It needs the usage `STORAGE`, and no other.
    ///
    /// Verbs are recorded first and submitted later. They see what the buffer holds when they are submitted and, if the caller's own
    /// commands go through [`record`](Self::record), in the order of the calls. Before the buffer is mapped or destroyed, or written
    /// by what is submitted elsewhere, call [`synchronize`](crate::Backend::synchronize).
    ///
    /// WebGPU lets no launch read and write the same buffer, wherever in it: a verb whose output lies in the buffer of an operand that
    /// it reads is refused.
    ///
    /// Errors: [`Error::Value`] if the range does not lie within the buffer, is not one of whole elements, or ends in the last two bytes
    /// of a buffer whose size is no multiple of four, which no shader can reach; if the buffer lacks the usage; if it is of another
    /// device. Wgpu tells devices of one `wgpu::Instance` from one another. Of a buffer of another instance it sees a number only, and
    /// only a size or a usage that does not fit that number is noticed.
    pub fn lend<'a, T: Element>(&self, buffer: &'a wgpu::Buffer, bytes: Range<u64>) -> Result<Lent<'a, T>> {
        Ok(Lent { slice: lent(&self.gpu, "lend", buffer, bytes)?, lender: PhantomData })
    }

    /// Borrows these bytes of a buffer, as elements `T` that verbs read and write; see [`lend`](Self::lend), with the same errors.
    ///
    /// A `wgpu::Buffer` is a handle that can be cloned, so the compiler cannot see whether the same bytes are lent twice. Two outputs of
    /// one verb that share bytes are refused.
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
        let want = format!("to end at {} at most, for shaders see whole words of a buffer of {size} bytes", size / 4 * 4);
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

/// What both kinds of lent memory give to be read.
macro_rules! lent {
    ($lent:ident) => {
        impl<T: Element> $lent<'_, T> {
            /// All of it, row after row. Errors: [`Error::Value`] if it does not hold exactly as many elements.
            pub fn view<E: Float>(&self, shape: impl Into<Shape>) -> Result<MatRef<'_, WebGpu<E>, T>> {
                let slice: &Slice<T> = &self.slice;
                MatRef::new(slice, shape)
            }

            /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of it.
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
    /// All of it, row after row, to be written. Errors: [`Error::Value`] if it does not hold exactly as many elements.
    pub fn view_mut<E: Float>(&mut self, shape: impl Into<Shape>) -> Result<MatMut<'_, WebGpu<E>, T>> {
        let slice: &mut Slice<T> = &mut self.slice;
        MatMut::new(slice, shape)
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of it, to be written. What lies between the rows is not.
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
