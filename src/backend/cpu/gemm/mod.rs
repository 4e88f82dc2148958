//! The engine: `out = init + Σ scale·lhs·rhs`. Every low-rank verb is such a sum, and a term is no more than extra depth.
//!
//! Three regimes, by the height of the output and the depth (see [`plan`] and [`sum_of_products`]):
//! - [`blocked`]: both sides are packed into panels, and tiles stay in registers along the whole depth of a block. What a tile
//!   is made with is a [`micro`]-kernel: the vector unit's multiply-adds, or a unit for [`bf16_pairs`] of `bf16`;
//! - [`skinny`]: few rows, or one; reading the right side once is all the work there is, so it is not packed;
//! - [`rank_k_update`]: an update of what is there by a product of little depth, which is merging.
//!
//! Beside them [`outer`]: a narrow product with the left side turned, from the panels that another product needs anyway; and
//! [`narrow`]: what few rows do with a matrix as narrow as the rank.

mod axpy;
mod bf16_pairs;
mod blocked;
mod depth;
mod dots;
mod micro;
mod narrow;
mod outer;
mod output;
mod pack;
mod packed_lhs;
mod plan;
mod prepack;
mod quantised;
mod rank_k_update;
mod skinny;
mod tile;

use micro::Fma;
pub(super) use outer::Outer;
pub(super) use output::Output;
use output::{Block, Parts};
use plan::{RANK_K_DEPTH, Regime, SKINNY_ROWS};
pub use prepack::PackedWeight;
pub(super) use quantised::{DequantiseRows, QuantMatrix};
pub(super) use tile::microkernel;

use std::ops::Range;

use super::Engine;
use super::pointwise::CHUNK;
use super::scratch::ScratchGuard;
use super::simd::{Kernel, LANES, Lanes, Simd};
use crate::element::{Float, bf16};
use crate::error::Result;

/// A row-major matrix in memory, whose rows may lie apart, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From the first element on.
    data: &'a [T],
    rows: usize,
    cols: usize,
    /// Elements from one row in memory to the next.
    stride: usize,
    transposed: bool,
    /// Its panels, if it is packed.
    packed: Option<&'a PackedWeight>,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows × cols`, row-major.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self::strided(data, rows, cols, cols)
    }

    /// `rows × cols`, whose rows begin `stride` elements after one another.
    pub(super) fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, transposed: false, packed: None }
    }

    /// With its panels, if it is packed.
    pub(super) fn with_packed(self, packed: Option<&'a PackedWeight>) -> Self {
        Self { packed, ..self }
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// How many rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, if the rows in memory follow one another.
    pub(super) fn as_contiguous(&self) -> Option<&'a [T]> {
        let (runs, len) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        (runs <= 1 || self.stride == len).then(|| &self.data[..runs * len])
    }

    /// The runs of contiguous elements in memory: rows, or columns of a transpose.
    pub(super) fn runs(self) -> impl Iterator<Item = &'a [T]> {
        let (runs, len) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        (0..if len == 0 { 0 } else { runs }).map(move |i| self.run(i))
    }

    /// The `i`-th run of contiguous elements: a row, or a column of a transpose.
    #[inline(always)]
    pub(super) fn run(&self, i: usize) -> &'a [T] {
        let len = if self.transposed { self.rows } else { self.cols };
        &self.data[i * self.stride..][..len]
    }

    /// These rows of it, which is not transposed.
    pub(super) fn row_range(self, rows: Range<usize>) -> Self {
        debug_assert!(!self.transposed && rows.end <= self.rows);
        let first = if rows.is_empty() || self.cols == 0 { 0 } else { rows.start * self.stride };
        Self { data: &self.data[first..], rows: rows.len(), packed: None, ..self }
    }
}

impl<T: Copy> Matrix<'_, T> {
    fn at(&self, row: usize, col: usize) -> T {
        if self.transposed { self.data[col * self.stride + row] } else { self.data[row * self.stride + col] }
    }
}

impl<'a, E: Float> Matrix<'a, E> {
    /// The same, if its numbers are `bf16`.
    fn as_bf16(self) -> Option<Matrix<'a, bf16>> {
        let Self { data, rows, cols, stride, transposed, packed } = self;
        let same = prepack::same::<E, bf16>();
        same.then(|| Matrix { data: bytemuck::cast_slice(data), rows, cols, stride, transposed, packed })
    }
}

