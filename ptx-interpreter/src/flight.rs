//! Asynchronous operations that were started and not waited for, in groups.

use std::collections::{HashMap, VecDeque};

use crate::scalar::Row;

/// A `cp.async` in flight.
pub(crate) struct Copy {
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A TMA load in flight.
pub(crate) struct Load {
    pub(crate) room: usize,
    pub(crate) barrier: u64,
    pub(crate) chunks: Vec<(u64, [u8; 16])>,
}

/// A TMA store: the argument with its tensor map, the corner of the box, and its address in shared memory.
pub(crate) struct Store {
    pub(crate) arg: usize,
    pub(crate) corner: Vec<i64>,
    pub(crate) from: u64,
}

/// A wgmma in flight: its instruction, its descriptors, and true if it accumulates.
pub(crate) struct Started {
    pub(crate) at: usize,
    pub(crate) lhs: u64,
    pub(crate) rhs: u64,
    pub(crate) adds: bool,
}

/// The groups of a thread or warp: those that were committed, and the open one.
pub(crate) struct Groups<T> {
    closed: VecDeque<Vec<T>>,
    pub(crate) open: Vec<T>,
}

impl<T> Groups<T> {
    pub(crate) fn close(&mut self) {
        self.closed.push_back(std::mem::take(&mut self.open));
    }

    /// Removes the oldest groups until this many are left.
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

/// The wgmma of a warp.
#[derive(Default)]
pub(crate) struct Products {
    pub(crate) groups: Groups<Started>,
    /// Registers of their sums, which hold NaN meanwhile.
    pub(crate) sums: HashMap<u32, Row>,
}
