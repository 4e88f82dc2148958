//! The verbs of the low-rank layer, as sums of products.

use super::gemm::{Factor, Init, LowRank, Matrix, Outer, Output, Product, low_rank, outer_product, store, sum_of_products};
use super::linear::{elements_mut, factor, init, matrix, output, product, weight};
use super::scratch::ScratchGuard;
use super::{Cpu, Engine, pointwise};
use crate::element::Float;
use crate::error::Result;
use crate::op::{self, Dropout, LoraBackward, LoraForward, LoraMerge};

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
pub(super) fn forward<E: Float>(engine: &Engine, op: LoraForward<'_, Cpu<E>>) -> Result<()> {
    let (x, a, b) = (matrix(op.x), factor(op.a).t(), factor(op.b).t());
    let (w, (y, adds)) = (op.w.map(|w| weight(w).t()), op.y.into_parts());
    let (m, r) = (op.h.rows(), op.h.cols());
    let h = elements_mut(op.h);
    if let (Some(w), None) = (w, op.dropout) {
        let sum = LowRank { lhs: x, w, a_scale: 1.0, a, b_scale: op.scale, b };
        return low_rank(engine, sum, Output::new(h, m, r), output(y), init(op.bias, adds), None);
    }
    let dropped = dropped(engine, op.dropout, x)?;
    let to_h = Product { scale: 1.0, lhs: update_input(x, &dropped), rhs: a };
    sum_of_products(engine, Output::new(h, m, r), Init::Zero, &[to_h])?;
    let update = Product { scale: op.scale, lhs: Factor::F32(Matrix::new(h, m, r)), rhs: b };
    match w {
        Some(w) => sum_of_products(engine, output(y), init(op.bias, adds), &[product(x, w), update]),
        None => sum_of_products(engine, output(y), init(op.bias, adds), &[update]),
    }
}

/// `drop(x)` in `f32` scratch memory; `None` without dropout.
fn dropped<'e, E: Float>(engine: &'e Engine, dropout: Option<Dropout>, x: Matrix<'_, E>) -> Result<Option<ScratchGuard<'e>>> {
    let Some(dropout) = dropout else { return Ok(None) };
    let mut dropped = engine.scratch.take(x.rows() * x.cols())?;
    match x.as_contiguous() {
        Some(x) => pointwise::drop(engine, dropout, x, &mut dropped),
        None => {
            pointwise::convert_rows(engine, x, &mut dropped);
            pointwise::dropout(engine, dropout, &mut dropped);
        }
    }
    Ok(Some(dropped))
}

/// The input of the update: `drop(x)`, or `x` without dropout.
fn update_input<'a, E>(x: Matrix<'a, E>, dropped: &'a Option<ScratchGuard<'_>>) -> Factor<'a, E> {
    match dropped {
        Some(dropped) => Factor::F32(Matrix::new(dropped, x.rows(), x.cols())),
        None => Factor::Elem(x),
    }
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
pub(super) fn backward<E: Float>(engine: &Engine, op: LoraBackward<'_, Cpu<E>>) -> Result<()> {
    let (m, r) = (op.x.rows(), op.a.rows());
    let (x, a, b, dy) = (matrix(op.x), factor(op.a), factor(op.b), matrix(op.dy));
    let (lhs, w) = (Factor::Elem(dy), op.w.map(weight));
    let dropped = dropped(engine, op.dropout, x)?;

    let mut dh = engine.scratch.take(m * r)?;
    let db = Outer { scale: op.scale, rhs: matrix(op.h), out: output(op.db) };
    match (op.dx.map(op::Output::into_parts), w, op.dropout) {
        (Some((dx, adds)), Some(w), None) => {
            let sum = LowRank { lhs: dy, w, a_scale: op.scale, a: b, b_scale: 1.0, b: a };
            low_rank(engine, sum, Output::new(&mut dh, m, r), output(dx), init(None, adds), Some(db))?;
        }
        (dx, w, dropout) => {
            outer_product(engine, lhs, db)?;
            let to_dh = Product { scale: op.scale, lhs, rhs: b };
            sum_of_products(engine, Output::new(&mut dh, m, r), Init::Zero, &[to_dh])?;
            let update = Product { scale: 1.0, lhs: Factor::F32(Matrix::new(&dh, m, r)), rhs: a };
            if let Some((dx, adds)) = dx {
                add_update(engine, w.map(|w| product(dy, w)), update, dropout, output(dx), init(None, adds))?;
            }
        }
    }

    let to_da = Product { scale: 1.0, lhs: Factor::F32(Matrix::new(&dh, m, r).t()), rhs: update_input(x, &dropped) };
    sum_of_products(engine, output(op.da), Init::Zero, &[to_da])?;
    if let Some(dbias) = op.dbias {
        pointwise::column_sums(engine, dy, elements_mut(dbias));
    }
    Ok(())
}

/// `dx = init + base + drop(update)`, rounded once. The update is computed in `f32` and masked, then the other terms are added
/// to it: with the mask between them, they are not one sum of products.
fn add_update<E: Float>(
    engine: &Engine,
    base: Option<Product<'_, E>>,
    update: Product<'_, E>,
    dropout: Option<Dropout>,
    dx: Output<'_, E>,
    init: Init<'_, E>,
) -> Result<()> {
    if let (None, None) = (base, dropout) {
        return sum_of_products(engine, dx, init, &[update]);
    }
    let (m, k) = (dx.rows(), dx.cols());
    let mut sum = engine.scratch.take(m * k)?;
    sum_of_products(engine, Output::new(&mut sum, m, k), Init::Zero, &[update])?;
    if let Some(dropout) = dropout {
        pointwise::dropout(engine, dropout, &mut sum);
    }
    if let Some(base) = base {
        sum_of_products(engine, Output::new(&mut sum, m, k), Init::Output, &[base])?;
    }
    store(engine, Matrix::new(&sum, m, k), dx, init)
}

/// `W += scale·B·A`
pub(super) fn merge<E: Float>(engine: &Engine, op: LoraMerge<'_, Cpu<E>>) -> Result<()> {
    if let Some(key) = op.rounding.key(E::DTYPE) {
        return merge_stochastic(engine, op, key);
    }
    let update = Product { scale: op.scale, lhs: factor(op.b), rhs: factor(op.a) };
    sum_of_products(engine, output(op.w), Init::Output, &[update])
}

/// Elements of a band of rows: 4 MiB of `f32` sums, small enough for L3.
const BAND: usize = 1 << 20;

/// `W += scale·B·A` with stochastic rounding, a band of rows at a time: the sums are made in `f32` scratch memory and then
/// rounded. The height of a band is a multiple of 4, so each band starts with a whole block of random words.
fn merge_stochastic<E: Float>(engine: &Engine, op: LoraMerge<'_, Cpu<E>>, key: [u32; 2]) -> Result<()> {
    let k = op.w.cols();
    let rows = (BAND / k.max(1)).max(1).next_multiple_of(4);
    let (a, b, w) = (factor(op.a), factor(op.b), elements_mut(op.w));
    let mut sums = engine.scratch.take((rows * k).min(w.len()))?;
    for (band, w) in w.chunks_mut((rows * k).max(1)).enumerate() {
        let (height, sums) = (w.len() / k, &mut sums[..w.len()]);
        pointwise::convert(engine, w, sums);
        let update = Product { scale: op.scale, lhs: b.row_range(band * rows..band * rows + height), rhs: a };
        sum_of_products(engine, Output::new(sums, height, k), Init::Output, &[update])?;
        pointwise::round(engine, key, band * rows * k, sums, w);
    }
    Ok(())
}
