//! Memory that nobody holds, kept for who asks for as much: a training step asks for the same again and again, and fresh pages
//! cost more than most verbs do with them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::buffer::Memory;

/// What may lie idle however little is in use.
const SPARE: usize = 256 << 20;

/// Where buffers come from and go back to.
///
/// At most [`SPARE`] bytes lie idle, or as many as are in use: so a loop finds all that it gave back, and a model that is dropped
/// goes back to the system.
#[derive(Default)]
pub(super) struct Pool(Mutex<Idle>);

#[derive(Default)]
struct Idle {
    /// What came back last is last, and likely still in a cache.
    memory: VecDeque<Memory>,
    bytes: usize,
    /// Bytes of what is in use.
    lent: usize,
}

impl Pool {
    /// Memory of this size, and whether somebody has used it before. `None` if there is no room.
    pub(super) fn take(&self, bytes: usize) -> Option<(Memory, bool)> {
        let idle = self.lock().take(bytes);
        let used = idle.is_some();
        let memory = match idle {
            Some(memory) => memory,
            None => Memory::zeros(bytes)?,
        };
        self.lock().lent += memory.len();
        Some((memory, used))
    }

    /// Takes memory back.
    pub(super) fn give(&self, memory: Memory) {
        self.lock().give(memory);
        while let Some(surplus) = self.surplus() {
            drop(surplus); // to the system, which takes its time: the lock is free
        }
    }

    /// What has been idle the longest, if too much is.
    fn surplus(&self) -> Option<Memory> {
        let mut idle = self.lock();
        if idle.bytes <= SPARE.max(idle.lent) {
            return None;
        }
        let oldest = idle.memory.pop_front()?;
        idle.bytes -= oldest.len();
        Some(oldest)
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Idle {
    fn take(&mut self, bytes: usize) -> Option<Memory> {
        let at = self.memory.iter().rposition(|memory| memory.fits(bytes))?;
        let memory = self.memory.remove(at)?;
        self.bytes -= memory.len();
        Some(memory)
    }

    fn give(&mut self, memory: Memory) {
        self.lent -= memory.len();
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
    fn what_came_back_is_lent_again_to_who_asks_for_as_much() {
        let pool = Pool::default();
        let (first, used) = take(&pool, 1000);
        let place = first.bytes().as_ptr();
        assert!(!used);
        pool.give(first);
        assert!(!take(&pool, 2000).1 && !take(&pool, 100).1);
        let (again, used) = take(&pool, 1001); // as many cache lines
        assert!(used && again.bytes().as_ptr() == place);
        assert!(!take(&pool, 1000).1, "it is lent to one at a time");
    }

    #[test]
    fn no_more_lies_idle_than_is_in_use_or_spare() {
        let pool = Pool::default();
        let model: Vec<_> = (0..10).map(|i| take(&pool, SPARE / 2 + 64 * i).0).collect();
        let sizes: Vec<usize> = model.iter().map(Memory::len).collect();
        for (given, memory) in model.into_iter().enumerate() {
            pool.give(memory);
            let idle = pool.lock();
            assert_eq!(idle.lent, sizes[given + 1..].iter().sum());
            assert_eq!(idle.bytes, idle.memory.iter().map(Memory::len).sum());
            assert!(idle.bytes <= SPARE.max(idle.lent) && (given > 4 || idle.memory.len() == given + 1));
        }
        assert_eq!(pool.lock().memory.len(), 1, "two are more than may be spare");
        assert!(take(&pool, sizes[9]).1, "and it is the one that came back last");
    }
}
