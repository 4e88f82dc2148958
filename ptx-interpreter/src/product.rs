//! wgmma: addresses of operands, and the sums of one warp.

use std::collections::hash_map::Entry;

use crate::WARP;
use crate::cluster::{Cluster, Step, whole_warp};
use crate::fault::Kind;
use crate::flight::Started;
use crate::float;
use crate::matrix::widen;
use crate::op::{Op, Product, Side};
use crate::scalar::Row;
use crate::semantics::Layout;
use crate::shadow::Moment;
use crate::sums::WGMMA;

/// The value of sums that are read too early: a NaN.
const POISON: Row = [0x7fc0_dead; WARP];

impl Layout {
    /// Decodes a descriptor.
    fn of(descriptor: u64) -> Result<Self, Kind> {
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
}

impl Product {
    /// Elements in 16 bytes: four or eight.
    fn elements(&self, chunk: u128) -> impl Iterator<Item = f32> {
        let (half, bits) = (self.half, 32 / self.parts());
        (0..16 / (bits / 8)).map(move |i| match half {
            Some(half) => widen(half, (chunk >> (bits * i)) as u16),
            None => float::cut_to_tf32(f32::from_bits((chunk >> (bits * i)) as u32)),
        })
    }
}

impl Cluster<'_, '_, '_> {
    /// Starts a wgmma. Its sums are NaN until it is waited for.
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
        let (rhs, adds) = (registers.values[product.rhs as usize][0], registers.get(product.adds, 0) & 1 == 1);
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
        products.groups.open.push(Started { at, lhs, rhs, adds });
        Ok(())
    }

    /// Completes wgmma until at most this many groups are left.
    pub(crate) fn wgmma_wait(&mut self, warp: usize, pending: usize) -> Step<()> {
        for started in self.warps[warp].products.groups.take_until(pending) {
            self.finish_product(warp, &started).map_err(whole_warp)?;
        }
        let products = &mut self.warps[warp].products;
        if products.groups.is_empty() {
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
        let (lhs, rhs) = (self.lhs(warp, product, started.lhs)?, self.rhs(warp, product, started.rhs)?);
        let (sums, place) = (&mut self.warps[warp].products.sums, self.context.semantics.wgmma_sum);
        let mut tile = vec![vec![0.0; product.cols]; 16];
        for (i, d) in product.d.iter().enumerate().filter(|_| started.adds) {
            for (lane, value) in sums[d].iter().enumerate() {
                let (row, col) = place(lane, i);
                tile[row][col] = f32::from_bits(*value as u32);
            }
        }
        WGMMA.multiply(&lhs, &rhs, &mut tile);
        for (i, &d) in product.d.iter().enumerate() {
            let value = |(row, col): (usize, usize)| u64::from(tile[row][col].to_bits());
            sums.insert(d, std::array::from_fn(|lane| value(place(lane, i))));
        }
        Ok(())
    }

    /// The 16 rows of a warp: `lhs[row][d]`
    fn lhs(&mut self, warp: usize, product: &Product, descriptor: u64) -> Result<Vec<Vec<f32>>, Kind> {
        let (first, layout) = (warp % 4 * 16, || Layout::of(descriptor));
        match &product.lhs {
            Side::Registers(registers) => Ok(self.lhs_in_registers(warp, product, registers)),
            Side::Shared(_) if product.lhs_along => {
                let columns = self.columns(warp, product, layout()?, first, 16)?;
                Ok((0..16).map(|row| columns.iter().map(|column| column[row]).collect()).collect())
            }
            Side::Shared(_) => self.lines(warp, product, layout()?, first, 16),
        }
    }

    /// `rhs[d][col]`
    fn rhs(&mut self, warp: usize, product: &Product, descriptor: u64) -> Result<Vec<Vec<f32>>, Kind> {
        let layout = Layout::of(descriptor)?;
        if product.rhs_along {
            return self.columns(warp, product, layout, 0, product.cols);
        }
        let lines = self.lines(warp, product, layout, 0, product.cols)?;
        Ok((0..product.depth()).map(|d| lines.iter().map(|line| line[d]).collect()).collect())
    }

    /// Rows of a K-major side, each two chunks long: `lines[row][d]`
    fn lines(
        &mut self,
        warp: usize,
        product: &Product,
        layout: Layout,
        first: usize,
        rows: usize,
    ) -> Result<Vec<Vec<f32>>, Kind> {
        let place = self.context.semantics.row_chunk;
        let mut line = |row| {
            let mut line = Vec::with_capacity(product.depth());
            for chunk in 0..2 {
                line.extend(product.elements(self.chunk(warp, layout, place(&layout, row as u64, chunk))?));
            }
            Ok(line)
        };
        (first..first + rows).map(&mut line).collect()
    }

    /// Rows of an MN-major side, eight to a chunk: `columns[d][row]`
    fn columns(
        &mut self,
        warp: usize,
        product: &Product,
        layout: Layout,
        first: usize,
        rows: usize,
    ) -> Result<Vec<Vec<f32>>, Kind> {
        let place = self.context.semantics.depth_chunk;
        let mut column = |d| {
            let mut column = Vec::with_capacity(rows);
            for chunk in first / 8..(first + rows) / 8 {
                column.extend(product.elements(self.chunk(warp, layout, place(&layout, chunk as u64, d as u64))?));
            }
            Ok(column)
        };
        (0..product.depth()).map(&mut column).collect()
    }

    fn lhs_in_registers(&mut self, warp: usize, product: &Product, registers: &[u32]) -> Vec<Vec<f32>> {
        let (place, parts) = (self.context.semantics.wgmma_lhs, product.parts());
        let mut rows = vec![vec![0.0; product.depth()]; 16];
        let values = self.registers(warp).values;
        for (i, lane) in (0..4).flat_map(|i| (0..WARP).map(move |lane| (i, lane))) {
            let register = u128::from(values[registers[i] as usize][lane] as u32);
            for (part, element) in product.elements(register).take(parts).enumerate() {
                let (row, d) = place(lane, i, part, parts);
                rows[row][d] = element;
            }
        }
        rows
    }

    /// 16 bytes of an operand, at an offset.
    fn chunk(&mut self, warp: usize, layout: Layout, offset: u64) -> Result<u128, Kind> {
        let at = (self.context.semantics.operand_byte)(layout.start, offset, layout.line);
        let now = Moment { bulk: true, ..self.position.moment(&self.warps[warp], warp, 0) };
        self.block_states[self.position.rank(warp)].memory.read(at, 16, now)
    }
}
