//! The engine: `out = init + Σ scale·lhs·rhs`. Every low-rank verb is such a sum, and a term is no more than extra depth.
//!
//! Three regimes, by the height of the output and the depth (see [`plan`] and [`sum_of_products`]):
//! - [`blocked`]: both sides are packed into panels, and tiles stay in registers along the whole depth of a block. What a tile
//!   is made with is a [`micro`]-kernel: the vector unit's multiply-adds, or a unit for [`pairs`] of `bf16`;
//! - [`skinny`]: few rows, or one; reading the right side once is all the work there is, so it is not packed;
//! - [`shallow`]: an update of what is there by a product of little depth, which is merging.
//!
//! Beside them [`outer`]: a narrow product with the left side turned, from the panels that another product needs anyway; and
//! [`narrow`]: what few rows do with a matrix as narrow as the rank.

mod blocked;
mod depth;
mod dots;
mod kept;
mod left;
mod lines;
mod micro;
mod narrow;
mod outer;
mod output;
mod pack;
mod pairs;
mod plan;
mod shallow;
mod skinny;
mod tile;

pub(super) use kept::Packed;
use micro::Fma;
pub(super) use outer::Outer;
pub(super) use output::Output;
use output::{Block, Parts};
use plan::{Regime, SHALLOW_DEPTH, SKINNY_ROWS};
pub(super) use tile::multiply as tile;

use super::Engine;
use super::scratch::Taken;
use super::simd::{LANES, Lanes, Simd};
use crate::element::{Float, bf16};
use crate::error::Result;

/// A row-major matrix in memory, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    transposed: bool,
    /// Its panels, if they are kept.
    packed: Option<&'a Packed>,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows × cols`, row-major.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, transposed: false, packed: None }
    }

    /// With the panels that are kept of it.
    pub(super) fn with_packed(self, packed: Option<&'a Packed>) -> Self {
        Self { packed, ..self }
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Other numbers in the same place.
    pub(super) fn with_data<'b, U>(&self, data: &'b [U]) -> Matrix<'b, U> {
        Matrix { data, rows: self.rows, cols: self.cols, transposed: self.transposed, packed: None }
    }

    /// The `i`-th run of contiguous elements: a row, or a column of a transpose.
    #[inline(always)]
    fn run(&self, i: usize) -> &'a [T] {
        let len = if self.transposed { self.rows } else { self.cols };
        &self.data[i * len..][..len]
    }
}

impl<T: Copy> Matrix<'_, T> {
    fn at(&self, row: usize, col: usize) -> T {
        if self.transposed { self.data[col * self.rows + row] } else { self.data[row * self.cols + col] }
    }
}

impl<'a, E: Float> Matrix<'a, E> {
    /// The same, if its numbers are `bf16`.
    fn as_bf16(self) -> Option<Matrix<'a, bf16>> {
        let Self { data, rows, cols, transposed, packed } = self;
        let same = kept::same::<E, bf16>();
        same.then(|| Matrix { data: bytemuck::cast_slice(data), rows, cols, transposed, packed })
    }
}

/// A factor of a product: stored as weights are, or `f32` as `h` always is.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a, E> {
    Stored(Matrix<'a, E>),
    Wide(Matrix<'a, f32>),
}

impl<E: Float> Factor<'_, E> {
    /// One number.
    fn at(&self, row: usize, col: usize) -> f32 {
        match self {
            Factor::Stored(m) => m.at(row, col).to_f32(),
            Factor::Wide(m) => m.at(row, col),
        }
    }
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

/// `h = a_scale·lhs·a`, `out = init + lhs·w + b_scale·h·b`: an update through a narrow `h`, beside the product it updates.
#[derive(Clone, Copy)]
pub(super) struct LowRank<'a, E> {
    pub(super) lhs: Matrix<'a, E>,
    pub(super) w: Matrix<'a, E>,
    pub(super) a_scale: f32,
    pub(super) a: Matrix<'a, E>,
    pub(super) b_scale: f32,
    pub(super) b: Matrix<'a, E>,
}

impl<'a, E: Copy> LowRank<'a, E> {
    /// `a_scale·lhs·a`, which is `h`
    fn narrowed(&self) -> Product<'a, E> {
        Product { scale: self.a_scale, lhs: Factor::Stored(self.lhs), rhs: Factor::Stored(self.a) }
    }

    /// `lhs·w`
    fn base(&self) -> Product<'a, E> {
        Product { scale: 1.0, lhs: Factor::Stored(self.lhs), rhs: Factor::Stored(self.w) }
    }

    /// `b_scale·h·b`, `h` with `rows` rows
    fn update(&self, h: &'a [f32], rows: usize) -> Product<'a, E> {
        let h = Matrix::new(h, rows, self.a.cols);
        Product { scale: self.b_scale, lhs: Factor::Wide(h), rhs: Factor::Stored(self.b) }
    }
}

impl<'a, E: Float> LowRank<'a, E> {
    /// The same, if its numbers are `bf16`.
    fn as_bf16(self) -> Option<LowRank<'a, bf16>> {
        let Self { lhs, w, a_scale, a, b_scale, b } = self;
        Some(LowRank { lhs: lhs.as_bf16()?, w: w.as_bf16()?, a_scale, a: a.as_bf16()?, b_scale, b: b.as_bf16()? })
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

impl<'a, E: Float> Init<'a, E> {
    /// The same, if its numbers are `bf16`.
    fn as_bf16(self) -> Option<Init<'a, bf16>> {
        match self {
            Init::Zero => Some(Init::Zero),
            Init::Row(row) => kept::same::<E, bf16>().then(|| Init::Row(bytemuck::cast_slice(row))),
            Init::Output => Some(Init::Output),
        }
    }
}

