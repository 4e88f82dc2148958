//! The verbs that pass over memory once; and Adam, the epilogue of a sum.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::aliasing::{check_aliasing, read, written};
use super::dispatch::{Binding, Launch};
use super::memory::Buffer;
use super::shader::Kernel;
use super::sum::{Epilogue, Init, Sum, matrix};
use crate::element::{Element, Float};
use crate::error::Result;
use crate::op::{Accumulate, Adam, Add, CrossEntropy, Dropout, DropoutForward, Relu, ReluBackward, WeightGrad};
use crate::tensor::Shape;
use crate::view::MatRef;

/// The number of elements, and the offsets of up to three operands in their bindings: `vec4<u32>`.
type Places = [u32; 4];

/// `struct Dropout` of dropout.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DropoutUniforms {
    len: u32,
    first_block: u32,
    key: [u32; 2],
    threshold: u32,
    keep_scale: f32,
    x: u32,
    y: u32,
}

/// `struct Accumulate` of accumulate.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AccumulateUniforms {
    len: u32,
    scale: f32,
    x: u32,
    y: u32,
}

/// `struct CrossEntropy` of cross_entropy.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CrossEntropyUniforms {
    rows: u32,
    cols: u32,
    counted: f32,
    logits: u32,
    labels: u32,
    losses: u32,
    dlogits: u32,
    unused: u32,
}

impl<E: Float> WebGpu<E> {
    /// `y = max(x, 0)`
    pub(super) fn relu_pass(&self, op: Relu<'_, Self>) -> Result<()> {
        let (x, y) = (op.x, op.y.into_ref());
        check_aliasing("relu", [read("x", x), written("y", y)].into_iter())?;
        self.elementwise(Kernel::Relu, &[x, y])
    }

    /// `dx = dy` where `y > 0`, else 0
    pub(super) fn relu_backward_pass(&self, op: ReluBackward<'_, Self>) -> Result<()> {
        let (y, dy, dx) = (op.y, op.dy, op.dx.into_ref());
        check_aliasing("relu_backward", [read("y", y), read("dy", dy), written("dx", dx)].into_iter())?;
        self.elementwise(Kernel::ReluBackward, &[y, dy, dx])
    }

    /// `y += x`
    pub(super) fn add_pass(&self, op: Add<'_, Self>) -> Result<()> {
        let (x, y) = (op.x, op.y.into_ref());
        check_aliasing("add", [read("x", x), written("y", y)].into_iter())?;
        self.elementwise(Kernel::Add, &[x, y])
    }

    /// `y += scale·x`, in `f32`
    pub(super) fn accumulate_pass(&self, op: Accumulate<'_, Self>) -> Result<()> {
        let (x, y) = (op.x, op.y.into_ref());
        check_aliasing("accumulate", [read("x", x), written("y", y)].into_iter())?;
        self.parts(len(x)).try_for_each(|part| {
            let ((x, x_first), (y, y_first)) = (self.run(x, &part), self.run(y, &part));
            let uniforms = AccumulateUniforms { len: part.len() as u32, scale: op.scale, x: x_first, y: y_first };
            let (uniforms, operands) = (bytemuck::bytes_of(&uniforms), [x, y]);
            let (grid, work) = ([self.groups(part.len()), 1], part.len() as u64);
            self.launch(Launch { kernel: Kernel::Accumulate, uniforms, operands: &operands, grid, work })
        })
    }

    /// `y = drop(x)`
    pub(super) fn dropout_pass(&self, op: DropoutForward<'_, Self>) -> Result<()> {
        let (x, y) = (op.x, op.y.into_ref());
        check_aliasing("dropout_forward", [read("x", x), written("y", y)].into_iter())?;
        self.drop_into(op.dropout, x, y)
    }

    /// `drop(x)`, in `f32`, of a contiguous matrix
    pub(super) fn drop<T: Float>(&self, dropout: Dropout, x: MatRef<'_, Self, T>) -> Result<Buffer<f32>> {
        let y = Buffer::unwritten(&self.gpu, len(x))?;
        self.drop_into(dropout, x, MatRef::all(y.slice(), x.shape()))?;
        Ok(y)
    }

    /// `y = drop(x)`, for any element types
    fn drop_into<T: Float, U: Float>(&self, dropout: Dropout, x: MatRef<'_, Self, T>, y: MatRef<'_, Self, U>) -> Result<()> {
        for part in self.parts(len(x)) {
            let ((x, x_first), (y, y_first)) = (self.run(x, &part), self.run(y, &part));
            let uniforms = DropoutUniforms {
                len: part.len() as u32,
                first_block: (part.start / 4) as u32,
                key: dropout.key(),
                threshold: dropout.threshold(),
                keep_scale: dropout.keep_scale(),
                x: x_first,
                y: y_first,
            };
            let (kernel, grid) = (Kernel::Dropout(T::DTYPE, U::DTYPE), [self.groups(part.len().div_ceil(4)), 1]);
            let (uniforms, work) = (bytemuck::bytes_of(&uniforms), part.len() as u64);
            self.launch(Launch { kernel, uniforms, operands: &[x, y], grid, work })?;
        }
        Ok(())
    }

