//! Who touched which bytes, and who has seen it: how races are found without playing out every order.
//!
//! Every warp has a time of its own. What it hands on, at a barrier, is the times up to which it has seen each other one: a
//! vector clock. An access is ordered after another if the clock of who makes it has reached that one's time.

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
        Seen { launch: self.launch, block, thread, time }.is_before(*self)
    }
}

/// The last to be seen there. The launches count from 1.
#[derive(Clone, Copy)]
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

    fn one(now: Moment<'_>) -> Self {
        Self { launch: now.launch, block: now.block, thread: now.thread, time: now.time }
    }

    fn is_foreign(&self, now: Moment<'_>) -> bool {
        !(now.cluster.0..now.cluster.0 + now.cluster.1).contains(&self.block)
    }

    /// Whether something orders it before `now`.
    fn is_before(&self, now: Moment<'_>) -> bool {
        if self.launch != now.launch || (self.block, self.thread) == now.actor {
            return true;
        }
        if self.is_foreign(now) {
            return false;
        }
        if self.block == now.actor.0 && agent(self.thread) == agent(now.actor.1) {
            return self.time < now.converged;
        }
        self.time <= now.clocks.seen.of(self.block - now.cluster.0, self.thread)
    }

    fn is_published(&self, now: Moment<'_>) -> bool {
        let by_bulk = self.thread & !SEVERAL >= BULK;
        self.launch != now.launch || by_bulk || self.time <= now.clocks.published.of(self.block - now.cluster.0, self.thread)
    }

    /// Whom nothing orders before `now`.
    fn clashes(&self, now: Moment<'_>) -> Option<Other> {
        let thread = (self.thread < BULK).then_some(self.thread);
        (!self.is_before(now)).then_some(Other { block: self.block, thread, unpublished: false })
    }
}

struct Record {
    wrote: Seen,
    read: Seen,
    /// Readers that nothing orders against each other and `read`.
    readers: Option<Box<Vec<Seen>>>,
}

impl Record {
    fn wrote_clashes(&self, now: Moment<'_>) -> Option<Other> {
        let unseen = || (now.bulk && !self.wrote.is_published(now)).then_some(Other { block: self.wrote.block, thread: None, unpublished: true });
        self.wrote.clashes(now).or_else(unseen)
    }

    fn read_clashes(&self, now: Moment<'_>) -> Option<Other> {
        let more = self.readers.iter().flat_map(|readers| readers.iter());
        std::iter::once(&self.read).chain(more).find_map(|seen| seen.clashes(now))
    }

    /// Adds a reader, and forgets those that it makes irrelevant: whoever comes after it comes after them.
    fn note(&mut self, now: Moment<'_>) {
        let warp = |seen: &Seen| (seen.block, agent(seen.thread), seen.time);
        let one = Seen::one(now);
        if let Some(readers) = &mut self.readers {
            readers.retain(|seen| !seen.is_before(now));
        }
        if self.read.is_before(now) {
            self.read = one;
        } else if warp(&self.read) == warp(&one) {
            self.read.thread |= SEVERAL;
        } else if !self.read.is_foreign(now) {
            // A writer that follows a foreign reader is never ordered after it, whoever else has read.
            let readers = self.readers.get_or_insert_default();
            match readers.iter_mut().find(|seen| warp(seen) == warp(&one)) {
                Some(seen) => seen.thread |= SEVERAL,
                None => readers.push(one),
            }
        }
    }
}

/// A record for every two bytes of a memory.
#[derive(Default)]
pub(crate) struct Shadow(Vec<Record>);

impl Shadow {
    pub(crate) fn new(bytes: usize) -> Self {
        let nobody = || Record { wrote: Seen::NOBODY, read: Seen::NOBODY, readers: None };
        Self(std::iter::repeat_with(nobody).take(bytes.div_ceil(CELL)).collect())
    }

    fn cells(&mut self, at: usize, width: usize) -> &mut [Record] {
        &mut self.0[at / CELL..(at + width).div_ceil(CELL)]
    }

    /// Notes a read. `Err`: who wrote there at the same time.
    pub(crate) fn read(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Other> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote_clashes(now) {
                return Err(other);
            }
            record.note(now);
        }
        Ok(())
    }

    /// Notes a write. `Err`: who wrote or read there at the same time.
    pub(crate) fn write(&mut self, at: usize, width: usize, now: Moment<'_>) -> Result<(), Other> {
        for record in self.cells(at, width) {
            if let Some(other) = record.wrote_clashes(now).or_else(|| record.read_clashes(now)) {
                return Err(other);
            }
            record.wrote = Seen::one(now);
            record.readers = None;
        }
        Ok(())
    }
}
