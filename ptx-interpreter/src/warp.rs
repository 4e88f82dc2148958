//! A warp: 32 lanes, in groups that share a program counter, and their registers.

use crate::WARP;
use crate::flight::Products;
use crate::op::{Operand, Special};
use crate::scalar::Row;
use crate::shadow::Clocks;

/// The event that a group waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// A barrier of the block, for this many threads; `None`: for all living ones.
    Barrier { number: u32, threads: Option<u32> },
    /// The end of a phase of an mbarrier in the cluster.
    Phase { block: usize, barrier: u64, parity: u64 },
    /// The barrier of the cluster.
    Cluster,
    /// Other lanes of the warp, at the same instruction.
    Lanes,
}

/// A group of lanes at the same instruction, as a bit mask.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub(crate) at: usize,
    pub(crate) lanes: u32,
    pub(crate) waits: Option<Wait>,
}

/// The program counters of a warp's lanes, and its clocks.
pub(crate) struct Warp {
    /// Groups of lanes; no two running groups are at the same instruction. Empty: every lane has returned.
    pub(crate) groups: Vec<Group>,
    /// The warp's time, which is also in its clocks, and the time at which it was last converged.
    pub(crate) time: u32,
    pub(crate) converged: u32,
    pub(crate) clocks: Clocks,
    pub(crate) products: Products,
    /// Instruction count of the last `wgmma.fence`.
    pub(crate) fenced: u64,
    pub(crate) arrived_in_cluster: bool,
    /// Lanes that have executed `griddepcontrol.wait`.
    pub(crate) waited: u32,
}

impl Warp {
    /// A warp of `lanes` lanes, at the first instruction.
    pub(crate) fn new(lanes: usize) -> Self {
        let groups = vec![Group { at: 0, lanes: u32::MAX >> (WARP - lanes), waits: None }];
        let (clocks, products) = Default::default();
        Self { groups, time: 0, converged: 0, clocks, products, fenced: 0, arrived_in_cluster: false, waited: 0 }
    }

    /// Removes the running group with the smallest program counter.
    pub(crate) fn take_hindmost(&mut self) -> Option<Group> {
        let running = (0..self.groups.len()).filter(|&i| self.groups[i].waits.is_none());
        let hindmost = running.min_by_key(|&i| self.groups[i].at)?;
        Some(self.groups.swap_remove(hindmost))
    }

    /// Adds lanes at an instruction, and merges them with a group there.
    pub(crate) fn put(&mut self, at: usize, lanes: u32) {
        match self.groups.iter_mut().find(|group| group.at == at && group.waits.is_none()) {
            Some(group) => group.lanes |= lanes,
            None if lanes == 0 => {}
            None => self.groups.push(Group { at, lanes, waits: None }),
        }
    }

    /// Adds lanes that wait, and then continue at an instruction.
    pub(crate) fn put_waiting(&mut self, at: usize, lanes: u32, wait: Wait) {
        self.groups.push(Group { at, lanes, waits: Some(wait) });
    }

    /// Removes the lanes that wait at an instruction for others of the warp.
    pub(crate) fn take_waiting_lanes(&mut self, at: usize) -> u32 {
        let waiting = self.groups.iter().position(|group| group.at == at && group.waits == Some(Wait::Lanes));
        waiting.map_or(0, |i| self.groups.swap_remove(i).lanes)
    }

    /// The living lanes, without removed groups.
    pub(crate) fn living(&self) -> u32 {
        self.groups.iter().fold(0, |living, group| living | group.lanes)
    }

    /// True if no lane lives except in removed groups.
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
}

/// The lanes of a mask, in order.
pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(lane)
    })
}

/// The size of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks along x, y and z.
    pub(crate) blocks: [u32; 3],
    /// Blocks of a cluster.
    pub(crate) cluster: u32,
    /// Threads of a block.
    pub(crate) threads: u32,
}

impl Grid {
    /// The index of a block along an axis.
    fn along(&self, axis: usize, block: u32) -> u32 {
        block / self.blocks[..axis].iter().product::<u32>() % self.blocks[axis]
    }
}

/// The registers of a warp, and its special registers.
pub(crate) struct Registers<'r> {
    pub(crate) values: &'r mut [Row],
    /// The instruction count at the last write of each register.
    pub(crate) written: &'r mut [u64],
    pub(crate) now: u64,
    pub(crate) rank: u32,
    pub(crate) first_thread: u32,
    pub(crate) block: u32,
    pub(crate) grid: Grid,
}

impl Registers<'_> {
    pub(crate) fn get(&self, operand: Operand, lane: usize) -> u64 {
        match operand {
            Operand::Register(register) => self.values[register as usize][lane],
            Operand::Constant(value) => value,
            Operand::Special(special) => u64::from(match special {
                Special::Thread => self.first_thread + lane as u32,
                Special::Threads => self.grid.threads,
                Special::Block(axis) => self.grid.along(axis, self.block),
                Special::Blocks(axis) => self.grid.blocks[axis],
                Special::Lane => lane as u32,
                Special::Rank => self.rank,
                Special::Ranks => self.grid.cluster,
            }),
        }
    }

    /// An operand in every lane; `scratch` holds it if it is not a register.
    pub(crate) fn row<'a>(&'a self, operand: Operand, scratch: &'a mut Row) -> &'a Row {
        match operand {
            Operand::Register(register) => return &self.values[register as usize],
            Operand::Constant(value) => *scratch = [value; WARP],
            Operand::Special(_) => *scratch = std::array::from_fn(|lane| self.get(operand, lane)),
        }
        scratch
    }

    /// Sets a register in the active lanes.
    pub(crate) fn set_row(&mut self, register: u32, active: u32, row: &Row) {
        self.written[register as usize] = self.now;
        let values = &mut self.values[register as usize];
        if active == u32::MAX {
            *values = *row;
        } else {
            lanes(active).for_each(|lane| values[lane] = row[lane]);
        }
    }

    pub(crate) fn set(&mut self, register: u32, lane: usize, value: u64) {
        self.written[register as usize] = self.now;
        self.values[register as usize][lane] = value;
    }

    /// The lanes of a mask whose guard holds.
    pub(crate) fn guarded(&self, mask: u32, guard: Option<(u32, bool)>) -> u32 {
        let Some((register, wanted)) = guard else { return mask };
        let values = &self.values[register as usize];
        lanes(mask).filter(|&lane| (values[lane] == 1) == wanted).fold(0, |mask, lane| mask | 1 << lane)
    }
}
