//! Products of a warpgroup (wgmma): where their operands lie, and what one warp's share of the sums is.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::WARP;
use crate::block::{Cluster, Step, whole_warp};
use crate::fault::Kind;
use crate::float;
use crate::matrix::widen;
use crate::op::{Half, Op};
use crate::scalar::Row;
use crate::shadow::Moment;

/// What the sums hold for who reads them too early: a NaN.
pub(crate) const POISON: Row = [0x7fc0_dead; WARP];

/// `d += lhs·rhs`, 64×cols×(32 bytes)
pub(crate) struct Product {
    /// None: tf32.
    pub(crate) half: Option<Half>,
    pub(crate) cols: usize,
    pub(crate) d: Vec<u32>,
    pub(crate) lhs: Side,
    pub(crate) rhs: u32,
    /// Neighbours of rhs are neighbours in row.
    pub(crate) along: bool,
}

/// Where the left side is.
pub(crate) enum Side {
    Shared(u32),
    Registers(Vec<u32>),
}

/// A product that was started: its instruction, and what the descriptors said.
pub(crate) struct Started {
    pub(crate) at: usize,
    pub(crate) lhs: u64,
    pub(crate) rhs: u64,
}

/// The products that a warp started: those of each group it closed, and those of the open one.
#[derive(Default)]
pub(crate) struct Products {
    pub(crate) closed: VecDeque<Vec<Started>>,
    pub(crate) open: Vec<Started>,
    /// The sums that they work on, while the registers are poisoned.
    pub(crate) sums: HashMap<u32, Row>,
}

impl Product {
    /// Elements of depth: 32 bytes.
    pub(crate) fn depth(&self) -> usize {
        if self.half.is_some() { 16 } else { 8 }
    }

    /// What one chunk of 16 bytes holds: four or eight.
    fn elements(&self, chunk: u128) -> ([f32; 8], usize) {
        match self.half {
            Some(half) => (std::array::from_fn(|i| widen(half, (chunk >> (16 * i)) as u16)), 8),
            None => (std::array::from_fn(|i| float::cut_to_tf32(f32::from_bits((chunk >> (32 * (i % 4))) as u32))), 4),
        }
    }

    /// Row and depth of register `i` of a lane's part of the left side, whose registers hold one `f32`, or two elements.
    pub(crate) fn lhs_place(&self, lane: usize, i: usize) -> (usize, usize) {
        let wide = self.depth() / 8;
        (lane / 4 + i % 2 * 8, lane % 4 * wide + i / 2 * 4 * wide)
    }
}

/// Row and column of register `i` of a lane's sums.
pub(crate) fn sum_place(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2)
}

/// What a descriptor says: where a matrix lies in shared memory, in chunks of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    start: u64,
    leap: u64,
    stride: u64,
    /// Bytes of a line, whose chunks are exchanged.
    line: u64,
}

impl Layout {
    pub(crate) fn of(descriptor: u64) -> Result<Self, Kind> {
        let bytes = |from: u32| (descriptor >> from & 0x3fff) << 4;
        let line = match descriptor >> 62 {
            1 => 128,
            2 => 64,
            3 => 32,
            _ => return Err(Kind::Misuse(format!("a descriptor without swizzle: {descriptor:#x}"))),
        };
        if descriptor >> 49 & 7 != 0 {
            return Err(Kind::Misuse(format!("a descriptor with a base offset: {descriptor:#x}")));
        }
        Ok(Self { start: bytes(0), leap: bytes(16), stride: bytes(32), line })
    }

    /// Neighbours in depth: a chunk of a row.
    pub(crate) fn across(&self, row: usize, chunk: usize) -> u64 {
        let (row, chunk) = (row as u64, chunk as u64);
        swizzle(self.start + row / 8 * self.stride + row % 8 * self.line + chunk * 16, self.line)
    }

    /// Neighbours in row: a chunk of rows at one depth.
    pub(crate) fn along(&self, chunk: usize, d: usize) -> u64 {
        let (chunk, d, chunks) = (chunk as u64, d as u64, self.line / 16);
        let place = chunk / chunks * self.leap + chunk % chunks * 16 + d / 8 * self.stride + d % 8 * self.line;
        swizzle(self.start + place, self.line)
    }
}

/// The chunks of a line are exchanged by the bits of the address above it: three for lines of 128 bytes, two for 64, one for 32.
pub(crate) fn swizzle(at: u64, line: u64) -> u64 {
    at ^ (at >> 7 & (line / 16 - 1)) << 4
}

/// `sums += lhs·rhs` for 16 rows: `lhs[row][d]`, `rhs[d][col]`, `sums[row][col]`
pub(crate) fn multiply(lhs: &[Vec<f32>], rhs: &[Vec<f32>], sums: &mut [Vec<f32>]) {
    for (left, sums) in lhs.iter().zip(sums) {
        for (left, right) in left.iter().zip(rhs) {
            sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
        }
    }
}

