//! A block: its warps in turn, each until it waits at a barrier; then all of them go on.

use std::collections::VecDeque;

use crate::WARP;
use crate::decode::{Address, Half, Instruction, MAX_VECTOR, Op, Operand, Shuffle};
use crate::fault::{Fault, Kind, Space};
use crate::launch::{Arg, Context, SPAN};
use crate::matrix;
use crate::memory::Memory;
use crate::scalar::{Function, Row};
use crate::shadow::Moment;
use crate::warp::{Registers, Warp, lanes};

/// An asynchronous copy on its way into shared memory.
struct Copy {
    to: u64,
    bytes: Vec<u8>,
}

/// The copies that one thread started: those of each group it closed, and those of the open one.
#[derive(Default)]
struct Copies {
    closed: VecDeque<Vec<Copy>>,
    open: Vec<Copy>,
}

pub(crate) struct Block<'c, 'l, 'm> {
    context: &'c mut Context<'l, 'm>,
    index: u32,
    began: u64,
    shared: Memory,
    registers: Vec<Row>,
    warps: Vec<Warp>,
    copies: Vec<Copies>,
}

/// A fault of a lane, or of the warp.
type Step<T> = Result<T, (usize, Kind)>;

fn whole_warp(kind: Kind) -> (usize, Kind) {
    (0, kind)
}

impl<'c, 'l, 'm> Block<'c, 'l, 'm> {
    pub(crate) fn new(context: &'c mut Context<'l, 'm>, index: u32) -> Self {
        let threads = context.launch.block as usize;
        let warps: Vec<_> = (0..threads).step_by(WARP).map(|first| Warp::new((threads - first).min(WARP))).collect();
        let shared = Memory::shared(context.kernel.static_shared + context.launch.shared);
        let registers = vec![[0; WARP]; context.kernel.registers * warps.len()];
        let copies = (0..threads).map(|_| Copies::default()).collect();
        context.time += 1;
        let began = context.time;
        Self { context, index, began, shared, registers, warps, copies }
    }

    /// Runs every warp to the next barrier, until all have returned.
    pub(crate) fn run(mut self) -> Result<(), Fault> {
        loop {
            for warp in 0..self.warps.len() {
                self.run_warp(warp)?;
            }
            let mut waiting = self.warps.iter().enumerate().filter_map(|(warp, state)| Some((warp, state.waits_at?)));
            let Some((_, barrier)) = waiting.next() else { return Ok(()) };
            if let Some((warp, other)) = waiting.find(|&(_, other)| other != barrier) {
                return Err(self.fault(warp, other, whole_warp(Kind::DivergedBarrier)));
            }
            self.context.time += 1;
            self.warps.iter_mut().for_each(|warp| warp.waits_at = None);
        }
    }

    fn fault(&self, warp: usize, at: usize, (lane, kind): (usize, Kind)) -> Fault {
        let (kernel, thread) = (self.context.kernel, (warp * WARP + lane) as u32);
        Fault { kernel: kernel.name.clone(), line: kernel.code[at].line, block: self.index, thread, kind }
    }

    /// Steps until every lane has returned or waits at one barrier.
    fn run_warp(&mut self, warp: usize) -> Result<(), Fault> {
        let kernel = self.context.kernel;
        while self.warps[warp].waits_at.is_none() {
            let Some(group) = self.warps[warp].take_hindmost() else { return Ok(()) };
            let Some(instruction) = kernel.code.get(group.at) else { continue };
            let step = self.step(warp, group.at, group.lanes, instruction);
            step.map_err(|fault| self.fault(warp, group.at, fault))?;
        }
        Ok(())
    }

    /// One instruction for the lanes of a group, and where they go next.
    fn step(&mut self, warp: usize, at: usize, group: u32, instruction: &Instruction) -> Step<()> {
        self.context.budget = self.context.budget.checked_sub(1).ok_or(whole_warp(Kind::Runaway))?;
        let active = self.registers(warp).guarded(group, instruction.guard);
        if active == 0 {
            self.warps[warp].put(at + 1, group);
            return Ok(());
        }
        let whole = self.warps[warp].is_empty() && active == group;
        match instruction.op {
            Op::Branch { to } => {
                self.warps[warp].put(to, active);
                self.warps[warp].put(at + 1, group & !active);
                return Ok(());
            }
            Op::Return => {
                self.warps[warp].put(at + 1, group & !active);
                return Ok(());
            }
            Op::Barrier if !whole => return Err((active.trailing_zeros() as usize, Kind::DivergedBarrier)),
            Op::Barrier => self.warps[warp].waits_at = Some(at),
            ref op => self.execute(warp, active, group == u32::MAX && whole, op)?,
        }
        self.warps[warp].put(at + 1, group);
        Ok(())
    }

