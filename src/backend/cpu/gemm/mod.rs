//! The engine: `out = init + Σ scale·lhs·rhs`. Every verb of the low-rank layer is such a sum; the update is a second term,
//! that is, more depth.
//!
//! Three regimes, chosen by the rows of the output and the depth (see [`plan`] and [`sum_of_products`]):
//! - [`blocked`]: both sides are packed into panels; a tile of sums stays in registers along the depth of a block. The
//!   [`micro`]-kernel multiplies either with multiply-adds of `f32` or with a unit for pairs of `bf16` ([`bf16_pairs`]);
//! - [`skinny`]: the output has few rows, the time goes into reading the right side once, and so it is not packed;
//! - [`rank_k_update`]: a product of little depth is added to the output, which is read and written once (merging).
//!
//! Two special cases: [`outer`] computes `scale·lhsᵀ·rhs` from left panels that another product has packed (`dB` beside `dx`);
//! [`narrow`] transposes a right side with fewer columns than a vector has lanes.
//! [`segments`] computes products in which each row has a right side of its own.

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
mod segments;
mod skinny;
mod tile;

use micro::Fma;
pub(super) use outer::Outer;
pub(super) use output::Output;
use output::{Block, Parts};
use plan::{RANK_K_DEPTH, Regime, SKINNY_ROWS};
pub use prepack::PackedWeight;
pub(super) use quantised::{Dequantise, QuantMatrix};
pub(super) use segments::{Rows, add_products, add_rows, narrow_by_row, outer_by_segment};
pub(super) use tile::microkernel;

use std::ops::Range;

use super::Engine;
use super::pointwise::CHUNK;
use super::scratch::ScratchGuard;
use super::simd::{Kernel, LANES, Lanes, Simd};
use crate::element::{Float, bf16};
use crate::error::Result;

/// A row-major matrix in memory, with a row stride, or the transpose of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// Starts with the first element.
    data: &'a [T],
    rows: usize,
    cols: usize,
    /// Elements from one row in memory to the next.
    stride: usize,
    transposed: bool,
    /// The panels of a prepacked weight.
    packed: Option<&'a PackedWeight>,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows × cols`, row-major.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols);
        Self::strided(data, rows, cols, cols)
    }

    /// `rows × cols`, row-major, with `stride` elements from the start of a row to that of the next.
    pub(super) fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, transposed: false, packed: None }
    }

    /// Adds the panels of a prepacked weight.
    pub(super) fn with_packed(self, packed: Option<&'a PackedWeight>) -> Self {
        Self { packed, ..self }
    }

    /// The transpose; nothing is copied.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, if they are contiguous in memory.
    pub(super) fn as_contiguous(&self) -> Option<&'a [T]> {
        let (runs, len) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        (runs <= 1 || self.stride == len).then(|| &self.data[..runs * len])
    }

    /// The contiguous runs of elements: the rows, or the columns of a transposed matrix.
    pub(super) fn runs(self) -> impl Iterator<Item = &'a [T]> {
        let (runs, len) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        (0..if len == 0 { 0 } else { runs }).map(move |i| self.run(i))
    }

    /// Contiguous run `i`: a row, or a column of a transposed matrix.
    #[inline(always)]
    pub(super) fn run(&self, i: usize) -> &'a [T] {
        let len = if self.transposed { self.rows } else { self.cols };
        &self.data[i * self.stride..][..len]
    }

    /// A range of rows of a matrix that is not transposed.
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
    /// The matrix itself, typed as `bf16`, if `E` is `bf16`.
    fn as_bf16(self) -> Option<Matrix<'a, bf16>> {
        let Self { data, rows, cols, stride, transposed, packed } = self;
        let same = prepack::is_same::<E, bf16>();
        same.then(|| Matrix { data: bytemuck::cast_slice(data), rows, cols, stride, transposed, packed })
    }
}

