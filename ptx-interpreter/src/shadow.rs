//! Who touched which bytes, and who has seen it: how races are found without playing out every order.
//!
//! Every warp has a time of its own. What it hands on, at a barrier, is the times up to which it has seen each other one: a
//! vector clock. An access is ordered after another if the clock of who makes it has reached that one's time.

use std::ops::Range;

/// Bytes that share a record. No element of the kernels is smaller.
const CELL: usize = 2;

/// From here on a "thread" is a barrier of the block, in whose name bulk copies write: their time is the phase that they end.
pub(crate) const BULK: u32 = 1 << 16;
/// Set in the place of a thread: several of its warp, at the same time.
const SEVERAL: u32 = 1 << 31;

/// Warps of a block, then barriers of a block.
const AGENTS: usize = 64;
pub(crate) const MAX_BARRIERS: usize = AGENTS / 2;

fn agent(thread: u32) -> usize {
    let thread = thread & !SEVERAL;
    if thread < BULK { thread as usize / crate::WARP } else { AGENTS - MAX_BARRIERS + (thread - BULK) as usize }
}

/// The times up to which everything that was done has been seen, for every agent of a cluster.
#[derive(Clone, Default)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    /// `block` counts from the first of the cluster.
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

/// What is handed on at a barrier.
#[derive(Clone, Default)]
pub(crate) struct Clocks {
    pub(crate) seen: Clock,
    /// The part of it that TMA and wgmma see too: what a `fence.proxy.async` came after.
    pub(crate) published: Clock,
}

impl Clocks {
    pub(crate) fn join(&mut self, other: &Self) {
        self.seen.join(&other.seen);
        self.published.join(&other.published);
    }
}

/// Who accesses, and what it has seen.
#[derive(Clone, Copy)]
pub(crate) struct Moment<'c> {
    pub(crate) launch: u32,
    /// The first block of the cluster, and how many it has.
    pub(crate) cluster: (u32, u32),
    /// In whose name.
    pub(crate) block: u32,
    pub(crate) thread: u32,
    pub(crate) time: u32,
    /// The thread that does it or started it.
    pub(crate) actor: (u32, u32),
    /// When the lanes of its warp last came together.
    pub(crate) converged: u32,
    pub(crate) clocks: &'c Clocks,
    /// It is TMA or wgmma that accesses.
    pub(crate) bulk: bool,
}

impl Moment<'_> {
    /// Whether what a thread did at that time comes before.
    pub(crate) fn has_seen(&self, block: u32, thread: u32, time: u32) -> bool {
        Seen { launch: self.launch, block, thread, time }.is_before(self)
    }
}

/// The last to be seen there. The launches count from 1.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    launch: u32,
    block: u32,
    thread: u32,
    time: u32,
}

/// Who is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Other {
    pub(crate) block: u32,
    /// None: several, or a bulk copy.
    pub(crate) thread: Option<u32>,
    /// It is seen, but not by TMA and wgmma.
    pub(crate) unpublished: bool,
}

impl Seen {
    const NOBODY: Self = Self { launch: 0, block: 0, thread: 0, time: 0 };

    fn one(now: &Moment<'_>) -> Self {
        Self { launch: now.launch, block: now.block, thread: now.thread, time: now.time }
    }

    fn is_foreign(&self, now: &Moment<'_>) -> bool {
        !(now.cluster.0..now.cluster.0 + now.cluster.1).contains(&self.block)
    }

    /// Whether something orders it before `now`.
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

    /// The same warp at the same time.
    fn is_as(self, other: Self) -> bool {
        (self.time, self.launch, self.block) == (other.time, other.launch, other.block)
            && agent(self.thread) == agent(other.thread)
    }

    /// One thread, or several of its warp.
    fn thread_with(self, other: Self) -> u32 {
        if self.thread == other.thread { self.thread } else { self.thread | SEVERAL }
    }

    /// Whom nothing orders before `now`.
    fn clashes(&self, now: &Moment<'_>) -> Option<Other> {
        let thread = (self.thread < BULK).then_some(self.thread);
        (!self.is_before(now)).then_some(Other { block: self.block, thread, unpublished: false })
    }
}

