//! The verbs of weight decomposition (DoRA): row norms and magnitudes.

use super::Cuda;
use super::device::{Arg, Device};
use super::linear::dbias;
use super::operand::{Matrix, read, read_if, stored_factor, write};
use super::plan::{NORM_ROWS, THREADS, WARP, blocks_for, size, stripes};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward};

/// `norm = ‖W + scale·B·A‖` by rows
pub(super) fn row_norm<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraRowNorm<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_row_norm";
    let w = Matrix::new(VERB, "w", op.w.dense())?;
    let ((a, a_is_f32), (b, b_is_f32)) = (stored_factor(VERB, "a", op.a)?, stored_factor(VERB, "b", op.b)?);
    let operands = [w.read(), a.read(), b.read(), op.scale.into(), write(op.norm)];
    let sizes = [w.rows, w.cols, a.rows, w.stride, a.stride, b.stride, a_is_f32.into(), b_is_f32.into()].map(Arg::U32);
    let plan = blocks_for(VERB, w.rows, THREADS / WARP * NORM_ROWS);
    cuda.launch(plan, operands.into_iter().chain(sizes).collect())
}

/// `y = (magnitude / norm)·z + bias`
pub(super) fn magnitude<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Magnitude<'_, Cuda<E, D>>) -> Result<()> {
    let (m, n) = (size(op.z.rows())?, size(op.z.cols())?);
    let (z, magnitude, norm) = (read(op.z), read(op.magnitude), read(op.norm));
    let args = vec![z, magnitude, norm, read_if(op.bias), write(op.y), m.into(), n.into()];
    cuda.launch(stripes("magnitude", m, n)?, args)
}

/// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
pub(super) fn magnitude_backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: MagnitudeBackward<'_, Cuda<E, D>>) -> Result<()> {
    if let Some(dz) = op.dz {
        magnitude(cuda, Magnitude { z: op.dy, magnitude: op.magnitude, norm: op.norm, bias: None, y: dz })?;
    }
    if let Some(dmagnitude) = op.dmagnitude {
        let [m, n] = [size(op.z.rows())?, size(op.z.cols())?].map(Arg::U32);
        let plan = blocks_for("magnitude_backward", size(op.z.cols())?, WARP);
        cuda.launch(plan, vec![read(op.z), read(op.norm), read(op.dy), write(dmagnitude), m, n])?;
    }
    dbias(cuda, Matrix::new("magnitude_backward", "dy", op.dy)?, op.dbias)
}