/// One side of a product: of the weights' element type, or `f32`, as `h` always is; a right side may be quantised.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a, E> {
    Elem(Matrix<'a, E>),
    F32(Matrix<'a, f32>),
    Quantised(QuantMatrix<'a>),
}

impl<E: Float> Factor<'_, E> {
    /// The element, widened to `f32`.
    fn at(&self, row: usize, col: usize) -> f32 {
        match self {
            Factor::Elem(m) => m.at(row, col).to_f32(),
            Factor::F32(m) => m.at(row, col),
            Factor::Quantised(m) => m.at(row, col),
        }
    }
}

impl<E> Factor<'_, E> {
    /// The transpose; nothing is copied.
    pub(super) fn t(self) -> Self {
        match self {
            Factor::Elem(m) => Factor::Elem(m.t()),
            Factor::F32(m) => Factor::F32(m.t()),
            Factor::Quantised(m) => Factor::Quantised(m.t()),
        }
    }

    /// A range of rows of a factor that is not transposed.
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

/// `h = a_scale·lhs·a`, `out = init + lhs·w + b_scale·h·b`: a base product and its low-rank update.
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
    /// `h = a_scale·lhs·a`
    fn h_product(&self) -> Product<'a, E> {
        Product { scale: self.a_scale, lhs: Factor::Elem(self.lhs), rhs: self.a }
    }

    /// `lhs·w`
    fn base(&self) -> Product<'a, E> {
        Product { scale: 1.0, lhs: Factor::Elem(self.lhs), rhs: self.w }
    }

    /// `b_scale·h·b`, where `h` has `rows` rows
    fn update(&self, h: &'a [f32], rows: usize) -> Product<'a, E> {
        let h = Matrix::new(h, rows, self.a.cols());
        Product { scale: self.b_scale, lhs: Factor::F32(h), rhs: self.b }
    }
}

impl<'a, E: Float> LowRank<'a, E> {
    /// The operands typed as `bf16`, if all four are `bf16` and `b` is [finite](bf16_pairs::all_finite).
    fn as_bf16(self) -> Option<LowRank<'a, bf16>> {
        let (Factor::Elem(a), Factor::Elem(b), Factor::Elem(w)) = (self.a, self.b, self.w) else { return None };
        let (a, b) = (Factor::Elem(a.as_bf16()?), Factor::Elem(b.as_bf16().filter(bf16_pairs::all_finite)?));
        let (lhs, w) = (self.lhs.as_bf16()?, Factor::Elem(w.as_bf16()?));
        Some(LowRank { lhs, w, a_scale: self.a_scale, a, b_scale: self.b_scale, b })
    }
}

/// The initial value of a sum.
#[derive(Clone, Copy)]
pub(super) enum Init<'a, E> {
    Zero,
    /// One row, added to every row of the output: a bias.
    Row(&'a [E]),
    /// The old output (`beta = 1`).
    Output,
    /// The old output plus a bias.
    OutputAndRow(&'a [E]),
}

impl<'a, E: Float> Init<'a, E> {
    /// Itself, typed as `bf16`, if `E` is `bf16`.
    fn as_bf16(self) -> Option<Init<'a, bf16>> {
        match self {
            Init::Zero => Some(Init::Zero),
            Init::Row(row) => prepack::is_same::<E, bf16>().then(|| Init::Row(bytemuck::cast_slice(row))),
            Init::Output => Some(Init::Output),
            Init::OutputAndRow(row) => prepack::is_same::<E, bf16>().then(|| Init::OutputAndRow(bytemuck::cast_slice(row))),
        }
    }

    /// `sum + init` for vector `v` of a row segment that starts at column `col`; `old` loads the old output.
    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, col: usize, v: usize, old: impl FnOnce() -> S::V) -> S::V {
        match self {
            Init::Zero => sum,
            Init::Row(row) => s.add(sum, s.widen_at(&row[col..], v)),
            Init::Output => s.add(sum, old()),
            Init::OutputAndRow(row) => s.add(s.add(sum, s.widen_at(&row[col..], v)), old()),
        }
    }

    /// True if the old output is read.
    pub(super) fn reads_output(self) -> bool {
        matches!(self, Init::Output | Init::OutputAndRow(_))
    }
}

