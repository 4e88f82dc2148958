//! Bulk copies (TMA): boxes of tensors on their way into shared memory, or out of it.
//!
//! A load has claimed its place from the start, and lands when no warp can go on: as late as a GPU could be. A store reads what it
//! stores when it is waited for, which is as late as well.

use std::collections::VecDeque;

use crate::WARP;
use crate::block::{Cluster, Step};
use crate::fault::Kind;
use crate::launch::{Arg, Tiles};
use crate::op::{Address, Op, Operand};
use crate::product::swizzle;
use crate::shadow::Moment;
use crate::warp::lanes;

/// Bytes of a line, whose chunks of 16 are exchanged.
const LINE: u64 = 128;
/// Elements of a chunk.
const CHUNK: i64 = 8;

/// A box on its way into a block's shared memory.
pub(crate) struct Load {
    room: usize,
    barrier: u64,
    chunks: Vec<(u64, [u8; 16])>,
}

/// A box that is to be stored.
#[derive(Clone, Copy)]
pub(crate) struct Store {
    arg: usize,
    corner: [i64; 2],
    from: u64,
}

/// The boxes that one thread stores: those of each group it closed, and those of the open one.
#[derive(Default)]
pub(crate) struct Stores {
    closed: VecDeque<Vec<Store>>,
    open: Vec<Store>,
}

impl Stores {
    pub(crate) fn is_empty(&self) -> bool {
        self.closed.is_empty() && self.open.is_empty()
    }
}

/// Where chunk `i` of a box lies in shared memory, and in the tensor; None: outside of it.
fn place(tiles: Tiles, corner: [i64; 2], from: u64, i: u64) -> (u64, Option<u64>) {
    let (row, chunk) = (i / (LINE / 16), i % (LINE / 16));
    let (x, y) = (corner[0] + chunk as i64 * CHUNK, corner[1] + row as i64);
    let inside = (0..tiles.cols as i64).contains(&x) && (0..tiles.rows as i64).contains(&y);
    (swizzle(from + row * LINE + chunk * 16, LINE), inside.then_some(tiles.offset + (y as u64 * tiles.stride + x as u64) * 2))
}

