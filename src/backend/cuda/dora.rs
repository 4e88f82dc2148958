//! The verbs of weight decomposition (DoRA): row norms and magnitudes.

use super::Cuda;
use super::device::Device;
use super::kernel::{self, Kernel};
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
    let plan = blocks_for(Kernel::LoraRowNorm, w.rows, THREADS / WARP * NORM_ROWS);
    let params = kernel::LoraRowNorm {
        w: w.read(),
        a: a.read(),
        b: b.read(),
        scale: op.scale,
        norm: write(op.norm),
        n: w.rows,
        k: w.cols,
        r: a.rows,
        w_stride: w.stride,
        a_stride: a.stride,
        b_stride: b.stride,
        a_is_f32,
        b_is_f32,
    };
    cuda.launch(plan, params)
}

/// `y = (magnitude / norm)·z + bias`
pub(super) fn magnitude<E: Float, D: Device>(cuda: &Cuda<E, D>, op: Magnitude<'_, Cuda<E, D>>) -> Result<()> {
    let (m, n) = (size(op.z.rows())?, size(op.z.cols())?);
    let (z, magnitude, norm, bias) = (read(op.z), read(op.magnitude), read(op.norm), read_if(op.bias));
    let params = kernel::Magnitude { z, magnitude, norm, bias, y: write(op.y), m, n };
    cuda.launch(stripes(Kernel::Magnitude, m, n)?, params)
}

/// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
pub(super) fn magnitude_backward<E: Float, D: Device>(cuda: &Cuda<E, D>, op: MagnitudeBackward<'_, Cuda<E, D>>) -> Result<()> {
    if let Some(dz) = op.dz {
        magnitude(cuda, Magnitude { z: op.dy, magnitude: op.magnitude, norm: op.norm, bias: None, y: dz })?;
    }
    if let Some(dmagnitude) = op.dmagnitude {
        let (m, n) = (size(op.z.rows())?, size(op.z.cols())?);
        let (z, norm, dy, dmagnitude) = (read(op.z), read(op.norm), read(op.dy), write(dmagnitude));
        let params = kernel::MagnitudeBackward { z, norm, dy, dmagnitude, m, n };
        cuda.launch(blocks_for(Kernel::MagnitudeBackward, n, WARP), params)?;
    }
    dbias(cuda, Matrix::new("magnitude_backward", "dy", op.dy)?, op.dbias)
}