/// The regime of a sum whose output has `rows` rows.
fn regime<E>(rows: usize, terms: &[Product<'_, E>]) -> Regime {
    let dots = terms.iter().any(|term| term.rhs.transposed());
    // A dot product needs both sides contiguous along the depth.
    let crossed = terms.iter().any(|term| term.lhs.transposed() && term.rhs.transposed());
    plan::regime(rows, dots, crossed)
}

/// The plan of `lhs·rhsᵀ`, `lhs m×k`, `rhs n×k`, in words.
pub(super) fn explain<E: Float>(engine: &Engine, m: usize, k: usize, n: usize) -> String {
    match (plan::regime(m, true, false), bf16_pairs::unit(engine).filter(|_| prepack::is_same::<E, bf16>())) {
        (Regime::Skinny, _) => format!("skinny: dot products, {} columns in each task", plan::DOT_COLS),
        (Regime::Blocked, Some(unit)) => blocked::explain(engine, unit, k, n),
        (Regime::Blocked, None) => blocked::explain(engine, Fma, k, n),
    }
}

/// `out = init + Σ scale·lhs·rhs`, summed in `f32` and rounded once to the element type of the output.
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
        return Ok(()); // its other dimension and the depth may be of any size
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
                    sum_separately(engine, out, init, [*base, *update])
                }
                _ => blocked::run(engine, Fma, out, init, terms),
            }
        }
        Regime::Skinny => skinny::run(engine, out, init, terms),
    }
}

/// `out = init + Σ scale·lhs·rhs` of two products that different units compute: both are summed in `f32` scratch memory, which
/// is rounded once. So the sum over the base weights has the same order as without the second product.
fn sum_separately<E: Float, O: Float>(
    engine: &Engine,
    out: Output<'_, O>,
    init: Init<'_, E>,
    terms: [Product<'_, E>; 2],
) -> Result<()> {
    let (rows, cols) = (out.rows(), out.cols());
    let mut sums = engine.scratch.take(rows * cols)?;
    for (term, init) in terms.into_iter().zip([Init::Zero, Init::Output]) {
        sum_of_products(engine, Output::new(&mut sums, rows, cols), init, &[term])?;
    }
    store(engine, Matrix::new(&sums, rows, cols), out, init)
}

/// `h = a_scale·lhs·a`, `out = init + lhs·w + b_scale·h·b`, and with `outer` also `outer.out = scale·lhsᵀ·outer.rhs`. In the
/// blocked regime `lhs` is packed once for all of them.
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
    if regime(out.rows(), &[op.h_product(), op.base()]) == Regime::Blocked {
        if let Some(unit) = bf16_pairs::unit(engine)
            && let (Some(op), Some(init)) = (op.as_bf16(), init.as_bf16())
        {
            let mut packed = outer.as_mut().map(|outer| outer.allocate_lhs(engine, lhs)).transpose()?;
            return blocked::run_low_rank(engine, unit, h, out, init, op, |_, rows| match (&mut outer, &mut packed) {
                (Some(outer), Some(packed)) => outer.pack_and_add(engine, lhs, packed, rows),
                _ => Ok(()),
            });
        }
        if bf16_pairs::unit(engine).is_none() || !prepack::is_same::<E, bf16>() {
            return blocked::run_low_rank(engine, Fma, h, out, init, op, |left, rows| match &mut outer {
                Some(outer) => outer.add(engine, left, rows),
                None => Ok(()),
            });
        }
    }
    sum_of_products(engine, h.reborrow(), Init::Zero, &[op.h_product()])?;
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

/// `line = init + sums`, rounded, for the part of an output row that starts at column `col`. It may end within a vector.
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

/// All rows of a matrix interleaved, a vector of each in turn; see [`pack::Interleave`].
pub(super) fn interleave<'e, T: Float>(engine: &'e Engine, lines: Matrix<'_, T>) -> Result<ScratchGuard<'e>> {
    let mut to = engine.scratch.take(lines.rows * lines.cols.next_multiple_of(LANES))?;
    if !to.is_empty() {
        engine.unit.run(pack::Interleave { lines, first: 0, width: lines.rows, to: to.as_chunks_mut().0 });
    }
    Ok(to)
}
