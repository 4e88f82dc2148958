//! The verbs of weight decomposition (DoRA): row norms and magnitudes.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::aliasing::{check_aliasing, read, read_factor, written};
use super::dispatch::Launch;
use super::memory::Buffer;
use super::pointwise::len;
use super::shader::Kernel;
use super::sum::{Init, Sum, factor, matrix};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};

/// Elements of a band of rows: 4 MB of `f32`, which fit the caches of most GPUs.
const BAND: usize = 1 << 20;

/// `struct RowNorm` of lora_row_norm.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowNormUniforms {
    rows: u32,
    cols: u32,
    norm: u32,
    begins: u32,
    ends: u32,
    unused: [u32; 3],
}

/// `struct Magnitude` of magnitude.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MagnitudeUniforms {
    len: u32,
    first: u32,
    cols: u32,
    has_bias: u32,
    z: u32,
    magnitude: u32,
    norm: u32,
    bias: u32,
    y: u32,
    unused: [u32; 3],
}

/// `struct MagnitudeBackward` of magnitude_backward.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MagnitudeBackwardUniforms {
    rows: u32,
    cols: u32,
    begins: u32,
    ends: u32,
    z: u32,
    norm: u32,
    dy: u32,
    dmagnitude: u32,
}

impl<E: Float> WebGpu<E> {
    /// `norm = ‖W + scale·B·A‖` by rows: for each band of rows, the sum is made in `f32`, then its norms
    pub(super) fn lora_row_norm_bands(&self, op: LoraRowNorm<'_, Self>) -> Result<()> {
        let (w, norm) = (op.w.dense(), op.norm.into_ref());
        let operands = [read("w", w), read_factor("a", op.a), read_factor("b", op.b), written("norm", norm)];
        check_aliasing("lora_row_norm", operands.into_iter())?;
        let (n, k) = (w.rows(), w.cols());
        if k == 0 {
            return self.zero(matrix(norm));
        }
        let height = (BAND.min(self.elements_at_once()) / k).max(1);
        for first in (0..n).step_by(height) {
            let rows = first..n.min(first + height);
            let sums = Buffer::<f32>::unwritten(&self.gpu, rows.len() * k)?;
            let sums = MatRef::all(sums.slice(), Shape { rows: rows.len(), cols: k });
            let init = Init::Matrix(matrix(w).band(rows.clone()));
            let update = factor(op.b).band(rows.clone()) * factor(op.a);
            self.sum(Sum { init, scale: op.scale, ..Sum::new(matrix(sums), update) })?;
            self.measure(sums, rows, norm)?;
        }
        Ok(())
    }

    /// `norm[rows.start + i] = ‖sums[i]‖`. A band of several rows fits a binding; a single row may need several.
    fn measure(&self, sums: MatRef<'_, Self, f32>, rows: Range<usize>, norm: MatRef<'_, Self, f32>) -> Result<()> {
        for part in self.parts(len(sums)) {
            let ((bound, _), (norm, norm_first)) = (self.run(sums, &part), self.run(norm, &rows));
            let uniforms = RowNormUniforms {
                rows: rows.len() as u32,
                cols: (part.len() / rows.len()) as u32,
                norm: norm_first,
                begins: u32::from(part.start == 0),
                ends: u32::from(part.end == len(sums)),
                unused: [0; 3],
            };
            let (uniforms, work) = (bytemuck::bytes_of(&uniforms), part.len() as u64);
            let grid = [(rows.len() as u32).min(self.limits.groups), 1];
            self.launch(Launch { kernel: Kernel::LoraRowNorm, uniforms, operands: &[bound, norm], grid, work })?;
        }
        Ok(())
    }

    /// `y = (magnitude / norm)·z + bias`
    pub(super) fn magnitude_pass(&self, op: Magnitude<'_, Self>) -> Result<()> {
        let y = op.y.into_ref();
        let reads = [read("z", op.z), read("magnitude", op.magnitude), read("norm", op.norm), written("y", y)];
        check_aliasing("magnitude", reads.into_iter().chain(op.bias.map(|bias| read("bias", bias))))?;
        self.scale_columns(op.magnitude, op.norm, op.bias, op.z, y)
    }

