//! Memory for packed panels and partial sums, kept from one call to the next: fresh pages cost more than the packing.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::Buffer;
use super::pool::Pool;
use crate::element::Element;
use crate::error::Result;

/// How many buffers are kept beside those of the tasks: a product takes its left side, a backward pass two more.
const KEPT: usize = 4;
/// The most numbers that a buffer kept here has (8 MiB): twice what any task asks for. A larger one lies idle with what tensors
/// lay in, within the same bound; sizes that come but once do not pile up.
const LARGEST: usize = 2 << 20;

/// Buffers that are not in use.
pub(super) struct Scratch {
    pool: Arc<Pool>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    /// From the smallest to the largest.
    buffers: Vec<Buffer<f32>>,
    /// How many tasks ever asked for one at the same time.
    tasks: usize,
}

impl Scratch {
    /// Whose memory comes from there.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, free: Mutex::default() }
    }

    /// `len` numbers, whatever they are. They come back when dropped.
    pub(super) fn take(&self, len: usize) -> Result<ScratchGuard<'_>> {
        let there = if len > LARGEST { None } else { self.lock().take(len) };
        let buffer = match there {
            Some(buffer) => buffer,
            None => Buffer::unwritten(&self.pool, len)?,
        };
        Ok(ScratchGuard { scratch: self, buffer: Some(buffer), len })
    }

    /// Room for `len` elements of another type; [`ScratchGuard::as_ref`] and [`ScratchGuard::as_mut`] show them.
    pub(super) fn take_of<T: Element>(&self, len: usize) -> Result<ScratchGuard<'_>> {
        self.take((len * size_of::<T>()).div_ceil(size_of::<f32>()))
    }

    /// Sees to it that `tasks` tasks will find `len` numbers each, unless another verb takes them meanwhile: what can fail should
    /// fail before anything is written.
    pub(super) fn reserve(&self, tasks: usize, len: usize) -> Result<()> {
        debug_assert!(len <= LARGEST);
        let mut free = self.lock();
        free.tasks = free.tasks.max(tasks);
        let there = free.buffers.iter().filter(|buffer| buffer.len() >= len).count();
        for _ in there..tasks {
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
    /// The smallest that is as long, if there is one.
    fn take(&mut self, len: usize) -> Option<Buffer<f32>> {
        let fits = self.buffers.iter().position(|buffer| buffer.len() >= len)?;
        Some(self.buffers.remove(fits))
    }

    fn put_back(&mut self, buffer: Buffer<f32>) {
        let at = self.buffers.partition_point(|smaller| smaller.len() <= buffer.len());
        self.buffers.insert(at, buffer);
        if self.buffers.len() > KEPT + self.tasks {
            self.buffers.remove(0);
        }
    }
}

/// Numbers on loan.
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
        if let Some(buffer) = self.buffer.take().filter(|buffer| buffer.len() <= LARGEST) {
            self.scratch.lock().put_back(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_back_is_lent_again() {
        let scratch = Scratch::new(Arc::default());
        let first = scratch.take(100).unwrap().as_ptr();
        assert_eq!(scratch.take(50).unwrap().as_ptr(), first);
        let (one, two) = (scratch.take(50).unwrap(), scratch.take(50).unwrap());
        assert_ne!(one.as_ptr(), two.as_ptr());
        drop((one, two));
        for len in 0..10 {
            assert_eq!(scratch.take(1000 * len).unwrap().len(), 1000 * len);
        }
        assert!(scratch.lock().buffers.len() <= KEPT);
    }

    #[test]
    fn a_large_one_lies_idle_with_what_tensors_lay_in() {
        let scratch = Scratch::new(Arc::default());
        drop(scratch.take(LARGEST + 1).unwrap());
        assert!(scratch.lock().buffers.is_empty());
        let bytes = (LARGEST + 1) * size_of::<f32>();
        assert!(scratch.pool.take(bytes).is_some_and(|(_, used)| used));
    }
}
