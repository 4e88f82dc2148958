//! Scratch memory for packed panels and partial sums. It is reused from call to call: the first writes to new pages take longer
//! than packing.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::Buffer;
use super::pool::Pool;
use crate::element::Element;
use crate::error::Result;

/// Free buffers that are held in addition to one for each task: a product uses one for its left side, a backward pass two more.
const EXTRA_BUFFERS: usize = 4;
/// The most numbers of a buffer that is held here (8 MiB): twice what a task needs. Larger ones go to the [`Pool`], which is
/// bounded, so that sizes that are used only once do not accumulate.
const MAX_LEN: usize = 2 << 20;

/// The free scratch buffers of a backend.
pub(super) struct Scratch {
    pool: Arc<Pool>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    /// From the smallest to the largest.
    buffers: Vec<Buffer<f32>>,
    /// The most tasks so far that used scratch memory at the same time.
    tasks: usize,
}

impl Scratch {
    /// Scratch memory that is allocated from `pool`.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, free: Mutex::default() }
    }

    /// Takes `len` numbers of undefined value. Dropping the guard returns them.
    pub(super) fn take(&self, len: usize) -> Result<ScratchGuard<'_>> {
        let free = if len > MAX_LEN { None } else { self.lock().take(len) };
        let buffer = match free {
            Some(buffer) => buffer,
            None => Buffer::unwritten(&self.pool, len)?,
        };
        Ok(ScratchGuard { scratch: self, buffer: Some(buffer), len })
    }

    /// Takes memory for `len` elements of another type; see [`ScratchGuard::as_ref`] and [`ScratchGuard::as_mut`].
    pub(super) fn take_of<T: Element>(&self, len: usize) -> Result<ScratchGuard<'_>> {
        self.take((len * size_of::<T>()).div_ceil(size_of::<f32>()))
    }

    /// Allocates so that `tasks` tasks can take `len` numbers each, unless another verb takes them in between. So a verb fails,
    /// if memory is short, before it has written anything.
    pub(super) fn reserve(&self, tasks: usize, len: usize) -> Result<()> {
        debug_assert!(len <= MAX_LEN);
        let mut free = self.lock();
        free.tasks = free.tasks.max(tasks);
        let present = free.buffers.iter().filter(|buffer| buffer.len() >= len).count();
        for _ in present..tasks {
            let new = Buffer::unwritten(&self.pool, len)?;
            free.put_back(new);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Free {
    /// Takes the smallest buffer of at least `len` numbers.
    fn take(&mut self, len: usize) -> Option<Buffer<f32>> {
        let fits = self.buffers.iter().position(|buffer| buffer.len() >= len)?;
        Some(self.buffers.remove(fits))
    }

    fn put_back(&mut self, buffer: Buffer<f32>) {
        let at = self.buffers.partition_point(|smaller| smaller.len() <= buffer.len());
        self.buffers.insert(at, buffer);
        if self.buffers.len() > EXTRA_BUFFERS + self.tasks {
            self.buffers.remove(0);
        }
    }
}

/// Scratch memory in use; dropping it returns the memory to [`Scratch`].
pub(super) struct ScratchGuard<'a> {
    scratch: &'a Scratch,
    buffer: Option<Buffer<f32>>,
    len: usize,
}

impl ScratchGuard<'_> {
    pub(super) fn as_ref<T: Element>(&self) -> &[T] {
        bytemuck::cast_slice(self)
    }

    pub(super) fn as_mut<T: Element>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self)
    }
}

impl Deref for ScratchGuard<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[..self.len])
    }
}

impl DerefMut for ScratchGuard<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.buffer.as_mut().map_or(&mut [], |buffer| &mut buffer[..self.len])
    }
}

impl Drop for ScratchGuard<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take().filter(|buffer| buffer.len() <= MAX_LEN) {
            self.scratch.lock().put_back(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returned_buffers_are_reused() {
        let scratch = Scratch::new(Arc::default());
        let first = scratch.take(100).unwrap().as_ptr();
        assert_eq!(scratch.take(50).unwrap().as_ptr(), first);
        let (one, two) = (scratch.take(50).unwrap(), scratch.take(50).unwrap());
        assert_ne!(one.as_ptr(), two.as_ptr());
        drop((one, two));
        for len in 0..10 {
            assert_eq!(scratch.take(1000 * len).unwrap().len(), 1000 * len);
        }
        assert!(scratch.lock().buffers.len() <= EXTRA_BUFFERS);
    }

    #[test]
    fn a_large_buffer_goes_to_the_pool() {
        let scratch = Scratch::new(Arc::default());
        drop(scratch.take(MAX_LEN + 1).unwrap());
        assert!(scratch.lock().buffers.is_empty());
        let bytes = (MAX_LEN + 1) * size_of::<f32>();
        assert!(scratch.pool.take(bytes).is_some_and(|(_, used)| used));
    }
}
