//! The state of a cluster of blocks, or of a single block: shared memory, warps, and operations in flight.

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

/// The context of a launch, shared by its blocks.
pub(crate) struct Context<'l, 'm> {
    pub(crate) kernel: &'l Kernel,
    pub(crate) grid: Grid,
    /// Bytes of shared memory of a block.
    pub(crate) shared: usize,
    pub(crate) checks: Checks,
    pub(crate) semantics: &'static Semantics,
    pub(crate) number: u32,
    /// The first launch that may not have ended when this one starts.
    pub(crate) pending: Option<u32>,
    pub(crate) params: Memory,
    pub(crate) args: Args<'l, 'm>,
    pub(crate) budget: u64,
}

/// Optional checks, for code that works on a GPU. All are on by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checks {
    /// Report an mbarrier that TMA uses without `fence.mbarrier_init`. PTX requires the fence; Triton 3.9 uses a barrier of the
    /// block instead.
    pub barriers_are_published: bool,
    /// Report lanes of one store that write the same value to the same address.
    pub stores_are_apart: bool,
}

impl Default for Checks {
    fn default() -> Self {
        Self { barriers_are_published: true, stores_are_apart: true }
    }
}

/// The position of a cluster in the grid. Its warps are numbered across its blocks.
#[derive(Clone, Copy)]
pub(crate) struct Position {
    launch: u32,
    /// Its first block.
    pub(crate) first: u32,
    blocks: u32,
    /// Warps of a block.
    warps: usize,
}

impl Position {
    /// The cluster rank of a warp's block.
    pub(crate) fn rank(self, warp: usize) -> usize {
        warp / self.warps
    }

    /// The block and thread number of a lane of a warp.
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

/// The state that the threads of a block share.
pub(crate) struct BlockState {
    pub(crate) memory: Memory,
    pub(crate) barriers: Barriers,
}

pub(crate) struct Cluster<'c, 'l, 'm> {
    pub(crate) context: &'c mut Context<'l, 'm>,
    pub(crate) position: Position,
    pub(crate) block_states: Vec<BlockState>,
    registers: Vec<Row>,
    /// The instruction count at the last write of each register.
    written: Vec<u64>,
    pub(crate) warps: Vec<Warp>,
    /// Operations in flight, of each thread.
    pub(crate) copies: Vec<Groups<Copy>>,
    pub(crate) stores: Vec<Groups<Store>>,
    pub(crate) loads: VecDeque<Load>,
}

/// The result of a step; a fault has the lane that caused it.
pub(crate) type Step<T> = Result<T, (usize, Kind)>;

pub(crate) fn whole_warp(kind: Kind) -> (usize, Kind) {
    (0, kind)
}

/// Address space of another block's shared memory: the block of cluster rank `i`, from 1, starts at `i · WINDOW`.
const WINDOW: u64 = 1 << 24;

impl<'c, 'l, 'm> Cluster<'c, 'l, 'm> {
    pub(crate) fn new(context: &'c mut Context<'l, 'm>, first: u32) -> Self {
        let (threads, blocks) = (context.grid.threads as usize, context.grid.cluster);
        let one = (0..threads).step_by(WARP).map(|first| (threads - first).min(WARP));
        let (position, all) = (Position { launch: context.number, first, blocks, warps: one.len() }, blocks as usize * one.len());
        let warps = (0..blocks).flat_map(|_| one.clone().map(Warp::new)).collect();
        let room = || BlockState { memory: Memory::shared(context.shared), barriers: Barriers::new(context.semantics) };
        let block_states = (0..blocks).map(|_| room()).collect();
        let registers = context.kernel.registers * all;
        let mut cluster = Self {
            context,
            position,
            block_states,
            registers: vec![[0; WARP]; registers],
            written: vec![0; registers],
            warps,
            copies: (0..all * WARP).map(|_| Groups::default()).collect(),
            stores: (0..all * WARP).map(|_| Groups::default()).collect(),
            loads: VecDeque::new(),
        };
        (0..all).for_each(|warp| cluster.release(warp, true));
        cluster
    }

    pub(crate) fn registers(&mut self, warp: usize) -> Registers<'_> {
        let (count, rank) = (self.context.kernel.registers, self.position.rank(warp) as u32);
        let range = warp * count..(warp + 1) * count;
        Registers {
            values: &mut self.registers[range.clone()],
            written: &mut self.written[range],
            now: u64::MAX - self.context.budget,
            rank,
            first_thread: (warp % self.position.warps * WARP) as u32,
            block: self.position.first + rank,
            grid: self.context.grid,
        }
    }

    pub(crate) fn addresses(&mut self, warp: usize, address: Address) -> Row {
        self.registers(warp).row(address.base, &mut [0; WARP]).map(|base| base.wrapping_add_signed(address.offset))
    }

    /// Splits an address of shared memory into a block of the cluster and an address there.
    pub(crate) fn resolve_shared(&mut self, warp: usize, lane: usize, address: Address) -> (usize, u64) {
        let at = self.addresses(warp, address)[lane];
        match at / WINDOW {
            0 => (self.position.rank(warp), at),
            rank => ((rank as usize - 1).min(self.block_states.len() - 1), at % WINDOW),
        }
    }

    /// Earlier launches that may not have ended as far as a thread knows, by number; `None` if all have.
    pub(crate) fn pending(&self, warp: usize, lane: usize) -> Option<std::ops::Range<u32>> {
        let first = self.context.pending.filter(|_| self.warps[warp].waited >> lane & 1 == 0)?;
        Some(first..self.context.number)
    }

    /// Advances the warp's clock: later work is not covered by what it has released. `together`: its lanes have converged.
    pub(crate) fn release(&mut self, warp: usize, together: bool) {
        let (_, thread) = self.position.thread(warp, 0);
        let (rank, state) = (self.position.rank(warp) as u32, &mut self.warps[warp]);
        state.time += 1;
        state.clocks.seen.set(rank, thread, state.time);
        if together {
            state.converged = state.time;
        }
    }
}
