//! `y = x·Wᵀ + bias`, and its derivatives, as sums of products.

use super::gemm::{Factor, Init, Matrix, Output, PackedWeight, Product, sum_of_products};
use super::{Cpu, Engine, pointwise};
use crate::element::{Element, Float};
use crate::error::Result;
use crate::op::{self, LinearBackward, LinearForward, Weight};
use crate::view::{MatMut, MatRef};

/// The view as the engine's [`Matrix`].
pub(super) fn matrix<'a, E: Float, T: Element>(view: MatRef<'a, Cpu<E>, T>) -> Matrix<'a, T> {
    Matrix::strided(&view.memory()[view.span()], view.rows(), view.cols(), view.row_stride())
}

/// The weight as a [`Matrix`], with its panels if it is packed.
pub(super) fn weight<'a, E: Float>(w: Weight<'a, Cpu<E>>) -> Matrix<'a, E> {
    matrix(w.dense()).with_packed(w.panels())
}

/// The factor of an update as the engine's [`Factor`].
pub(super) fn factor<'a, E: Float>(factor: op::Factor<'a, Cpu<E>>) -> Factor<'a, E> {
    match factor {
        op::Factor::Elem(view) => Factor::Elem(matrix(view)),
        op::Factor::F32(view) => Factor::F32(matrix(view)),
    }
}

/// The view as the engine's [`Output`].
pub(super) fn output<'a, E: Float, T: Element>(view: MatMut<'a, Cpu<E>, T>) -> Output<'a, T> {
    let (rows, cols, stride, span) = (view.rows(), view.cols(), view.row_stride(), view.span());
    Output::strided(&mut view.into_memory()[span], rows, cols, stride)
}

/// The elements of a contiguous view.
pub(super) fn elements<'a, E: Float, T: Element>(view: MatRef<'a, Cpu<E>, T>) -> &'a [T] {
    debug_assert!(view.is_contiguous());
    &view.memory()[view.span()]
}

/// The elements of a contiguous view, to be written.
pub(super) fn elements_mut<'a, E: Float, T: Element>(view: MatMut<'a, Cpu<E>, T>) -> &'a mut [T] {
    debug_assert!(view.is_contiguous());
    let span = view.span();
    &mut view.into_memory()[span]
}

/// Packs `w` for `x·Wᵀ` and, if `backward`, for `dy·W`.
pub(super) fn pack<E: Float>(engine: &Engine, w: MatRef<'_, Cpu<E>>, backward: bool) -> Result<PackedWeight> {
    PackedWeight::new(engine, matrix(w), backward)
}

/// `lhs·rhs`
pub(super) fn product<'a, E>(lhs: Matrix<'a, E>, rhs: Matrix<'a, E>) -> Product<'a, E> {
    Product { scale: 1.0, lhs: Factor::Elem(lhs), rhs: Factor::Elem(rhs) }
}

/// The initial value of `y`: zero, a bias in every row, the old `y`, or both.
pub(super) fn init<'a, E: Float>(bias: Option<MatRef<'a, Cpu<E>>>, adds: bool) -> Init<'a, E> {
    match (bias.map(elements), adds) {
        (None, false) => Init::Zero,
        (None, true) => Init::Output,
        (Some(bias), false) => Init::Row(bias),
        (Some(bias), true) => Init::OutputAndRow(bias),
    }
}

/// `y = x·Wᵀ + bias`
pub(super) fn forward<E: Float>(engine: &Engine, op: LinearForward<'_, Cpu<E>>) -> Result<()> {
    let (base, (y, adds)) = (product(matrix(op.x), weight(op.w).t()), op.y.into_parts());
    sum_of_products(engine, output(y), init(op.bias, adds), &[base])
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float>(engine: &Engine, op: LinearBackward<'_, Cpu<E>>) -> Result<()> {
    let dy = matrix(op.dy);
    if let (Some(dx), Some(w)) = (op.dx, op.w) {
        let (dx, adds) = dx.into_parts();
        sum_of_products(engine, output(dx), init(None, adds), &[product(dy, weight(w))])?;
    }
    if let (Some(dw), Some(x)) = (op.dw, op.x) {
        sum_of_products(engine, output(dw), Init::Zero, &[product(dy.t(), matrix(x))])?;
    }
    if let Some(dbias) = op.dbias {
        pointwise::column_sums(engine, dy, elements_mut(dbias));
    }
    Ok(())
}