struct Record {
    wrote: Seen,
    /// The last to read, and the other warps of its cluster that nothing orders before it.
    read: Seen,
    others: Option<Box<Others>>,
}

/// The last to read of each warp of a cluster, if it has read since the last write.
#[derive(Default)]
struct Others {
    launch: u32,
    /// The first block.
    first: u32,
    readers: Vec<Seen>,
    /// A bit for each that counts.
    valid: u64,
}

impl Others {
    /// A warp's place among those of its cluster.
    fn place(&self, seen: Seen) -> usize {
        (seen.block - self.first) as usize * (AGENTS - MAX_BARRIERS) + agent(seen.thread)
    }

    fn add(&mut self, seen: Seen, now: &Moment<'_>) {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            *self = Self { launch: now.launch, first: now.cluster.0, valid: 0, readers: std::mem::take(&mut self.readers) };
        }
        let place = self.place(seen);
        if self.readers.len() <= place {
            self.readers.resize(place + 1, Seen::NOBODY);
        }
        self.readers[place] = seen;
        self.valid |= 1 << place;
    }

    /// Takes out the reader of the same warp.
    fn take(&mut self, one: Seen, now: &Moment<'_>) -> Option<Seen> {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            return None;
        }
        let place = self.place(one);
        let valid = self.valid >> place & 1 == 1;
        self.valid &= !(1 << place);
        valid.then(|| self.readers[place])
    }

    fn clashes(&self, now: &Moment<'_>) -> Option<Other> {
        if (self.launch, self.first) != (now.launch, now.cluster.0) {
            return None;
        }
        let valid = self.readers.iter().enumerate().filter(|(place, _)| self.valid >> place & 1 == 1);
        valid.map(|(_, seen)| seen).find_map(|seen| seen.clashes(now))
    }
}

impl Record {
    #[inline]
    fn wrote_clashes(&self, now: &Moment<'_>) -> Option<Other> {
        if !self.wrote.is_before(now) {
            return self.wrote.clashes(now);
        }
        let unseen = now.bulk && !self.wrote.is_published(now);
        unseen.then_some(Other { block: self.wrote.block, thread: None, unpublished: true })
    }

    fn read_clashes(&self, now: &Moment<'_>) -> Option<Other> {
        self.read.clashes(now).or_else(|| self.others.as_ref()?.clashes(now))
    }

    /// Adds a reader. Those before it no longer matter: whoever comes after it comes after them.
    #[inline]
    fn note(&mut self, mut one: Seen, now: &Moment<'_>) {
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
        } // a writer that follows a reader of another cluster is never ordered after it, whoever else has read
    }
}

/// A record for every two bytes of a memory.
#[derive(Default)]
pub(crate) struct Shadow(Vec<Record>);

impl Shadow {
    pub(crate) fn new(bytes: usize) -> Self {
        let nobody = || Record { wrote: Seen::NOBODY, read: Seen::NOBODY, others: None };
        Self(std::iter::repeat_with(nobody).take(bytes.div_ceil(CELL)).collect())
    }

    fn cells(&mut self, at: usize, width: usize) -> &mut [Record] {
        &mut self.0[at / CELL..(at + width).div_ceil(CELL)]
    }

    /// Whether one of those launches was the last to write there.
    pub(crate) fn was_written_by(&self, at: usize, width: usize, launches: &Range<u32>) -> bool {
        self.0[at / CELL..(at + width).div_ceil(CELL)].iter().any(|record| launches.contains(&record.wrote.launch))
    }

    /// Notes a read. `Err`: who wrote there at the same time.
    pub(crate) fn read(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Other> {
        let (one, mut checked) = (Seen::one(&now), Seen::NOBODY);
        for record in self.cells(at, width) {
            // Neighbours were mostly written together.
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

    /// Notes a write. `Err`: who wrote or read there at the same time.
    pub(crate) fn write(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Other> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote_clashes(&now).or_else(|| record.read_clashes(&now)) {
                return Err(other);
            }
            record.wrote = Seen::one(&now);
            record.others.iter_mut().for_each(|others| others.valid = 0);
        }
        Ok(())
    }
}
