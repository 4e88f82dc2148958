//! Quantised weights as the right side of products: widened to `f32` on the way into panels, or, for few rows, into registers or lines
//! that stay in L1. A weight is never widened as a whole.

use std::ops::Range;

use super::super::simd::{APART, CodeTable, Kernel, LANES, Lanes, Simd, Unit};
use super::Matrix;
use super::dots::each_line;
use super::micro::Micro;
use super::pack::{PackPart, Part, Side};
use super::plan::{self, QUANTISED_COLS, QUANTISED_DEPTH};
use super::skinny::Sums;
use crate::quant::{Blocks, FP4, NF4, ONE_127TH, Q8_0_BLOCK, QuantKind, QuantView, ScalesView};

static NF4_TABLE: CodeTable = CodeTable::new(NF4);
static FP4_TABLE: CodeTable = CodeTable::new(FP4);

/// Codes that are looked up together.
const STEP: usize = 64;

/// A quantised weight, or the transpose of one.
#[derive(Clone, Copy)]
pub(in super::super) struct QuantMatrix<'a> {
    pub(super) w: QuantView<'a>,
    pub(super) transposed: bool,
}

impl<'a> QuantMatrix<'a> {
    pub(in super::super) fn new(w: QuantView<'a>) -> Self {
        Self { w, transposed: false }
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    pub(super) fn rows(&self) -> usize {
        if self.transposed { self.w.cols } else { self.w.rows }
    }

    pub(super) fn cols(&self) -> usize {
        if self.transposed { self.w.rows } else { self.w.cols }
    }

    /// One number.
    pub(super) fn at(&self, row: usize, col: usize) -> f32 {
        let (row, col) = if self.transposed { (col, row) } else { (row, col) };
        let mut number = [0.0];
        self.w.dequantise(row, col..col + 1, &mut number);
        number[0]
    }

    /// Whether one row on the left is multiplied with values that are looked up in the order of [`APART`].
    fn is_looked_up_apart(&self, rows: usize) -> bool {
        let blocks = self.w.kind.four_bits().map(|(_, blocks)| blocks.len);
        rows == 1 && self.w.cols.is_multiple_of(STEP) && blocks.is_some_and(|len| len >= STEP)
    }

    /// Puts one row on the left in the order in which the values of this weight are looked up.
    pub(super) fn reorder_left(&self, rows: usize, left: &mut [f32]) {
        if !self.is_looked_up_apart(rows) {
            return;
        }
        for numbers in left.as_chunks_mut::<STEP>().0 {
            let in_order = *numbers;
            for (number, &from) in numbers.iter_mut().zip(&APART) {
                *number = in_order[from as usize];
            }
        }
    }
}

fn table(kind: QuantKind) -> &'static CodeTable {
    if let QuantKind::Fp4(_) = kind { &FP4_TABLE } else { &NF4_TABLE }
}

/// `to = W[row][cols]`, with the bits of [`QuantView::dequantise`].
#[inline(always)]
pub(in super::super) fn dequantise<S: Simd>(s: S, w: &QuantView<'_>, row: usize, cols: Range<usize>, to: &mut [f32]) {
    match w.kind {
        QuantKind::Nf4(blocks) | QuantKind::Fp4(blocks) => four_bits(s, w, blocks, row, cols, to),
        QuantKind::Int8 => {
            let (absmax, one_127th) = (s.splat(w.scale(row)), s.splat(ONE_127TH));
            let codes = &w.codes[row * w.cols..][cols];
            eight_bits(s, codes, to, |whole| s.mul(s.mul(whole, absmax), one_127th));
        }
        QuantKind::Q8_0 => q8_0(s, w, row, cols, to),
    }
}

/// `to = value(codes)`
#[inline(always)]
fn eight_bits<S: Simd>(s: S, codes: &[u8], to: &mut [f32], value: impl Fn(S::V) -> S::V) {
    let (codes, last_codes) = codes.as_chunks();
    let (to, last) = to.as_chunks_mut();
    for (codes, to) in codes.iter().zip(to) {
        s.store(value(s.load_i8(codes)), to);
    }
    if !last.is_empty() {
        s.narrow_to(value(whole_numbers(s, last_codes)), last);
    }
}