    fn registers(&mut self, warp: usize) -> Registers<'_> {
        let count = self.context.kernel.registers;
        Registers {
            values: &mut self.registers[warp * count..(warp + 1) * count],
            first_thread: (warp * WARP) as u32,
            threads: self.context.launch.block,
            block: self.index,
            blocks: self.context.launch.grid,
        }
    }

    fn execute(&mut self, warp: usize, active: u32, whole: bool, op: &Op) -> Step<()> {
        match op {
            Op::Scalar { f, to, from } => scalar(&mut self.registers(warp), active, *f, *to, from),
            Op::Pack { to, parts, bits } => pack(&mut self.registers(warp), active, *to, parts, *bits),
            Op::Unpack { to, from, bits } => unpack(&mut self.registers(warp), active, to, *from, *bits),
            Op::Load { .. } => return self.load(warp, active, op),
            Op::Store { .. } => return self.store(warp, active, op),
            Op::Shuffle { .. } => return self.shuffle(warp, active, op),
            Op::WarpBarrier { lanes: mask } => {
                let wanted = self.registers(warp).get(*mask, active.trailing_zeros() as usize) as u32;
                if wanted & !active != 0 {
                    return Err(whole_warp(Kind::DivergedWarp));
                }
            }
            Op::CopyAsync { to, from, width, filled } => {
                return self.each_lane(active, |block, lane| block.copy_async(warp, lane, *to, *from, *width, *filled));
            }
            Op::CommitCopies => lanes(active).for_each(|lane| {
                let copies = &mut self.copies[warp * WARP + lane];
                copies.closed.push_back(std::mem::take(&mut copies.open));
            }),
            Op::WaitCopies { pending } => return self.each_lane(active, |block, lane| block.wait_copies(warp, lane, *pending)),
            Op::LoadMatrix { .. } | Op::Multiply { .. } if !whole => return Err(whole_warp(Kind::DivergedWarp)),
            Op::LoadMatrix { to, address, transposed } => return self.load_matrix(warp, to, *address, *transposed),
            Op::Multiply { half, d, a, b, c } => multiply(&mut self.registers(warp), *half, d, a, b, c),
            Op::Branch { .. } | Op::Return | Op::Barrier => {}
        }
        Ok(())
    }

    fn each_lane(&mut self, active: u32, mut f: impl FnMut(&mut Self, usize) -> Result<(), Kind>) -> Step<()> {
        lanes(active).try_for_each(|lane| f(self, lane).map_err(|kind| (lane, kind)))
    }

    fn moment(&self, warp: usize, lane: usize) -> Moment {
        let thread = (warp * WARP + lane) as u32;
        Moment { launch: self.context.began, begin: self.began, time: self.context.time, block: self.index, thread }
    }

    fn addresses(&mut self, warp: usize, address: Address) -> Row {
        self.registers(warp).row(address.base, &mut [0; WARP]).map(|base| base.wrapping_add_signed(address.offset))
    }

    fn read(&mut self, warp: usize, lane: usize, space: Option<Space>, at: u64, width: usize) -> Result<u128, Kind> {
        let now = self.moment(warp, lane);
        match space {
            Some(Space::Param) => self.context.params.peek(at, width),
            Some(Space::Shared) => self.shared.read(at, width, now),
            None if at < SPAN => self.shared.read(at, width, now),
            _ => match argument(self.context.args, at, width)? {
                Arg::Write(global) => global.memory.read(at % SPAN, width, now),
                Arg::Read(global) => global.memory.peek(at % SPAN, width),
                _ => Err(nowhere(at, width)),
            },
        }
    }

    fn load(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
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

    fn store(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
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
        let now = self.moment(warp, lane);
        match space {
            Some(Space::Shared) => self.shared.write(at, width, value, now),
            None if at < SPAN => self.shared.write(at, width, value, now),
            Some(Space::Param) => Err(Kind::ReadOnly),
            _ => match argument(self.context.args, at, width)? {
                Arg::Write(global) => global.memory.write(at % SPAN, width, value, now),
                _ => Err(Kind::ReadOnly),
            },
        }
    }

    /// The source is read now; the destination gets it when its group is waited for.
    fn copy_async(
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
        self.shared.depart(to, width, self.moment(warp, lane))?;
        self.copies[warp * WARP + lane].open.push(Copy { to, bytes: value.to_le_bytes()[..width].to_vec() });
        Ok(())
    }

    fn wait_copies(&mut self, warp: usize, lane: usize, pending: Option<usize>) -> Result<(), Kind> {
        let now = self.moment(warp, lane);
        let Copies { closed, open } = &mut self.copies[warp * WARP + lane];
        if pending.is_none() {
            closed.push_back(std::mem::take(open));
        }
        let landing = closed.len().saturating_sub(pending.unwrap_or(0));
        closed.drain(..landing).flatten().try_for_each(|copy| self.shared.land(copy.to, &copy.bytes, now))
    }

    fn shuffle(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        let Op::Shuffle { kind, to, inside, from, by, clamp, lanes: mask } = *op else { return Ok(()) };
        let mut registers = self.registers(warp);
        let values: [u64; WARP] = std::array::from_fn(|lane| registers.get(from, lane));
        for lane in lanes(active) {
            let [by, clamp, mask] = [by, clamp, mask].map(|operand| registers.get(operand, lane) as u32);
            if mask & !active != 0 {
                return Err((lane, Kind::DivergedWarp));
            }
            let (partner, within) = partner(kind, lane as u32, by, clamp);
            if within && active >> partner & 1 == 0 {
                return Err((lane, Kind::AbsentLane));
            }
            registers.set(to, lane, if within { values[partner as usize] } else { values[lane] });
            inside.iter().for_each(|&inside| registers.set(inside, lane, u64::from(within)));
        }
        Ok(())
    }

    /// Row i of matrix j is where lane 8·j + i says.
    fn load_matrix(&mut self, warp: usize, to: &[u32], address: Address, transposed: bool) -> Step<()> {
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

fn scalar(registers: &mut Registers<'_>, active: u32, f: Function, to: u32, from: &[Operand; 4]) {
    let mut scratch = [[0; WARP]; 4];
    let [a, b, c, d] = &mut scratch;
    let result = match f {
        Function::One(f) => f(registers.row(from[0], a)),
        Function::Two(f) => f(registers.row(from[0], a), registers.row(from[1], b)),
        Function::Three(f) => f(registers.row(from[0], a), registers.row(from[1], b), registers.row(from[2], c)),
        Function::Four(f) => {
            f(registers.row(from[0], a), registers.row(from[1], b), registers.row(from[2], c), registers.row(from[3], d))
        }
    };
    registers.set_row(to, active, &result);
}

fn pack(registers: &mut Registers<'_>, active: u32, to: u32, parts: &[Operand], bits: u32) {
    for lane in lanes(active) {
        let part = |i: usize| (registers.get(parts[i], lane) & ((1 << bits) - 1)) << (i as u32 * bits);
        let value = (0..parts.len()).fold(0, |value, i| value | part(i));
        registers.set(to, lane, value);
    }
}

fn unpack(registers: &mut Registers<'_>, active: u32, to: &[Option<u32>], from: Operand, bits: u32) {
    for lane in lanes(active) {
        let value = registers.get(from, lane);
        for (i, to) in (0..).zip(to) {
            to.iter().for_each(|&to| registers.set(to, lane, value >> (i * bits) & ((1 << bits) - 1)));
        }
    }
}

fn multiply(registers: &mut Registers<'_>, half: Half, d: &[u32], a: &[u32], b: &[u32], c: &[Operand]) {
    let row = |register: u32| registers.values[register as usize].map(|value| value as u32);
    let (a, b) = (std::array::from_fn(|i| row(a[i])), std::array::from_fn(|i| row(b[i])));
    let c = std::array::from_fn(|i| std::array::from_fn(|lane| registers.get(c[i], lane) as u32));
    for (d, values) in d.iter().zip(matrix::multiply(half, &a, &b, &c)) {
        registers.values[*d as usize] = values.map(u64::from);
    }
}

/// The lane that a shuffle reads from, and whether that is inside the segment that `clamp` describes.
fn partner(kind: Shuffle, lane: u32, by: u32, clamp: u32) -> (u32, bool) {
    let (by, limit, segment) = (by & 31, clamp & 31, clamp >> 8 & 31);
    let (first, last) = (lane & segment, lane & segment | limit & !segment);
    match kind {
        Shuffle::Up => (lane.wrapping_sub(by), lane >= by + last),
        Shuffle::Down => (lane + by, lane + by <= last),
        Shuffle::Xor => (lane ^ by, lane ^ by <= last),
        Shuffle::Index => (first | by & !segment, first | by & !segment <= last),
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
