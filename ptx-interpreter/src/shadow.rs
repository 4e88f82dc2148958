//! Detects races without trying every order: records accesses to bytes, and orders them by vector clocks.
//!
//! Every warp has a time of its own. At a barrier it joins the clocks of the others: for each warp, the time up to which it has
//! seen that warp's work. An access is ordered after another if the clock of the later thread has reached the time of the earlier
//! access.

use std::ops::Range;

/// Bytes that share a record; no element is smaller.
const CELL: usize = 2;

/// Thread numbers from here on are mbarriers of the block, the agents of bulk copies; their time is the phase.
pub(crate) const BULK: u32 = 1 << 16;
/// Flag of a thread number: several threads of its warp, at the same time.
const SEVERAL: u32 = 1 << 31;

/// Agents of a block: its warps, then its mbarriers.
const AGENTS: usize = 64;
pub(crate) const MAX_BARRIERS: usize = AGENTS / 2;

fn agent(thread: u32) -> usize {
    let thread = thread & !SEVERAL;
    if thread < BULK { thread as usize / crate::WARP } else { AGENTS - MAX_BARRIERS + (thread - BULK) as usize }
}

/// A vector clock: for every agent of a cluster, the time up to which its work has been seen.
#[derive(Clone, Default)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    /// `block` is relative to the cluster.
    fn of(&self, block: u32, thread: u32) -> u32 {
        self.0.get(block as usize * AGENTS + agent(thread)).copied().unwrap_or(0)
    }

    pub(crate) fn set(&mut self, block: u32, thread: u32, time: u32) {
        let at = block as usize * AGENTS + agent(thread);
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        self.0[at] = time;
    }

    pub(crate) fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(mine, &theirs)| *mine = theirs.max(*mine));
    }
}

/// The clocks that a barrier hands on.
#[derive(Clone, Default)]
pub(crate) struct Clocks {
    pub(crate) seen: Clock,
    /// Work that TMA and wgmma see too: followed by `fence.proxy.async`.
    pub(crate) published: Clock,
}

impl Clocks {
    pub(crate) fn join(&mut self, other: &Self) {
        self.seen.join(&other.seen);
        self.published.join(&other.published);
    }
}

/// An agent that accesses memory, its time and its clocks.
#[derive(Clone, Copy)]
pub(crate) struct Moment<'c> {
    pub(crate) launch: u32,
    /// The first block of the cluster, and its number of blocks.
    pub(crate) cluster: (u32, u32),
    /// The agent.
    pub(crate) block: u32,
    pub(crate) thread: u32,
    pub(crate) time: u32,
    /// The thread that executes or started the access.
    pub(crate) actor: (u32, u32),
    /// The time at which its warp was last converged.
    pub(crate) converged: u32,
    pub(crate) clocks: &'c Clocks,
    /// True for accesses by TMA and wgmma.
    pub(crate) bulk: bool,
}

impl Moment<'_> {
    /// True if a thread's work at that time is ordered before this.
    pub(crate) fn has_seen(&self, block: u32, thread: u32, time: u32) -> bool {
        Access { launch: self.launch, block, thread, time }.is_before(self)
    }
}

/// The last access of some bytes. Launches count from 1.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Access {
    launch: u32,
    block: u32,
    thread: u32,
    time: u32,
}

/// The other side of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) block: u32,
    /// `None`: several threads, or a bulk copy.
    pub(crate) thread: Option<u32>,
    /// True if the access is ordered, but without a proxy fence for TMA and wgmma.
    pub(crate) unpublished: bool,
}

impl Access {
    const NONE: Self = Self { launch: 0, block: 0, thread: 0, time: 0 };

    fn one(now: &Moment<'_>) -> Self {
        Self { launch: now.launch, block: now.block, thread: now.thread, time: now.time }
    }

    fn is_foreign(&self, now: &Moment<'_>) -> bool {
        !(now.cluster.0..now.cluster.0 + now.cluster.1).contains(&self.block)
    }

    /// True if the access is ordered before `now`.
    #[inline]
    fn is_before(&self, now: &Moment<'_>) -> bool {
        if self.launch != now.launch {
            return true;
        }
        if self.block == now.actor.0 {
            if self.thread == now.actor.1 {
                return true;
            }
            if agent(self.thread) == agent(now.actor.1) {
                return self.time < now.converged;
            }
        } else if self.is_foreign(now) {
            return false;
        }
        self.time <= now.clocks.seen.of(self.block - now.cluster.0, self.thread)
    }

    fn is_published(&self, now: &Moment<'_>) -> bool {
        let by_bulk = self.thread & !SEVERAL >= BULK;
        self.launch != now.launch || by_bulk || self.time <= now.clocks.published.of(self.block - now.cluster.0, self.thread)
    }

    /// True if it is the same warp at the same time.
    fn is_as(self, other: Self) -> bool {
        (self.time, self.launch, self.block) == (other.time, other.launch, other.block)
            && agent(self.thread) == agent(other.thread)
    }

