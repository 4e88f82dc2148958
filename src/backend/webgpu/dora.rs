//! The lengths of rows, and what gives an output its length: the verbs of weight decomposition (DoRA).

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::dispatch::{Launch, Slice};
use super::memory::Buffer;
use super::pointwise::{ALIGNED, slice};
use super::shader::Kernel;
use super::sum::{Init, Matrix, Sum, matrix};
use crate::element::Float;
use crate::error::Result;
use crate::op::{LoraRowNorm, Magnitude, MagnitudeBackward};
use crate::tensor::Tensor;

/// Elements of a band of rows: 4 MB of `f32`, which most GPUs keep in a cache.
const BAND: usize = 1 << 20;

/// `struct RowNorm` of lora_row_norm.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowNormUniforms {
    rows: u32,
    cols: u32,
    first_row: u32,
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
}

/// `struct MagnitudeBackward` of magnitude_backward.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MagnitudeBackwardUniforms {
    rows: u32,
    cols: u32,
    offset: u32,
    begins: u32,
    ends: u32,
    unused: [u32; 3],
}

impl<E: Float> WebGpu<E> {
    /// `norm = ‖W + scale·B·A‖` by rows: the engine makes a band of rows of the sum at a time, and each is measured.
    pub(super) fn lora_row_norm_bands(&self, op: LoraRowNorm<'_, Self>) -> Result<()> {
        let (n, k, norm) = (op.w.rows(), op.w.cols(), op.norm.buffer());
        if k == 0 {
            return self.gpu.clear(norm.raw());
        }
        let height = (BAND.min(self.elements_at_once()) / k).max(1);
        for first in (0..n).step_by(height) {
            let rows = first..n.min(first + height);
            let sums = Buffer::<f32>::unwritten(&self.gpu, rows.len() * k)?;
            let (out, w) = (Matrix::new(&sums, rows.len(), k), matrix(op.w).band(rows.clone()));
            let update = matrix(op.b).band(rows.clone()) * matrix(op.a);
            self.sum(Sum { init: Init::Matrix(w), scale: op.scale, ..Sum::new(out, update) })?;
            self.measure(&sums, rows.len(), first, norm)?;
        }
        Ok(())
    }

    /// `norm[first_row + i] = ‖sums[i]‖`. A band of several rows fits a binding; one row may not.
    fn measure(&self, sums: &Buffer<f32>, rows: usize, first_row: usize, norm: &Buffer<f32>) -> Result<()> {
        for part in self.parts(sums.len()) {
            let uniforms = RowNormUniforms {
                rows: rows as u32,
                cols: (part.len() / rows) as u32,
                first_row: first_row as u32,
                begins: u32::from(part.start == 0),
                ends: u32::from(part.end == sums.len()),
                unused: [0; 3],
            };
            let (uniforms, work) = (bytemuck::bytes_of(&uniforms), part.len() as u64);
            let operands = [slice(sums, &part), Slice::all(norm.raw())];
            let grid = [(rows as u32).min(self.limits.groups), 1];
            self.launch(Launch { kernel: Kernel::LoraRowNorm, uniforms, operands: &operands, grid, work })?;
        }
        Ok(())
    }

    /// `y = (magnitude / norm)·z + bias`
    pub(super) fn magnitude_pass(&self, op: Magnitude<'_, Self>) -> Result<()> {
        self.scale_columns(op.magnitude, op.norm, op.bias, op.z, op.y)
    }

    /// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
    pub(super) fn magnitude_backward_pass(&self, op: MagnitudeBackward<'_, Self>) -> Result<()> {
        if let Some(dz) = op.dz {
            self.scale_columns(op.magnitude, op.norm, None, op.dy, dz)?;
        }
        if let Some(dmagnitude) = op.dmagnitude {
            self.magnitude_gradient(op.z, op.norm, op.dy, dmagnitude)?;
        }
        self.bias_gradient(op.dy, op.dbias)
    }

    /// `y = (magnitude / norm)·x + bias`, column by column
    fn scale_columns(
        &self,
        magnitude: &Tensor<Self>,
        norm: &Tensor<Self, f32>,
        bias: Option<&Tensor<Self>>,
        x: &Tensor<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()> {
        let (x, y, cols) = (x.buffer(), y.buffer(), norm.cols());
        self.parts(x.len()).try_for_each(|part| {
            let (len, first) = (part.len() as u32, (part.start % cols) as u32);
            let uniforms = MagnitudeUniforms { len, first, cols: cols as u32, has_bias: u32::from(bias.is_some()) };
            let [magnitude, norm] = [magnitude.buffer().raw(), norm.buffer().raw()].map(Slice::all);
            // Something must be bound.
            let bias = Slice::all(bias.map_or(self.one.raw(), |bias| bias.buffer().raw()));
            let operands = [slice(x, &part), magnitude, norm, bias, slice(y, &part)];
            let (uniforms, grid) = (bytemuck::bytes_of(&uniforms), [self.groups(part.len()), 1]);
            self.launch(Launch { kernel: Kernel::Magnitude, uniforms, operands: &operands, grid, work: part.len() as u64 })
        })
    }

    /// `dmagnitude = Σ dy·z / norm` over the rows
    fn magnitude_gradient(
        &self,
        z: &Tensor<Self>,
        norm: &Tensor<Self, f32>,
        dy: &Tensor<Self>,
        dmagnitude: &mut Tensor<Self, f32>,
    ) -> Result<()> {
        let (m, n) = (z.rows(), z.cols());
        let (z, dy, norm, dmagnitude) = (z.buffer(), dy.buffer(), norm.buffer().raw(), dmagnitude.buffer().raw());
        if m == 0 || n == 0 {
            return self.gpu.clear(dmagnitude);
        }
        let rows_at_once = (self.elements_at_once() / n).max(1);
        for first_row in (0..m).step_by(rows_at_once) {
            let rows = rows_at_once.min(m - first_row);
            let first = first_row * n;
            let bound = first / ALIGNED * ALIGNED;
            let part = bound..first + rows * n;
            let uniforms = MagnitudeBackwardUniforms {
                rows: rows as u32,
                cols: n as u32,
                offset: (first - bound) as u32,
                begins: u32::from(first_row == 0),
                ends: u32::from(first_row + rows == m),
                unused: [0; 3],
            };
            let operands = [slice(z, &part), Slice::all(norm), slice(dy, &part), Slice::all(dmagnitude)];
            let (uniforms, grid) = (bytemuck::bytes_of(&uniforms), [self.groups(n), 1]);
            self.launch(Launch {
                kernel: Kernel::MagnitudeBackward,
                uniforms,
                operands: &operands,
                grid,
                work: part.len() as u64,
            })?;
        }
        Ok(())
    }
}
