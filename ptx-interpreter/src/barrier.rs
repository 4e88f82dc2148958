//! mbarriers: who has yet to arrive, which bytes have yet to come, and what those who wait will have seen.

use std::collections::HashMap;

use crate::fault::Kind;
use crate::shadow::{BULK, Clocks, MAX_BARRIERS, Moment};

/// One mbarrier.
struct Phases {
    /// Which of its block: bulk copies write in its name.
    number: u32,
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
#[derive(Default)]
pub(crate) struct Barriers(HashMap<u64, Phases>);

fn bad(at: u64, reason: &'static str) -> Kind {
    Kind::BadBarrier { at, reason }
}

impl Barriers {
    pub(crate) fn make(&mut self, at: u64, count: u32, now: Moment<'_>) -> Result<(), Kind> {
        let number = self.0.len() as u32;
        match () {
            _ if !at.is_multiple_of(8) => return Err(bad(at, "is misaligned")),
            _ if count == 0 => return Err(bad(at, "waits for nobody")),
            _ if self.0.contains_key(&at) => return Err(bad(at, "is made twice")),
            _ if number as usize >= MAX_BARRIERS => return Err(bad(at, "is one too many for this interpreter")),
            _ => {}
        }
        let made = (now.block, now.thread, now.time);
        let (arriving, arrived) = Default::default();
        self.0
            .insert(at, Phases { number, count, made, published: false, ended: 0, missing: count, bytes: 0, arriving, arrived });
        Ok(())
    }

    /// `fence.mbarrier_init` of a thread.
    pub(crate) fn publish(&mut self, (block, thread): (u32, u32)) {
        let mine = self.0.values_mut().filter(|phases| (phases.made.0, phases.made.1) == (block, thread));
        mine.for_each(|phases| phases.published = true);
    }

    /// The mbarrier at a place, as a thread that has seen it made may use it.
    fn seen(&mut self, at: u64, now: Moment<'_>) -> Result<&mut Phases, Kind> {
        let phases = self.0.get_mut(&at).ok_or(bad(at, "was not made"))?;
        let (block, thread, time) = phases.made;
        if !now.has_seen(block, thread, time) {
            return Err(bad(at, "was made by a thread that nothing orders before this one"));
        }
        if block != now.block && !phases.published {
            return Err(Kind::Unpublished { at });
        }
        Ok(phases)
    }

    /// An arrival, and the bytes that it says will come.
    pub(crate) fn arrive(&mut self, at: u64, bytes: u32, now: Moment<'_>) -> Result<(), Kind> {
        let phases = self.seen(at, now)?;
        phases.missing = phases.missing.checked_sub(1).ok_or(bad(at, "gets more arrivals than its count"))?;
        phases.bytes += i64::from(bytes);
        phases.arriving.join(now.clocks);
        phases.end_if_complete();
        Ok(())
    }

    /// Bytes that a bulk copy will bring: the number of the mbarrier, and of the phase that this is.
    pub(crate) fn departs(&mut self, at: u64, now: Moment<'_>) -> Result<(u32, u32), Kind> {
        let phases = self.seen(at, now)?;
        if !phases.published {
            return Err(Kind::Unpublished { at });
        }
        Ok((BULK + phases.number, phases.ended + 1))
    }

    /// They came. `block` counts from the first of the cluster.
    pub(crate) fn lands(&mut self, at: u64, bytes: usize, block: u32) {
        let phases = self.0.get_mut(&at).expect("it was there when the copy departed");
        phases.bytes -= bytes as i64;
        let (thread, time) = (BULK + phases.number, phases.ended + 1);
        phases.arriving.seen.set(block, thread, time);
        phases.end_if_complete();
    }

    /// What a thread sees that waits for the end of the phase of that parity; None: it has not ended.
    pub(crate) fn ended(&mut self, at: u64, parity: u64, now: Moment<'_>) -> Result<Option<&Clocks>, Kind> {
        let phases = self.seen(at, now)?;
        Ok((u64::from(phases.ended & 1) != parity & 1).then_some(&phases.arrived))
    }

    /// In words.
    pub(crate) fn describe(&self, at: u64, parity: u64) -> String {
        let Some(Phases { count, missing, bytes, ended, .. }) = self.0.get(&at) else { return String::new() };
        let arrived = count - missing;
        format!(
            "the mbarrier at {at:#x} of shared memory (parity {parity}; {ended} phases have ended, in this one {arrived} of \
             {count} have arrived and {bytes} bytes have yet to come)"
        )
    }
}

impl Phases {
    fn end_if_complete(&mut self) {
        if self.missing == 0 && self.bytes == 0 {
            self.ended += 1;
            self.missing = self.count;
            self.arrived = std::mem::take(&mut self.arriving);
        }
    }
}
