//! A warp: 32 lanes, in groups that share a program counter, and their registers.

use crate::WARP;
use crate::decode::{Operand, Special};
use crate::scalar::Row;

/// Lanes that are at the same instruction, as a bit mask.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub(crate) at: usize,
    pub(crate) lanes: u32,
}

/// Where the lanes of a warp are.
pub(crate) struct Warp {
    /// No two are at the same instruction. Empty: every lane has returned.
    groups: Vec<Group>,
    /// The barrier where every living lane waits.
    pub(crate) waits_at: Option<usize>,
}

impl Warp {
    /// The first `lanes` lanes, at the first instruction.
    pub(crate) fn new(lanes: usize) -> Self {
        let lanes = u32::MAX >> (WARP - lanes);
        Self { groups: vec![Group { at: 0, lanes }], waits_at: None }
    }

    /// Takes out the group that is furthest behind.
    pub(crate) fn take_hindmost(&mut self) -> Option<Group> {
        let hindmost = (0..self.groups.len()).min_by_key(|&i| self.groups[i].at)?;
        Some(self.groups.swap_remove(hindmost))
    }

    /// Puts lanes at an instruction, where they join those that are there.
    pub(crate) fn put(&mut self, at: usize, lanes: u32) {
        match self.groups.iter_mut().find(|group| group.at == at) {
            Some(group) => group.lanes |= lanes,
            None if lanes == 0 => {}
            None => self.groups.push(Group { at, lanes }),
        }
    }

    /// Whether no lane lives but those that were taken out.
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

/// The registers of one warp, and what its lanes know about themselves.
pub(crate) struct Registers<'r> {
    pub(crate) values: &'r mut [Row],
    pub(crate) first_thread: u32,
    pub(crate) threads: u32,
    pub(crate) block: u32,
    pub(crate) blocks: u32,
}

impl Registers<'_> {
    pub(crate) fn get(&self, operand: Operand, lane: usize) -> u64 {
        match operand {
            Operand::Register(register) => self.values[register as usize][lane],
            Operand::Constant(value) => value,
            Operand::Special(special) => u64::from(match special {
                Special::Thread => self.first_thread + lane as u32,
                Special::Threads => self.threads,
                Special::Block => self.block,
                Special::Blocks => self.blocks,
                Special::Lane => lane as u32,
            }),
        }
    }

    /// An operand of every lane; `scratch` holds it if no register does.
    pub(crate) fn row<'a>(&'a self, operand: Operand, scratch: &'a mut Row) -> &'a Row {
        match operand {
            Operand::Register(register) => return &self.values[register as usize],
            Operand::Constant(value) => *scratch = [value; WARP],
            Operand::Special(_) => *scratch = std::array::from_fn(|lane| self.get(operand, lane)),
        }
        scratch
    }

    /// Sets a register of the active lanes.
    pub(crate) fn set_row(&mut self, register: u32, active: u32, row: &Row) {
        let values = &mut self.values[register as usize];
        if active == u32::MAX {
            *values = *row;
        } else {
            lanes(active).for_each(|lane| values[lane] = row[lane]);
        }
    }

    pub(crate) fn set(&mut self, register: u32, lane: usize, value: u64) {
        self.values[register as usize][lane] = value;
    }

    /// The lanes of a mask whose guard holds.
    pub(crate) fn guarded(&self, mask: u32, guard: Option<(u32, bool)>) -> u32 {
        let Some((register, wanted)) = guard else { return mask };
        let values = &self.values[register as usize];
        lanes(mask).filter(|&lane| (values[lane] == 1) == wanted).fold(0, |mask, lane| mask | 1 << lane)
    }
}
