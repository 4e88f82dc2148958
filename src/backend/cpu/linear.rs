//! `y = x·Wᵀ + bias`, and its derivatives, as sums of products.

use super::gemm::{Factor, Init, Matrix, Output, Packed, Product, sum_of_products};
use super::{Cpu, Engine, pointwise};
use crate::element::{Element, Float};
use crate::error::Result;
use crate::op::{LinearBackward, LinearForward};
use crate::tensor::Tensor;

/// A tensor as a matrix.
pub(super) fn matrix<E: Float, T: Element>(tensor: &Tensor<Cpu<E>, T>) -> Matrix<'_, T> {
    Matrix::new(tensor.buffer(), tensor.rows(), tensor.cols()).with_packed(tensor.buffer().packed())
}

/// A tensor as what a sum is written to.
pub(super) fn output<E: Float, T: Element>(tensor: &mut Tensor<Cpu<E>, T>) -> Output<'_, T> {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    Output::new(tensor.buffer_mut(), rows, cols)
}

/// Keeps `w` packed as well, for `x·Wᵀ` and, if `backward`, for `dy·W`.
pub(super) fn pack<E: Float>(engine: &Engine, w: &mut Tensor<Cpu<E>>, backward: bool) -> Result<()> {
    let packed = Packed::new(engine, matrix(w), backward)?;
    w.buffer_mut().keep(packed);
    Ok(())
}

/// `lhs·rhs`
pub(super) fn product<'a, E>(lhs: Matrix<'a, E>, rhs: Matrix<'a, E>) -> Product<'a, E> {
    Product { scale: 1.0, lhs: Factor::Stored(lhs), rhs: Factor::Stored(rhs) }
}

/// The bias in every row, or nothing.
pub(super) fn init<E: Float>(bias: Option<&Tensor<Cpu<E>>>) -> Init<'_, E> {
    bias.map_or(Init::Zero, |bias| Init::Row(bias.buffer()))
}

/// `y = x·Wᵀ + bias`
pub(super) fn forward<E: Float>(engine: &Engine, op: LinearForward<'_, Cpu<E>>) -> Result<()> {
    let base = product(matrix(op.x), matrix(op.w).t());
    sum_of_products(engine, output(op.y), init(op.bias), &[base])
}

/// `dx = dy·W`, `dW = dyᵀ·x`, `dbias = Σ dy`
pub(super) fn backward<E: Float>(engine: &Engine, op: LinearBackward<'_, Cpu<E>>) -> Result<()> {
    let dy = matrix(op.dy);
    if let Some(dx) = op.dx {
        sum_of_products(engine, output(dx), Init::Zero, &[product(dy, matrix(op.w))])?;
    }
    if let Some(dw) = op.dw {
        sum_of_products(engine, output(dw), Init::Zero, &[product(dy.t(), matrix(op.x))])?;
    }
    if let Some(dbias) = op.dbias {
        pointwise::column_sums(engine, op.dy.buffer(), dbias.buffer_mut());
    }
    Ok(())
}
