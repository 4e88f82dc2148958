//! The lengths of rows, and what gives an output its length: the verbs of weight decomposition (DoRA).

use super::device::{Arg, Device};
use super::linear::dbias;
use super::plan::{NORMS, THREADS, WARP, shares, size, stripes};
use super::{Cuda, read, read_if, write};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward};

/// `norm = ‖W + scale·B·A‖` by rows
pub(super) fn row_norm<E: Float, D: Device>(cuda: &Cuda<E, D>, op: LoraRowNorm<'_, Cuda<E, D>>) -> Result<()> {
    let (n, k, r) = (size(op.w.rows())?, size(op.w.cols())?, size(op.a.rows())?);
    let (w, a, b, scale, norm) = (read(op.w), read(op.a), read(op.b), op.scale.into(), write(op.norm));
    let plan = shares("lora_row_norm", n, THREADS / WARP * NORMS);
    cuda.launch(plan, vec![w, a, b, scale, norm, n.into(), k.into(), r.into()])
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
    dbias(cuda, op.dy, op.dbias)
}