impl Cluster<'_, '_, '_> {
    pub(crate) fn bulk(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        for lane in lanes(active) {
            let done = match *op {
                Op::LoadBox { to, map, corner, barrier, blocks } => self.load_box(warp, lane, [to, barrier], map, corner, blocks),
                Op::StoreBox { map, corner, from } => self.store_box(warp, lane, map, corner, from),
                Op::CommitStores => {
                    let stores = &mut self.stores[warp * WARP + lane];
                    stores.closed.push_back(std::mem::take(&mut stores.open));
                    Ok(())
                }
                Op::WaitStores { pending } => self.wait_stores(warp, lane, pending),
                _ => Ok(()),
            };
            done.map_err(|kind| (lane, kind))?;
        }
        Ok(())
    }

    /// The argument that a map belongs to, which is passed by its place among the parameters, and the corner of a box.
    fn tensor(&mut self, warp: usize, lane: usize, map: Operand, corner: [Operand; 2]) -> Result<(usize, Tiles, [i64; 2]), Kind> {
        let registers = self.registers(warp);
        let at = registers.get(map, lane) as usize;
        let corner = corner.map(|operand| i64::from(registers.get(operand, lane) as u32 as i32));
        let arg = self.context.kernel.params.iter().position(|&(offset, _)| offset == at);
        match arg.map(|arg| (arg, &self.context.args[arg])) {
            Some((arg, &Arg::ReadTiles(_, tiles) | &Arg::WriteTiles(_, tiles))) if corner[0] % CHUNK == 0 => {
                Ok((arg, tiles, corner))
            }
            Some((_, Arg::ReadTiles(..) | Arg::WriteTiles(..))) => Err(Kind::Misuse("a box that starts inside a chunk".into())),
            _ => Err(Kind::Misuse(format!("there is no tensor map at {at:#x} of the parameters"))),
        }
    }

    fn load_box(
        &mut self,
        warp: usize,
        lane: usize,
        [to, barrier]: [Address; 2],
        map: Operand,
        corner: [Operand; 2],
        blocks: Option<Operand>,
    ) -> Result<(), Kind> {
        let (arg, tiles, corner) = self.tensor(warp, lane, map, corner)?;
        let (room, to) = self.room(warp, lane, to);
        let (barrier_room, barrier) = self.room(warp, lane, barrier);
        if room != barrier_room || to % LINE != 0 {
            return Err(Kind::Misuse("a box must start at a multiple of 128 bytes, in the block of its mbarrier".into()));
        }
        let blocks = blocks.map_or(1 << room, |blocks| self.registers(warp).get(blocks, lane));
        for room in (0..self.rooms.len()).filter(|room| blocks >> room & 1 == 1) {
            let now = self.place.moment(&self.warps[warp], warp, lane);
            let (thread, time) = self.rooms[room].barriers.departs(barrier, now)?;
            let now = Moment { block: self.place.first + room as u32, thread, time, bulk: true, ..now };
            let mut chunks = Vec::new();
            for i in 0..u64::from(tiles.tile[0]) * LINE / 16 {
                let (at, source) = place(tiles, corner, to, i);
                let value = match (source, &self.context.args[arg]) {
                    (None, _) => 0,
                    (Some(source), Arg::ReadTiles(global, _)) => {
                        global.memory.unless_pending(source, 16, self.pending(warp, lane))?;
                        global.memory.peek(source, 16)?
                    }
                    (Some(_), _) => return Err(Kind::Misuse("loads from a tensor that is written".into())),
                };
                self.rooms[room].memory.depart(at, 16, now)?;
                chunks.push((at, value.to_le_bytes()));
            }
            self.loads.push_back(Load { room, barrier, chunks });
        }
        Ok(())
    }

    /// The oldest load lands, if there is one.
    pub(crate) fn land(&mut self) -> bool {
        let Some(Load { room, barrier, chunks }) = self.loads.pop_front() else { return false };
        let Self { rooms, .. } = self;
        chunks.iter().for_each(|(at, bytes)| rooms[room].memory.settle(*at, bytes));
        rooms[room].barriers.lands(barrier, 16 * chunks.len(), room as u32);
        true
    }

    fn store_box(&mut self, warp: usize, lane: usize, map: Operand, corner: [Operand; 2], from: Address) -> Result<(), Kind> {
        let (arg, _, corner) = self.tensor(warp, lane, map, corner)?;
        let from = self.addresses(warp, from)[lane];
        if !from.is_multiple_of(LINE) {
            return Err(Kind::Misuse("a box must start at a multiple of 128 bytes".into()));
        }
        self.stores[warp * WARP + lane].open.push(Store { arg, corner, from });
        Ok(())
    }

    fn wait_stores(&mut self, warp: usize, lane: usize, pending: usize) -> Result<(), Kind> {
        let closed = &mut self.stores[warp * WARP + lane].closed;
        let due: Vec<_> = closed.drain(..closed.len().saturating_sub(pending)).flatten().collect();
        due.into_iter().try_for_each(|store| self.copy_out(warp, lane, store))
    }

    fn copy_out(&mut self, warp: usize, lane: usize, Store { arg, corner, from }: Store) -> Result<(), Kind> {
        let (room, early) = (self.place.rank(warp), self.pending(warp, lane).is_some());
        let now = self.place.moment(&self.warps[warp], warp, lane);
        let Arg::WriteTiles(global, tiles) = &mut self.context.args[arg] else { return Err(Kind::ReadOnly) };
        for i in 0..u64::from(tiles.tile[0]) * LINE / 16 {
            let (at, Some(to)) = place(*tiles, corner, from, i) else { continue };
            if early {
                return Err(Kind::WritesEarly { at: to });
            }
            let value = self.rooms[room].memory.read(at, 16, Moment { bulk: true, ..now })?;
            global.memory.write(to, 16, value, now)?;
        }
        Ok(())
    }
}
