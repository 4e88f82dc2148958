//! Executes instructions.

use crate::WARP;
use crate::cluster::{BlockState, Cluster, Step, whole_warp};
use crate::fault::Kind;
use crate::matrix;
use crate::op::{Address, Arrivals, Half, Instruction, Op, Operand, Shuffle};
use crate::scalar::Function;
use crate::semantics::Semantics;
use crate::warp::{Registers, Wait, lanes};

impl Cluster<'_, '_, '_> {
    /// Executes an instruction for a group of lanes, and moves them to the next one.
    pub(crate) fn step(&mut self, warp: usize, at: usize, group: u32, instruction: &Instruction) -> Step<()> {
        self.context.budget = self.context.budget.checked_sub(1).ok_or(whole_warp(Kind::Runaway))?;
        let Some(group) = self.gather(warp, at, group, instruction) else { return Ok(()) };
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
            Op::Barrier { .. } | Op::ArriveInCluster | Op::WaitInCluster if !whole => {
                return Err((active.trailing_zeros() as usize, Kind::DivergedBarrier));
            }
            Op::Barrier { number, threads } => {
                let registers = self.registers(warp);
                let [number, threads] = [Some(number), threads].map(|operand| Some(registers.get(operand?, 0) as u32));
                let wait = Wait::Barrier { number: number.unwrap_or_default(), threads };
                self.warps[warp].put_waiting(at + 1, group, wait);
                return Ok(());
            }
            Op::ArriveInCluster => self.warps[warp].arrived_in_cluster = true,
            Op::WaitInCluster => {
                self.warps[warp].put_waiting(at + 1, group, Wait::Cluster);
                return Ok(());
            }
            Op::WaitPhase { to, barrier, parity } => {
                let wait = self.wait_phase(warp, active, to, barrier, parity)?;
                match wait {
                    Some(wait) => self.warps[warp].put_waiting(at, group, wait),
                    None => self.warps[warp].put(at + 1, group),
                }
                return Ok(());
            }
            Op::Product(ref product) if group == u32::MAX && whole => self.start(warp, at, product)?,
            ref op => self.execute(warp, active, group == u32::MAX && whole, op)?,
        }
        self.warps[warp].put(at + 1, group);
        Ok(())
    }

    /// For an instruction that names lanes: adds the lanes that already wait there. `None` if named lanes are still missing; then
    /// the group waits for them.
    fn gather(&mut self, warp: usize, at: usize, group: u32, instruction: &Instruction) -> Option<u32> {
        let (Op::WarpBarrier { lanes: mask } | Op::Elect { lanes: mask, .. } | Op::Shuffle { lanes: mask, .. }) = instruction.op
        else {
            return Some(group);
        };
        let group = group | self.warps[warp].take_waiting_lanes(at);
        let registers = self.registers(warp);
        let first = lanes(registers.guarded(group, instruction.guard)).next();
        let wanted = first.map_or(0, |lane| registers.get(mask, lane) as u32);
        if wanted & !group & self.warps[warp].living() == 0 {
            return Some(group);
        }
        self.warps[warp].put_waiting(at, group, Wait::Lanes);
        None
    }

    /// The phase that a lane must wait for; `None` if all have ended.
    fn wait_phase(&mut self, warp: usize, active: u32, to: u32, barrier: Address, parity: Operand) -> Step<Option<Wait>> {
        for lane in lanes(active) {
            let (block, barrier) = self.resolve_shared(warp, lane, barrier);
            let parity = self.registers(warp).get(parity, lane);
            let now = self.position.moment(&self.warps[warp], warp, lane);
            let ended = self.block_states[block].barriers.ended(barrier, parity, now).map_err(|kind| (lane, kind))?;
            let Some(clocks) = ended.cloned() else { return Ok(Some(Wait::Phase { block, barrier, parity })) };
            self.warps[warp].clocks.join(&clocks);
            self.registers(warp).set(to, lane, 1);
        }
        Ok(None)
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
                if self.wanted(warp, active, *mask)? == u32::MAX && whole {
                    self.release(warp, true);
                }
            }
            Op::Elect { to, chosen, lanes: mask } => {
                let first = self.wanted(warp, active, *mask)?.trailing_zeros();
                let mut registers = self.registers(warp);
                for lane in lanes(active) {
                    to.iter().for_each(|&to| registers.set(to, lane, u64::from(first)));
                    registers.set(*chosen, lane, u64::from(lane as u32 == first));
                }
            }
            Op::CopyAsync { to, from, width, filled } => {
                return self.each_lane(active, |block, lane| block.copy_async(warp, lane, *to, *from, *width, *filled));
            }
            Op::CommitCopies => lanes(active).for_each(|lane| self.copies[warp * WARP + lane].close()),
            Op::Trap => return Err((active.trailing_zeros() as usize, Kind::Trap)),
            Op::WaitForPreviousLaunch => self.warps[warp].waited |= active,
            Op::LaunchDependents | Op::NoEffect => {}
            Op::WaitCopies { pending } => return self.each_lane(active, |block, lane| block.wait_copies(warp, lane, *pending)),
            Op::InitBarrier { .. } | Op::InvalidateBarrier { .. } | Op::Arrive { .. } => return self.mbarrier(warp, active, op),
            Op::BarrierInitFence => lanes(active).for_each(|lane| {
                let (thread, rank) = (self.position.thread(warp, lane), self.position.rank(warp));
                self.block_states[rank].barriers.publish(thread);
            }),
            Op::ProxyFence => {
                self.warps[warp].clocks.published = self.warps[warp].clocks.seen.clone();
                self.release(warp, false);
            }
            Op::TmaLoad { .. } | Op::TmaStore { .. } | Op::TmaStoreCommit | Op::TmaStoreWait { .. } => {
                return self.bulk(warp, active, op);
            }
            Op::LoadMatrix { .. } | Op::StoreMatrix { .. } | Op::Multiply { .. } | Op::ConvergedNoEffect if !whole => {
                return Err(whole_warp(Kind::DivergedWarp));
            }
            Op::WgmmaFence | Op::Product(_) | Op::WgmmaCommit | Op::WgmmaWait { .. } if !whole => {
                return Err(whole_warp(Kind::DivergedWarp));
            }
            Op::LoadMatrix { to, address, transposed } => return self.load_matrix(warp, to, *address, *transposed),
            Op::StoreMatrix { from, address, transposed } => return self.store_matrix(warp, from, *address, *transposed),
            Op::Multiply { half, d, a, b, c } => {
                let semantics = self.context.semantics;
                multiply(semantics, &mut self.registers(warp), *half, d, a, b, c);
            }
            Op::WgmmaFence => self.warps[warp].fenced = u64::MAX - self.context.budget,
            Op::WgmmaCommit => self.warps[warp].products.groups.close(),
            Op::WgmmaWait { pending } => return self.wgmma_wait(warp, *pending),
            // Executed in `step`.
            Op::Branch { .. } | Op::Return | Op::Barrier { .. } | Op::ArriveInCluster | Op::WaitInCluster => {}
            Op::WaitPhase { .. } | Op::Product(_) | Op::ConvergedNoEffect => {}
        }
        Ok(())
    }

    /// The lanes that an instruction names, all of which must be there.
    fn wanted(&mut self, warp: usize, active: u32, mask: Operand) -> Step<u32> {
        let wanted = self.registers(warp).get(mask, active.trailing_zeros() as usize) as u32;
        if wanted & !active == 0 { Ok(wanted) } else { Err(whole_warp(Kind::DivergedWarp)) }
    }

    fn each_lane(&mut self, active: u32, mut f: impl FnMut(&mut Self, usize) -> Result<(), Kind>) -> Step<()> {
        lanes(active).try_for_each(|lane| f(self, lane).map_err(|kind| (lane, kind)))
    }

    fn mbarrier(&mut self, warp: usize, active: u32, op: &Op) -> Step<()> {
        for lane in lanes(active) {
            let done = match *op {
                Op::InitBarrier { barrier, count } => {
                    let (at, count) = (self.addresses(warp, barrier)[lane], self.registers(warp).get(count, lane) as u32);
                    let now = self.position.moment(&self.warps[warp], warp, lane);
                    let BlockState { memory, barriers } = &mut self.block_states[self.position.rank(warp)];
                    memory.place(at, 8).and_then(|_| barriers.init(at, count, now))
                }
                Op::InvalidateBarrier { barrier } => {
                    let at = self.addresses(warp, barrier)[lane];
                    let now = self.position.moment(&self.warps[warp], warp, lane);
                    self.block_states[self.position.rank(warp)].barriers.invalidate(at, now)
                }
                Op::Arrive { barrier, by } => {
                    let (room, at) = self.resolve_shared(warp, lane, barrier);
                    let registers = self.registers(warp);
                    let (count, bytes) = match by {
                        Arrivals::Count(count) => (registers.get(count, lane) as u32, None),
                        Arrivals::Expecting(bytes) => (1, Some(registers.get(bytes, lane) as u32)),
                    };
                    let now = self.position.moment(&self.warps[warp], warp, lane);
                    self.block_states[room].barriers.arrive(at, count, bytes, now)
                }
                _ => Ok(()),
            };
            done.map_err(|kind| (lane, kind))?;
        }
        self.release(warp, false);
        Ok(())
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

fn multiply(semantics: &Semantics, registers: &mut Registers<'_>, half: Half, d: &[u32], a: &[u32], b: &[u32], c: &[Operand]) {
    let row = |register: u32| registers.values[register as usize].map(|value| value as u32);
    let (a, b) = (std::array::from_fn(|i| row(a[i])), std::array::from_fn(|i| row(b[i])));
    let c = std::array::from_fn(|i| std::array::from_fn(|lane| registers.get(c[i], lane) as u32));
    for (d, values) in d.iter().zip(matrix::multiply(semantics, half, &a, &b, &c)) {
        registers.values[*d as usize] = values.map(u64::from);
    }
}

/// The source lane of a shuffle, and true if it is inside the segment that `clamp` describes.
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
