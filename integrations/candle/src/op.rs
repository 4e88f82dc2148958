//! Linear layers, with and without a low-rank update, as operations that candle's autograd runs backward through.
//!
//! The frozen weight is no argument of the operations, so that candle never makes a gradient of it.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, WithDType, bail};
use lowrank::Cpu;
use lowrank::op::{Dropout, Factor, LinearBackward, LinearForward, LoraBackward, LoraForward, Output};

use crate::lend::{Elem, Lent, by_dtype, lend, matrix, matrix_mut, rows_and_columns, wrapped};

/// The frozen part of a linear layer: a weight `n×k` and a bias of `n` elements, both contiguous and of one type.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) w: Tensor,
    pub(crate) bias: Option<Tensor>,
}

/// `y = x·Wᵀ + bias`, whose backward pass makes `dx = dy·W` alone.
pub(crate) struct FrozenOp(pub(crate) Base);

/// `y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ`; without a base, `y = scale·(drop(x)·Aᵀ)·Bᵀ`.
///
/// The arguments are `x`, of the base's type, and `A r×k` and `B n×r` in `f32`.
pub(crate) struct LoraOp {
    base: Option<Base>,
    scale: f32,
    dropout: Option<Dropout>,
    /// `drop(x)·Aᵀ` of the forward pass, for the backward pass
    h: Mutex<Option<Vec<f32>>>,
}

impl LoraOp {
    pub(crate) fn new(base: Option<Base>, scale: f32, dropout: Option<Dropout>) -> Self {
        Self { base, scale, dropout, h: Mutex::new(None) }
    }

    fn lora<'f>(&self, a: &'f [f32], b: &'f [f32]) -> Lora<'f> {
        Lora { a, b, scale: self.scale, dropout: self.dropout }
    }
}

/// The locked memory of a layer's weight and bias.
struct LentBase<'b> {
    w: Lent<'b>,
    bias: Option<Lent<'b>>,
    shape: (usize, usize),
}

impl Base {
    fn lent(&self) -> Result<LentBase<'_>> {
        Ok(LentBase { w: Lent::new(&self.w), bias: self.bias.as_ref().map(Lent::new), shape: self.w.dims2()? })
    }
}

impl LentBase<'_> {
    fn weight<E: Elem>(&self) -> Result<lowrank::op::Weight<'_, Cpu<E>>> {
        Ok(matrix(self.w.slice::<E>()?, self.shape)?.into())
    }

    fn bias<E: Elem>(&self) -> Result<Option<lowrank::MatRef<'_, Cpu<E>>>> {
        self.bias.as_ref().map(|bias| matrix(bias.slice::<E>()?, (1, self.shape.0))).transpose()
    }
}

/// The factors of an update in lent memory, `A r×k` and `B n×r`, and its scalars.
#[derive(Clone, Copy)]
pub(crate) struct Lora<'f> {
    pub(crate) a: &'f [f32],
    pub(crate) b: &'f [f32],
    pub(crate) scale: f32,
    pub(crate) dropout: Option<Dropout>,
}

/// What the backward pass of an update reads, `h = drop(x)·Aᵀ`, and the gradients that it makes.
pub(crate) struct LoraGradients<'g> {
    pub(crate) h: &'g [f32],
    pub(crate) da: &'g mut [f32],
    pub(crate) db: &'g mut [f32],
}

/// Memory for a result: overwritten, or added to.
pub(crate) enum To<'o, E> {
    Write(&'o mut [E]),
    Add(&'o mut [E]),
}

impl<'o, E: Elem> To<'o, E> {
    fn output(self, shape: (usize, usize)) -> Result<Output<'o, Cpu<E>>> {
        Ok(match self {
            To::Write(memory) => matrix_mut(memory, shape)?.into(),
            To::Add(memory) => Output::AddTo(matrix_mut(memory, shape)?),
        })
    }
}