    /// Merges an access of the same warp: one thread, or several.
    fn thread_with(self, other: Self) -> u32 {
        if self.thread == other.thread { self.thread } else { self.thread | SEVERAL }
    }

    /// The race, if the access is not ordered before `now`.
    fn clashes(&self, now: &Moment<'_>) -> Option<Conflict> {
        let thread = (self.thread < BULK).then_some(self.thread);
        (!self.is_before(now)).then_some(Conflict { block: self.block, thread, unpublished: false })
    }
}

struct Record {
    wrote: Access,
    /// The last reader, and other warps of its cluster that are not ordered before it.
    read: Access,
    others: Option<Box<Others>>,
}

/// The last reader of each warp of a cluster, if it has read since the last write.
#[derive(Default)]
struct Others {
    launch: u32,
    /// The first block of the cluster.
    first: u32,
    readers: Vec<Access>,
    /// A bit for each warp with an entry.
    valid: u64,
}

impl Others {
    /// The index of a warp in its cluster.
    fn place(&self, seen: Access) -> usize {
        (seen.block - self.first) as usize * (AGENTS - MAX_BARRIERS) + agent(seen.thread)
    }

    fn add(&mut self, seen: Access, now: &Moment<'_>) {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            *self = Self { launch: now.launch, first: now.cluster.0, valid: 0, readers: std::mem::take(&mut self.readers) };
        }
        let place = self.place(seen);
        if self.readers.len() <= place {
            self.readers.resize(place + 1, Access::NONE);
        }
        self.readers[place] = seen;
        self.valid |= 1 << place;
    }

    /// Removes the reader of the same warp.
    fn take(&mut self, one: Access, now: &Moment<'_>) -> Option<Access> {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            return None;
        }
        let place = self.place(one);
        let valid = self.valid >> place & 1 == 1;
        self.valid &= !(1 << place);
        valid.then(|| self.readers[place])
    }

    fn clashes(&self, now: &Moment<'_>) -> Option<Conflict> {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            return None;
        }
        let valid = self.readers.iter().enumerate().filter(|(place, _)| self.valid >> place & 1 == 1);
        valid.map(|(_, seen)| seen).find_map(|seen| seen.clashes(now))
    }
}

impl Record {
    #[inline]
    fn wrote_clashes(&self, now: &Moment<'_>) -> Option<Conflict> {
        if !self.wrote.is_before(now) {
            return self.wrote.clashes(now);
        }
        let unseen = now.bulk && !self.wrote.is_published(now);
        unseen.then_some(Conflict { block: self.wrote.block, thread: None, unpublished: true })
    }

    fn read_clashes(&self, now: &Moment<'_>) -> Option<Conflict> {
        self.read.clashes(now).or_else(|| self.others.as_ref()?.clashes(now))
    }

    /// Adds a reader. Readers that are ordered before it are dropped: whatever follows it also follows them.
    #[inline]
    fn note(&mut self, mut one: Access, now: &Moment<'_>) {
        if self.read.is_as(one) {
            self.read.thread = self.read.thread_with(one);
        } else if self.read.is_before(now) {
            self.read = one;
        } else if !self.read.is_foreign(now) {
            let others = self.others.get_or_insert_default();
            if let Some(seen) = others.take(one, now).filter(|seen| !seen.is_before(now)) {
                one.thread = one.thread_with(seen);
            }
            others.add(self.read, now);
            self.read = one;
        } // a writer in another cluster is never ordered after this reader
    }
}

/// The records of a memory, one for every two bytes.
#[derive(Default)]
pub(crate) struct Shadow(Vec<Record>);

impl Shadow {
    pub(crate) fn new(bytes: usize) -> Self {
        let nobody = || Record { wrote: Access::NONE, read: Access::NONE, others: None };
        Self(std::iter::repeat_with(nobody).take(bytes.div_ceil(CELL)).collect())
    }

    fn cells(&mut self, at: usize, width: usize) -> &mut [Record] {
        &mut self.0[at / CELL..(at + width).div_ceil(CELL)]
    }

    /// True if the last writer is one of these launches.
    pub(crate) fn was_written_by(&self, at: usize, width: usize, launches: &Range<u32>) -> bool {
        self.0[at / CELL..(at + width).div_ceil(CELL)].iter().any(|record| launches.contains(&record.wrote.launch))
    }

    /// Records a read. `Err`: a race with a writer.
    pub(crate) fn read(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Conflict> {
        let (one, mut checked) = (Access::one(&now), Access::NONE);
        for record in self.cells(at, width) {
            // Consecutive bytes were mostly written together.
            if record.wrote != checked {
                if let Some(other) = record.wrote_clashes(&now) {
                    return Err(other);
                }
                checked = record.wrote;
            }
            record.note(one, &now);
        }
        Ok(())
    }

    /// Records a write. `Err`: a race with a writer or reader.
    pub(crate) fn write(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Conflict> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote_clashes(&now).or_else(|| record.read_clashes(&now)) {
                return Err(other);
            }
            record.wrote = Access::one(&now);
            record.others.iter_mut().for_each(|others| others.valid = 0);
        }
        Ok(())
    }
}