/// Scales that are widened together.
const SCALES: usize = 64;

/// The scales from number `first` on.
#[inline(always)]
fn widen_scales<S: Simd>(s: S, w: &QuantView<'_>, first: usize, to: &mut [f32]) {
    if let ScalesView::F16(scales) = w.scales {
        let scales = &scales[first..][..to.len()];
        for (v, to) in to.chunks_mut(LANES).enumerate() {
            s.narrow_to(s.widen_at(scales, v), to);
        }
    } else {
        for (i, to) in to.iter_mut().enumerate() {
            *to = w.scale(first + i);
        }
    }
}

/// Block by block.
#[inline(always)]
fn q8_0<S: Simd>(s: S, w: &QuantView<'_>, row: usize, cols: Range<usize>, to: &mut [f32]) {
    let (first, codes) = (row * w.cols.div_ceil(Q8_0_BLOCK), &w.codes[row * w.cols..][..w.cols]);
    let mut scales = [0.0; SCALES];
    let mut col = cols.start;
    while col < cols.end {
        let block = col / Q8_0_BLOCK;
        let count = SCALES.min(cols.end.div_ceil(Q8_0_BLOCK) - block);
        widen_scales(s, w, first + block, &mut scales[..count]);
        for (i, &scale) in scales[..count].iter().enumerate() {
            let end = cols.end.min((block + i + 1) * Q8_0_BLOCK);
            let scale = s.splat(scale);
            eight_bits(s, &codes[col..end], &mut to[col - cols.start..end - cols.start], |whole| s.mul(whole, scale));
            col = end;
        }
    }
}

/// At most sixteen whole numbers; beyond the last come zeros.
#[inline(always)]
fn whole_numbers<S: Simd>(s: S, codes: &[u8]) -> S::V {
    if let Some(whole) = codes.first_chunk() {
        return s.load_i8(whole);
    }
    let mut lanes = [0; LANES];
    lanes[..codes.len()].copy_from_slice(codes);
    s.load_i8(&lanes)
}

/// Block by block; the ends of a block that are no whole vectors one after another.
#[inline(always)]
fn four_bits<S: Simd>(s: S, w: &QuantView<'_>, Blocks { len, .. }: Blocks, row: usize, cols: Range<usize>, to: &mut [f32]) {
    let (table, first, shift) = (table(w.kind), row * w.cols, len.trailing_zeros());
    let (mut at, last, begin) = (first + cols.start, first + cols.end, first + cols.start);
    while at < last {
        let end = last.min(((at >> shift) + 1) << shift);
        let scale = w.scale(at >> shift);
        let one = |at: usize| {
            let two = w.codes[at / 2];
            table.values[(if at.is_multiple_of(2) { two >> 4 } else { two & 15 }) as usize] * scale
        };
        if at % 2 == 1 {
            to[at - begin] = one(at);
            at += 1;
        }
        let pairs = (end - at) / (2 * LANES);
        let codes = w.codes[at / 2..][..pairs * LANES].as_chunks::<LANES>().0;
        let lanes = to[at - begin..][..pairs * 2 * LANES].as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
        for (codes, lanes) in codes.iter().zip(lanes) {
            let values = s.look_up(codes, table);
            for v in 0..2 {
                s.store(s.mul(values[v], s.splat(scale)), &mut lanes[v]);
            }
        }
        at += pairs * 2 * LANES;
        while at < end {
            to[at - begin] = one(at);
            at += 1;
        }
    }
}

/// The most lines of a panel that are widened together, and steps of the depth.
const LINES: usize = 32;
const PIECE: usize = 128;
/// The same where a step of the depth is a run of the weight: steps, and numbers of a run.
const RUNS: usize = 8;
const RUN: usize = 512;

