//! The order of a run: which conversations go into which batch, and where in it the run is.

use std::collections::BTreeMap;
use std::mem;

use lowrank::random::Rng;
use serde::{Deserialize, Serialize};

use super::Dataset;
use crate::chat::Encoded;
use crate::error::{Error, Result};
use crate::model::Tokens;

/// How batches are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchSettings {
    /// Rows in a batch; the last one of an epoch may have fewer.
    pub rows: usize,
    /// With a length, a row is as many conversations as fit into so many tokens; without, it is one conversation. A token attends to those of
    /// its own conversation either way, and positions begin anew with each.
    pub packing: Option<usize>,
    /// How often the data is gone through.
    pub epochs: usize,
    /// The seed of the orders; without one, conversations stay in the order they have.
    pub shuffle: Option<u64>,
}

/// Some conversations, one behind the other without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The tokens, and where each conversation begins and ends.
    pub tokens: Tokens,
    /// For each token the one that follows it in its conversation, if that is of an answer.
    pub labels: Vec<Option<u32>>,
    /// Which conversations of the data these are.
    pub conversations: Vec<usize>,
}

impl Batch {
    /// Conversations as a batch.
    pub fn new<'e>(conversations: impl IntoIterator<Item = (usize, &'e Encoded)>) -> Self {
        let (numbers, examples): (Vec<_>, Vec<_>) = conversations.into_iter().unzip();
        let sequences: Vec<&[u32]> = examples.iter().map(|example| example.ids.as_slice()).collect();
        let label = |example: &Encoded, at: usize| example.answer.get(at + 1)?.then(|| example.ids[at + 1]);
        let labels = examples.iter().flat_map(|example| (0..example.ids.len()).map(|at| label(example, at))).collect();
        Self { tokens: Tokens::batch(&sequences), labels, conversations: numbers }
    }

    /// How many tokens have a label.
    pub fn counted(&self) -> usize {
        self.labels.iter().flatten().count()
    }
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The epoch; the first is 0.
    pub epoch: usize,
    /// The next batch of the epoch; the first is 0.
    pub batch: usize,
    /// A digest of the data and the settings.
    pub data: u64,
}

/// The batches of a run, in order.
#[derive(Clone, Debug)]
pub struct Batches<'d> {
    data: &'d Dataset,
    settings: BatchSettings,
    digest: u64,
    epoch: usize,
    /// Those of the epoch, as the numbers of their conversations.
    batches: Vec<Vec<usize>>,
    next: usize,
}

impl<'d> Batches<'d> {
    /// A run from its beginning. Errors: [`Error::Setting`] for settings that are 0, and a conversation that is longer than a packed row.
    pub fn new(data: &'d Dataset, settings: BatchSettings) -> Result<Self> {
        for (name, value) in [("rows", settings.rows), ("epochs", settings.epochs)] {
            Error::unless(value > 0, name, value, "1 or more")?;
        }
        let longest = data.examples().iter().map(|example| example.ids.len()).max().unwrap_or(0);
        if let Some(room) = settings.packing {
            Error::unless(
                longest <= room,
                "packing",
                room,
                format!("at least the {longest} tokens of the longest conversation"),
            )?;
        }
        let batches = batches(data, &settings, 0);
        Ok(Self { data, settings, digest: digest(data, &settings), epoch: 0, batches, next: 0 })
    }

    /// How many batches the run has, from its beginning.
    pub fn total(&self) -> usize {
        (0..self.settings.epochs).map(|epoch| batches(self.data, &self.settings, epoch).len()).sum()
    }

    /// The epoch that the last batch was of; the first is 0.
    pub fn epoch(&self) -> usize {
        self.epoch
    }

    /// Where the run is.
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, batch: self.next, data: self.digest }
    }

    /// Goes to a place that [`position`](Self::position) gave, in this run or in one before it with the same data and settings.
    ///
    /// Errors: [`Error::Setting`] for a place of other data or settings, or behind the end.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        let Position { epoch, batch, data } = position;
        Error::unless(data == self.digest, "position", "of other data or settings", "of the same, to go on with a run")?;
        let last = self.settings.epochs;
        Error::unless(epoch <= last, "position", format!("in epoch {epoch}"), format!("in one of {last} epochs"))?;
        let batches = batches(self.data, &self.settings, epoch);
        let count = batches.len();
        Error::unless(batch <= count, "position", format!("batch {batch}"), format!("one of {count}"))?;
        *self = Self { epoch, batches, next: batch, ..self.clone() };
        Ok(())
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        if self.next == self.batches.len() && self.epoch + 1 < self.settings.epochs {
            self.epoch += 1;
            self.batches = batches(self.data, &self.settings, self.epoch);
            self.next = 0;
        }
        let conversations = self.batches.get_mut(self.next).map(mem::take)?;
        self.next += 1;
        Some(Batch::new(conversations.into_iter().map(|at| (at, &self.data.examples()[at]))))
    }
}

/// The batches of an epoch: a function of data, settings and epoch.
fn batches(data: &Dataset, settings: &BatchSettings, epoch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..data.len()).collect();
    if let Some(seed) = settings.shuffle {
        let mut random = Rng::new(seed);
        (0..=epoch).for_each(|_| random.shuffle(&mut order));
    }
    let rows = match settings.packing {
        Some(room) => packed(data, &order, room),
        None => order.into_iter().map(|at| vec![at]).collect(),
    };
    rows.chunks(settings.rows).map(<[Vec<usize>]>::concat).collect()
}

/// Each conversation in turn goes into the row that it leaves the least room in, or begins one.
fn packed(data: &Dataset, order: &[usize], room: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &at in order {
        let length = data.examples()[at].ids.len();
        let tightest = by_room.range_mut(length..).next().and_then(|(&free, rows)| Some((rows.pop()?, free, rows.is_empty())));
        if let Some((_, free, true)) = tightest {
            by_room.remove(&free);
        }
        let (row, free) = tightest.map(|(row, free, _)| (row, free)).unwrap_or_else(|| {
            rows.push(Vec::new());
            (rows.len() - 1, room)
        });
        rows[row].push(at);
        by_room.entry(free - length).or_default().push(row);
    }
    rows
}

/// FNV-1a over the tokens and the settings.
fn digest(data: &Dataset, settings: &BatchSettings) -> u64 {
    let option = |value: Option<u64>| [u64::from(value.is_some()), value.unwrap_or(0)];
    let sizes = [settings.rows as u64, settings.epochs as u64];
    let settings = sizes.into_iter().chain(option(settings.packing.map(|room| room as u64))).chain(option(settings.shuffle));
    let tokens = data.examples().iter().flat_map(|example| {
        let each = example.ids.iter().zip(&example.answer).map(|(&id, &answer)| u64::from(id) << 1 | u64::from(answer));
        each.chain([u64::MAX])
    });
    let bytes = settings.chain(tokens).flat_map(u64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