/// The loop nest for an output of so many rows.
fn regime<E>(rows: usize, terms: &[Product<'_, E>]) -> Regime {
    let dots = terms.iter().any(|term| term.rhs.transposed());
    // Dot products are made of lines that are contiguous along the depth on both sides.
    let crossed = terms.iter().any(|term| term.lhs.transposed() && term.rhs.transposed());
    plan::regime(rows, dots, crossed)
}

/// The plan of `lhs·rhsᵀ`, `lhs m×k`, `rhs n×k`, in words.
pub(super) fn explain<E: Float>(engine: &Engine, m: usize, k: usize, n: usize) -> String {
    match (plan::regime(m, true, false), pairs::unit(engine).filter(|_| kept::same::<E, bf16>())) {
        (Regime::Skinny, _) => format!("skinny: dot products, {} columns a task", plan::DOTS),
        (Regime::Blocked, Some(unit)) => blocked::explain(engine, unit, k, n),
        (Regime::Blocked, None) => blocked::explain(engine, Fma, k, n),
    }
}

/// `out = init + Σ scale·lhs·rhs`, summed in `f32` and rounded once to the type of the output.
pub(super) fn sum_of_products<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: &[Product<'_, E>],
) -> Result<()> {
    for term in terms {
        debug_assert_eq!((term.lhs.rows(), term.rhs.cols()), (out.rows(), out.cols()));
        debug_assert_eq!(term.lhs.cols(), term.rhs.rows());
    }
    if out.is_empty() {
        return Ok(()); // whose other side, or whose depth, may be any number
    }
    if let (Init::Output, [term]) = (init, terms)
        && term.depth() <= SHALLOW_DEPTH
    {
        return shallow::run(engine, out, term);
    }
    match regime(out.rows(), terms) {
        Regime::Blocked => match pairs::Sum::of(engine, init, terms) {
            Some(sum) => sum.run(engine, out),
            None => blocked::run(engine, Fma, out, init, terms),
        },
        Regime::Skinny => skinny::run(engine, out, init, terms),
    }
}

/// [`LowRank`], and [`Outer`] if it is asked for, with `lhs` read once where it pays.
pub(super) fn low_rank<E: Float, O: Float>(
    engine: &Engine,
    op: LowRank<'_, E>,
    mut h: Output<'_, f32>,
    out: Output<'_, O>,
    init: Init<'_, E>,
    mut outer: Option<Outer<'_>>,
) -> Result<()> {
    let lhs = Factor::Stored(op.lhs);
    if h.is_empty() && out.is_empty() {
        return outer.map_or(Ok(()), |outer| outer_product(engine, lhs, outer));
    }
    if regime(out.rows(), &[op.narrowed(), op.base()]) == Regime::Blocked {
        if let (Some(unit), Some(op), Some(init)) = (pairs::unit(engine), op.as_bf16(), init.as_bf16())
            && pairs::may_repeat(&op.b)
        {
            let mut wide = outer.as_mut().map(|outer| outer.left(engine, lhs)).transpose()?;
            return blocked::run_low_rank(engine, unit, h, out, init, op, |_, rows| match (&mut outer, &mut wide) {
                (Some(outer), Some(wide)) => outer.pack_and_add(engine, lhs, wide, rows),
                _ => Ok(()),
            });
        }
        return blocked::run_low_rank(engine, Fma, h, out, init, op, |left, rows| match &mut outer {
            Some(outer) => outer.add(engine, left, rows),
            None => Ok(()),
        });
    }
    skinny::run(engine, h.reborrow(), Init::Zero, &[op.narrowed()])?;
    let rows = h.rows();
    skinny::run(engine, out, init, &[op.base(), op.update(h.data(), rows)])?;
    outer.map_or(Ok(()), |outer| outer_product(engine, lhs, outer))
}

/// `out = scale·lhsᵀ·rhs`
pub(super) fn outer_product<E: Float>(engine: &Engine, lhs: Factor<'_, E>, outer: Outer<'_>) -> Result<()> {
    if outer.out.is_empty() {
        return Ok(());
    }
    if lhs.rows() <= SKINNY_ROWS && outer.rhs.cols <= SKINNY_ROWS && !lhs.transposed() {
        return narrow::outer(engine, lhs, outer);
    }
    blocked::run_outer(engine, lhs, outer)
}

/// `line = init + sums`, rounded: the one place where a tile meets the edge of the output. `line` begins at column `col`.
#[inline(always)]
fn finish<S: Simd, E: Float, O: Float>(s: S, sums: &[Lanes<f32>], init: Init<'_, E>, col: usize, line: &mut [O]) {
    let (whole, rest) = line.as_chunks_mut::<LANES>();
    for (v, (to, sum)) in whole.iter_mut().zip(sums).enumerate() {
        let sum = s.load(sum);
        let value = match init {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], v)),
            Init::Output => s.add(sum, s.widen(to)),
        };
        s.narrow(value, to);
    }
    if !rest.is_empty() {
        let sum = s.load(&sums[whole.len()]);
        let value = match init {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], whole.len())),
            Init::Output => s.add(sum, s.widen_at(rest, 0)),
        };
        s.narrow_to(value, rest);
    }
}

/// `x` as vectors, `rows` of them side by side for each step of sixteen columns; see [`pack::Interleave`].
pub(super) fn interleave<'e, T: Float>(engine: &'e Engine, lines: Matrix<'_, T>) -> Result<Taken<'e>> {
    let mut to = engine.scratch.take(lines.rows * lines.cols.next_multiple_of(LANES))?;
    if !to.is_empty() {
        engine.unit.run(pack::Interleave { lines, first: 0, width: lines.rows, to: to.as_chunks_mut().0 });
    }
    Ok(to)
}
