//! What a thread has started and nobody has waited for yet: copies, boxes and products, in groups.

use std::collections::{HashMap, VecDeque};

use crate::scalar::Row;

/// An asynchronous copy on its way into shared memory.
pub(crate) struct Copy {
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A box on its way into a block's shared memory.
pub(crate) struct Load {
    pub(crate) room: usize,
    pub(crate) barrier: u64,
    pub(crate) chunks: Vec<(u64, [u8; 16])>,
}

/// A box that is to be stored: the argument with its map, the coordinates of its corner, and its place in shared memory.
pub(crate) struct Store {
    pub(crate) arg: usize,
    pub(crate) corner: Vec<i64>,
    pub(crate) from: u64,
}

/// A product that was started: its instruction, what the descriptors said, and whether it adds to the sums or replaces them.
pub(crate) struct Started {
    pub(crate) at: usize,
    pub(crate) lhs: u64,
    pub(crate) rhs: u64,
    pub(crate) adds: bool,
}

/// What one thread, or one warp, started: each group that it closed, and the open one.
pub(crate) struct Groups<T> {
    closed: VecDeque<Vec<T>>,
    pub(crate) open: Vec<T>,
}

impl<T> Groups<T> {
    pub(crate) fn close(&mut self) {
        self.closed.push_back(std::mem::take(&mut self.open));
    }

    /// Takes out the oldest until so many groups are left.
    pub(crate) fn take_until(&mut self, pending: usize) -> Vec<T> {
        let due = self.closed.len().saturating_sub(pending);
        self.closed.drain(..due).flatten().collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.closed.is_empty() && self.open.is_empty()
    }
}

impl<T> Default for Groups<T> {
    fn default() -> Self {
        Self { closed: VecDeque::new(), open: Vec::new() }
    }
}

/// The products that a warp started.
#[derive(Default)]
pub(crate) struct Products {
    pub(crate) groups: Groups<Started>,
    /// The sums that they work on, while the registers are poisoned.
    pub(crate) sums: HashMap<u32, Row>,
}
