//! The low-rank layer where each row of the batch has an adapter of its own, or none.
//!
//! `x·Wᵀ` is made for all rows at once, as the base layer makes it; then each row's update is added to it, in `f32`.

use super::gemm::{
    Factor, Init, Matrix, Output, Product, Rows, add_products, add_rows, narrow_by_row, outer_by_segment, store, sum_of_products,
};
use super::linear::{elements_mut, factor, init, matrix, output, product, weight};
use super::lora::{dropped, update_input};
use super::{Cpu, Engine, pointwise};
use crate::element::Float;
use crate::error::Result;
use crate::op::{self, LoraBackward, LoraForward};

/// Rows of a 16-bit output whose sums are made in `f32` memory together; at least half as many, which are not few.
const CHUNK: usize = 1008;

/// `A` and `B` of all slots, and which rows use which.
fn bank<'a, E: Float>(
    a: op::Factor<'a, Cpu<E>>,
    b: op::Factor<'a, Cpu<E>>,
    scale: f32,
) -> Option<[(Rows<'a>, Factor<'a, E>); 2]> {
    let (op::Factor::PerRow(a), op::Factor::PerRow(b)) = (a, b) else { return None };
    let (bank, rows) = (a.bank(), a.rows());
    let (segments, order, slots, rank) = (rows.segments(), rows.order(), bank.slot_list(), bank.rank());
    let rows = Rows { segments, order, slots, rank, scale: Some(scale) };
    Some([a, b].map(|all| (rows, factor(all.stacked()))))
}

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
pub(super) fn forward<E: Float>(engine: &Engine, op: LoraForward<'_, Cpu<E>>) -> Result<()> {
    let Some([(rows, a), (_, b)]) = bank(op.a, op.b, op.scale) else { return Ok(()) }; // the request sees to it
    let (x, m, r) = (matrix(op.x), op.h.rows(), op.h.cols());
    let h = elements_mut(op.h);
    let dropped = dropped(engine, op.dropout, x)?;
    narrow_by_row(engine, rows.unscaled(), update_input(x, &dropped), a, Output::new(h, m, r))?;
    let base = op.w.map(|w| product(x, weight(w).t()));
    let (y, adds) = op.y.into_parts();
    let h = Matrix::new(h, m, r);
    base_and_update(engine, base, output(y), init(op.bias, adds), |first, y| add_products(engine, rows, h, b, first, y))
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
pub(super) fn backward<E: Float>(engine: &Engine, op: LoraBackward<'_, Cpu<E>>) -> Result<()> {
    let Some([(rows, a), (_, b)]) = bank(op.a, op.b, op.scale) else { return Ok(()) }; // the request sees to it
    let (x, dy, h, m, r) = (matrix(op.x), matrix(op.dy), matrix(op.h), op.h.rows(), op.h.cols());
    let dropped = dropped(engine, op.dropout, x)?;
    let mut dh = engine.scratch.take(m * r)?;
    narrow_by_row(engine, rows, Factor::Elem(dy), b, Output::new(&mut dh, m, r))?;
    let dh = Matrix::new(&dh, m, r);
    outer_by_segment(engine, rows, h, Factor::Elem(dy), output(op.db))?;
    outer_by_segment(engine, rows.unscaled(), dh, update_input(x, &dropped), output(op.da))?;
    if let Some(dbias) = op.dbias {
        pointwise::column_sums(engine, dy, elements_mut(dbias));
    }
    let Some((dx, adds)) = op.dx.map(op::Output::into_parts) else { return Ok(()) };
    let base = op.w.map(|w| product(dy, weight(w)));
    let (rows, to, init, k) = (rows.unscaled(), output(dx), init(None, adds), x.cols());
    let Some(dropout) = op.dropout else {
        return base_and_update(engine, base, to, init, |first, dx| add_products(engine, rows, dh, a, first, dx));
    };
    let mut masked = engine.scratch.take(m * k)?;
    masked.fill(0.0);
    add_products(engine, rows, dh, a, 0, Output::new(&mut masked, m, k))?;
    pointwise::dropout(engine, dropout, &mut masked);
    let masked = Matrix::new(&masked, m, k);
    base_and_update(engine, base, to, init, |first, dx| add_rows(engine, rows, masked, first, dx))
}

/// `out = init + base + update`, rounded once. `add` adds the update to some rows, of which it is told the first; those that use no
/// slot have the bits of `init + base`.
fn base_and_update<E: Float>(
    engine: &Engine,
    base: Option<Product<'_, E>>,
    mut out: Output<'_, E>,
    init: Init<'_, E>,
    add: impl Fn(usize, Output<'_, f32>) -> Result<()>,
) -> Result<()> {
    let (m, n) = (out.rows(), out.cols());
    // Without a base the sum of products has no depth.
    let (lhs, rhs) = (Factor::Elem(Matrix::new(&[], m, 0)), Factor::Elem(Matrix::new(&[], 0, n)));
    let base = base.unwrap_or(Product { scale: 1.0, lhs, rhs });
    if let Some(mut out) = out.as_f32() {
        sum_of_products(engine, out.reborrow(), init, &[base])?;
        return add(0, out);
    }
    // Parts of about the same height, so that none is multiplied as few rows are where all together are not.
    let height = m.div_ceil(m.div_ceil(CHUNK).max(1)).max(1);
    let mut sums = engine.scratch.take(height.min(m) * n)?;
    for first in (0..m).step_by(height) {
        let rows = first..m.min(first + height);
        let (height, mut out, sums) = (rows.len(), out.rows_of(rows.clone()), &mut sums[..rows.len() * n]);
        if init.reads_output() {
            pointwise::convert_rows(engine, out.as_matrix(), sums);
        }
        let base = Product { lhs: base.lhs.row_range(rows), ..base };
        sum_of_products(engine, Output::new(sums, height, n), init, &[base])?;
        add(first, Output::new(sums, height, n))?;
        store(engine, Matrix::new(sums, height, n), out.reborrow(), Init::<E>::Zero)?;
    }
    Ok(())
}
