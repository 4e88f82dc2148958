//! The verbs of the low-rank layer, as sums of products.

use super::gemm::{Factor, Init, LowRank, Matrix, Output, Product, low_rank, sum_of_products};
use super::linear::{init, matrix, output, product};
use super::scratch::Taken;
use super::{Cpu, Engine, pointwise};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraBackward, LoraForward, LoraMerge};
use crate::tensor::Tensor;

/// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
pub(super) fn forward<E: Float>(engine: &Engine, op: LoraForward<'_, Cpu<E>>) -> Result<()> {
    let (x, a, b) = (matrix(op.x), matrix(op.a), matrix(op.b));
    let (lhs, w, b) = (Factor::Stored(x), Factor::Stored(matrix(op.w).t()), Factor::Stored(b.t()));
    let Some(dropped) = dropped(engine, op.dropout, op.x)? else {
        let sum = LowRank { lhs, w, a_scale: 1.0, a: Factor::Stored(a.t()), b_scale: op.scale, b };
        return low_rank(engine, sum, output(op.h), output(op.y), init(op.bias));
    };
    let to_h = Product { scale: 1.0, lhs: Factor::Wide(x.with_data(&dropped)), rhs: Factor::Stored(a.t()) };
    sum_of_products(engine, output(op.h), Init::Zero, &[to_h])?;
    let base = Product { scale: 1.0, lhs, rhs: w };
    let update = Product { scale: op.scale, lhs: Factor::Wide(matrix(op.h)), rhs: b };
    sum_of_products(engine, output(op.y), init(op.bias), &[base, update])
}

/// `drop(x)` in `f32`, where there is dropout.
fn dropped<'e, E: Float>(engine: &'e Engine, dropout: Option<Dropout>, x: &Tensor<Cpu<E>>) -> Result<Option<Taken<'e>>> {
    let Some(dropout) = dropout else { return Ok(None) };
    let mut dropped = engine.scratch.take(x.buffer().len())?;
    pointwise::convert(engine.unit, x.buffer(), &mut dropped);
    pointwise::dropout(dropout, &mut dropped);
    Ok(Some(dropped))
}

/// What the adapter sees of `x`.
fn seen<'a, E>(x: Matrix<'a, E>, dropped: &'a Option<Taken<'_>>) -> Factor<'a, E> {
    match dropped {
        Some(dropped) => Factor::Wide(x.with_data(dropped)),
        None => Factor::Stored(x),
    }
}

/// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
pub(super) fn backward<E: Float>(engine: &Engine, op: LoraBackward<'_, Cpu<E>>) -> Result<()> {
    let (m, r) = (op.x.rows(), op.a.rows());
    let (x, a, b, dy) = (matrix(op.x), matrix(op.a), matrix(op.b), matrix(op.dy));
    let dropped = dropped(engine, op.dropout, op.x)?;

    let mut dh = engine.scratch.take(m * r)?;
    let through_b = Product { scale: op.scale, ..product(dy, b) };
    match op.dx {
        Some(dx) if op.dropout.is_none() => {
            let (lhs, w, a) = (Factor::Stored(dy), Factor::Stored(matrix(op.w)), Factor::Stored(a));
            let sum = LowRank { lhs, w, a_scale: op.scale, a: through_b.rhs, b_scale: 1.0, b: a };
            low_rank(engine, sum, Output::new(&mut dh, m, r), output(dx), Init::Zero)?;
        }
        dx => {
            sum_of_products(engine, Output::new(&mut dh, m, r), Init::Zero, &[through_b])?;
            if let (Some(dx), Some(dropout)) = (dx, op.dropout) {
                let update = Product { scale: 1.0, lhs: Factor::Wide(Matrix::new(&dh, m, r)), rhs: Factor::Stored(a) };
                dx_with_dropout(engine, product(dy, matrix(op.w)), update, dropout, dx)?;
            }
        }
    }

    let dh = Matrix::new(&dh, m, r);
    let da = Product { scale: 1.0, lhs: Factor::Wide(dh.t()), rhs: seen(x, &dropped) };
    sum_of_products(engine, output(op.da), Init::Zero, &[da])?;
    let db = Product { scale: op.scale, lhs: Factor::Stored(dy.t()), rhs: Factor::Wide(matrix(op.h)) };
    sum_of_products(engine, output(op.db), Init::Zero, &[db])?;
    if let Some(dbias) = op.dbias {
        pointwise::column_sums(engine.unit, op.dy.buffer(), dbias.buffer_mut());
    }
    Ok(())
}

/// `dx = base + drop(update)`. The mask lies between the update and the sum: the masked update is made in `f32`, the rest is
/// added to it, and `dx` is rounded once.
fn dx_with_dropout<E: Float>(
    engine: &Engine,
    base: Product<'_, E>,
    update: Product<'_, E>,
    dropout: Dropout,
    dx: &mut Tensor<Cpu<E>>,
) -> Result<()> {
    let (m, k) = (dx.rows(), dx.cols());
    let mut sum = engine.scratch.take(m * k)?;
    sum_of_products(engine, Output::new(&mut sum, m, k), Init::Zero, &[update])?;
    pointwise::dropout(dropout, &mut sum);
    sum_of_products(engine, Output::new(&mut sum, m, k), Init::Output, &[base])?;
    pointwise::convert(engine.unit, &sum, dx.buffer_mut());
    Ok(())
}

/// `W += scale·B·A`
pub(super) fn merge<E: Float>(engine: &Engine, op: LoraMerge<'_, Cpu<E>>) -> Result<()> {
    let update = Product { scale: op.scale, ..product(matrix(op.b), matrix(op.a)) };
    sum_of_products(engine, output(op.w), Init::Output, &[update])
}
