//! Which adapter of a bank each row of a batch uses.

use std::ops::Range;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// For each row of a batch the slot of a [`Bank`](super::Bank) that it uses, or none.
///
/// Exists only with every slot below the number of slots. The rows are sorted by slot once, here; every layer of a model can use the
/// same assignment.
#[derive(Debug)]
pub struct Assignment<B: Backend> {
    slots: usize,
    slot_of: Vec<u32>,
    /// The rows that use a slot: by slot, then as the caller has them.
    order: Vec<u32>,
    segments: Vec<Segment>,
    tensor: Tensor<B, u32>,
}

/// The rows of a batch that use one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The slot.
    pub slot: usize,
    /// Its range in the list of rows that use a slot, sorted by slot.
    pub(crate) range: Range<usize>,
}

/// Marks a row without an adapter.
pub(crate) const NO_SLOT: u32 = u32::MAX;

impl<B: Backend> Assignment<B> {
    /// `rows` has the slot of each row; `None` is the base layer alone. `slots` is how many the bank has.
    ///
    /// Errors: [`Error::Value`] naming the row whose slot is not below `slots`; [`Error::OutOfMemory`].
    ///
    /// ```
    /// use lowrank::{Cpu, op::Assignment};
    ///
    /// let cpu = Cpu::<f32>::new()?;
    /// let rows = Assignment::new(&cpu, 8, &[Some(5), None, Some(2), Some(5)])?;
    /// let segments: Vec<_> = rows.segments().iter().map(|segment| (segment.slot, rows.rows_of(segment))).collect();
    /// assert_eq!(segments, [(2, &[2][..]), (5, &[0, 3][..])]);
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    pub fn new(backend: &B, slots: usize, rows: &[Option<usize>]) -> Result<Self> {
        Self::for_sequences(backend, slots, rows, 1)
    }

    /// For a batch of sequences, each `length` rows long: `sequences` has the slot of each.
    ///
    /// Errors: as [`new`](Self::new); [`Error::Value`] for more rows than 32 bits can count.
    pub fn for_sequences(backend: &B, slots: usize, sequences: &[Option<usize>], length: usize) -> Result<Self> {
        for (at, slot) in sequences.iter().enumerate().filter_map(|(at, slot)| Some((at, (*slot)?))) {
            let got = || format!("slot {slot} in row {}, of {slots} slots", at.saturating_mul(length));
            if slot >= slots {
                return Err(Error::Value {
                    verb: "assignment",
                    name: "rows",
                    got: got(),
                    want: "below the number of slots".into(),
                });
            }
        }
        let count = sequences.len().checked_mul(length).filter(|&count| count.max(slots) < NO_SLOT as usize);
        let Some(count) = count else {
            let got = format!("{} sequences of {length} rows, {slots} slots", sequences.len());
            return Err(Error::Value { verb: "assignment", name: "rows", got, want: "fewer than 2^32".into() });
        };
        let stored = sequences.iter().map(|slot| slot.map_or(NO_SLOT, |slot| slot as u32));
        let slot_of: Vec<u32> = stored.flat_map(|slot| std::iter::repeat_n(slot, length)).collect();
        let mut order: Vec<u32> = (0..count as u32).filter(|&row| slot_of[row as usize] != NO_SLOT).collect();
        order.sort_by_key(|&row| slot_of[row as usize]); // stable: the rows of a slot stay in the caller's order
        let segments = segments(&order, &slot_of);
        let tensor = upload(backend, &slot_of, &order, &segments)?;
        Ok(Self { slots, slot_of, order, segments, tensor })
    }

    /// The number of rows of the batch.
    pub fn rows(&self) -> usize {
        self.slot_of.len()
    }

    /// Every slot is below this.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The slot of a row; `None` for the base layer alone, and beyond the batch.
    pub fn slot(&self, row: usize) -> Option<usize> {
        self.slot_of.get(row).filter(|&&slot| slot != NO_SLOT).map(|&slot| slot as usize)
    }

    /// The slots that take part, in ascending order, each once. Gradients of a bank come in this order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The rows of a segment, in ascending order.
    pub fn rows_of(&self, segment: &Segment) -> &[u32] {
        &self.order[segment.range.clone()]
    }

    /// The rows that use a slot, sorted by slot.
    pub(crate) fn order(&self) -> &[u32] {
        &self.order
    }

    /// On the device: the slot of each row, [`NO_SLOT`] for none (`rows` numbers); where the rows of each segment begin in the list of
    /// sorted rows, and where the last ends (`segments + 1`); the slot of each segment (`segments`); the sorted rows.
    #[allow(dead_code, reason = "for backends on GPUs")]
    pub(crate) fn tensor(&self) -> &Tensor<B, u32> {
        &self.tensor
    }
}

/// Runs of rows that use the same slot.
fn segments(order: &[u32], slot_of: &[u32]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for (at, &row) in order.iter().enumerate() {
        let slot = slot_of[row as usize] as usize;
        match segments.last_mut().filter(|last| last.slot == slot) {
            Some(last) => last.range.end = at + 1,
            None => segments.push(Segment { slot, range: at..at + 1 }),
        }
    }
    segments
}

fn upload<B: Backend>(backend: &B, slot_of: &[u32], order: &[u32], segments: &[Segment]) -> Result<Tensor<B, u32>> {
    let starts = segments.iter().map(|segment| segment.range.start as u32).chain([order.len() as u32]);
    let slots = segments.iter().map(|segment| segment.slot as u32);
    let all: Vec<u32> = slot_of.iter().copied().chain(starts).chain(slots).chain(order.iter().copied()).collect();
    Tensor::from_slice(backend, (1, all.len()), &all)
}
