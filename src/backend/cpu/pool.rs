//! The pool of freed buffers. The next allocation of the same size reuses one: a training step allocates the same sizes each
//! time, and the first writes to new pages take longer than most verbs.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::buffer::Memory;

/// The pool may hold this many bytes, however few are in use.
const MAX_FREE: usize = 256 << 20;

/// Freed memory. It holds at most [`MAX_FREE`] bytes, or as many as are in use, whichever is more. So a loop finds all memory
/// that it has freed, and the memory of a dropped model is returned to the system.
#[derive(Default)]
pub(super) struct Pool(Mutex<Free>);

#[derive(Default)]
struct Free {
    /// In the order in which it was freed; the last is likely still in a cache.
    memory: VecDeque<Memory>,
    /// Bytes of `memory`.
    bytes: usize,
    /// Bytes in use.
    in_use: usize,
}

impl Pool {
    /// Takes memory of this size; `true` if it was used before and may not be zero. `None` if the system is out of memory.
    pub(super) fn take(&self, bytes: usize) -> Option<(Memory, bool)> {
        let free = self.lock().take(bytes);
        let used = free.is_some();
        let memory = match free {
            Some(memory) => memory,
            None => self.allocate(bytes, Memory::zeros)?,
        };
        self.lock().in_use += memory.len();
        Some((memory, used))
    }

    /// Allocates memory. If that fails, frees the whole pool and tries once more.
    fn allocate(&self, bytes: usize, allocate: impl Fn(usize) -> Option<Memory>) -> Option<Memory> {
        allocate(bytes).or_else(|| {
            drop(self.lock().take_all());
            allocate(bytes)
        })
    }

    /// Returns memory to the pool.
    pub(super) fn give(&self, memory: Memory) {
        self.lock().give(memory);
        while let Some(surplus) = self.take_surplus() {
            drop(surplus); // slow, so it is done without the lock
        }
    }

    /// Takes the memory that was freed first, if the pool holds too much.
    fn take_surplus(&self) -> Option<Memory> {
        let mut free = self.lock();
        if free.bytes <= MAX_FREE.max(free.in_use) {
            return None;
        }
        let oldest = free.memory.pop_front()?;
        free.bytes -= oldest.len();
        Some(oldest)
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Free {
    fn take(&mut self, bytes: usize) -> Option<Memory> {
        let at = self.memory.iter().rposition(|memory| memory.fits(bytes))?;
        let memory = self.memory.remove(at)?;
        self.bytes -= memory.len();
        Some(memory)
    }

    /// Takes all memory.
    fn take_all(&mut self) -> VecDeque<Memory> {
        self.bytes = 0;
        std::mem::take(&mut self.memory)
    }

    fn give(&mut self, memory: Memory) {
        self.in_use -= memory.len();
        self.bytes += memory.len();
        self.memory.push_back(memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &Pool, bytes: usize) -> (Memory, bool) {
        pool.take(bytes).unwrap()
    }

    #[test]
    fn freed_memory_is_reused_for_the_same_size() {
        let pool = Pool::default();
        let (first, used) = take(&pool, 1000);
        let place = first.bytes().as_ptr();
        assert!(!used);
        pool.give(first);
        assert!(!take(&pool, 2000).1 && !take(&pool, 100).1);
        let (again, used) = take(&pool, 1001); // as many cache lines
        assert!(used && again.bytes().as_ptr() == place);
        assert!(!take(&pool, 1000).1, "memory is taken by one caller at a time");
    }

    #[test]
    fn the_pool_is_freed_if_the_system_is_out_of_memory() {
        let pool = Pool::default();
        let (one, two) = (take(&pool, 1000).0, take(&pool, 2000).0);
        pool.give(one);
        pool.give(two);
        let full = |bytes| Memory::zeros(bytes).filter(|_| pool.lock().memory.is_empty());
        assert_eq!(pool.allocate(640, full).map(|memory| memory.len()), Some(640));
        assert_eq!(pool.lock().bytes, 0);
        assert!(pool.allocate(640, |_| None).is_none());
        assert!(!take(&pool, 1000).1);
    }

    #[test]
    fn the_pool_holds_at_most_as_much_as_is_in_use_or_max_free() {
        let pool = Pool::default();
        let model: Vec<_> = (0..10).map(|i| take(&pool, MAX_FREE / 2 + 64 * i).0).collect();
        let sizes: Vec<usize> = model.iter().map(Memory::len).collect();
        for (given, memory) in model.into_iter().enumerate() {
            pool.give(memory);
            let free = pool.lock();
            assert_eq!(free.in_use, sizes[given + 1..].iter().sum::<usize>());
            assert_eq!(free.bytes, free.memory.iter().map(Memory::len).sum::<usize>());
            assert!(free.bytes <= MAX_FREE.max(free.in_use) && (given > 4 || free.memory.len() == given + 1));
        }
        assert_eq!(pool.lock().memory.len(), 1, "two are more than MAX_FREE");
        assert!(take(&pool, sizes[9]).1, "and it is the one that was freed last");
    }
}
