//! The low-rank layer where each row of the batch has an adapter of its own, or none.
//!
//! The updates of all rows are made in `f32` memory, and the product with `W` begins with them: `W` is read once for the whole batch.

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::aliasing::{check_aliasing, read, read_factor, written};
use super::dispatch::{Binding, Launch};
use super::memory::Buffer;
use super::shader::{Kernel, RowsKernel};
use super::sum::{Epilogue, Init, Sum, matrix};
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::{Factor, LoraBackward, LoraForward, PerRow};
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};

/// `struct Rows` of rows.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct RowsUniforms {
    rows: u32,
    cols: u32,
    room: u32,
    segments: u32,
    scaled: u32,
    scale: f32,
    left: u32,
    left_row: u32,
    right: u32,
    right_row: u32,
    list: u32,
    table: u32,
    bias: u32,
    has_bias: u32,
    out: u32,
    unused: u32,
}

/// A matrix as kernels read it: the binding, where in it the first element is, elements from row to row, and how they are stored.
struct Operand<'a> {
    binding: Binding<'a>,
    first: u32,
    row: u32,
    dtype: DType,
}

/// One pass of the rows of a batch over the slots of a bank. `scale` is what the scaling of a slot is multiplied with; without it
/// products are not scaled.
struct Pass<'a, E: Float> {
    kernel: RowsKernel,
    of: PerRow<'a, WebGpu<E>>,
    scale: Option<f32>,
    cols: usize,
    left: Operand<'a>,
    right: Operand<'a>,
    bias: Option<MatRef<'a, WebGpu<E>>>,
    out: MatRef<'a, WebGpu<E>, f32>,
}

impl<E: Float> WebGpu<E> {
    /// `h = drop(x)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    pub(super) fn lora_forward_rows(&self, op: LoraForward<'_, Self>, a: PerRow<'_, Self>) -> Result<()> {
        let (x, w, bias, h) = (op.x, op.w.map(|w| w.dense("lora_forward")).transpose()?, op.bias, op.h.into_ref());
        let (y, accumulate) = op.y.into_parts();
        let y = y.into_ref();
        let reads = [w.map(|w| read("w", w)), bias.map(|bias| read("bias", bias)), Some(read("x", x))].into_iter().flatten();
        let factors = [read_factor("a", op.a), read_factor("b", op.b)];
        check_aliasing("lora_forward", reads.chain(factors).chain([written("h", h), read("h", h), written("y", y)]))?;

