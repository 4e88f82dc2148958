//! mbarriers: who has yet to arrive, which bytes have yet to come, and what those who wait will have seen.

use std::collections::HashMap;

use crate::fault::Kind;
use crate::semantics::Semantics;
use crate::shadow::{BULK, Clocks, MAX_BARRIERS, Moment};

/// One mbarrier.
struct Phases {
    /// Which of its block: bulk copies write in its name.
    number: u32,
    /// The time of the last phase of the one that was at its place before it.
    before: u32,
    /// No `mbarrier.inval` has come.
    valid: bool,
    count: u32,
    /// The thread that made it, and when.
    made: (u32, u32, u32),
    /// TMA and other blocks can see it.
    published: bool,
    /// Phases that have ended.
    ended: u32,
    missing: u32,
    bytes: i64,
    /// What has been handed on in this phase, and what was in the one before.
    arriving: Clocks,
    arrived: Clocks,
}

/// The mbarriers of a block, by their place in its shared memory.
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

    pub(crate) fn make(&mut self, at: u64, count: u32, now: Moment<'_>) -> Result<(), Kind> {
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

    /// `mbarrier.inval`: its place may be used for something else.
    pub(crate) fn unmake(&mut self, at: u64, now: Moment<'_>) -> Result<(), Kind> {
        let phases = self.seen(at, now)?;
        if phases.bytes != 0 {
            return Err(bad(at, "is made invalid while bytes are on their way"));
        }
        phases.valid = false;
        Ok(())
    }

    /// `fence.mbarrier_init` of a thread.
    pub(crate) fn publish(&mut self, (block, thread): (u32, u32)) {
        let mine = self.all.values_mut().filter(|phases| (phases.made.0, phases.made.1) == (block, thread));
        mine.for_each(|phases| phases.published = true);
    }

    /// The mbarrier at a place, as a thread that has seen it made may use it.
    fn seen(&mut self, at: u64, now: Moment<'_>) -> Result<&mut Phases, Kind> {
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

    /// So many arrivals of a thread. `expected`: one that says how many bytes will come.
    pub(crate) fn arrive(&mut self, at: u64, count: u32, expected: Option<u32>, now: Moment<'_>) -> Result<(), Kind> {
        let semantics = self.semantics;
        let phases = self.seen(at, now)?;
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

    /// Bytes that a bulk copy will bring: the number of the mbarrier, and of the phase that this is. `published`: it has to be.
    pub(crate) fn departs(&mut self, at: u64, published: bool, now: Moment<'_>) -> Result<(u32, u32), Kind> {
        let phases = self.seen(at, now)?;
        if published && !phases.published {
            return Err(Kind::Unpublished { at });
        }
        Ok((BULK + phases.number, phases.time()))
    }

    /// They came. `block` counts from the first of the cluster.
    pub(crate) fn lands(&mut self, at: u64, bytes: usize, block: u32) {
        let phases = self.all.get_mut(&at).expect("it was there when the copy departed");
        phases.bytes -= (self.semantics.landed)(bytes as u64);
        let (thread, time) = (BULK + phases.number, phases.time());
        phases.arriving.seen.set(block, thread, time);
        phases.end_if_complete(self.semantics);
    }

    /// What a thread sees that waits for the end of the phase of that parity; None: it has not ended.
    pub(crate) fn ended(&mut self, at: u64, parity: u64, now: Moment<'_>) -> Result<Option<&Clocks>, Kind> {
        let semantics = self.semantics;
        let phases = self.seen(at, now)?;
        Ok((semantics.has_ended)(phases.ended, parity).then_some(&phases.arrived))
    }

    /// In words.
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
    /// The time of this phase: it grows for as long as the block runs.
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
