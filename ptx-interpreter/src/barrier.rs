//! mbarriers: pending arrivals and bytes, and the clocks that they hand to waiting threads.

use std::collections::HashMap;

use crate::fault::Kind;
use crate::semantics::Semantics;
use crate::shadow::{BULK, Clocks, MAX_BARRIERS, Moment};

/// An mbarrier, and its phases.
struct Phases {
    /// Number in its block: bulk copies use it as their agent.
    number: u32,
    /// Time of the last phase of an earlier mbarrier at the same address.
    before: u32,
    /// False after `mbarrier.inval`.
    valid: bool,
    count: u32,
    /// Block, thread and time of `mbarrier.init`.
    made: (u32, u32, u32),
    /// True if TMA and other blocks can see it, after `fence.mbarrier_init`.
    published: bool,
    /// Number of completed phases.
    ended: u32,
    missing: u32,
    bytes: i64,
    /// Clocks of the arrivals in this phase, and in the previous one.
    arriving: Clocks,
    arrived: Clocks,
}

/// The mbarriers of a block, by their address in shared memory.
pub(crate) struct Barriers {
    semantics: &'static Semantics,
    all: HashMap<u64, Phases>,
}

fn bad(at: u64, reason: &'static str) -> Kind {
    Kind::BadBarrier { at, reason }
}

impl Barriers {
    pub(crate) fn new(semantics: &'static Semantics) -> Self {
        Self { semantics, all: HashMap::new() }
    }

    pub(crate) fn init(&mut self, at: u64, count: u32, now: Moment<'_>) -> Result<(), Kind> {
        let before = self.all.get(&at);
        let number = before.map_or(self.all.len() as u32, |phases| phases.number);
        match () {
            _ if !at.is_multiple_of(8) => return Err(bad(at, "is misaligned")),
            _ if count == 0 => return Err(bad(at, "waits for nobody")),
            _ if before.is_some_and(|phases| phases.valid) => return Err(bad(at, "is made twice")),
            _ if number as usize >= MAX_BARRIERS => return Err(bad(at, "is one too many for this interpreter")),
            _ => {}
        }
        let before = before.map_or(0, Phases::time);
        let made = (now.block, now.thread, now.time);
        let (arriving, arrived) = Default::default();
        let (valid, published, ended, missing, bytes) = (true, false, 0, count, 0);
        let phases = Phases { number, before, valid, count, made, published, ended, missing, bytes, arriving, arrived };
        self.all.insert(at, phases);
        Ok(())
    }

    /// `mbarrier.inval`: the address may be used for something else.
    pub(crate) fn invalidate(&mut self, at: u64, now: Moment<'_>) -> Result<(), Kind> {
        let phases = self.usable(at, now)?;
        if phases.bytes != 0 {
            return Err(bad(at, "is made invalid while bytes are on their way"));
        }
        phases.valid = false;
        Ok(())
    }

    /// `fence.mbarrier_init`, executed by a thread.
    pub(crate) fn publish(&mut self, (block, thread): (u32, u32)) {
        let mine = self.all.values_mut().filter(|phases| (phases.made.0, phases.made.1) == (block, thread));
        mine.for_each(|phases| phases.published = true);
    }

    /// The mbarrier at an address, if the thread has seen its initialisation.
    fn usable(&mut self, at: u64, now: Moment<'_>) -> Result<&mut Phases, Kind> {
        let phases = self.all.get_mut(&at).filter(|phases| phases.valid).ok_or(bad(at, "was not made"))?;
        let (block, thread, time) = phases.made;
        if !now.has_seen(block, thread, time) {
            return Err(bad(at, "was made by a thread that nothing orders before this one"));
        }
        if block != now.block && !phases.published {
            return Err(Kind::Unpublished { at });
        }
        Ok(phases)
    }

    /// `count` arrivals of a thread; with `expected`, one arrival that expects this many bytes.
    pub(crate) fn arrive(&mut self, at: u64, count: u32, expected: Option<u32>, now: Moment<'_>) -> Result<(), Kind> {
        let semantics = self.semantics;
        let phases = self.usable(at, now)?;
        if count == 0 {
            return Err(bad(at, "gets an arrival that counts as none"));
        }
        let count = if expected.is_some() { (semantics.expecting)() } else { count };
        phases.missing = phases.missing.checked_sub(count).ok_or(bad(at, "gets more arrivals than its count"))?;
        phases.bytes += i64::from(expected.unwrap_or(0));
        phases.arriving.join(now.clocks);
        phases.end_if_complete(semantics);
        Ok(())
    }

    /// Starts a bulk copy. Returns its agent, from the number of the mbarrier, and the time of this phase. `published`: the
    /// mbarrier must be.
    pub(crate) fn start_copy(&mut self, at: u64, published: bool, now: Moment<'_>) -> Result<(u32, u32), Kind> {
        let phases = self.usable(at, now)?;
        if published && !phases.published {
            return Err(Kind::Unpublished { at });
        }
        Ok((BULK + phases.number, phases.time()))
    }

    /// Completes a bulk copy of `bytes` bytes. `block` is relative to the cluster.
    pub(crate) fn complete_copy(&mut self, at: u64, bytes: usize, block: u32) {
        let phases = self.all.get_mut(&at).expect("it was there when the copy departed");
        phases.bytes -= (self.semantics.landed)(bytes as u64);
        let (thread, time) = (BULK + phases.number, phases.time());
        phases.arriving.seen.set(block, thread, time);
        phases.end_if_complete(self.semantics);
    }

    /// The clocks for a thread that waits for the phase with this parity; `None` if the phase has not ended.
    pub(crate) fn ended(&mut self, at: u64, parity: u64, now: Moment<'_>) -> Result<Option<&Clocks>, Kind> {
        let semantics = self.semantics;
        let phases = self.usable(at, now)?;
        Ok((semantics.has_ended)(phases.ended, parity).then_some(&phases.arrived))
    }

    /// A description for errors.
    pub(crate) fn describe(&self, at: u64, parity: u64) -> String {
        let Some(Phases { count, missing, bytes, ended, .. }) = self.all.get(&at) else { return String::new() };
        let arrived = count - missing;
        format!(
            "the mbarrier at {at:#x} of shared memory (parity {parity}; {ended} phases have ended, in this one {arrived} of \
             {count} have arrived and {bytes} bytes have yet to come)"
        )
    }
}

impl Phases {
    /// The time of this phase; it increases for as long as the block runs.
    fn time(&self) -> u32 {
        self.before + self.ended + 1
    }

    fn end_if_complete(&mut self, semantics: &Semantics) {
        if (semantics.is_complete)(self.missing, self.bytes) {
            self.ended += 1;
            self.missing = self.count;
            self.arrived = std::mem::take(&mut self.arriving);
        }
    }
}