        let dropped = self.dropped(op.dropout, x)?;
        let (left, right) = (self.seen(x, &dropped)?, self.stacked(op.a)?);
        self.pass(Pass { kernel: RowsKernel::Narrow, of: a, scale: None, cols: x.cols(), left, right, bias: None, out: h })?;
        let (left, right, n) = (self.operand(h)?, self.stacked(op.b)?, y.cols());
        let update = Buffer::<f32>::unwritten(&self.gpu, x.rows() * n)?;
        let update = MatRef::all(update.slice(), Shape { rows: x.rows(), cols: n });
        let kernel = RowsKernel::Products;
        self.pass(Pass { kernel, of: a, scale: Some(op.scale), cols: n, left, right, bias, out: update })?;
        let (init, base) = (Init::new(Some(matrix(update)), accumulate), w.map(|w| matrix(x) * matrix(w).t()));
        self.sum(Sum { init, scale: 1.0, update: None, base, epilogue: Epilogue::Store(matrix(y)) })
    }

    /// `dh = scale·dy·B`, `dA = dhᵀ·drop(x)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + drop(dh·A)`
    pub(super) fn lora_backward_rows(&self, op: LoraBackward<'_, Self>, a: PerRow<'_, Self>) -> Result<()> {
        let (x, w, dbias, scale) =
            (op.x, op.w.map(|w| w.dense("lora_backward")).transpose()?, op.dbias.map(MatMut::into_ref), Some(op.scale));
        let (da, db, dx) = (op.da.into_ref(), op.db.into_ref(), op.dx.map(|dx| dx.into_parts()));
        let dx = dx.map(|(dx, accumulate)| (dx.into_ref(), accumulate));
        let reads = [read("x", x), read_factor("a", op.a), read_factor("b", op.b), read("h", op.h), read("dy", op.dy)];
        let writes = [written("da", da), written("db", db)];
        let others = [w.map(|w| read("w", w)), dbias.map(|d| written("dbias", d)), dx.map(|(dx, _)| written("dx", dx))];
        check_aliasing("lora_backward", reads.into_iter().chain(others.into_iter().flatten()).chain(writes))?;

        let (m, k, n, r) = (x.rows(), x.cols(), op.dy.cols(), a.bank().rank());
        let dropped = self.dropped(op.dropout, x)?;
        let dh = Buffer::<f32>::unwritten(&self.gpu, m * r)?;
        let dh = MatRef::all(dh.slice(), Shape { rows: m, cols: r });
        let (narrow, outer) = (RowsKernel::Narrow, RowsKernel::Outer);
        let (left, right) = (self.operand(op.dy)?, self.stacked(op.b)?);
        self.pass(Pass { kernel: narrow, of: a, scale, cols: n, left, right, bias: None, out: dh })?;
        let (left, right) = (self.operand(op.h)?, self.operand(op.dy)?);
        self.pass(Pass { kernel: outer, of: a, scale, cols: n, left, right, bias: None, out: db })?;
        let (left, right) = (self.operand(dh)?, self.seen(x, &dropped)?);
        self.pass(Pass { kernel: outer, of: a, scale: None, cols: k, left, right, bias: None, out: da })?;
        self.bias_gradient(op.dy, dbias)?;

        let Some((dx, accumulate)) = dx else { return Ok(()) };
        let update = Buffer::<f32>::unwritten(&self.gpu, m * k)?;
        let update = MatRef::all(update.slice(), Shape { rows: m, cols: k });
        let (left, right) = (self.operand(dh)?, self.stacked(op.a)?);
        self.pass(Pass { kernel: RowsKernel::Products, of: a, scale: None, cols: k, left, right, bias: None, out: update })?;
        let masked = op.dropout.map(|dropout| self.drop(dropout, update)).transpose()?;
        let update = masked.as_ref().map_or(update, |masked| MatRef::all(masked.slice(), update.shape()));
        let (init, base) = (Init::new(Some(matrix(update)), accumulate), w.map(|w| matrix(op.dy) * matrix(w)));
        self.sum(Sum { init, scale: 1.0, update: None, base, epilogue: Epilogue::Store(matrix(dx)) })
    }

    fn pass(&self, pass: Pass<'_, E>) -> Result<()> {
        let Pass { kernel, of, scale, cols, left, right, bias, out } = pass;
        let (rows, bank) = (of.rows(), of.bank());
        let elements = out.shape().elements()?;
        if elements == 0 {
            return Ok(());
        }
        let (list, table) = (self.operand(rows.tensor().view())?, self.operand(bank.table().view())?);
        let (row, out) = (bias.map(|bias| self.operand(bias)).transpose()?, self.operand(out)?);
        let uniforms = RowsUniforms {
            rows: rows.rows() as u32,
            cols: cols as u32,
            room: bank.rank() as u32,
            segments: rows.segments().len() as u32,
            scaled: u32::from(scale.is_some()),
            scale: scale.unwrap_or(1.0),
            left: left.first,
            left_row: left.row,
            right: right.first,
            right_row: right.row,
            list: list.first,
            table: table.first,
            bias: row.as_ref().map_or(0, |row| row.first),
            has_bias: u32::from(row.is_some()),
            out: out.first,
            unused: 0,
        };
        let groups = if kernel == RowsKernel::Narrow { (elements as u32).min(self.limits.groups) } else { self.groups(elements) };
        let row = row.map_or_else(|| self.placeholder(), |row| row.binding);
        let row = (kernel == RowsKernel::Products).then_some(row);
        let work = elements as u64 * if kernel == RowsKernel::Narrow { cols } else { bank.rank() } as u64;
        let kernel = Kernel::Rows(kernel, left.dtype, right.dtype);
        let reads = [left.binding, right.binding, list.binding, table.binding];
        let operands: Vec<Binding<'_>> = reads.into_iter().chain(row).chain([out.binding]).collect();
        self.launch(Launch { kernel, uniforms: bytemuck::bytes_of(&uniforms), operands: &operands, grid: [groups, 1], work })
    }

    /// A factor of all slots, one after another.
    fn stacked<'a>(&'a self, factor: Factor<'a, Self>) -> Result<Operand<'a>> {
        match factor {
            Factor::Elem(view) => self.operand(view),
            Factor::F32(view) => self.operand(view),
            Factor::PerRow(all) => self.stacked(all.stacked()),
        }
    }

    /// The input of the update: `drop(x)`, or `x` without dropout.
    fn seen<'a>(&'a self, x: MatRef<'a, Self>, dropped: &'a Option<Buffer<f32>>) -> Result<Operand<'a>> {
        match dropped {
            Some(dropped) => self.operand(MatRef::<Self, f32>::all(dropped.slice(), x.shape())),
            None => self.operand(x),
        }
    }

    /// Errors: [`Error::TooLarge`] for a matrix that no binding sees whole.
    fn operand<'a, T: Element>(&'a self, view: MatRef<'a, Self, T>) -> Result<Operand<'a>> {
        let (before, span) = (view.memory().first(), view.span());
        let [start, end] = [span.start, span.end].map(|element| ((before + element) * size_of::<T>()) as u64);
        if end - start > self.limits.binding_bytes - self.alignment() {
            return Err(Error::TooLarge {
                shape: view.shape(),
                limit: "a binding of this device holds, and factors for each row need one",
            });
        }
        let (binding, first) = self.window(view.memory().raw(), start..end, size_of::<T>() as u64);
        let dtype = if size_of::<T>() == 2 { DType::F16 } else { DType::F32 };
        Ok(Operand { binding, first, row: view.row_stride() as u32, dtype })
    }
}
