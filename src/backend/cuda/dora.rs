//! The lengths of rows, and what gives an output its length: the verbs of weight decomposition (DoRA).

use super::Cuda;
use super::device::{Arg, Device};
use super::linear::dbias;
use super::operand::{Matrix, factor_as_it_is, read, read_if, write};
use super::plan::{NORMS, THREADS, WARP, shares, size, stripes};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward};

/// `norm = ‖W + scale·B·A‖` by rows
pub(super) fn row_norm<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraRowNorm<'_, Cuda<E, D>>) -> Result<()> {
    const VERB: &str = "lora_row_norm";
    let w = Matrix::new(VERB, "w", op.w.dense(VERB)?)?;
    let ((a, a_is_f32), (b, b_is_f32)) = (factor_as_it_is(VERB, "a", op.a)?, factor_as_it_is(VERB, "b", op.b)?);
    let operands = [w.read(), a.read(), b.read(), op.scale.into(), write(op.norm)];
    let sizes = [w.rows, w.cols, a.rows, w.stride, a.stride, b.stride, a_is_f32.into(), b_is_f32.into()].map(Arg::U32);
    let plan = shares(VERB, w.rows, THREADS / WARP * NORMS);
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
        let plan = shares("magnitude_backward", size(op.z.cols())?, WARP);
        cuda.launch(plan, vec![read(op.z), read(op.norm), read(op.dy), write(dmagnitude), m, n])?;
    }
    dbias(cuda, Matrix::new("magnitude_backward", "dy", op.dy)?, op.dbias)
}