/// A factor of a product: stored as weights are, or `f32` as `h` always is, or quantised.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a, E> {
    Elem(Matrix<'a, E>),
    F32(Matrix<'a, f32>),
    Quantised(QuantMatrix<'a>),
}

impl<E: Float> Factor<'_, E> {
    /// One number.
    fn at(&self, row: usize, col: usize) -> f32 {
        match self {
            Factor::Elem(m) => m.at(row, col).to_f32(),
            Factor::F32(m) => m.at(row, col),
            Factor::Quantised(m) => m.at(row, col),
        }
    }
}

impl<E> Factor<'_, E> {
    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        match self {
            Factor::Elem(m) => Factor::Elem(m.t()),
            Factor::F32(m) => Factor::F32(m.t()),
            Factor::Quantised(m) => Factor::Quantised(m.t()),
        }
    }

    /// These rows of it, which is not transposed.
    pub(super) fn row_range(self, rows: Range<usize>) -> Self {
        match self {
            Factor::Elem(m) => Factor::Elem(m.row_range(rows)),
            Factor::F32(m) => Factor::F32(m.row_range(rows)),
            Factor::Quantised(m) => Factor::Quantised(m), // never: no factor of an update is quantised
        }
    }

    fn rows(&self) -> usize {
        match self {
            Factor::Elem(m) => m.rows,
            Factor::F32(m) => m.rows,
            Factor::Quantised(m) => m.rows(),
        }
    }
    fn cols(&self) -> usize {
        match self {
            Factor::Elem(m) => m.cols,
            Factor::F32(m) => m.cols,
            Factor::Quantised(m) => m.cols(),
        }
    }
    fn transposed(&self) -> bool {
        match self {
            Factor::Elem(m) => m.transposed,
            Factor::F32(m) => m.transposed,
            Factor::Quantised(m) => m.transposed,
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
    pub(super) w: Factor<'a, E>,
    pub(super) a_scale: f32,
    pub(super) a: Factor<'a, E>,
    pub(super) b_scale: f32,
    pub(super) b: Factor<'a, E>,
}

impl<'a, E: Copy> LowRank<'a, E> {
    /// `a_scale·lhs·a`, which is `h`
    fn narrowed(&self) -> Product<'a, E> {
        Product { scale: self.a_scale, lhs: Factor::Elem(self.lhs), rhs: self.a }
    }

    /// `lhs·w`
    fn base(&self) -> Product<'a, E> {
        Product { scale: 1.0, lhs: Factor::Elem(self.lhs), rhs: self.w }
    }

    /// `b_scale·h·b`, `h` with `rows` rows
    fn update(&self, h: &'a [f32], rows: usize) -> Product<'a, E> {
        let h = Matrix::new(h, rows, self.a.cols());
        Product { scale: self.b_scale, lhs: Factor::F32(h), rhs: self.b }
    }
}

impl<'a, E: Float> LowRank<'a, E> {
    /// As `bf16`, if all its numbers are stored so, and those of `b` may be [repeated](bf16_pairs::may_repeat).
    fn as_bf16(self) -> Option<LowRank<'a, bf16>> {
        let (Factor::Elem(a), Factor::Elem(b), Factor::Elem(w)) = (self.a, self.b, self.w) else { return None };
        let (a, b) = (Factor::Elem(a.as_bf16()?), Factor::Elem(b.as_bf16().filter(bf16_pairs::may_repeat)?));
        let (lhs, w) = (self.lhs.as_bf16()?, Factor::Elem(w.as_bf16()?));
        Some(LowRank { lhs, w, a_scale: self.a_scale, a, b_scale: self.b_scale, b })
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
    /// What the output holds, and in every row the same.
    OutputAndRow(&'a [E]),
}

impl<'a, E: Float> Init<'a, E> {
    /// The same, if its numbers are `bf16`.
    fn as_bf16(self) -> Option<Init<'a, bf16>> {
        match self {
            Init::Zero => Some(Init::Zero),
            Init::Row(row) => prepack::same::<E, bf16>().then(|| Init::Row(bytemuck::cast_slice(row))),
            Init::Output => Some(Init::Output),
            Init::OutputAndRow(row) => prepack::same::<E, bf16>().then(|| Init::OutputAndRow(bytemuck::cast_slice(row))),
        }
    }

