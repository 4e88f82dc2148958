//! One pass over memory: relu, its derivative, sums, dropout, cross-entropy; and Adam, which finishes a sum.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::dispatch::{Launch, Slice};
use super::memory::Buffer;
use super::shader::Kernel;
use super::sum::{Finish, Init, Sum, matrix};
use crate::element::{Element, Float};
use crate::error::Result;
use crate::op::{Accumulate, Adam, Add, CrossEntropy, Dropout, DropoutForward, Relu, ReluBackward, WeightGrad};

/// A length, as a uniform: `vec4<u32>`.
type Len = [u32; 4];

/// `struct Dropout` of dropout.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DropoutUniforms {
    len: u32,
    first_block: u32,
    key: [u32; 2],
    threshold: u32,
    keep_scale: f32,
    unused: [u32; 2],
}

/// `struct Accumulate` of accumulate.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AccumulateUniforms {
    len: u32,
    scale: f32,
    unused: [u32; 2],
}

/// `struct CrossEntropy` of cross_entropy.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CrossEntropyUniforms {
    rows: u32,
    cols: u32,
    offset: u32,
    first_row: u32,
    m: f32,
    unused: [u32; 3],
}

impl<E: Float> WebGpu<E> {
    /// `y = max(x, 0)`
    pub(super) fn relu_pass(&self, op: Relu<'_, Self>) -> Result<()> {
        let (x, y) = (op.x.buffer(), op.y.buffer());
        self.elementwise(Kernel::Relu, x.len(), |part| vec![slice(x, &part), slice(y, &part)])
    }

    /// `dx = dy` where `y > 0`, else 0
    pub(super) fn relu_backward_pass(&self, op: ReluBackward<'_, Self>) -> Result<()> {
        let (y, dy, dx) = (op.y.buffer(), op.dy.buffer(), op.dx.buffer());
        self.elementwise(Kernel::ReluBackward, y.len(), |part| vec![slice(y, &part), slice(dy, &part), slice(dx, &part)])
    }

    /// `y += x`
    pub(super) fn add_pass(&self, op: Add<'_, Self>) -> Result<()> {
        let (x, y) = (op.x.buffer(), op.y.buffer());
        self.elementwise(Kernel::Add, x.len(), |part| vec![slice(x, &part), slice(y, &part)])
    }

    /// `y += scale·x`, in `f32`
    pub(super) fn accumulate_pass(&self, op: Accumulate<'_, Self>) -> Result<()> {
        let (x, y) = (op.x.buffer(), op.y.buffer());
        self.parts(x.len()).try_for_each(|part| {
            let uniforms = AccumulateUniforms { len: part.len() as u32, scale: op.scale, unused: [0; 2] };
            let (uniforms, operands) = (bytemuck::bytes_of(&uniforms), [slice(x, &part), slice(y, &part)]);
            let (grid, work) = ([self.groups(part.len()), 1], part.len() as u64);
            self.launch(Launch { kernel: Kernel::Accumulate, uniforms, operands: &operands, grid, work })
        })
    }

    /// `y = drop(x)`
    pub(super) fn dropout_pass(&self, op: DropoutForward<'_, Self>) -> Result<()> {
        self.drop_into(op.dropout, op.x.buffer(), op.y.buffer())
    }

    /// `drop(x)`, in `f32`
    pub(super) fn drop<T: Float>(&self, dropout: Dropout, x: &Buffer<T>) -> Result<Buffer<f32>> {
        let y = Buffer::unwritten(&self.gpu, x.len())?;
        self.drop_into(dropout, x, &y)?;
        Ok(y)
    }

    /// `y = drop(x)`, whatever they are stored as.
    fn drop_into<T: Float, U: Float>(&self, dropout: Dropout, x: &Buffer<T>, y: &Buffer<U>) -> Result<()> {
        for part in self.parts(x.len()) {
            let uniforms = DropoutUniforms {
                len: part.len() as u32,
                first_block: (part.start / 4) as u32,
                key: dropout.key(),
                threshold: dropout.threshold(),
                keep_scale: dropout.keep_scale(),
                unused: [0; 2],
            };
            let operands = [slice(x, &part), slice(y, &part)];
            let grid = [self.groups(part.len().div_ceil(4)), 1];
            let uniforms = bytemuck::bytes_of(&uniforms);
            self.launch(Launch {
                kernel: Kernel::Dropout(T::DTYPE, U::DTYPE),
                uniforms,
                operands: &operands,
                grid,
                work: part.len() as u64,
            })?;
        }
        Ok(())
    }