    /// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
    pub(super) fn magnitude_backward_pass(&self, op: MagnitudeBackward<'_, Self>) -> Result<()> {
        let MagnitudeBackward { z, magnitude, norm, dy, .. } = op;
        let (dz, dmagnitude, dbias) =
            (op.dz.map(MatMut::into_ref), op.dmagnitude.map(MatMut::into_ref), op.dbias.map(MatMut::into_ref));
        let reads = [read("z", z), read("magnitude", magnitude), read("norm", norm), read("dy", dy)];
        let sums = [("dmagnitude", dmagnitude), ("dbias", dbias)].map(|(name, sums)| sums.map(|sums| written(name, sums)));
        let writes = sums.into_iter().flatten().chain(dz.map(|dz| written("dz", dz)));
        check_aliasing("magnitude_backward", reads.into_iter().chain(writes))?;
        if let Some(dz) = dz {
            self.scale_columns(magnitude, norm, None, dy, dz)?;
        }
        if let Some(dmagnitude) = dmagnitude {
            self.magnitude_gradient(z, norm, dy, dmagnitude)?;
        }
        self.bias_gradient(dy, dbias)
    }

    /// `y = (magnitude / norm)·z + bias`, column by column
    fn scale_columns(
        &self,
        magnitude: MatRef<'_, Self>,
        norm: MatRef<'_, Self, f32>,
        bias: Option<MatRef<'_, Self>>,
        z: MatRef<'_, Self>,
        y: MatRef<'_, Self>,
    ) -> Result<()> {
        let cols = norm.cols();
        self.parts(len(z)).try_for_each(|part| {
            let ((z, z_first), (y, y_first)) = (self.run(z, &part), self.run(y, &part));
            let ((magnitude, magnitude_first), (norm, norm_first)) =
                (self.run(magnitude, &(0..cols)), self.run(norm, &(0..cols)));
            let (row, bias_first) = bias.map_or((self.placeholder(), 0), |bias| self.run(bias, &(0..cols)));
            let uniforms = MagnitudeUniforms {
                len: part.len() as u32,
                first: (part.start % cols) as u32,
                cols: cols as u32,
                has_bias: u32::from(bias.is_some()),
                z: z_first,
                magnitude: magnitude_first,
                norm: norm_first,
                bias: bias_first,
                y: y_first,
                unused: [0; 3],
            };
            let operands = [z, magnitude, norm, row, y];
            let (uniforms, grid) = (bytemuck::bytes_of(&uniforms), [self.groups(part.len()), 1]);
            self.launch(Launch { kernel: Kernel::Magnitude, uniforms, operands: &operands, grid, work: part.len() as u64 })
        })
    }

    /// `dmagnitude = Σ dy·z / norm` over the rows
    fn magnitude_gradient(
        &self,
        z: MatRef<'_, Self>,
        norm: MatRef<'_, Self, f32>,
        dy: MatRef<'_, Self>,
        dmagnitude: MatRef<'_, Self, f32>,
    ) -> Result<()> {
        let (m, n) = (z.rows(), z.cols());
        if m == 0 || n == 0 {
            return self.zero(matrix(dmagnitude));
        }
        let rows_at_once = (self.elements_at_once() / n).max(1);
        for first in (0..m).step_by(rows_at_once) {
            let rows = first..m.min(first + rows_at_once);
            let part = rows.start * n..rows.end * n;
            let ((z, z_first), (dy, dy_first)) = (self.run(z, &part), self.run(dy, &part));
            let ((norm, norm_first), (sums, sums_first)) = (self.run(norm, &(0..n)), self.run(dmagnitude, &(0..n)));
            let uniforms = MagnitudeBackwardUniforms {
                rows: rows.len() as u32,
                cols: n as u32,
                begins: u32::from(rows.start == 0),
                ends: u32::from(rows.end == m),
                z: z_first,
                norm: norm_first,
                dy: dy_first,
                dmagnitude: sums_first,
            };
            let (operands, grid, work) = ([z, norm, dy, sums], [self.groups(n), 1], part.len() as u64);
            let (kernel, uniforms) = (Kernel::MagnitudeBackward, bytemuck::bytes_of(&uniforms));
            self.launch(Launch { kernel, uniforms, operands: &operands, grid, work })?;
        }
        Ok(())
    }
}