/// What a weight gives to neighbouring panels: see [`Part`].
pub(super) fn pack<M: Micro>(unit: Unit, micro: M, side: Side, part: Part<'_, M::Number>, lines: QuantMatrix<'_>, scale: f32) {
    let (width, stride, steps) = (part.width, part.stride, part.depth.len());
    if steps == 0 {
        return;
    }
    if width > if lines.transposed { RUN } else { LINES } {
        return pack_each(unit, micro, side, part, lines, scale);
    }
    if lines.transposed {
        // Lines are columns: as many panels at a time as a run has room for.
        let mut buffer = [0.0; RUNS * RUN];
        let panels = (RUN / width).max(1);
        for (group, to) in part.to.chunks_mut(panels * stride).enumerate() {
            let first = part.first + group * panels * width;
            let there = (to.len().div_ceil(stride) * width).min(lines.w.cols.saturating_sub(first));
            for p in (0..steps).step_by(RUNS) {
                let depth = RUNS.min(steps - p);
                let rows = part.depth.start + p..part.depth.start + p + depth;
                unit.run(Dequantise { w: lines.w, rows, cols: first..first + there, stride: RUN, to: &mut buffer });
                let lines = Matrix::strided(&buffer, depth, there, RUN).t();
                let part = Part { depth: 0..depth, first: 0, width, stride, to: &mut to[p * width..] };
                unit.run(PackPart { micro, side, part, lines, scale });
            }
        }
        return;
    }
    let mut buffer = [0.0; LINES * PIECE];
    for (panel, to) in part.to.chunks_mut(stride).enumerate() {
        let first = part.first + panel * width;
        let there = width.min(lines.w.rows.saturating_sub(first));
        for p in (0..steps).step_by(PIECE) {
            let depth = PIECE.min(steps - p);
            let cols = part.depth.start + p..part.depth.start + p + depth;
            unit.run(Dequantise { w: lines.w, rows: first..first + there, cols, stride: PIECE, to: &mut buffer });
            let lines = Matrix::strided(&buffer, there, depth, PIECE);
            let part =
                Part { depth: 0..depth, first: 0, width, stride: depth * width, to: &mut to[p * width..][..depth * width] };
            unit.run(PackPart { micro, side, part, lines, scale });
        }
    }
}

/// The same, number by number: for a panel of very many lines, which is a weight that is as narrow as a rank.
fn pack_each<M: Micro>(unit: Unit, micro: M, side: Side, part: Part<'_, M::Number>, lines: QuantMatrix<'_>, scale: f32) {
    let (width, stride, steps) = (part.width, part.stride, part.depth.len());
    for (panel, to) in part.to.chunks_mut(stride).enumerate() {
        for line in 0..width {
            let there = part.first + panel * width + line < lines.rows();
            for (step, p) in part.depth.clone().enumerate() {
                let number = [if there { lines.at(part.first + panel * width + line, p) } else { 0.0 }];
                let (lines, at) = (Matrix::new(&number, 1, 1), step * width + line);
                let part = Part { depth: 0..1, first: 0, width: 1, stride: 1, to: &mut to[at..at + 1] };
                unit.run(PackPart { micro, side, part, lines, scale });
            }
        }
        debug_assert!(to.len() >= steps * width);
    }
}

