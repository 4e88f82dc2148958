//! Who touched which bytes since when: how races are found without playing out every order.

/// Bytes that share a record. No element of the kernels is smaller.
const CELL: usize = 2;

/// A thread at a moment. Time goes on with every launch, block and barrier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// When the launch began.
    pub(crate) launch: u64,
    /// When the block began.
    pub(crate) begin: u64,
    /// When the block passed its last barrier.
    pub(crate) time: u64,
    pub(crate) block: u32,
    pub(crate) thread: u32,
}

/// In the place of a thread: several of one block, at the same time; and threads of several blocks.
const SEVERAL_THREADS: u32 = u32::MAX - 1;
const SEVERAL_BLOCKS: u32 = u32::MAX;

/// The last to be seen there, and whether others were at the same time. Nobody was at time 0.
#[derive(Clone, Copy)]
struct Seen {
    time: u64,
    block: u32,
    thread: u32,
}

/// The other party of a race: its block, and its thread if it was only one.
pub(crate) type Other = (u32, Option<u32>);

impl Seen {
    const NOBODY: Self = Self { time: 0, block: 0, thread: 0 };

    fn one(now: Moment) -> Self {
        Self { time: now.time, block: now.block, thread: now.thread }
    }

    /// Whom nothing orders before `now`, if anyone.
    fn clashes(&self, now: Moment) -> Option<Other> {
        if self.time < now.launch {
            return None;
        }
        let same_block = self.time >= now.begin && self.thread != SEVERAL_BLOCKS;
        if same_block && (self.time < now.time || self.thread == now.thread) {
            return None;
        }
        Some((self.block, (self.thread < SEVERAL_THREADS).then_some(self.thread)))
    }

    /// Adds a reader, and forgets those that it makes irrelevant: nothing that follows can clash with them alone.
    fn note(&mut self, now: Moment) {
        if self.time < now.launch {
            *self = Self::one(now);
        } else if self.time < now.begin || self.thread == SEVERAL_BLOCKS {
            *self = Self { thread: SEVERAL_BLOCKS, ..Self::one(now) };
        } else if self.time < now.time {
            *self = Self::one(now);
        } else if self.thread != now.thread {
            self.thread = SEVERAL_THREADS;
        }
    }
}

#[derive(Clone, Copy)]
struct Record {
    wrote: Seen,
    read: Seen,
}

/// A record for every two bytes of a memory.
#[derive(Default)]
pub(crate) struct Shadow(Vec<Record>);

impl Shadow {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(vec![Record { wrote: Seen::NOBODY, read: Seen::NOBODY }; bytes.div_ceil(CELL)])
    }

    fn cells(&mut self, at: usize, width: usize) -> &mut [Record] {
        &mut self.0[at / CELL..(at + width).div_ceil(CELL)]
    }

    /// Notes a read. `Err`: who wrote there at the same time.
    pub(crate) fn read(&mut self, at: usize, width: usize, now: Moment) -> Result<(), Other> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote.clashes(now) {
                return Err(other);
            }
            record.read.note(now);
        }
        Ok(())
    }

    /// Notes a write. `Err`: who wrote or read there at the same time.
    pub(crate) fn write(&mut self, at: usize, width: usize, now: Moment) -> Result<(), Other> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote.clashes(now).or_else(|| record.read.clashes(now)) {
                return Err(other);
            }
            record.wrote = Seen::one(now);
        }
        Ok(())
    }
}
