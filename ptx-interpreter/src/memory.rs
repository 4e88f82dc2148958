//! Memory that tracks which bytes were written.

use std::ops::Range;

use crate::fault::{Kind, Space};
use crate::shadow::{Conflict, Moment, Shadow};

/// The state of a byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unwritten,
    /// An asynchronous copy to it was started and not waited for.
    InFlight,
    Written,
}

/// Bytes, their states, and their accesses.
pub(crate) struct Memory {
    space: Space,
    bytes: Vec<u8>,
    state: Vec<State>,
    /// `None`: never written, so that there are no races.
    shadow: Option<Shadow>,
}

impl Memory {
    /// The shared memory of a block, not initialised.
    pub(crate) fn shared(len: usize) -> Self {
        let shadow = Some(Shadow::new(len));
        Self { space: Space::Shared, bytes: vec![0; len], state: vec![State::Unwritten; len], shadow }
    }

    /// The bytes of a kernel's parameters.
    pub(crate) fn params(bytes: Vec<u8>) -> Self {
        let state = vec![State::Written; bytes.len()];
        Self { space: Space::Param, bytes, state, shadow: None }
    }

    /// The index of `width` bytes from `at`, if they are inside and aligned.
    pub(crate) fn place(&self, at: u64, width: usize) -> Result<usize, Kind> {
        let (space, len) = (self.space, self.bytes.len());
        let inside = at.checked_add(width as u64).is_some_and(|end| end <= len as u64);
        if !inside {
            return Err(Kind::OutOfBounds { space, at, width, len });
        }
        if !at.is_multiple_of(width as u64) {
            return Err(Kind::Misaligned { space, at, width });
        }
        Ok(at as usize)
    }

    /// Reads up to 16 bytes, the first in the lowest bits.
    pub(crate) fn read(&mut self, at: u64, width: usize, now: Moment<'_>) -> Result<u128, Kind> {
        let value = self.peek(at, width)?;
        self.note_read(at, width, now)?;
        Ok(value)
    }

    /// Reads without recording the access, for memory that nothing writes meanwhile.
    pub(crate) fn peek(&self, at: u64, width: usize) -> Result<u128, Kind> {
        let place = self.readable(at, width)?;
        Ok(number(&self.bytes[place..place + width]))
    }

    /// `Err` if the bytes were written by one of the launches in `pending`, which may not have ended.
    pub(crate) fn unless_pending(&self, at: u64, width: usize, pending: Option<Range<u32>>) -> Result<(), Kind> {
        let Some((shadow, pending)) = self.shadow.as_ref().zip(pending) else { return Ok(()) };
        if shadow.was_written_by(at as usize, width, &pending) { Err(Kind::ReadsEarly { at }) } else { Ok(()) }
    }

    fn readable(&self, at: u64, width: usize) -> Result<usize, Kind> {
        let place = self.place(at, width)?;
        let states = &self.state[place..place + width];
        let (fours, rest) = states.as_chunks::<4>();
        if fours.iter().all(|four| *four == [State::Written; 4]) && rest.iter().all(|&state| state == State::Written) {
            return Ok(place);
        }
        let in_flight = states.contains(&State::InFlight);
        Err(if in_flight { Kind::InFlight { at } } else { Kind::Uninitialised { space: self.space, at } })
    }

    fn note_read(&mut self, at: u64, width: usize, now: Moment<'_>) -> Result<(), Kind> {
        let space = self.space;
        let Some(shadow) = &mut self.shadow else { return Ok(()) };
        shadow.read(at as usize, width, now).map_err(|other| race(space, at, other))
    }

    /// Writes up to 16 bytes, the lowest bits first.
    pub(crate) fn write(&mut self, at: u64, width: usize, value: u128, now: Moment<'_>) -> Result<(), Kind> {
        self.claim(at, width, State::Written, now)?;
        self.bytes[at as usize..at as usize + width].copy_from_slice(&value.to_le_bytes()[..width]);
        Ok(())
    }

    /// Starts an asynchronous copy to these bytes, which must not be accessed until it completes.
    pub(crate) fn depart(&mut self, at: u64, width: usize, now: Moment<'_>) -> Result<(), Kind> {
        self.claim(at, width, State::InFlight, now)
    }

    /// Completes a copy, as a write of the thread that waited for it.
    pub(crate) fn land(&mut self, at: u64, bytes: &[u8], now: Moment<'_>) -> Result<(), Kind> {
        let range = at as usize..at as usize + bytes.len();
        self.state[range.clone()].fill(State::Unwritten);
        self.claim(at, bytes.len(), State::Written, now)?;
        self.bytes[range].copy_from_slice(bytes);
        Ok(())
    }

    /// Completes a bulk copy, whose bytes were claimed for its agent when it started.
    pub(crate) fn settle(&mut self, at: u64, bytes: &[u8]) {
        let range = at as usize..at as usize + bytes.len();
        self.state[range.clone()].fill(State::Written);
        self.bytes[range].copy_from_slice(bytes);
    }

    fn claim(&mut self, at: u64, width: usize, state: State, now: Moment<'_>) -> Result<(), Kind> {
        let (place, space) = (self.place(at, width)?, self.space);
        let states = &mut self.state[place..place + width];
        if states.contains(&State::InFlight) {
            return Err(Kind::InFlight { at });
        }
        states.fill(state);
        let Some(shadow) = &mut self.shadow else { return Err(Kind::ReadOnly) };
        shadow.write(place, width, now).map_err(|other| race(space, at, other))
    }
}

/// Up to 16 bytes, the first in the lowest bits.
fn number(bytes: &[u8]) -> u128 {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return u128::from(u32::from_le_bytes(four)); // the most frequent case
    }
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u128::from(byte))
}

fn race(space: Space, at: u64, other: Conflict) -> Kind {
    match other {
        Conflict { unpublished: true, .. } => Kind::Unpublished { at },
        Conflict { block, thread, .. } => Kind::Race { space, at, other_block: block, other_thread: thread },
    }
}

/// A device allocation, which tracks the bytes that were written.
pub struct Global {
    pub(crate) memory: Memory,
}

impl Global {
    /// Uninitialised memory: reading it is a fault.
    pub fn uninitialised(len: usize) -> Self {
        let memory = Memory { space: Space::Global, bytes: vec![0; len], state: vec![State::Unwritten; len], shadow: None };
        Self { memory }
    }

    /// Memory with a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut global = Self::uninitialised(bytes.len());
        global.copy_from(bytes);
        global
    }

    /// Overwrites it from the start.
    pub fn copy_from(&mut self, bytes: &[u8]) {
        self.memory.bytes[..bytes.len()].copy_from_slice(bytes);
        self.memory.state[..bytes.len()].fill(State::Written);
    }

    /// The contents; bytes that were never written are 0.
    pub fn bytes(&self) -> &[u8] {
        &self.memory.bytes
    }

    /// True if every byte was written.
    pub fn is_initialised(&self) -> bool {
        self.memory.state.iter().all(|&state| state == State::Written)
    }

    /// Starts tracking accesses, for a launch that may write here.
    pub(crate) fn watch(&mut self) {
        let len = self.memory.bytes.len();
        self.memory.shadow.get_or_insert_with(|| Shadow::new(len));
    }
}