impl Cluster<'_, '_, '_> {
    /// Starts a product: its sums are poisoned until it is waited for.
    pub(crate) fn start(&mut self, warp: usize, at: usize, product: &Product) -> Step<()> {
        let fenced = self.warps[warp].fenced;
        let mut sums = std::mem::take(&mut self.warps[warp].products.sums);
        let registers = self.registers(warp);
        let is_new = |register: u32| registers.written[register as usize] > fenced;
        let lhs = match &product.lhs {
            Side::Shared(descriptor) => registers.values[*descriptor as usize][0],
            Side::Registers(lhs) if lhs.iter().any(|&lhs| is_new(lhs)) => return Err(whole_warp(Kind::MissingFence)),
            Side::Registers(_) => 0,
        };
        let started = Started { at, lhs, rhs: registers.values[product.rhs as usize][0] };
        for &d in &product.d {
            let value = &mut registers.values[d as usize];
            match sums.entry(d) {
                Entry::Occupied(_) if *value != POISON => return Err(whole_warp(Kind::SumsInFlight)),
                Entry::Occupied(_) => {}
                Entry::Vacant(_) if registers.written[d as usize] > fenced => return Err(whole_warp(Kind::MissingFence)),
                Entry::Vacant(entry) => {
                    entry.insert(std::mem::replace(value, POISON));
                }
            }
        }
        let products = &mut self.warps[warp].products;
        products.sums = sums;
        products.open.push(started);
        Ok(())
    }

    /// Finishes products until so many groups are left.
    pub(crate) fn wait_products(&mut self, warp: usize, pending: usize) -> Step<()> {
        let closed = &mut self.warps[warp].products.closed;
        let due: Vec<_> = closed.drain(..closed.len().saturating_sub(pending)).flatten().collect();
        for started in due {
            self.finish_product(warp, &started).map_err(whole_warp)?;
        }
        let products = &mut self.warps[warp].products;
        if products.closed.is_empty() && products.open.is_empty() {
            let sums = std::mem::take(&mut products.sums);
            let registers = self.registers(warp);
            for (register, row) in sums {
                let value = &mut registers.values[register as usize];
                if *value != POISON {
                    return Err(whole_warp(Kind::SumsInFlight));
                }
                *value = row;
            }
        }
        Ok(())
    }

    fn finish_product(&mut self, warp: usize, started: &Started) -> Result<(), Kind> {
        let Op::Product(product) = &self.context.kernel.code[started.at].op else { return Ok(()) };
        let rows = match &product.lhs {
            Side::Registers(registers) => self.lhs_in_registers(warp, product, registers),
            Side::Shared(_) => {
                let (layout, first) = (Layout::of(started.lhs)?, warp % 4 * 16);
                (first..first + 16).map(|row| Ok(self.line(warp, product, layout, row)?.to_vec())).collect::<Result<_, _>>()?
            }
        };
        let rhs = self.rhs(warp, product, Layout::of(started.rhs)?)?;
        let sums = &mut self.warps[warp].products.sums;
        let mut tile = vec![vec![0.0; product.cols]; 16];
        for (i, d) in product.d.iter().enumerate() {
            for (lane, value) in sums[d].iter().enumerate() {
                let (row, col) = sum_place(lane, i);
                tile[row][col] = f32::from_bits(*value as u32);
            }
        }
        multiply(&rows, &rhs, &mut tile);
        for (i, &d) in product.d.iter().enumerate() {
            let place = |lane| sum_place(lane, i);
            let value = |lane| u64::from(tile[place(lane).0][place(lane).1].to_bits());
            sums.insert(d, std::array::from_fn(value));
        }
        Ok(())
    }

    /// A row of 32 bytes whose neighbours are neighbours in depth: as many elements as a product is deep.
    fn line(&mut self, warp: usize, product: &Product, layout: Layout, row: usize) -> Result<[f32; 16], Kind> {
        let mut line = [0.0; 16];
        for chunk in 0..2 {
            let (elements, count) = product.elements(self.chunk(warp, layout.across(row, chunk))?);
            line[chunk * count..][..count].copy_from_slice(&elements[..count]);
        }
        Ok(line)
    }

    /// `rhs[d][col]`
    fn rhs(&mut self, warp: usize, product: &Product, layout: Layout) -> Result<Vec<Vec<f32>>, Kind> {
        let mut rhs = vec![Vec::with_capacity(product.cols); product.depth()];
        if product.along {
            for (d, right) in rhs.iter_mut().enumerate() {
                for chunk in 0..product.cols / 8 {
                    right.extend(product.elements(self.chunk(warp, layout.along(chunk, d))?).0);
                }
            }
        } else {
            for col in 0..product.cols {
                let line = self.line(warp, product, layout, col)?;
                rhs.iter_mut().zip(line).for_each(|(right, element)| right.push(element));
            }
        }
        Ok(rhs)
    }

    fn lhs_in_registers(&mut self, warp: usize, product: &Product, registers: &[u32]) -> Vec<Vec<f32>> {
        let mut rows = vec![vec![0.0; product.depth()]; 16];
        let values = self.registers(warp).values;
        for (i, lane) in (0..4).flat_map(|i| (0..WARP).map(move |lane| (i, lane))) {
            let (row, d) = product.lhs_place(lane, i);
            let (elements, _) = product.elements(u128::from(values[registers[i] as usize][lane] as u32));
            rows[row][d..d + product.depth() / 8].copy_from_slice(&elements[..product.depth() / 8]);
        }
        rows
    }

    fn chunk(&mut self, warp: usize, at: u64) -> Result<u128, Kind> {
        let now = Moment { bulk: true, ..self.place.moment(&self.warps[warp], warp, 0) };
        self.rooms[self.place.rank(warp)].memory.read(at, 16, now)
    }
}
