//! Who touched which bytes since when: how races are found without playing out every order.

/// Bytes that share a record. No element of the kernels is smaller.
const CELL: usize = 2;

/// A thread at a moment: launches, blocks and barriers count up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) launch: u32,
    pub(crate) block: u32,
    /// How many barriers the block has passed.
    pub(crate) barriers: u32,
    pub(crate) thread: u32,
}

/// Who was seen there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    OneThread,
    SeveralThreads,
    SeveralBlocks,
}

/// The last to be seen there, and whether others were at the same time; nobody is launch 0.
#[derive(Clone, Copy)]
struct Seen {
    last: Moment,
    who: Who,
}

/// The other party of a race: its block, and its thread if it was only one.
pub(crate) type Other = (u32, Option<u32>);

impl Seen {
    const NOBODY: Self = Self { last: Moment { launch: 0, block: 0, barriers: 0, thread: 0 }, who: Who::OneThread };

    /// Whom nothing orders before `now`, if anyone.
    fn clashes(&self, now: Moment) -> Option<Other> {
        let Self { last, who } = *self;
        let other_block = who == Who::SeveralBlocks || last.block != now.block;
        let same_thread = who == Who::OneThread && last.thread == now.thread;
        let clash = last.launch == now.launch && (other_block || last.barriers == now.barriers && !same_thread);
        clash.then_some((last.block, (who == Who::OneThread).then_some(last.thread)))
    }

    /// Adds a reader, and forgets those that it makes irrelevant: nothing that follows can clash with them alone.
    fn note(&mut self, now: Moment) {
        let last = self.last;
        let who = if last.launch != now.launch {
            Who::OneThread
        } else if self.who == Who::SeveralBlocks || last.block != now.block {
            Who::SeveralBlocks
        } else if last.barriers == now.barriers && (self.who == Who::SeveralThreads || last.thread != now.thread) {
            Who::SeveralThreads
        } else {
            Who::OneThread
        };
        *self = Self { last: now, who };
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
            record.wrote = Seen { last: now, who: Who::OneThread };
        }
        Ok(())
    }
}