impl Sums<'_> {
    /// `sums += scale·left·rhs`
    #[inline(always)]
    pub(super) fn add_quantised<S: Simd>(&mut self, s: S, scale: f32, left: &[f32], rhs: QuantMatrix<'_>) {
        let lanes = left.as_chunks::<LANES>().0;
        match (rhs.transposed, rhs.w.kind) {
            _ if rhs.rows() == 0 => {}
            (false, _) => self.add_quantised_lines(s, left, rhs),
            (true, _) if rhs.is_looked_up_apart(self.height) => self.decode::<S, 1>(s, scale, lanes, rhs, looked_up),
            (true, QuantKind::Q8_0) if self.height == 1 && rhs.w.cols.is_multiple_of(Q8_0_BLOCK) => {
                self.decode::<S, 1>(s, scale, lanes, rhs, of_blocks);
            }
            (true, QuantKind::Int8) if self.height == 1 => self.decode::<S, 4>(s, scale, lanes, rhs, of_rows),
            _ => match plan::dot_rows(S::REGISTERS, self.height) {
                1 => self.add_widened_dots::<S, 1, 4>(s, scale, lanes, rhs),
                2 => self.add_widened_dots::<S, 2, 3>(s, scale, lanes, rhs),
                _ => self.add_widened_dots::<S, 5, 4>(s, scale, lanes, rhs),
            },
        }
    }

    /// One row on the left: values are multiplied as they are made, `W` lines of the weight side by side.
    #[inline(always)]
    fn decode<S: Simd, const W: usize>(
        &mut self,
        s: S,
        scale: f32,
        left: &[Lanes<f32>],
        rhs: QuantMatrix<'_>,
        dots: impl Fn(S, &[Lanes<f32>], &QuantView<'_>, [usize; W]) -> [S::V; W],
    ) {
        for j in (0..self.width).step_by(4) {
            let mut sums = [s.splat(0.0); 4];
            for w in (0..4).step_by(W) {
                // At the edge the last line is taken again, and what it gives is dropped.
                let lines = std::array::from_fn(|i| self.first + (j + w + i).min(self.width - 1));
                sums[w..w + W].copy_from_slice(&dots(s, left, &rhs.w, lines));
            }
            let to = &mut self.lanes.as_flattened_mut()[j..self.width.min(j + 4)];
            for (sum, dot) in to.iter_mut().zip(s.sums(sums)) {
                *sum += scale * dot;
            }
        }
    }

    /// Few rows on the left: a stretch of a few lines is widened and used for all rows.
    #[inline(always)]
    fn add_widened_dots<S: Simd, const X: usize, const W: usize>(
        &mut self,
        s: S,
        scale: f32,
        left: &[Lanes<f32>],
        rhs: QuantMatrix<'_>,
    ) {
        let (left, depth) = (left.as_chunks::<X>().0, rhs.w.cols);
        let mut wide = [[0.0; QUANTISED_DEPTH]; W];
        for start in (0..depth).step_by(QUANTISED_DEPTH) {
            let steps = start..depth.min(start + QUANTISED_DEPTH);
            for j in (0..self.width).step_by(W) {
                for (w, wide) in wide.iter_mut().enumerate() {
                    let line = self.first + (j + w).min(self.width - 1);
                    dequantise(s, &rhs.w, line, steps.clone(), &mut wide[..steps.len()]);
                }
                let right: [&[f32]; W] = each_line(|w| &wide[w][..steps.len()]);
                self.add_dots_of_rows::<S, f32, X, W>(s, scale, left, right, (start, depth, j), |_| {});
            }
        }
    }

    /// `sums[i] += Σ_p left[p][i]·rhs[p]`, from lines that are widened a few at a time.
    #[inline(always)]
    fn add_quantised_lines<S: Simd>(&mut self, s: S, left: &[f32], rhs: QuantMatrix<'_>) {
        const LINES: usize = 8;
        let (first, width) = (self.first, self.width);
        debug_assert!(width <= QUANTISED_COLS);
        let mut wide = [[0.0; QUANTISED_COLS]; LINES];
        for (block, left) in left.chunks(LINES * self.height).enumerate() {
            let depth = left.len() / self.height;
            for (p, wide) in wide.iter_mut().enumerate().take(depth) {
                dequantise(s, &rhs.w, block * LINES + p, first..first + width, &mut wide[..width]);
            }
            let lines: [&[f32]; LINES] = each_line(|p| &wide[p][..width]);
            self.add_block_of_rows(s, left, &lines[..depth], &[]);
        }
    }
}

