//! Skinny products with a matrix of few columns, as wide as the rank: they are computed transposed, so that vectors run along
//! the long dimension.

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::micro::Fma;
use super::pack::{Panels, Side};
use super::{Factor, Init, Matrix, Outer, Output, Product, skinny};
use crate::element::Float;
use crate::error::Result;

/// `out = scale·lhsᵀ·rhs`, as the transpose of `scale·rhsᵀ·lhs`, a skinny product whose right side `lhs` is N-major.
pub(super) fn outer<E: Float>(engine: &Engine, lhs: Factor<'_, E>, outer: Outer<'_>) -> Result<()> {
    let Outer { scale, rhs, mut out } = outer;
    let (r, n) = (out.cols(), out.rows());
    let product = Product { scale, lhs: Factor::F32(rhs.t()), rhs: lhs };
    if r == 1 {
        return skinny::run(engine, Output::new(out.data(), 1, n), Init::Zero, &[product]);
    }
    let mut sums = engine.scratch.take(r * n)?;
    skinny::run(engine, Output::new(&mut sums, r, n), Init::Zero, &[product])?;
    transpose_into(engine, Factor::<E>::F32(Matrix::new(&sums, r, n)), out.data());
    Ok(())
}

/// The transpose of `matrix`, in `f32` scratch memory, row-major.
pub(super) fn transposed<'e, E: Float>(engine: &'e Engine, matrix: Factor<'_, E>) -> Result<ScratchGuard<'e>> {
    let mut transposed = engine.scratch.take(matrix.rows() * matrix.cols())?;
    transpose_into(engine, matrix, &mut transposed);
    Ok(transposed)
}

/// `to = lhsᵀ`: the matrix is packed as one panel that holds all its rows.
fn transpose_into<E: Float>(engine: &Engine, lhs: Factor<'_, E>, to: &mut [f32]) {
    let (width, depth) = (lhs.rows(), lhs.cols());
    if to.is_empty() {
        return;
    }
    let terms = &[Product { scale: 1.0, lhs, rhs: lhs }]; // only its left side is read
    Panels { micro: Fma, side: Side::Left, terms, depth: 0..depth, first: 0, width, stride: to.len(), to }.pack(engine.unit);
}
