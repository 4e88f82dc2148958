//! The loss of a language model: `-Σ log softmax(h·Wᵀ)[label] / denominator` over the rows that have a label.
//!
//! The head is frozen, so the gradient of `h` can be made in the forward pass, some rows at a time: the logits of all rows never exist
//! at once, and those of rows without a label are never made.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use lowrank::op::{LinearBackward, LinearForward};
use rayon::prelude::*;

use crate::lend::{Elem, Lent, by_dtype, lend, matrix, matrix_mut, rows_and_columns, wrapped};
use crate::numeric::{exp, max, sum_of_exp, vectorised};

/// Rows whose logits exist at a time.
const ROWS: usize = 128;

/// `loss = -Σ log softmax(h·Wᵀ)[label] / denominator`
pub(crate) struct HeadLoss {
    /// `classes × d`
    head: Tensor,
    /// The rows that count, and their labels.
    labels: Vec<(usize, u32)>,
    denominator: f32,
    /// The gradient of `h`, where it is wanted.
    dh: Mutex<Option<Tensor>>,
    gradients: bool,
}

impl HeadLoss {
    /// `labels` has one for each row of `h`, or `None` where the row does not count.
    pub(crate) fn new(head: Tensor, labels: &[Option<u32>], denominator: f32) -> Self {
        let labels = labels.iter().enumerate().filter_map(|(row, label)| Some((row, (*label)?))).collect();
        Self { head, labels, denominator, dh: Mutex::new(None), gradients: false }
    }

    /// The loss of the hidden states `h`, tokens × d: a scalar in `f32`.
    pub(crate) fn forward(self, h: &Tensor) -> Result<Tensor> {
        let gradients = h.track_op();
        h.contiguous()?.apply_op1(Self { gradients, ..self })
    }

    /// The sum of the losses, and the gradient of `h` if it is wanted.
    fn run<E: Elem>(&self, h: &[E], (m, d): (usize, usize)) -> Result<(f64, Vec<E>)> {
        let (cpu, (classes, _), lent) = (E::cpu()?, self.head.dims2()?, Lent::new(&self.head));
        let w = matrix::<E, E>(lent.slice()?, (classes, d))?;
        let (mut loss, mut dh) = (0.0, vec![E::default(); if self.gradients { m * d } else { 0 }]);
        let mut logits = vec![E::default(); self.labels.len().min(ROWS) * classes];
        for part in self.labels.chunks(ROWS) {
            let c = part.len();
            let mut picked: Vec<E> = part.iter().flat_map(|&(row, _)| h[row * d..][..d].iter().copied()).collect();
            let logits = &mut logits[..c * classes];
            let y = matrix_mut(logits, (c, classes))?.into();
            LinearForward { x: matrix(&picked, (c, d))?, w: w.into(), bias: None, y }.run(cpu).map_err(wrapped)?;
            let rows = logits.par_chunks_mut(classes).zip(part);
            let losses: Vec<f64> = rows.map(|(row, &(_, label))| cross_entropy(row, label as usize, self.gradients)).collect();
            loss += losses.iter().sum::<f64>();
            if self.gradients {
                let (dy, dx) = (matrix(logits, (c, classes))?, Some(matrix_mut(&mut picked, (c, d))?.into()));
                LinearBackward { x: None, w: Some(w.into()), dy, dx, dw: None, dbias: None }.run(cpu).map_err(wrapped)?;
                for (&(row, _), dx) in part.iter().zip(picked.chunks_exact(d)) {
                    let dh = dh[row * d..][..d].iter_mut();
                    dh.zip(dx).for_each(|(dh, dx)| *dh = E::from_f32(dx.to_f32() / self.denominator));
                }
            }
        }
        Ok((loss, dh))
    }
}

/// `-log softmax(row)[label]` of a row of logits, which becomes `softmax(row) - onehot(label)` if gradients are wanted.
fn cross_entropy<E: Elem>(row: &mut [E], label: usize, gradients: bool) -> f64 {
    vectorised!({
        let most = max(row);
        let sum = sum_of_exp(row, most);
        let logit = row[label].to_f32();
        if gradients {
            let inverse = 1.0 / sum;
            for x in row.iter_mut() {
                *x = E::from_f32(exp(x.to_f32() - most) * inverse);
            }
            row[label] = E::from_f32(exp(logit - most) * inverse - 1.0);
        }
        f64::from(sum.ln()) + f64::from(most - logit)
    })
}

impl CustomOp1 for HeadLoss {
    fn name(&self) -> &'static str {
        "lowrank-head-loss"
    }

    fn cpu_fwd(&self, h: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, d) = rows_and_columns(layout);
        let (classes, columns) = self.head.dims2()?;
        if self.labels.iter().any(|&(row, label)| row >= m || label as usize >= classes) || columns != d {
            bail!("a head of {:?} got {m} rows of {d}, and labels of other rows or classes", self.head.dims());
        }
        by_dtype!(h.dtype(), E => {
            let (loss, dh) = self.run::<E>(lend(h, layout)?, (m, d))?;
            if self.gradients {
                let dh = Tensor::from_vec(dh, layout.shape(), self.head.device())?;
                *self.dh.lock().unwrap_or_else(PoisonError::into_inner) = Some(dh);
            }
            Ok((CpuStorage::F32(vec![(loss / f64::from(self.denominator)) as f32]), Shape::from(())))
        })
    }

    fn bwd(&self, _h: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let dh = self.dh.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(dh) = dh else { bail!("the backward pass of a loss whose forward pass did not run") };
        let factor = f64::from(dloss.to_scalar::<f32>()?);
        Ok(Some(if factor == 1.0 { dh } else { (dh * factor)? }))
    }
}