/// `y = x·Wᵀ + bias + scale·h·Bᵀ`, `x m×k`, `y m×n`; the terms of what there is. Gives back `h = drop(x)·Aᵀ`.
pub(crate) fn project<E: Elem>(
    x: &[E],
    [m, k, n]: [usize; 3],
    base: Option<&Base>,
    lora: Option<Lora<'_>>,
    y: To<'_, E>,
) -> Result<Vec<f32>> {
    let (x, y, lent) = (matrix(x, (m, k))?, y.output((m, n))?, base.map(Base::lent).transpose()?);
    let (w, bias) = match &lent {
        Some(lent) => (Some(lent.weight()?), lent.bias()?),
        None => (None, None),
    };
    let (Lora { a, b, scale, dropout }, r) = match (lora, w) {
        (Some(lora), _) => (lora, lora.a.len() / k.max(1)),
        (None, Some(w)) => {
            LinearForward { x, w, bias, y }.run(E::cpu()?).map_err(wrapped)?;
            return Ok(Vec::new());
        }
        (None, None) => bail!("a projection without a weight and without an update"),
    };
    let mut h = vec![0f32; m * r];
    let (a, b) = (Factor::F32(matrix(a, (r, k))?), Factor::F32(matrix(b, (n, r))?));
    LoraForward { x, w, bias, a, b, scale, dropout, h: matrix_mut(&mut h, (m, r))?, y }.run(E::cpu()?).map_err(wrapped)?;
    Ok(h)
}

/// The gradients of [`project`]: `dA`, `dB`, and `dx` where there is memory for it.
pub(crate) fn project_back<E: Elem>(
    (x, dy): (&[E], &[E]),
    [m, k, n]: [usize; 3],
    base: Option<&Base>,
    lora: Option<(Lora<'_>, LoraGradients<'_>)>,
    dx: Option<To<'_, E>>,
) -> Result<()> {
    let (x, dy, lent) = (matrix(x, (m, k))?, matrix(dy, (m, n))?, base.map(Base::lent).transpose()?);
    let w = lent.as_ref().map(LentBase::weight::<E>).transpose()?;
    let dx = dx.map(|dx| dx.output((m, k))).transpose()?;
    match lora {
        None if dx.is_none() => Ok(()),
        None => LinearBackward { x: None, w, dy, dx, dw: None, dbias: None }.run(E::cpu()?),
        Some((Lora { a, b, scale, dropout }, LoraGradients { h, da, db })) => {
            let r = a.len() / k.max(1);
            let (da, db) = (matrix_mut(da, (r, k))?, matrix_mut(db, (n, r))?);
            let (a, b, h) = (Factor::F32(matrix(a, (r, k))?), Factor::F32(matrix(b, (n, r))?), matrix(h, (m, r))?);
            LoraBackward { x, w, a, b, h, dy, scale, dropout, da, db, dbias: None, dx }.run(E::cpu()?)
        }
    }
    .map_err(wrapped)
}

/// The shape of an input with another number of columns.
fn with_columns(layout: &Layout, columns: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = columns;
    }
    Shape::from(dims)
}