/// `Σ scale_of_step · Σ value·left`, looked up in the order of [`APART`]: a block's sum is multiplied with its scale once.
#[inline(always)]
fn looked_up<S: Simd>(s: S, left: &[Lanes<f32>], w: &QuantView<'_>, [line]: [usize; 1]) -> [S::V; 1] {
    let (table, first) = (table(w.kind), line * w.cols);
    let len = w.kind.four_bits().map_or(STEP, |(_, blocks)| blocks.len);
    let shift = len.trailing_zeros();
    let codes = w.codes[first / 2..][..w.cols / 2].as_chunks::<{ STEP / 2 }>().0;
    let mut total = s.splat(0.0);
    for (step, (codes, left)) in codes.iter().zip(left.as_chunks::<4>().0).enumerate() {
        let values = s.look_up_apart(codes, table);
        let mut sum = s.mul(values[0], s.load(&left[0]));
        for v in 1..4 {
            sum = s.mul_add(values[v], s.load(&left[v]), sum);
        }
        total = s.mul_add(s.splat(w.scale((first + step * STEP) >> shift)), sum, total);
    }
    [total]
}

/// The same for Q8_0.
#[inline(always)]
fn of_blocks<S: Simd>(s: S, left: &[Lanes<f32>], w: &QuantView<'_>, [line]: [usize; 1]) -> [S::V; 1] {
    let codes = w.codes[line * w.cols..][..w.cols].as_chunks::<LANES>().0.as_chunks::<2>().0;
    let (mut total, mut first, mut scales) = (s.splat(0.0), line * codes.len(), [0.0; SCALES]);
    for (codes, left) in codes.chunks(SCALES).zip(left.as_chunks::<2>().0.chunks(SCALES)) {
        widen_scales(s, w, first, &mut scales[..codes.len()]);
        first += codes.len();
        for ((codes, left), &scale) in codes.iter().zip(left).zip(&scales) {
            let sum = s.mul(s.load_i8(&codes[0]), s.load(&left[0]));
            let sum = s.mul_add(s.load_i8(&codes[1]), s.load(&left[1]), sum);
            total = s.mul_add(s.splat(scale), sum, total);
        }
    }
    [total]
}

/// Rows of `int8`: the sum of a row is multiplied with its scale at the end.
#[inline(always)]
fn of_rows<S: Simd>(s: S, left: &[Lanes<f32>], w: &QuantView<'_>, lines: [usize; 4]) -> [S::V; 4] {
    let codes = lines.map(|line| &w.codes[line * w.cols..][..w.cols]);
    let mut sums = [s.splat(0.0); 4];
    let (left, rest) = left.split_at(w.cols / LANES);
    let lanes = codes.map(|codes| &codes.as_chunks::<LANES>().0[..left.len()]);
    for (v, left) in left.iter().enumerate() {
        let left = s.load(left);
        for i in 0..4 {
            sums[i] = s.mul_add(left, s.load_i8(&lanes[i][v]), sums[i]);
        }
    }
    if let [rest] = rest {
        for i in 0..4 {
            sums[i] = s.mul_add(s.load(rest), whole_numbers(s, &codes[i][left.len() * LANES..]), sums[i]);
        }
    }
    for i in 0..4 {
        sums[i] = s.mul(s.mul(sums[i], s.splat(w.scale(lines[i]))), s.splat(ONE_127TH));
    }
    sums
}

/// `to[i·stride + j] = w[rows.start + i][cols.start + j]`
pub(in super::super) struct Dequantise<'a> {
    pub(in super::super) w: QuantView<'a>,
    pub(in super::super) rows: Range<usize>,
    pub(in super::super) cols: Range<usize>,
    /// Numbers from a row of `to` to the next; at least as many as there are columns, and 1.
    pub(in super::super) stride: usize,
    pub(in super::super) to: &'a mut [f32],
}

impl Kernel for Dequantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, to) in self.rows.zip(self.to.chunks_exact_mut(self.stride)) {
            dequantise(s, &self.w, row, self.cols.clone(), &mut to[..self.cols.len()]);
        }
    }
}
