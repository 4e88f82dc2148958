//! Bulk copies (TMA): boxes of tensors to or from shared memory.
//!
//! A load claims its destination at once, and completes when no warp can continue: as late as on any GPU. A store reads its
//! source when it is waited for, also as late as possible.

use crate::WARP;
use crate::arg::Arg;
use crate::cluster::{Cluster, Step};
use crate::fault::Kind;
use crate::flight::{Load, Store};
use crate::op::{Address, Op, Operand};
use crate::shadow::Moment;
use crate::warp::lanes;

/// Alignment of a box in shared memory, in bytes.
const ALIGNMENT: u64 = 128;

impl Cluster<'_, '_, '_> {
    pub(crate) fn bulk(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        for lane in lanes(active) {
            let done = match op {
                Op::TmaLoad { to, map, corner, barrier, blocks } => {
                    self.load_box(warp, lane, [*to, *barrier], (*map, corner), *blocks)
                }
                Op::TmaStore { map, corner, from } => self.store_box(warp, lane, (*map, corner), *from),
                Op::TmaStoreCommit => {
                    self.stores[warp * WARP + lane].close();
                    Ok(())
                }
                Op::TmaStoreWait { pending } => self.wait_stores(warp, lane, *pending),
                _ => Ok(()),
            };
            done.map_err(|kind| (lane, kind))?;
        }
        Ok(())
    }

    /// The argument of a tensor map, which is identified by its offset in the parameters, and the corner of the box.
    fn tensor(&mut self, warp: usize, lane: usize, (map, corner): (Operand, &[Operand])) -> Result<(usize, Vec<i64>), Kind> {
        let registers = self.registers(warp);
        let at = registers.get(map, lane) as usize;
        let corner: Vec<_> = corner.iter().map(|&operand| i64::from(registers.get(operand, lane) as u32 as i32)).collect();
        match self.context.args.map_at(at) {
            Some((arg, map)) if map.axes.len() == corner.len() => Ok((arg, corner)),
            Some((_, map)) => {
                Err(Kind::Misuse(format!("a box of {} dimensions of a tensor of {}", corner.len(), map.axes.len())))
            }
            None => Err(Kind::Misuse(format!("there is no tensor map at {at:#x} of the parameters"))),
        }
    }

    fn load_box(
        &mut self,
        warp: usize,
        lane: usize,
        [to, barrier]: [Address; 2],
        tensor: (Operand, &[Operand]),
        blocks: Option<Operand>,
    ) -> Result<(), Kind> {
        let (arg, corner) = self.tensor(warp, lane, tensor)?;
        let (room, to) = self.resolve_shared(warp, lane, to);
        let (barrier_room, barrier) = self.resolve_shared(warp, lane, barrier);
        if room != barrier_room || to % ALIGNMENT != 0 {
            return Err(Kind::Misuse("a box must start at a multiple of 128 bytes, in the block of its mbarrier".into()));
        }
        let chunks = self.box_of(warp, lane, arg, &corner, to)?;
        let blocks = blocks.map_or(1 << room, |blocks| self.registers(warp).get(blocks, lane));
        let published = self.context.checks.barriers_are_published;
        for room in (0..self.block_states.len()).filter(|room| blocks >> room & 1 == 1) {
            let now = self.position.moment(&self.warps[warp], warp, lane);
            let (thread, time) = self.block_states[room].barriers.start_copy(barrier, published, now)?;
            let now = Moment { block: self.position.first + room as u32, thread, time, bulk: true, ..now };
            let memory = &mut self.block_states[room].memory;
            chunks.iter().try_for_each(|&(at, _)| memory.depart(at, 16, now))?;
            self.loads.push_back(Load { room, barrier, chunks: chunks.clone() });
        }
        Ok(())
    }

    /// The chunks of a box, with their addresses in shared memory; elements outside the tensor are zero.
    fn box_of(&self, warp: usize, lane: usize, arg: usize, corner: &[i64], to: u64) -> Result<Vec<(u64, [u8; 16])>, Kind> {
        let (semantics, pending) = (self.context.semantics, self.pending(warp, lane));
        let Arg::ReadTiles(global, map) = self.context.args.get(arg) else {
            return Err(Kind::Misuse("loads from a tensor that is written".into()));
        };
        let chunk = |i| {
            let mut bytes = [0; 16];
            for (from, at, width) in map.parts(semantics, corner, i) {
                global.memory.unless_pending(at, width, pending.clone())?;
                let value = global.memory.peek(at, width)?;
                bytes[from..from + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
            Ok((map.place(semantics, to, i), bytes))
        };
        (0..map.chunks()).map(chunk).collect()
    }

    /// Completes the oldest load, if there is one.
    pub(crate) fn land(&mut self) -> bool {
        let Some(Load { room, barrier, chunks }) = self.loads.pop_front() else { return false };
        let Self { block_states, .. } = self;
        chunks.iter().for_each(|(at, bytes)| block_states[room].memory.settle(*at, bytes));
        block_states[room].barriers.complete_copy(barrier, 16 * chunks.len(), room as u32);
        true
    }

    fn store_box(&mut self, warp: usize, lane: usize, tensor: (Operand, &[Operand]), from: Address) -> Result<(), Kind> {
        let (arg, corner) = self.tensor(warp, lane, tensor)?;
        let from = self.addresses(warp, from)[lane];
        if !from.is_multiple_of(ALIGNMENT) {
            return Err(Kind::Misuse("a box must start at a multiple of 128 bytes".into()));
        }
        self.stores[warp * WARP + lane].open.push(Store { arg, corner, from });
        Ok(())
    }

    fn wait_stores(&mut self, warp: usize, lane: usize, pending: usize) -> Result<(), Kind> {
        let due = self.stores[warp * WARP + lane].take_until(pending);
        due.into_iter().try_for_each(|store| self.copy_out(warp, lane, store))
    }

    fn copy_out(&mut self, warp: usize, lane: usize, Store { arg, corner, from }: Store) -> Result<(), Kind> {
        let (room, early) = (self.position.rank(warp), self.pending(warp, lane).is_some());
        let (now, semantics) = (self.position.moment(&self.warps[warp], warp, lane), self.context.semantics);
        let Arg::WriteTiles(global, map) = self.context.args.get_mut(arg) else { return Err(Kind::ReadOnly) };
        for i in 0..map.chunks() {
            for (offset, to, width) in map.parts(semantics, &corner, i) {
                if early {
                    return Err(Kind::WritesEarly { at: to });
                }
                let at = map.place(semantics, from, i) + offset as u64;
                let value = self.block_states[room].memory.read(at, width, Moment { bulk: true, ..now })?;
                global.memory.write(to, width, value, now)?;
            }
        }
        Ok(())
    }
}
