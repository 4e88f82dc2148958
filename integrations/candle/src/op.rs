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
        by_dtype!(self.0.w.dtype(), E => {
            let y = forward::<E>(lend(x, layout)?, rows_and_columns(layout), &self.0, &[])?;
            Ok((E::to_cpu_storage_owned(y), with_columns(layout, self.0.w.dims2()?.0)))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dy = dy.contiguous()?;
        by_dtype!(self.0.w.dtype(), E => {
            let (base, lent) = (self.0.lent()?, Lent::new(&dy));
            let (m, k) = rows_and_columns(x.layout());
            let mut dx = vec![E::default(); m * k];
            LinearBackward {
                x: None,
                w: Some(base.weight::<E>()?),
                dy: matrix(lent.slice::<E>()?, (m, base.shape.0))?,
                dx: Some(matrix_mut(&mut dx, (m, k))?.into()),
                dw: None,
                dbias: None,
            }
            .run(E::cpu()?)
            .map_err(wrapped)?;
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
        let ((m, k), (r, _), (n, _)) = (rows_and_columns(lx), la.shape().dims2()?, lb.shape().dims2()?);
        by_dtype!(x.dtype(), E => {
            let base = self.base.as_ref().map(Base::lent).transpose()?;
            let (mut h, mut y) = (vec![0f32; m * r], vec![E::default(); m * n]);
            LoraForward {
                x: matrix(lend::<E>(x, lx)?, (m, k))?,
                w: base.as_ref().map(LentBase::weight::<E>).transpose()?,
                bias: base.as_ref().map(LentBase::bias::<E>).transpose()?.flatten(),
                a: Factor::F32(matrix(lend(a, la)?, la.shape().dims2()?)?),
                b: Factor::F32(matrix(lend(b, lb)?, lb.shape().dims2()?)?),
                scale: self.scale,
                dropout: self.dropout,
                h: matrix_mut(&mut h, (m, r))?,
                y: matrix_mut(&mut y, (m, n))?.into(),
            }
            .run(E::cpu()?)
            .map_err(wrapped)?;
            *self.h.lock().unwrap_or_else(PoisonError::into_inner) = Some(h);
            Ok((E::to_cpu_storage_owned(y), with_columns(lx, n)))
        })
    }

    #[rustfmt::skip]
    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((m, k), (r, _), (n, _)) = (rows_and_columns(x.layout()), a.dims2()?, b.dims2()?);
        let h = self.h.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(h) = h.as_ref() else { bail!("the backward pass of a layer whose forward pass did not run") };
        let dy = dy.contiguous()?;
        by_dtype!(x.dtype(), E => {
            let base = self.base.as_ref().map(Base::lent).transpose()?;
            let (lx, la, lb, ldy) = (Lent::new(x), Lent::new(a), Lent::new(b), Lent::new(&dy));
            let (mut da, mut db) = (vec![0f32; r * k], vec![0f32; n * r]);
            let mut dx = x.track_op().then(|| vec![E::default(); m * k]);
            LoraBackward {
                x: matrix(lx.slice::<E>()?, (m, k))?,
                w: base.as_ref().map(LentBase::weight::<E>).transpose()?,
                a: Factor::F32(matrix(la.slice()?, (r, k))?),
                b: Factor::F32(matrix(lb.slice()?, (n, r))?),
                h: matrix(h, (m, r))?,
                dy: matrix(ldy.slice::<E>()?, (m, n))?,
                scale: self.scale,
                dropout: self.dropout,
                da: matrix_mut(&mut da, (r, k))?,
                db: matrix_mut(&mut db, (n, r))?,
                dbias: None,
                dx: dx.as_mut().map(|dx| matrix_mut(dx, (m, k)).map(Into::into)).transpose()?,
            }
            .run(E::cpu()?)
            .map_err(wrapped)?;
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
