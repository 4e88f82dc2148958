//! Batches of an epoch in random order, and the shard of each rank.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::random::{Rng, philox};

/// The part of `0..len` that is this rank's: `len·rank/size .. len·(rank + 1)/size`.
///
/// The parts of all ranks are disjoint, cover everything, and differ in length by at most one; some are empty if there are fewer
/// items than ranks. `0..0` if `rank` is not below `size`.
pub fn shard(len: usize, rank: usize, size: usize) -> Range<usize> {
    if rank >= size {
        return 0..0;
    }
    let edge = |rank: usize| (len as u128 * rank as u128 / size as u128) as usize;
    edge(rank)..edge(rank + 1)
}

/// Where a [`Sampler`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SamplerPosition {
    /// The pass over the samples, from 0.
    pub epoch: u64,
    /// The number of batches of this pass that were taken.
    pub batch: u64,
}

/// The indices of all samples in random order, in batches, epoch after epoch.
///
/// The batches are those of all ranks together: each rank makes the same sampler and takes its [`shard`] of each batch. So a
/// run sees the same batches on any number of ranks, and no sample is lost or used twice. The order of an epoch is a function of
/// the seed and the epoch; a [position](Self::position) is all that a checkpoint needs.
///
/// ```
/// use lowrank::distributed::{Sampler, shard};
///
/// let mut sampler = Sampler::new(10, 4, 7)?; // 10 samples, batches of 4, seed 7
/// let batch = sampler.next_batch();
/// let ranks = [0, 1, 2].map(|rank| &batch[shard(batch.len(), rank, 3)]);
/// assert_eq!(ranks.concat(), batch);
/// # Ok::<(), lowrank::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    batch: usize,
    seed: u64,
    position: SamplerPosition,
    order: Vec<usize>,
}

impl Sampler {
    /// The first batch of the first epoch is next. Errors: [`Error::Value`] for no samples, or batches of none.
    pub fn new(samples: usize, batch: usize, seed: u64) -> Result<Self> {
        Error::unless(samples > 0, "sampler", "samples", samples, "at least 1")?;
        Error::unless(batch > 0, "sampler", "batch", batch, "at least 1")?;
        let mut sampler = Self { batch, seed, position: SamplerPosition::default(), order: (0..samples).collect() };
        sampler.shuffle();
        Ok(sampler)
    }

    /// The indices of the next batch; the last one of an epoch may be shorter.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let SamplerPosition { epoch, batch } = self.position;
        let first = batch as usize * self.batch;
        let indices = self.order[first..self.order.len().min(first + self.batch)].to_vec();
        self.position.batch += 1;
        if self.position.batch == self.batches() {
            self.position = SamplerPosition { epoch: epoch + 1, batch: 0 };
            self.shuffle();
        }
        indices
    }

    /// The number of batches of an epoch.
    pub fn batches(&self) -> u64 {
        self.order.len().div_ceil(self.batch) as u64
    }

    /// The place of the next batch.
    pub fn position(&self) -> SamplerPosition {
        self.position
    }

    /// Goes on at a position. Errors: [`Error::Value`] for a batch that an epoch does not have.
    pub fn seek(&mut self, position: SamplerPosition) -> Result<()> {
        let there = position.batch < self.batches();
        Error::unless(there, "sampler", "batch", position.batch, "below the number of batches of an epoch")?;
        self.position = position;
        self.shuffle();
        Ok(())
    }

    /// Puts the samples into the order of this epoch.
    fn shuffle(&mut self) {
        let words = |number: u64| [number as u32, (number >> 32) as u32];
        let [low, high] = words(self.position.epoch);
        // With 2 as the third word, the numbers differ from those of dropout masks and of an `Rng` with the same seed.
        let [a, b, ..] = philox(words(self.seed), [low, high, 2, 0]);
        self.order.sort_unstable();
        Rng::new(u64::from(a) | (u64::from(b) << 32)).shuffle(&mut self.order);
    }
}