    /// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / m`
    pub(super) fn cross_entropy_pass(&self, op: CrossEntropy<'_, Self>) -> Result<()> {
        let (m, n) = (op.logits.rows(), op.logits.cols());
        let losses = Buffer::<f32>::unwritten(&self.gpu, m)?;
        let (logits, dlogits) = (op.logits.buffer(), op.dlogits.buffer());
        let rows_at_once = (self.elements_at_once() / n.max(1)).max(1);
        for first_row in (0..m).step_by(rows_at_once) {
            let rows = rows_at_once.min(m - first_row);
            let first = first_row * n;
            let bound = first / ALIGNED * ALIGNED;
            let part = bound..first + rows * n;
            let uniforms = CrossEntropyUniforms {
                rows: rows as u32,
                cols: n as u32,
                offset: (first - bound) as u32,
                first_row: first_row as u32,
                m: m as f32,
                unused: [0; 3],
            };
            let labels = op.labels.tensor().buffer();
            let operands = [slice(logits, &part), Slice::all(labels.raw()), Slice::all(losses.raw()), slice(dlogits, &part)];
            let grid = [(rows as u32).min(self.limits.groups), 1];
            let uniforms = bytemuck::bytes_of(&uniforms);
            self.launch(Launch { kernel: Kernel::CrossEntropy, uniforms, operands: &operands, grid, work: part.len() as u64 })?;
        }
        let (len, operands): (Len, _) = ([m as u32, 0, 0, 0], [Slice::all(losses.raw()), Slice::all(op.loss.buffer().raw())]);
        self.launch(Launch {
            kernel: Kernel::Mean,
            uniforms: bytemuck::bytes_of(&len),
            operands: &operands,
            grid: [1, 1],
            work: m as u64,
        })
    }

    /// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
    pub(super) fn adam_sum(&self, op: Adam<'_, Self>) -> Result<()> {
        let master = op.master.map(|master| matrix(master));
        let finish = Finish::Adam { rate: op.rate, m: matrix(op.m), v: matrix(op.v), master, w: matrix(op.w) };
        let (init, update) = match op.grad {
            WeightGrad::Dense(grad) => (Init::Matrix(matrix(grad)), None),
            WeightGrad::Factored { dy, x } => (Init::Zero, Some(matrix(dy).t() * matrix(x))),
        };
        self.sum(Sum { finish, init, scale: 1.0, update, base: None })
    }

    /// A launch for each part of `len` elements that fits the bindings.
    fn elementwise<'a>(&self, kernel: Kernel, len: usize, operands: impl Fn(Range<usize>) -> Vec<Slice<'a>>) -> Result<()> {
        self.parts(len).try_for_each(|part| {
            let (count, grid): (Len, _) = ([part.len() as u32, 0, 0, 0], [self.groups(part.len()), 1]);
            let work = part.len() as u64;
            self.launch(Launch { kernel, uniforms: bytemuck::bytes_of(&count), operands: &operands(part), grid, work })
        })
    }

    /// `0..len` in parts of which a binding can see each, whatever the type of the elements.
    pub(super) fn parts(&self, len: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let most = self.elements_at_once();
        (0..len).step_by(most).map(move |start| start..(start + most).min(len))
    }

    /// How many 32-bit elements a binding sees, wherever it begins.
    pub(super) fn elements_at_once(&self) -> usize {
        ((self.limits.binding_bytes / 4) as usize / ALIGNED * ALIGNED).saturating_sub(ALIGNED).max(ALIGNED)
    }

    /// Workgroups for so many invocations; each takes more than one element where a grid cannot hold them.
    pub(super) fn groups(&self, invocations: usize) -> u32 {
        invocations.div_ceil(self.limits.threads() as usize).min(self.limits.groups as usize) as u32
    }
}

/// Elements after which any binding may begin: 256 bytes of 16-bit elements.
pub(super) const ALIGNED: usize = 128;

/// A part of a buffer, as a binding: whole words.
pub(super) fn slice<'a, T: Element>(buffer: &'a Buffer<T>, part: &Range<usize>) -> Slice<'a> {
    let [start, end] = [part.start, part.end].map(|e| (e * size_of::<T>()) as u64);
    Slice { buffer: buffer.raw(), bytes: start..end.next_multiple_of(4) }
}
