//! What touches memory: loads, stores, asynchronous copies, and the matrices that a warp loads.

use std::collections::VecDeque;

use crate::WARP;
use crate::block::{Cluster, Step};
use crate::fault::{Kind, Space};
use crate::launch::{Arg, SPAN};
use crate::matrix;
use crate::op::{Address, MAX_VECTOR, Op, Operand};
use crate::scalar::Row;
use crate::warp::lanes;

/// An asynchronous copy on its way into shared memory.
struct Copy {
    to: u64,
    bytes: Vec<u8>,
}

/// The copies that one thread started: those of each group it closed, and those of the open one.
#[derive(Default)]
pub(crate) struct Copies {
    closed: VecDeque<Vec<Copy>>,
    open: Vec<Copy>,
}

impl Copies {
    pub(crate) fn close(&mut self) {
        self.closed.push_back(std::mem::take(&mut self.open));
    }
}

/// Addresses of another block's shared memory: its rank in the cluster, from 1, times this.
const WINDOW: u64 = 1 << 24;

impl Cluster<'_, '_, '_> {
    /// The block of the cluster that an address of shared memory belongs to, and the place there.
    pub(crate) fn room(&mut self, warp: usize, lane: usize, address: Address) -> (usize, u64) {
        let at = self.addresses(warp, address)[lane];
        match at / WINDOW {
            0 => (self.place.rank(warp), at),
            rank => ((rank as usize - 1).min(self.rooms.len() - 1), at % WINDOW),
        }
    }

    pub(crate) fn addresses(&mut self, warp: usize, address: Address) -> Row {
        self.registers(warp).row(address.base, &mut [0; WARP]).map(|base| base.wrapping_add_signed(address.offset))
    }

    fn read(&mut self, warp: usize, lane: usize, space: Option<Space>, at: u64, width: usize) -> Result<u128, Kind> {
        let now = self.place.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.rooms[self.place.rank(warp)].memory;
        match space {
            Some(Space::Param) => self.context.params.peek(at, width),
            Some(Space::Shared) => shared.read(at, width, now),
            None if at < SPAN => shared.read(at, width, now),
            _ => {
                let pending = self.pending(warp, lane);
                match argument(self.context.args, at, width)? {
                    Arg::Write(global) | Arg::WriteAt(global, _) => {
                        let value = global.memory.read(at % SPAN, width, now)?;
                        global.memory.unless_pending(at % SPAN, width, pending).and(Ok(value))
                    }
                    Arg::Read(global) | Arg::ReadAt(global, _) => {
                        let value = global.memory.peek(at % SPAN, width)?;
                        global.memory.unless_pending(at % SPAN, width, pending).and(Ok(value))
                    }
                    _ => Err(nowhere(at, width)),
                }
            }
        }
    }

    /// The launches before this one that may not have ended as far as a thread knows: from this number on. None: all have.
    pub(crate) fn pending(&self, warp: usize, lane: usize) -> Option<std::ops::Range<u32>> {
        let first = self.context.pending.filter(|_| self.warps[warp].waited >> lane & 1 == 0)?;
        Some(first..self.context.number)
    }

    pub(crate) fn load(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        let Op::Load { space, to, address, width, signed } = op else { return Ok(()) };
        let (at, bits) = (self.addresses(warp, *address), 8 * *width as u32);
        let mut rows = [[0; WARP]; MAX_VECTOR];
        for lane in lanes(active) {
            let value = self.read(warp, lane, *space, at[lane], width * to.len()).map_err(|kind| (lane, kind))?;
            for (i, row) in (0..).zip(&mut rows[..to.len()]) {
                let part = (value >> (i * bits)) as u64 & (u64::MAX >> (64 - bits));
                // A narrow signed value fills the 32 bits of its register with its sign.
                let extend = *signed && bits < 32;
                row[lane] = if extend { ((part << (64 - bits)) as i64 >> (64 - bits)) as u32 as u64 } else { part };
            }
        }
        let mut registers = self.registers(warp);
        to.iter().zip(&rows).for_each(|(&to, row)| registers.set_row(to, active, row));
        Ok(())
    }

    pub(crate) fn store(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        let Op::Store { space, address, from, width } = op else { return Ok(()) };
        let (at, bits) = (self.addresses(warp, *address), 8 * *width as u32);
        for lane in lanes(active) {
            let registers = self.registers(warp);
            let part = |i: usize| u128::from(registers.get(from[i], lane) & (u64::MAX >> (64 - bits))) << (i as u32 * bits);
            let value = (0..from.len()).fold(0, |value, i| value | part(i));
            self.write(warp, lane, *space, at[lane], width * from.len(), value).map_err(|kind| (lane, kind))?;
        }
        Ok(())
    }

    fn write(&mut self, warp: usize, lane: usize, space: Option<Space>, at: u64, width: usize, value: u128) -> Result<(), Kind> {
        let now = self.place.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.rooms[self.place.rank(warp)].memory;
        match space {
            Some(Space::Shared) => shared.write(at, width, value, now),
            None if at < SPAN => shared.write(at, width, value, now),
            Some(Space::Param) => Err(Kind::ReadOnly),
            _ if self.pending(warp, lane).is_some() => Err(Kind::WritesEarly { at: at % SPAN }),
            _ => match argument(self.context.args, at, width)? {
                Arg::Write(global) | Arg::WriteAt(global, _) => global.memory.write(at % SPAN, width, value, now),
                _ => Err(Kind::ReadOnly),
            },
        }
    }

    /// The source is read now; the destination gets it when its group is waited for.
    pub(crate) fn copy_async(
        &mut self,
        warp: usize,
        lane: usize,
        to: Address,
        from: Address,
        width: usize,
        filled: Option<Operand>,
    ) -> Result<(), Kind> {
        let (to, from) = (self.addresses(warp, to)[lane], self.addresses(warp, from)[lane]);
        let filled = filled.map_or(width, |operand| (self.registers(warp).get(operand, lane) as u32 as usize).min(width));
        if !from.is_multiple_of(width as u64) {
            return Err(Kind::Misaligned { space: Space::Global, at: from % SPAN, width });
        }
        let value = if filled == 0 { 0 } else { self.read(warp, lane, Some(Space::Global), from, filled)? };
        let now = self.place.moment(&self.warps[warp], warp, lane);
        self.rooms[self.place.rank(warp)].memory.depart(to, width, now)?;
        self.copies[warp * WARP + lane].open.push(Copy { to, bytes: value.to_le_bytes()[..width].to_vec() });
        Ok(())
    }

    pub(crate) fn wait_copies(&mut self, warp: usize, lane: usize, pending: Option<usize>) -> Result<(), Kind> {
        let now = self.place.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.rooms[self.place.rank(warp)].memory;
        let Copies { closed, open } = &mut self.copies[warp * WARP + lane];
        if pending.is_none() {
            closed.push_back(std::mem::take(open));
        }
        let landing = closed.len().saturating_sub(pending.unwrap_or(0));
        closed.drain(..landing).flatten().try_for_each(|copy| shared.land(copy.to, &copy.bytes, now))
    }

    /// Row i of matrix j is where lane 8·j + i says.
    pub(crate) fn load_matrix(&mut self, warp: usize, to: &[u32], address: Address, transposed: bool) -> Step<()> {
        let at = self.addresses(warp, address);
        for (j, &to) in to.iter().enumerate() {
            let mut fragment = [0; WARP];
            for row in 0..8 {
                let lane = 8 * j + row;
                let line = self.read(warp, lane, Some(Space::Shared), at[lane], 16).map_err(|kind| (lane, kind))?;
                for col in 0..8 {
                    let (holder, half) = if transposed { matrix::holder(col, row) } else { matrix::holder(row, col) };
                    fragment[holder] |= u64::from((line >> (16 * col)) as u16) << (16 * half);
                }
            }
            self.registers(warp).values[to as usize] = fragment;
        }
        Ok(())
    }
}

/// The argument that an address belongs to.
fn argument<'a, 'm>(args: &'a mut [Arg<'m>], at: u64, width: usize) -> Result<&'a mut Arg<'m>, Kind> {
    let number = (at / SPAN).checked_sub(1).ok_or(nowhere(at, width))?;
    args.get_mut(number as usize).ok_or(nowhere(at, width))
}

/// An address that belongs to no argument, such as one behind a null pointer.
fn nowhere(at: u64, width: usize) -> Kind {
    Kind::OutOfBounds { space: Space::Global, at, width, len: 0 }
}
