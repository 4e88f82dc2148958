//! Products of few rows with a matrix as narrow as the rank: turned, so that vectors run along its long side.

use super::super::Engine;
use super::super::scratch::ScratchGuard;
use super::micro::Fma;
use super::pack::{Panels, Side};
use super::{Factor, Init, Matrix, Outer, Output, Product, skinny};
use crate::element::Float;
use crate::error::Result;

/// `out = scale·lhsᵀ·rhs`, as the transpose of `scale·rhsᵀ·lhs`: few rows as well, and `lhs` contiguous along them.
pub(super) fn outer<E: Float>(engine: &Engine, lhs: Factor<'_, E>, outer: Outer<'_>) -> Result<()> {
    let Outer { scale, rhs, mut out } = outer;
    let (r, n) = (out.cols(), out.rows());
    let product = Product { scale, lhs: Factor::F32(rhs.t()), rhs: lhs };
    if r == 1 {
        return skinny::run(engine, Output::new(out.data(), 1, n), Init::Zero, &[product]);
    }
    let mut sums = engine.scratch.take(r * n)?;
    skinny::run(engine, Output::new(&mut sums, r, n), Init::Zero, &[product])?;
    turn(engine, Factor::<E>::F32(Matrix::new(&sums, r, n)), out.data());
    Ok(())
}

/// The transpose of `matrix`, `f32`, row-major.
pub(super) fn turned<'e, E: Float>(engine: &'e Engine, matrix: Factor<'_, E>) -> Result<ScratchGuard<'e>> {
    let mut turned = engine.scratch.take(matrix.rows() * matrix.cols())?;
    turn(engine, matrix, &mut turned);
    Ok(turned)
}

/// Packed as one panel: all its rows side by side, for each step of the depth.
fn turn<E: Float>(engine: &Engine, lhs: Factor<'_, E>, to: &mut [f32]) {
    let (width, depth) = (lhs.rows(), lhs.cols());
    if to.is_empty() {
        return;
    }
    let terms = &[Product { scale: 1.0, lhs, rhs: lhs }]; // only its left side is read
    engine.unit.run(Panels { micro: Fma, side: Side::Left, terms, depth: 0..depth, first: 0, width, stride: to.len(), to });
}
