//! Memory that begins on a cache line, so that a vector load touches one line, not two.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use crate::element::Element;
use crate::error::{Error, Result};

/// One cache line. A boxed slice of them is memory aligned to 64 bytes, without a line of unsafe code.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Elements in host memory, aligned to 64 bytes.
pub struct Buffer<T: Element> {
    lines: Box<[Line]>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// All zeros.
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let lines = bytemuck::try_zeroed_slice_box(bytes.div_ceil(64));
        let lines = lines.map_err(|()| Error::OutOfMemory { backend: "cpu", bytes })?;
        Ok(Self { lines, len, element: PhantomData })
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} × {})", self.len, std::any::type_name::<T>())
    }
}
