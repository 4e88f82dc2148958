//! Memory accesses: loads, stores, asynchronous copies, ldmatrix and stmatrix.

use crate::WARP;
use crate::arg::{Arg, SPAN};
use crate::cluster::{Cluster, Step};
use crate::fault::{Kind, Space};
use crate::flight::Copy;
use crate::op::{Address, MAX_VECTOR, Op, Operand};
use crate::warp::lanes;

impl Cluster<'_, '_, '_> {
    fn read(&mut self, warp: usize, lane: usize, space: Option<Space>, at: u64, width: usize) -> Result<u128, Kind> {
        let now = self.position.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.block_states[self.position.rank(warp)].memory;
        match space {
            Some(Space::Param) => self.context.params.peek(at, width),
            Some(Space::Shared) => shared.read(at, width, now),
            None if at < SPAN => shared.read(at, width, now),
            _ => {
                let pending = self.pending(warp, lane);
                match self.context.args.at_address(at).ok_or(nowhere(at, width))? {
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

    pub(crate) fn load(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        let Op::Load { space, to, address, width, signed } = op else { return Ok(()) };
        let (at, bits) = (self.addresses(warp, *address), 8 * *width as u32);
        let mut rows = [[0; WARP]; MAX_VECTOR];
        for lane in lanes(active) {
            let value = self.read(warp, lane, *space, at[lane], width * to.len()).map_err(|kind| (lane, kind))?;
            for (i, row) in (0..).zip(&mut rows[..to.len()]) {
                let part = (value >> (i * bits)) as u64 & (u64::MAX >> (64 - bits));
                // A signed value of less than 32 bits is sign-extended to 32.
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
        let registers = self.registers(warp);
        let part = |lane, i: usize| u128::from(registers.get(from[i], lane) & (u64::MAX >> (64 - bits))) << (i as u32 * bits);
        let values: [u128; WARP] = std::array::from_fn(|lane| (0..from.len()).fold(0, |value, i| value | part(lane, i)));
        let apart = self.context.checks.stores_are_apart;
        for lane in lanes(active) {
            let is_same = |other: usize| at[other] == at[lane] && values[other] == values[lane];
            if !apart && lanes(active).take_while(|&other| other < lane).any(is_same) {
                continue;
            }
            self.write(warp, lane, *space, at[lane], width * from.len(), values[lane]).map_err(|kind| (lane, kind))?;
        }
        Ok(())
    }

    fn write(&mut self, warp: usize, lane: usize, space: Option<Space>, at: u64, width: usize, value: u128) -> Result<(), Kind> {
        let now = self.position.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.block_states[self.position.rank(warp)].memory;
        match space {
            Some(Space::Shared) => shared.write(at, width, value, now),
            None if at < SPAN => shared.write(at, width, value, now),
            Some(Space::Param) => Err(Kind::ReadOnly),
            _ if self.pending(warp, lane).is_some() => Err(Kind::WritesEarly { at: at % SPAN }),
            _ => match self.context.args.at_address(at).ok_or(nowhere(at, width))? {
                Arg::Write(global) | Arg::WriteAt(global, _) => global.memory.write(at % SPAN, width, value, now),
                _ => Err(Kind::ReadOnly),
            },
        }
    }

    /// `cp.async`: reads the source now, and writes the destination when its group is waited for.
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
        let now = self.position.moment(&self.warps[warp], warp, lane);
        self.block_states[self.position.rank(warp)].memory.depart(to, width, now)?;
        self.copies[warp * WARP + lane].open.push(Copy { to, bytes: value.to_le_bytes()[..width].to_vec() });
        Ok(())
    }

    pub(crate) fn wait_copies(&mut self, warp: usize, lane: usize, pending: Option<usize>) -> Result<(), Kind> {
        let now = self.position.moment(&self.warps[warp], warp, lane);
        let shared = &mut self.block_states[self.position.rank(warp)].memory;
        let copies = &mut self.copies[warp * WARP + lane];
        if pending.is_none() {
            copies.close();
        }
        copies.take_until(pending.unwrap_or(0)).iter().try_for_each(|copy| shared.land(copy.to, &copy.bytes, now))
    }

    /// `ldmatrix`: row i of matrix j is at the address of lane 8·j + i.
    pub(crate) fn load_matrix(&mut self, warp: usize, to: &[u32], address: Address, transposed: bool) -> Step<()> {
        let at = self.addresses(warp, address);
        for (j, &to) in to.iter().enumerate() {
            let mut lines = [0; 8];
            for (lane, line) in (8 * j..).zip(&mut lines) {
                *line = self.read(warp, lane, Some(Space::Shared), at[lane], 16).map_err(|kind| (lane, kind))?;
            }
            let loaded = self.context.semantics.loaded;
            let half = |lane, half| {
                let (line, element) = loaded(lane, half, transposed);
                u64::from((lines[line] >> (16 * element)) as u16) << (16 * half)
            };
            self.registers(warp).values[to as usize] = std::array::from_fn(|lane| half(lane, 0) | half(lane, 1));
        }
        Ok(())
    }

    /// `stmatrix`: row i of matrix j goes to the address of lane 8·j + i.
    pub(crate) fn store_matrix(&mut self, warp: usize, from: &[u32], address: Address, transposed: bool) -> Step<()> {
        let (at, stored) = (self.addresses(warp, address), self.context.semantics.stored);
        for (j, &from) in from.iter().enumerate() {
            let (fragment, mut lines) = (self.registers(warp).values[from as usize], [0u128; 8]);
            for (lane, half) in (0..WARP).flat_map(|lane| [(lane, 0), (lane, 1)]) {
                let (line, element) = stored(lane, half, transposed);
                lines[line] |= u128::from((fragment[lane] >> (16 * half)) as u16) << (16 * element);
            }
            for (lane, line) in (8 * j..).zip(lines) {
                self.write(warp, lane, Some(Space::Shared), at[lane], 16, line).map_err(|kind| (lane, kind))?;
            }
        }
        Ok(())
    }
}

/// The fault of an address outside every argument, such as a null pointer's.
fn nowhere(at: u64, width: usize) -> Kind {
    Kind::OutOfBounds { space: Space::Global, at, width, len: 0 }
}
