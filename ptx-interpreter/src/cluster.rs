//! Blocks that run together, a cluster or a single one: what they share, and where they stand in the grid.

use std::collections::VecDeque;

use crate::WARP;
use crate::arg::Args;
use crate::barrier::Barriers;
use crate::fault::Kind;
use crate::flight::{Copy, Groups, Load, Store};
use crate::memory::Memory;
use crate::op::Address;
use crate::parse::Kernel;
use crate::scalar::Row;
use crate::semantics::Semantics;
use crate::shadow::Moment;
use crate::warp::{Grid, Registers, Warp};

/// What all blocks of a launch share.
pub(crate) struct Context<'l, 'm> {
    pub(crate) kernel: &'l Kernel,
    pub(crate) grid: Grid,
    /// Bytes of shared memory of a block.
    pub(crate) shared: usize,
    pub(crate) checks: Checks,
    pub(crate) semantics: &'static Semantics,
    pub(crate) number: u32,
    /// The first of the launches that may not have ended when this one begins.
    pub(crate) pending: Option<u32>,
    pub(crate) params: Memory,
    pub(crate) args: Args<'l, 'm>,
    pub(crate) budget: u64,
}

/// What is reported although a GPU does as was meant: all of it, unless a launch says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checks {
    /// TMA uses an mbarrier with no `fence.mbarrier_init` since it was made. PTX asks for the fence; Triton 3.9 has a barrier of the
    /// block in its place.
    pub barriers_are_published: bool,
    /// Lanes of one store write the same value to the same place.
    pub stores_are_apart: bool,
}

impl Default for Checks {
    fn default() -> Self {
        Self { barriers_are_published: true, stores_are_apart: true }
    }
}

/// Where a cluster stands in the grid. Its warps are numbered through its blocks.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    launch: u32,
    /// The first of its blocks.
    pub(crate) first: u32,
    blocks: u32,
    /// Of a block.
    warps: usize,
}

impl Place {
    /// The rank of the block of a warp in the cluster.
    pub(crate) fn rank(self, warp: usize) -> usize {
        warp / self.warps
    }

    /// The block of a warp, and a thread's number there.
    pub(crate) fn thread(self, warp: usize, lane: usize) -> (u32, u32) {
        (self.first + self.rank(warp) as u32, (warp % self.warps * WARP + lane) as u32)
    }

    pub(crate) fn moment(self, warp: &Warp, number: usize, lane: usize) -> Moment<'_> {
        let (block, thread) = self.thread(number, lane);
        let Warp { time, converged, ref clocks, .. } = *warp;
        let (cluster, actor) = ((self.first, self.blocks), (block, thread));
        Moment { launch: self.launch, cluster, block, thread, time, actor, converged, clocks, bulk: false }
    }
}

/// What the threads of a block share.
pub(crate) struct Room {
    pub(crate) memory: Memory,
    pub(crate) barriers: Barriers,
}

pub(crate) struct Cluster<'c, 'l, 'm> {
    pub(crate) context: &'c mut Context<'l, 'm>,
    pub(crate) place: Place,
    pub(crate) rooms: Vec<Room>,
    registers: Vec<Row>,
    /// When each register was written.
    written: Vec<u64>,
    pub(crate) warps: Vec<Warp>,
    /// Of each thread.
    pub(crate) copies: Vec<Groups<Copy>>,
    pub(crate) stores: Vec<Groups<Store>>,
    pub(crate) loads: VecDeque<Load>,
}

/// A fault of a lane, or of the warp.
pub(crate) type Step<T> = Result<T, (usize, Kind)>;

pub(crate) fn whole_warp(kind: Kind) -> (usize, Kind) {
    (0, kind)
}

/// Addresses of another block's shared memory: its rank in the cluster, from 1, times this.
const WINDOW: u64 = 1 << 24;

impl<'c, 'l, 'm> Cluster<'c, 'l, 'm> {
    pub(crate) fn new(context: &'c mut Context<'l, 'm>, first: u32) -> Self {
        let (threads, blocks) = (context.grid.threads as usize, context.grid.cluster);
        let one = (0..threads).step_by(WARP).map(|first| (threads - first).min(WARP));
        let (place, all) = (Place { launch: context.number, first, blocks, warps: one.len() }, blocks as usize * one.len());
        let warps = (0..blocks).flat_map(|_| one.clone().map(Warp::new)).collect();
        let room = || Room { memory: Memory::shared(context.shared), barriers: Barriers::new(context.semantics) };
        let rooms = (0..blocks).map(|_| room()).collect();
        let registers = context.kernel.registers * all;
        let mut cluster = Self {
            context,
            place,
            rooms,
            registers: vec![[0; WARP]; registers],
            written: vec![0; registers],
            warps,
            copies: (0..all * WARP).map(|_| Groups::default()).collect(),
            stores: (0..all * WARP).map(|_| Groups::default()).collect(),
            loads: VecDeque::new(),
        };
        (0..all).for_each(|warp| cluster.hand_on(warp, true));
        cluster
    }

    pub(crate) fn registers(&mut self, warp: usize) -> Registers<'_> {
        let (count, rank) = (self.context.kernel.registers, self.place.rank(warp) as u32);
        let range = warp * count..(warp + 1) * count;
        Registers {
            values: &mut self.registers[range.clone()],
            written: &mut self.written[range],
            now: u64::MAX - self.context.budget,
            rank,
            first_thread: (warp % self.place.warps * WARP) as u32,
            block: self.place.first + rank,
            grid: self.context.grid,
        }
    }

    pub(crate) fn addresses(&mut self, warp: usize, address: Address) -> Row {
        self.registers(warp).row(address.base, &mut [0; WARP]).map(|base| base.wrapping_add_signed(address.offset))
    }

    /// The block of the cluster that an address of shared memory belongs to, and the place there.
    pub(crate) fn room(&mut self, warp: usize, lane: usize, address: Address) -> (usize, u64) {
        let at = self.addresses(warp, address)[lane];
        match at / WINDOW {
            0 => (self.place.rank(warp), at),
            rank => ((rank as usize - 1).min(self.rooms.len() - 1), at % WINDOW),
        }
    }

    /// The launches before this one that may not have ended as far as a thread knows: from this number on. None: all have.
    pub(crate) fn pending(&self, warp: usize, lane: usize) -> Option<std::ops::Range<u32>> {
        let first = self.context.pending.filter(|_| self.warps[warp].waited >> lane & 1 == 0)?;
        Some(first..self.context.number)
    }

    /// What the warp did until now is what it hands on; what it does from now on is not. `together`: all its lanes have come.
    pub(crate) fn hand_on(&mut self, warp: usize, together: bool) {
        let (_, thread) = self.place.thread(warp, 0);
        let (rank, state) = (self.place.rank(warp) as u32, &mut self.warps[warp]);
        state.time += 1;
        state.clocks.seen.set(rank, thread, state.time);
        if together {
            state.converged = state.time;
        }
    }
}
