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
pub(super) struct Pool(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// What came back last is last, and likely still in a cache.
    memory: VecDeque<Memory>,
    bytes: usize,
    /// Bytes of what is in use.
    lent: usize,
}

impl Pool {
    /// Memory of this size, and whether somebody has used it before. `None` if there is no room.
    pub(super) fn take(&self, bytes: usize) -> Option<(Memory, bool)> {
        let there = self.lock().take(bytes);
        let used = there.is_some();
        let memory = match there {
            Some(memory) => memory,
            None => self.fresh(bytes, Memory::zeros)?,
        };
        self.lock().lent += memory.len();
        Some((memory, used))
    }

    /// Memory of the system's. If it has no room, all that lies idle goes back to it, and it is asked once more.
    fn fresh(&self, bytes: usize, of_system: impl Fn(usize) -> Option<Memory>) -> Option<Memory> {
        of_system(bytes).or_else(|| {
            drop(self.lock().shed());
            of_system(bytes)
        })
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
        let mut kept = self.lock();
        if kept.bytes <= SPARE.max(kept.lent) {
            return None;
        }
        let oldest = kept.memory.pop_front()?;
        kept.bytes -= oldest.len();
        Some(oldest)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn take(&mut self, bytes: usize) -> Option<Memory> {
        let at = self.memory.iter().rposition(|memory| memory.fits(bytes))?;
        let memory = self.memory.remove(at)?;
        self.bytes -= memory.len();
        Some(memory)
    }

    /// All that lies idle.
    fn shed(&mut self) -> VecDeque<Memory> {
        self.bytes = 0;
        std::mem::take(&mut self.memory)
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

    fn take(idle: &Pool, bytes: usize) -> (Memory, bool) {
        idle.take(bytes).unwrap()
    }

    #[test]
    fn what_came_back_is_lent_again_to_who_asks_for_as_much() {
        let idle = Pool::default();
        let (first, used) = take(&idle, 1000);
        let place = first.bytes().as_ptr();
        assert!(!used);
        idle.give(first);
        assert!(!take(&idle, 2000).1 && !take(&idle, 100).1);
        let (again, used) = take(&idle, 1001); // as many cache lines
        assert!(used && again.bytes().as_ptr() == place);
        assert!(!take(&idle, 1000).1, "it is lent to one at a time");
    }

    #[test]
    fn what_lies_idle_goes_back_to_a_system_that_has_no_room() {
        let idle = Pool::default();
        let (one, two) = (take(&idle, 1000).0, take(&idle, 2000).0);
        idle.give(one);
        idle.give(two);
        let full = |bytes| Memory::zeros(bytes).filter(|_| idle.lock().memory.is_empty());
        assert_eq!(idle.fresh(640, full).map(|memory| memory.len()), Some(640));
        assert_eq!(idle.lock().bytes, 0);
        assert!(idle.fresh(640, |_| None).is_none());
        assert!(!take(&idle, 1000).1);
    }

    #[test]
    fn no_more_lies_idle_than_is_in_use_or_spare() {
        let idle = Pool::default();
        let model: Vec<_> = (0..10).map(|i| take(&idle, SPARE / 2 + 64 * i).0).collect();
        let sizes: Vec<usize> = model.iter().map(Memory::len).collect();
        for (given, memory) in model.into_iter().enumerate() {
            idle.give(memory);
            let kept = idle.lock();
            assert_eq!(kept.lent, sizes[given + 1..].iter().sum::<usize>());
            assert_eq!(kept.bytes, kept.memory.iter().map(Memory::len).sum::<usize>());
            assert!(kept.bytes <= SPARE.max(kept.lent) && (given > 4 || kept.memory.len() == given + 1));
        }
        assert_eq!(idle.lock().memory.len(), 1, "two are more than may be spare");
        assert!(take(&idle, sizes[9]).1, "and it is the one that came back last");
    }
}
