//! Buffers. Their memory is aligned to cache lines, so that a vector load reads one line and not two. Large buffers use huge
//! pages where the system has them: products read rows that are a page or more apart, and with small pages TLB misses cost
//! several per cent.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

use bytemuck::{Pod, Zeroable};

use super::gemm::PackedWeight;
use super::pool::Pool;
use crate::element::Element;
use crate::error::{Error, Result};

/// One cache line. A boxed slice of them is memory aligned to 64 bytes, without unsafe code.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// A buffer in host memory: memory of the backend's pool, aligned to 64 bytes, or a [`Vec`] of the caller.
pub struct Buffer<T: Element> {
    storage: Storage<T>,
    /// The elements as panels, if they are prepacked. Dropped when the buffer is next borrowed mutably.
    packed: Option<Box<PackedWeight>>,
}

enum Storage<T> {
    /// Returned to the pool when the buffer is dropped, or freed if the pool no longer exists.
    Pooled { memory: Memory, len: usize, pool: Weak<Pool> },
    /// A vector of the caller.
    Vec(Vec<T>),
}

/// Memory of a whole number of cache lines.
pub(super) enum Memory {
    Lines(Box<[Line]>),
    #[cfg(target_os = "linux")]
    Pages(memmap2::MmapMut),
}

/// Bytes from which memory is mapped from the system, with huge pages: two of them.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

impl Memory {
    /// Memory of zeros; `None` if the system is out of memory.
    pub(super) fn zeros(bytes: usize) -> Option<Self> {
        let bytes = bytes.checked_next_multiple_of(size_of::<Line>())?;
        #[cfg(target_os = "linux")]
        if bytes >= LARGE {
            let pages = memmap2::MmapMut::map_anon(bytes).ok()?;
            // A request that the system may ignore.
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Some(Self::Pages(pages));
        }
        bytemuck::try_zeroed_slice_box(bytes / size_of::<Line>()).ok().map(Self::Lines)
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// True if its length is `bytes`, rounded up to whole cache lines.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        bytes.checked_next_multiple_of(size_of::<Line>()) == Some(self.len())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice(lines),
            #[cfg(target_os = "linux")]
            Self::Pages(pages) => pages,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice_mut(lines),
            #[cfg(target_os = "linux")]
            Self::Pages(pages) => pages,
        }
    }
}

impl<T: Element> Buffer<T> {
    /// A buffer of zeros.
    pub(super) fn zeros(pool: &Arc<Pool>, len: usize) -> Result<Self> {
        let (mut buffer, used) = Self::take(pool, len)?;
        if used {
            bytemuck::cast_slice_mut::<T, u8>(&mut buffer).fill(0);
        }
        Ok(buffer)
    }

    /// A buffer of undefined elements, for a caller that overwrites all of them. Debug builds fill it with NaN.
    pub(super) fn unwritten(pool: &Arc<Pool>, len: usize) -> Result<Self> {
        let (mut buffer, _) = Self::take(pool, len)?;
        if cfg!(debug_assertions) {
            bytemuck::cast_slice_mut::<T, u8>(&mut buffer).fill(0xff);
        }
        Ok(buffer)
    }

    /// A buffer, and `true` if its memory was used before and may not be zero.
    fn take(pool: &Arc<Pool>, len: usize) -> Result<(Self, bool)> {
        let (memory, used) = pool.take(Self::bytes(len)).ok_or(Self::out_of_memory(len))?;
        Ok((Self { storage: Storage::Pooled { memory, len, pool: Arc::downgrade(pool) }, packed: None }, used))
    }

    /// Its panels, if it is prepacked.
    pub(super) fn packed(&self) -> Option<&PackedWeight> {
        self.packed.as_deref()
    }

    /// Attaches panels of its elements, until the buffer is next borrowed mutably.
    pub(super) fn set_packed(&mut self, packed: PackedWeight) {
        self.packed = Some(Box::new(packed));
    }

    fn bytes(len: usize) -> usize {
        len.saturating_mul(size_of::<T>())
    }

    fn out_of_memory(len: usize) -> Error {
        Error::OutOfMemory { backend: "cpu", bytes: Self::bytes(len) }
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    /// The vector becomes the memory of the buffer; nothing is copied.
    fn from(vec: Vec<T>) -> Self {
        Self { storage: Storage::Vec(vec), packed: None }
    }
}

impl<T: Element> From<Buffer<T>> for Vec<T> {
    /// The vector that the buffer was made from, or a copy of memory of the pool.
    fn from(mut buffer: Buffer<T>) -> Self {
        match &mut buffer.storage {
            Storage::Vec(vec) => std::mem::take(vec),
            Storage::Pooled { .. } => buffer.to_vec(),
        }
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let Storage::Pooled { memory, pool, .. } = &mut self.storage else { return };
        if let Some(pool) = pool.upgrade() {
            pool.give(std::mem::replace(memory, Memory::Lines(Box::default())));
        }
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &self.storage {
            Storage::Pooled { memory, len, .. } => bytemuck::cast_slice(&memory.bytes()[..len * size_of::<T>()]),
            Storage::Vec(vec) => vec,
        }
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.packed = None;
        match &mut self.storage {
            Storage::Pooled { memory, len, .. } => bytemuck::cast_slice_mut(&mut memory.bytes_mut()[..*len * size_of::<T>()]),
            Storage::Vec(vec) => vec,
        }
    }
}

impl<T: Element> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} × {})", self.len(), std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_size_is_zero_and_begins_on_a_cache_line() {
        let pool = Arc::default();
        for len in [0, 1, 63, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20] {
            let mut buffer = Buffer::<f32>::zeros(&pool, len).unwrap();
            assert!(buffer.len() == len && buffer.iter().all(|&x| x == 0.0));
            assert!(len == 0 || (buffer.as_ptr() as usize).is_multiple_of(64));
            buffer.fill(1.0);
            assert_eq!(buffer.iter().filter(|&&x| x == 1.0).count(), len);
        }
        let bytes = usize::MAX / 2;
        assert!(matches!(Buffer::<f32>::zeros(&pool, bytes), Err(Error::OutOfMemory { .. })));
    }
}
