//! Ranks that are threads of one process: for tests, and for machines without MPI.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Communicator, check_root};
use crate::error::{Error, Result};

/// A rank that is a thread of this process. Sums are made in the order of the ranks, so the bits do not depend on which rank is
/// slow.
///
/// If a rank is dropped while others wait for it, their collectives return [`Error::Device`], which names it. So do collectives
/// that do not match.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The number of collectives that are complete.
    round: u64,
    /// What each rank brought to the collective that is under way.
    brought: Vec<Option<Message>>,
    /// What all ranks brought to the last complete one.
    complete: Arc<Vec<Message>>,
    /// The first rank that was dropped.
    left: Option<usize>,
}

#[derive(Debug, PartialEq)]
enum Message {
    AllReduce(Vec<f32>),
    Broadcast { root: usize, bytes: Vec<u8> },
    Barrier,
}

impl Threads {
    /// The ranks of a group, one for each thread. Give each to a thread of its own. No ranks for size 0.
    pub fn group(size: usize) -> Vec<Self> {
        let brought = (0..size).map(|_| None).collect();
        let state = State { round: 0, brought, complete: Arc::default(), left: None };
        let shared = Arc::new(Shared { size, state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all ranks brought, by rank, once the last has come.
    fn exchange(&self, message: Message) -> Result<Arc<Vec<Message>>> {
        let mut state = self.state();
        let round = state.round;
        state.brought[self.rank] = Some(message);
        if state.brought.iter().all(Option::is_some) {
            state.complete = Arc::new(state.brought.iter_mut().filter_map(Option::take).collect());
            state.round += 1;
            self.shared.changed.notify_all();
            return Ok(Arc::clone(&state.complete));
        }
        while state.round == round {
            if let Some(left) = state.left {
                return Err(failed(format!("rank {left} has ended, and rank {} waits for it", self.rank)));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // The next collective is complete only after this rank has come to it.
        Ok(Arc::clone(&state.complete))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.state().left.get_or_insert(self.rank);
        self.shared.changed.notify_all();
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        let messages = self.exchange(Message::AllReduce(values.to_vec()))?;
        let terms = messages.iter().enumerate().map(|(rank, message)| match message {
            Message::AllReduce(terms) if terms.len() == values.len() => Ok(terms),
            _ => Err(mismatch(self.rank, rank)),
        });
        let terms = terms.collect::<Result<Vec<_>>>()?;
        for (i, value) in values.iter_mut().enumerate() {
            *value = terms[1..].iter().fold(terms[0][i], |sum, terms| sum + terms[i]);
        }
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        check_root(root, self.size())?;
        let messages = self.exchange(Message::Broadcast { root, bytes: bytes.to_vec() })?;
        for (rank, message) in messages.iter().enumerate() {
            match message {
                Message::Broadcast { root: other, bytes: theirs } if *other == root && theirs.len() == bytes.len() => {}
                _ => return Err(mismatch(self.rank, rank)),
            }
        }
        if let Message::Broadcast { bytes: sent, .. } = &messages[root] {
            bytes.copy_from_slice(sent);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let messages = self.exchange(Message::Barrier)?;
        messages.iter().position(|message| *message != Message::Barrier).map_or(Ok(()), |rank| Err(mismatch(self.rank, rank)))
    }
}

fn failed(reason: String) -> Error {
    Error::Device { backend: "threads", reason }
}

fn mismatch(rank: usize, other: usize) -> Error {
    failed(format!("ranks {rank} and {other} called different collectives, or with different numbers of elements"))
}
