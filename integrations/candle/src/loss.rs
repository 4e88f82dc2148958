//! The loss of a language model: `-Σ log softmax(h·Wᵀ)[label] / denominator` over the rows that have a label.
//!
//! The head is frozen, so the gradient of `h` can be made in the forward pass, some rows at a time: the logits of all rows never exist
//! at once, and those of rows without a label are never made.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use lowrank::op::{CrossEntropy, Labels, LinearBackward, LinearForward};

use crate::lend::{Elem, Lent, by_dtype, lend, matrix, matrix_mut, rows_and_columns, wrapped};

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

    /// The sum of the losses, and the gradient of `h` of the mean.
    fn run<E: Elem>(&self, h: &[E], (m, d): (usize, usize)) -> Result<(f64, Vec<E>)> {
        let (cpu, (classes, _), lent) = (E::cpu()?, self.head.dims2()?, Lent::new(&self.head));
        let w = matrix::<E, E>(lent.slice()?, (classes, d))?;
        let (mut loss, mut dh) = (0.0, vec![E::default(); if self.gradients { m * d } else { 0 }]);
        let rows = self.labels.len().min(ROWS);
        let (mut logits, mut dlogits) = (vec![E::default(); rows * classes], vec![E::default(); rows * classes]);
        for part in self.labels.chunks(ROWS) {
            let c = part.len();
            let picked: Vec<E> = part.iter().flat_map(|&(row, _)| h[row * d..][..d].iter().copied()).collect();
            let (logits, dlogits) = (&mut logits[..c * classes], &mut dlogits[..c * classes]);
            let y = matrix_mut(logits, (c, classes))?.into();
            LinearForward { x: matrix(&picked, (c, d))?, w: w.into(), bias: None, y }.run(cpu).map_err(wrapped)?;
            let labels: Vec<u32> = part.iter().map(|&(_, label)| label).collect();
            let labels = Labels::new(cpu, classes, &labels).map_err(wrapped)?;
            let mut mean = [0f32];
            CrossEntropy {
                logits: matrix(logits, (c, classes))?,
                labels: &labels,
                loss: matrix_mut(&mut mean, (1, 1))?,
                dlogits: matrix_mut(dlogits, (c, classes))?,
            }
            .run(cpu)
            .map_err(wrapped)?;
            loss += f64::from(mean[0]) * c as f64;
            if self.gradients {
                let mut dx = picked;
                let (dy, out) = (matrix(dlogits, (c, classes))?, Some(matrix_mut(&mut dx, (c, d))?.into()));
                LinearBackward { x: None, w: Some(w.into()), dy, dx: out, dw: None, dbias: None }.run(cpu).map_err(wrapped)?;
                let factor = c as f32 / self.denominator; // the verb gave the gradient of the mean over the part
                for (&(row, _), dx) in part.iter().zip(dx.chunks_exact(d)) {
                    let dh = dh[row * d..][..d].iter_mut();
                    dh.zip(dx).for_each(|(dh, dx)| *dh = E::from_f32(factor * dx.to_f32()));
                }
            }
        }
        Ok((loss, dh))
    }
}

impl CustomOp1 for HeadLoss {
    fn name(&self) -> &'static str {
        "lowrank-head-loss"
    }

    fn cpu_fwd(&self, h: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, d) = rows_and_columns(layout);
        if self.labels.last().is_some_and(|&(row, _)| row >= m) || self.head.dims2()?.1 != d {
            bail!("a head of {:?} got {m} rows of {d}", self.head.dims());
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
