//! Memory for packed panels and partial sums, kept from one call to the next: fresh pages cost more than the packing.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::buffer::Buffer;
use crate::error::Result;

/// How many buffers are kept: a product takes three at most, a backward pass one beside them.
const KEPT: usize = 4;

/// Buffers that are not in use.
#[derive(Default)]
pub(super) struct Scratch(Mutex<Vec<Buffer<f32>>>);

impl Scratch {
    /// `len` numbers, whatever they are. They come back when dropped.
    pub(super) fn take(&self, len: usize) -> Result<Taken<'_>> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = free.iter().position(|buffer| buffer.len() >= len);
        let buffer = match fits {
            Some(fits) => free.swap_remove(fits),
            None => Buffer::zeros(len)?,
        };
        Ok(Taken { scratch: self, buffer: Some(buffer), len })
    }

    fn put_back(&self, buffer: Buffer<f32>) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.partition_point(|smaller| smaller.len() <= buffer.len());
        free.insert(at, buffer);
        if free.len() > KEPT {
            free.remove(0);
        }
    }
}

/// Numbers on loan.
pub(super) struct Taken<'a> {
    scratch: &'a Scratch,
    buffer: Option<Buffer<f32>>,
    len: usize,
}

impl Deref for Taken<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[..self.len])
    }
}

impl DerefMut for Taken<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.buffer.as_mut().map_or(&mut [], |buffer| &mut buffer[..self.len])
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.scratch.put_back(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_back_is_lent_again() {
        let scratch = Scratch::default();
        let first = scratch.take(100).unwrap().as_ptr();
        assert_eq!(scratch.take(50).unwrap().as_ptr(), first);
        let (one, two) = (scratch.take(50).unwrap(), scratch.take(50).unwrap());
        assert_ne!(one.as_ptr(), two.as_ptr());
        drop((one, two));
        for len in 0..10 {
            assert_eq!(scratch.take(1000 * len).unwrap().len(), 1000 * len);
        }
        assert!(scratch.0.lock().unwrap().len() <= KEPT);
    }
}