    /// `sum + init` for vector `v` of a line that begins at column `col` and holds `old` there.
    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, col: usize, v: usize, old: impl FnOnce() -> S::V) -> S::V {
        match self {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], v)),
            Init::Output => s.add(sum, old()),
            Init::OutputAndRow(row) => s.add(s.add(sum, s.widen_at(&row[col..], v)), old()),
        }
    }

    /// Whether the output is read.
    pub(super) fn reads_output(self) -> bool {
        matches!(self, Init::Output | Init::OutputAndRow(_))
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
    match (plan::regime(m, true, false), bf16_pairs::unit(engine).filter(|_| prepack::same::<E, bf16>())) {
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
        && term.depth() <= RANK_K_DEPTH
    {
        return rank_k_update::run(engine, out, term);
    }
    match regime(out.rows(), terms) {
        Regime::Blocked => {
            if let Some(sum) = bf16_pairs::Sum::of(engine, init, terms) {
                return sum.run(engine, out);
            }
            match terms {
                [base, update] if bf16_pairs::Sum::of(engine, init, &[*base]).is_some() => {
                    apart(engine, out, init, [*base, *update])
                }
                _ => blocked::run(engine, Fma, out, init, terms),
            }
        }
        Regime::Skinny => skinny::run(engine, out, init, terms),
    }
}

/// `out = init + Σ scale·lhs·rhs` of two products that different units make, the first as it would be made by itself: both are summed
/// in `f32` memory, and rounded once.
fn apart<E: Float, O: Float>(engine: &Engine, out: Output<'_, O>, init: Init<'_, E>, terms: [Product<'_, E>; 2]) -> Result<()> {
    let (rows, cols) = (out.rows(), out.cols());
    let mut sums = engine.scratch.take(rows * cols)?;
    for (term, init) in terms.into_iter().zip([Init::Zero, Init::Output]) {
        sum_of_products(engine, Output::new(&mut sums, rows, cols), init, &[term])?;
    }
    store(engine, Matrix::new(&sums, rows, cols), out, init)
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
    let lhs = Factor::Elem(op.lhs);
    if h.is_empty() && out.is_empty() {
        return outer.map_or(Ok(()), |outer| outer_product(engine, lhs, outer));
    }
    if regime(out.rows(), &[op.narrowed(), op.base()]) == Regime::Blocked {
        if let Some(unit) = bf16_pairs::unit(engine)
            && let (Some(op), Some(init)) = (op.as_bf16(), init.as_bf16())
        {
            let mut wide = outer.as_mut().map(|outer| outer.left(engine, lhs)).transpose()?;
            return blocked::run_low_rank(engine, unit, h, out, init, op, |_, rows| match (&mut outer, &mut wide) {
                (Some(outer), Some(wide)) => outer.pack_and_add(engine, lhs, wide, rows),
                _ => Ok(()),
            });
        }
        if bf16_pairs::unit(engine).is_none() || !prepack::same::<E, bf16>() {
            return blocked::run_low_rank(engine, Fma, h, out, init, op, |left, rows| match &mut outer {
                Some(outer) => outer.add(engine, left, rows),
                None => Ok(()),
            });
        }
    }
    sum_of_products(engine, h.reborrow(), Init::Zero, &[op.narrowed()])?;
    let rows = h.rows();
    sum_of_products(engine, out, init, &[op.base(), op.update(h.data(), rows)])?;
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
        let value = init.add(s, s.load(sum), col, v, || s.widen(to));
        s.narrow(value, to);
    }
    if !rest.is_empty() {
        let value = init.add(s, s.load(&sums[whole.len()]), col, whole.len(), || s.widen_at(rest, 0));
        s.narrow_to(value, rest);
    }
}

/// `out = init + from`, rounded once
pub(super) fn store<E: Float, O: Float>(
    engine: &Engine,
    from: Matrix<'_, f32>,
    out: Output<'_, O>,
    init: Init<'_, E>,
) -> Result<()> {
    let down = Parts::new(out.rows(), 1, (CHUNK / out.cols().max(1)).max(1), 1);
    let across = Parts::new(out.cols(), out.cols().max(1), out.cols(), 1);
    out.for_each_block(engine, down, across, 1, |block| {
        engine.unit.run(Store { block, from, init });
        Ok(())
    })
}

struct Store<'a, 'o, E, O> {
    block: Block<'o, O>,
    from: Matrix<'a, f32>,
    init: Init<'a, E>,
}

impl<E: Float, O: Float> Kernel for Store<'_, '_, E, O> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (i, row) in self.block.rows().enumerate() {
            let from = self.from.run(row);
            for (v, to) in self.block.line(i).chunks_mut(LANES).enumerate() {
                let value = self.init.add(s, s.widen_at(from, v), 0, v, || s.widen_at(to, 0));
                s.narrow_to(value, to);
            }
        }
    }
}

/// `x` as vectors, `rows` of them side by side for each step of sixteen columns; see [`pack::Interleave`].
pub(super) fn interleave<'e, T: Float>(engine: &'e Engine, lines: Matrix<'_, T>) -> Result<ScratchGuard<'e>> {
    let mut to = engine.scratch.take(lines.rows * lines.cols.next_multiple_of(LANES))?;
    if !to.is_empty() {
        engine.unit.run(pack::Interleave { lines, first: 0, width: lines.rows, to: to.as_chunks_mut().0 });
    }
    Ok(to)
}