impl CustomOp1 for FrozenOp {
    fn name(&self) -> &'static str {
        "lowrank-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (n, _)) = (rows_and_columns(layout), self.0.w.dims2()?);
        by_dtype!(self.0.w.dtype(), E => {
            let mut y = vec![E::default(); m * n];
            project(lend::<E>(x, layout)?, [m, k, n], Some(&self.0), None, To::Write(&mut y))?;
            Ok((E::to_cpu_storage_owned(y), with_columns(layout, n)))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        let ((m, k), (n, _), lx, ldy) = (rows_and_columns(x.layout()), self.0.w.dims2()?, Lent::new(x), Lent::new(&dy));
        by_dtype!(self.0.w.dtype(), E => {
            let mut dx = vec![E::default(); m * k];
            project_back::<E>((lx.slice()?, ldy.slice()?), [m, k, n], Some(&self.0), None, Some(To::Write(&mut dx)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

impl CustomOp3 for LoraOp {
    fn name(&self) -> &'static str {
        "lowrank-lora"
    }

    #[rustfmt::skip]
    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (n, _)) = (rows_and_columns(lx), lb.shape().dims2()?);
        by_dtype!(x.dtype(), E => {
            let mut y = vec![E::default(); m * n];
            let lora = self.lora(lend(a, la)?, lend(b, lb)?);
            let h = project(lend::<E>(x, lx)?, [m, k, n], self.base.as_ref(), Some(lora), To::Write(&mut y))?;
            *self.h.lock().unwrap_or_else(PoisonError::into_inner) = Some(h);
            Ok((E::to_cpu_storage_owned(y), with_columns(lx, n)))
        })
    }

    #[rustfmt::skip]
    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((m, k), (n, _)) = (rows_and_columns(x.layout()), b.dims2()?);
        let h = self.h.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(h) = h.as_ref() else { bail!("the backward pass of a layer whose forward pass did not run") };
        let dy = dy.contiguous()?;
        let (lx, la, lb, ldy) = (Lent::new(x), Lent::new(a), Lent::new(b), Lent::new(&dy));
        by_dtype!(x.dtype(), E => {
            let (mut da, mut db) = (vec![0f32; a.elem_count()], vec![0f32; b.elem_count()]);
            let mut dx = x.track_op().then(|| vec![E::default(); m * k]);
            let lora = (self.lora(la.slice()?, lb.slice()?), LoraGradients { h, da: &mut da, db: &mut db });
            let to = dx.as_mut().map(|dx| To::Write(dx.as_mut_slice()));
            project_back::<E>((lx.slice()?, ldy.slice()?), [m, k, n], self.base.as_ref(), Some(lora), to)?;
            let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
            let tensor = |vec, of: &Tensor| Tensor::from_vec(vec, of.shape(), of.device());
            Ok((dx, Some(tensor(da, a)?), Some(tensor(db, b)?)))
        })
    }
}

/// The low-rank update of some rows: `y[rows] += scale·(x[rows]·Aᵀ)·Bᵀ`.
#[derive(Clone, Debug)]
pub(crate) struct Update<'u> {
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) a: &'u Tensor,
    pub(crate) b: &'u Tensor,
    pub(crate) scale: f32,
}

/// `y = x·Wᵀ + bias`, and the updates of some of its rows, without a way back.
pub(crate) fn forward<E: Elem>(x: &[E], (m, k): (usize, usize), base: &Base, updates: &[Update<'_>]) -> Result<Vec<E>> {
    let (lent, cpu) = (base.lent()?, E::cpu()?);
    let n = lent.shape.0;
    let (x, mut y) = (matrix::<E, E>(x, (m, k))?, vec![E::default(); m * n]);
    // One update of all rows rides along in the product.
    let whole = updates.first().filter(|update| update.rows == (0..m));
    if whole.is_none() {
        let y = matrix_mut(&mut y, (m, n))?.into();
        LinearForward { x, w: lent.weight()?, bias: lent.bias()?, y }.run(cpu).map_err(wrapped)?;
    }
    for (at, Update { rows, a, b, scale }) in updates.iter().enumerate() {
        let first = at == 0 && whole.is_some();
        let (la, lb, r) = (Lent::new(a), Lent::new(b), a.dims2()?.0);
        let mut h = vec![0f32; rows.len() * r];
        let part = matrix_mut(&mut y, (m, n))?.row_range(rows.clone()).map_err(wrapped)?;
        LoraForward {
            x: x.row_range(rows.clone()).map_err(wrapped)?,
            w: first.then(|| lent.weight()).transpose()?,
            bias: if first { lent.bias()? } else { None },
            a: Factor::F32(matrix(la.slice()?, a.dims2()?)?),
            b: Factor::F32(matrix(lb.slice()?, b.dims2()?)?),
            scale: *scale,
            dropout: None,
            h: matrix_mut(&mut h, (rows.len(), r))?,
            y: if first { part.into() } else { Output::AddTo(part) },
        }
        .run(cpu)
        .map_err(wrapped)?;
    }
    Ok(y)
}

/// [`forward`] of a tensor, whatever its type.
pub(crate) fn forward_tensor(x: &Tensor, base: &Base, updates: &[Update<'_>]) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (rows, lent) = (rows_and_columns(x.layout()), Lent::new(&x));
    by_dtype!(x.dtype(), E => {
        let y = forward::<E>(lent.slice()?, rows, base, updates)?;
        Tensor::from_vec(y, with_columns(x.layout(), base.w.dims2()?.0), x.device())
    })
}