    /// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / c`, over the rows with a label
    pub(super) fn cross_entropy_pass(&self, op: CrossEntropy<'_, Self>) -> Result<()> {
        let (logits, loss, dlogits) = (op.logits, op.loss.into_ref(), op.dlogits.into_ref());
        check_aliasing(
            "cross_entropy",
            [read("logits", logits), written("loss", loss), written("dlogits", dlogits)].into_iter(),
        )?;
        let (n, counted) = (logits.cols(), op.labels.counted());
        let m = if n == 0 { 0 } else { logits.rows() }; // no classes, no labels
        let losses = Buffer::<f32>::unwritten(&self.gpu, m)?;
        let (labels, losses) = (op.labels.tensor().view(), MatRef::all(losses.slice(), Shape { rows: m, cols: 1 }));
        let rows_at_once = (self.elements_at_once() / n.max(1)).max(1);
        for first in (0..m).step_by(rows_at_once) {
            let rows = first..m.min(first + rows_at_once);
            let part = rows.start * n..rows.end * n;
            let ((logits, logits_first), (dlogits, dlogits_first)) = (self.run(logits, &part), self.run(dlogits, &part));
            let ((labels, labels_first), (losses, losses_first)) = (self.run(labels, &rows), self.run(losses, &rows));
            let uniforms = CrossEntropyUniforms {
                rows: rows.len() as u32,
                cols: n as u32,
                counted: counted as f32,
                logits: logits_first,
                labels: labels_first,
                losses: losses_first,
                dlogits: dlogits_first,
                unused: 0,
            };
            let grid = [(rows.len() as u32).min(self.limits.groups), 1];
            let (uniforms, work) = (bytemuck::bytes_of(&uniforms), part.len() as u64);
            let operands = [logits, labels, losses, dlogits];
            self.launch(Launch { kernel: Kernel::CrossEntropy, uniforms, operands: &operands, grid, work })?;
        }
        let ((losses, losses_first), (loss, loss_first)) = (self.run(losses, &(0..m)), self.run(loss, &(0..1)));
        let uniforms = [m as u32, counted as u32, losses_first, loss_first];
        let (uniforms, operands) = (bytemuck::bytes_of(&uniforms), [losses, loss]);
        self.launch(Launch { kernel: Kernel::Mean, uniforms, operands: &operands, grid: [1, 1], work: m as u64 })
    }

    /// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
    pub(super) fn adam_sum(&self, op: Adam<'_, Self>) -> Result<()> {
        let master = op.master.map(|master| matrix(master.view()));
        let epilogue =
            Epilogue::Adam { rate: op.rate, m: matrix(op.m.view()), v: matrix(op.v.view()), master, w: matrix(op.w.view()) };
        let (init, update) = match op.grad {
            WeightGrad::Dense(grad) => (Init::Matrix(matrix(grad.view())), None),
            WeightGrad::Factored { dy, x } => (Init::Zero, Some(matrix(dy.view()).t() * matrix(x.view()))),
        };
        self.sum(Sum { epilogue, init, scale: 1.0, update, base: None })
    }

    /// Launches an element-wise kernel on contiguous matrices of one shape, once for each part that fits the bindings.
    fn elementwise(&self, kernel: Kernel, views: &[MatRef<'_, Self>]) -> Result<()> {
        self.parts(len(views[0])).try_for_each(|part| {
            let mut uniforms: Places = [part.len() as u32, 0, 0, 0];
            let mut operands = Vec::with_capacity(views.len());
            for (view, place) in views.iter().zip(&mut uniforms[1..]) {
                let (binding, first) = self.run(*view, &part);
                operands.push(binding);
                *place = first;
            }
            let (grid, work) = ([self.groups(part.len()), 1], part.len() as u64);
            self.launch(Launch { kernel, uniforms: bytemuck::bytes_of(&uniforms), operands: &operands, grid, work })
        })
    }

    /// A binding for some elements of a contiguous matrix, and the offset of the first in it.
    pub(super) fn run<'a, T: Element>(&'a self, view: MatRef<'a, Self, T>, part: &Range<usize>) -> (Binding<'a>, u32) {
        debug_assert!(view.is_contiguous());
        let first = view.memory().first() + view.offset();
        let [start, end] = [part.start, part.end].map(|element| ((first + element) * size_of::<T>()) as u64);
        self.window(view.memory().raw(), start..end, size_of::<T>() as u64)
    }

    /// Cuts `0..len` into parts that fit a binding, for any element type.
    pub(super) fn parts(&self, len: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let most = self.elements_at_once();
        (0..len).step_by(most).map(move |start| start..(start + most).min(len))
    }

    /// 32-bit elements that fit a binding with any alignment.
    pub(super) fn elements_at_once(&self) -> usize {
        ((self.limits.binding_bytes / 4) as usize / ALIGNED * ALIGNED).saturating_sub(ALIGNED).max(ALIGNED)
    }

    /// Workgroups for this many invocations; if a grid cannot hold them, each invocation takes several elements.
    pub(super) fn groups(&self, invocations: usize) -> u32 {
        invocations.div_ceil(self.limits.threads() as usize).min(self.limits.groups as usize) as u32
    }
}

/// An upper bound of the alignment of bindings, in elements.
const ALIGNED: usize = 128;

/// The number of elements of a matrix.
pub(super) fn len<E: Float, T: Element>(view: MatRef<'_, WebGpu<E>, T>) -> usize {
    view.rows() * view.cols()
}
