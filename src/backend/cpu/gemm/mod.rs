//! The engine: `out = init + Σ scale·lhs·rhs`. Every low-rank verb is such a sum, and a term is no more than extra depth.
//!
//! Two regimes, by the height of the output (see [`plan`]):
//! - [`blocked`]: both sides are packed into panels, and tiles stay in registers along the whole depth of a block;
//! - [`skinny`]: few rows; reading the right side once is all the work there is, so it is not packed.

mod blocked;
mod pack;
mod skinny;
mod tile;

pub(super) use tile::multiply as tile;

use super::Engine;
use super::scratch::Taken;
use super::simd::{LANES, Lanes, Simd};
use crate::element::Float;
use crate::error::Result;

/// A row-major matrix in memory, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows × cols`, row-major.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, transposed: false }
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Other numbers in the same place.
    pub(super) fn with_data<'b, U>(&self, data: &'b [U]) -> Matrix<'b, U> {
        Matrix { data, rows: self.rows, cols: self.cols, transposed: self.transposed }
    }

    /// The `i`-th run of contiguous elements: a row, or a column of a transpose.
    #[inline(always)]
    fn run(&self, i: usize) -> &'a [T] {
        let len = if self.transposed { self.rows } else { self.cols };
        &self.data[i * len..][..len]
    }
}

/// A factor of a product: stored as weights are, or `f32` as `h` always is.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a, E> {
    Stored(Matrix<'a, E>),
    Wide(Matrix<'a, f32>),
}

impl<E> Factor<'_, E> {
    fn rows(&self) -> usize {
        match self {
            Factor::Stored(m) => m.rows,
            Factor::Wide(m) => m.rows,
        }
    }
    fn cols(&self) -> usize {
        match self {
            Factor::Stored(m) => m.cols,
            Factor::Wide(m) => m.cols,
        }
    }
    fn transposed(&self) -> bool {
        match self {
            Factor::Stored(m) => m.transposed,
            Factor::Wide(m) => m.transposed,
        }
    }
}

/// `scale·lhs·rhs`, `lhs m×depth`, `rhs depth×n`
#[derive(Clone, Copy)]
pub(super) struct Product<'a, E> {
    pub(super) scale: f32,
    pub(super) lhs: Factor<'a, E>,
    pub(super) rhs: Factor<'a, E>,
}

impl<E> Product<'_, E> {
    fn depth(&self) -> usize {
        self.lhs.cols()
    }
}

/// What the sum begins with.
#[derive(Clone, Copy)]
pub(super) enum Init<'a, E> {
    Zero,
    /// The same row everywhere: a bias.
    Row(&'a [E]),
    /// What the output holds.
    Output,
}

/// The matrix to write.
pub(super) struct Output<'a, O> {
    data: &'a mut [O],
    rows: usize,
    cols: usize,
}

impl<'a, O> Output<'a, O> {
    /// `rows × cols`, row-major.
    pub(super) fn new(data: &'a mut [O], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols }
    }

    /// Cuts the output into blocks, each the property of one task: slices of rows, so that no task can reach another's part.
    fn into_blocks(self, height: usize, width: usize) -> Vec<Block<'a, O>> {
        let across = self.cols.div_ceil(width);
        let mut blocks: Vec<Block<'a, O>> = Vec::with_capacity(self.rows.div_ceil(height) * across);
        if self.cols == 0 {
            return blocks;
        }
        for (row, line) in self.data.chunks_exact_mut(self.cols).enumerate() {
            if row % height == 0 {
                let new = |i| Block { row, col: i * width, lines: Vec::with_capacity(height.min(self.rows - row)) };
                blocks.extend((0..across).map(new));
            }
            let band = blocks.len() - across;
            for (block, part) in blocks[band..].iter_mut().zip(line.chunks_mut(width)) {
                block.lines.push(part);
            }
        }
        blocks
    }
}

/// A rectangle of the output, from (`row`, `col`) on.
struct Block<'a, O> {
    row: usize,
    col: usize,
    lines: Vec<&'a mut [O]>,
}

impl<O> Block<'_, O> {
    fn width(&self) -> usize {
        self.lines.first().map_or(0, |line| line.len())
    }
}

/// Which loop nest computes a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Blocked,
    Skinny,
}

/// The most rows that are cheaper without packing: packing the right side costs about what sixteen rows of products do.
const SKINNY_ROWS: usize = 16;

fn plan(rows: usize, left_is_transposed: bool) -> Plan {
    if rows <= SKINNY_ROWS && !left_is_transposed { Plan::Skinny } else { Plan::Blocked }
}

/// `out = init + Σ scale·lhs·rhs`, summed in `f32` and rounded once to the type of the output.
pub(super) fn sum_of_products<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    for term in terms {
        debug_assert_eq!((term.lhs.rows(), term.rhs.cols()), (out.rows, out.cols));
        debug_assert_eq!(term.lhs.cols(), term.rhs.rows());
    }
    match plan(out.rows, terms.iter().any(|term| term.lhs.transposed())) {
        Plan::Blocked => blocked::run(engine, out, init, terms),
        Plan::Skinny => skinny::run(engine, out, init, terms),
    }
}

/// `line = init + sums`, rounded: the one place where a tile meets the edge of the output. `line` begins at column `col`.
#[inline(always)]
fn finish<S: Simd, E: Float, O: Float>(s: S, sums: &[Lanes<f32>], init: Init<'_, E>, col: usize, line: &mut [O]) {
    for (v, (to, sum)) in line.chunks_mut(LANES).zip(sums).enumerate() {
        let sum = s.load(sum);
        let value = match init {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], v)),
            Init::Output => s.add(sum, s.widen_at(to, 0)),
        };
        s.narrow_to(value, to);
    }
}

/// `x` as vectors, `rows` of them side by side for each step of sixteen columns; see [`pack::Interleave`].
pub(super) fn interleave<'e, T: Float>(engine: &'e Engine, lines: Matrix<'_, T>) -> Result<Taken<'e>> {
    let mut to = engine.scratch.take(lines.rows * lines.cols.next_multiple_of(LANES))?;
    if !to.is_empty() {
        engine.unit.run(pack::Interleave { lines, scale: 1.0, width: lines.rows, to: to.as_chunks_mut().0 });
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_output_once() {
        for (rows, cols, height, width) in [(7, 9, 3, 4), (1, 1, 5, 5), (6, 8, 3, 4), (0, 3, 2, 2), (3, 0, 2, 2)] {
            let mut data = vec![0u32; rows * cols];
            for block in Output::new(&mut data, rows, cols).into_blocks(height, width) {
                assert!(block.lines.len() <= height && block.width() <= width);
                for (i, line) in block.lines.into_iter().enumerate() {
                    for (j, to) in line.iter_mut().enumerate() {
                        *to += ((block.row + i) * cols + block.col + j + 1) as u32;
                    }
                }
            }
            assert!(data.iter().enumerate().all(|(i, &seen)| seen == i as u32 + 1));
        }
    }

    #[test]
    fn the_plan_packs_what_is_tall_or_turned() {
        assert_eq!(plan(SKINNY_ROWS, false), Plan::Skinny);
        assert_eq!(plan(SKINNY_ROWS + 1, false), Plan::Blocked);
        assert_eq!(plan(1, true), Plan::Blocked);
    }
}
