//! DoRA: `W' = diag(magnitude / ‖W + scaling·B·A‖)·(W + scaling·B·A)`, the norms by rows.
//!
//! S.-Y. Liu et al., "DoRA: weight-decomposed low-rank adaptation", 2024. On the tape it is two operations,
//! `z = x·(W + scaling·B·A)ᵀ` and `y = (magnitude / norm)·z + bias`. The gradient treats the norms as constants, as in the paper.

use rayon::prelude::*;

use super::{Adapter, Linear};
use crate::autograd::{LoraParams, Param, Tape, Var};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraRowNorm, Rounding, round_stochastic, rounding_words};
use crate::tensor::Tensor;

/// The initial magnitudes of an adapter: the norms of the merged rows, so that a new adapter changes nothing.
pub(super) fn row_norms<B: Backend>(backend: &B, base: &Linear<B>, adapter: &Adapter<B>) -> Result<Tensor<B>> {
    let norms = norm(backend, &base.weight().tensor, adapter)?.to_vec(backend)?;
    let norms: Vec<_> = norms.into_iter().map(B::Elem::from_f32).collect();
    Tensor::from_slice(backend, (1, norms.len()), &norms)
}

/// `norm_j = ‖(W + scaling·B·A)_j‖` for each row `j`
fn norm<B: Backend>(backend: &B, w: &Tensor<B>, adapter: &Adapter<B>) -> Result<Tensor<B, f32>> {
    let mut norm = Tensor::unwritten(backend, (1, w.rows()))?;
    let (a, b, scale) = (&adapter.a.tensor, &adapter.b.tensor, adapter.scaling());
    LoraRowNorm { w: w.into(), a: a.into(), b: b.into(), scale, norm: norm.view_mut() }.run(backend)?;
    Ok(norm)
}

/// `y = base(x) + (c - 1)·drop(x)·Wᵀ + c·scaling·drop(x)·Aᵀ·Bᵀ` with `c = magnitude / norm`, as in PEFT.
///
/// It is computed as `base(x) + c·z - drop(x)·Wᵀ` with `z = drop(x)·(W + scaling·B·A)ᵀ`. `so_far` is the sum of the base layer and the
/// adapters before this one, if there are any. Without dropout and without `so_far` it is just `c·z + bias`.
pub(super) fn forward<'m, B: Backend>(
    tape: &mut Tape<'m, B>,
    x: Var,
    (base, bias): (&'m Linear<B>, Option<&'m Param<B>>),
    (adapter, magnitude): (&'m Adapter<B>, &'m Param<B>),
    (dropout, so_far): (Option<Dropout>, Option<Var>),
) -> Result<Var> {
    let w = base.weight();
    let norm = norm(tape.backend(), &w.tensor, adapter)?;
    let dropped = dropout.map_or(Ok(x), |dropout| tape.dropout(x, dropout))?;
    let (a, b, scale) = (&adapter.a, &adapter.b, adapter.scaling());
    let z = tape.lora_linear(dropped, LoraParams { w: Some(w), bias: None, a, b, lora_bias: None, scale, dropout: None })?;
    if dropout.is_none() && so_far.is_none() {
        return tape.magnitude(z, magnitude, norm, bias);
    }
    let so_far = so_far.map_or_else(|| tape.linear(x, w, bias), Ok)?;
    let scaled = tape.magnitude(z, magnitude, norm, None)?;
    let unscaled = tape.linear(dropped, w, None)?;
    let added = tape.sub(scaled, unscaled)?;
    tape.add(so_far, added)
}

/// Merges and unmerges a DoRA adapter on the host, row by row.
#[derive(Debug)]
pub(super) struct Rows {
    /// `magnitude / norm`
    gains: Vec<f32>,
}

impl Rows {
    /// Computes the gains for a weight before it is merged.
    pub(super) fn of<B: Backend>(backend: &B, w: &Tensor<B>, adapter: &Adapter<B>, magnitude: &Param<B>) -> Result<Self> {
        let (norms, magnitudes) = (norm(backend, w, adapter)?.to_vec(backend)?, magnitude.tensor.to_vec(backend)?);
        // A row of zeros has no direction, and stays zero.
        let gain = |(norm, magnitude): (f32, B::Elem)| if norm == 0.0 { 0.0 } else { magnitude.to_f32() / norm };
        Ok(Self { gains: norms.into_iter().zip(magnitudes).map(gain).collect() })
    }

    /// The bytes of host memory that the gains take.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.gains[..])
    }

    /// `W = diag(gains)·(W + scaling·B·A)`, summed in `f32` and rounded once.
    pub(super) fn merge<B: Backend>(
        &self,
        backend: &B,
        adapter: &Adapter<B>,
        rounding: Rounding,
        w: &mut Tensor<B>,
    ) -> Result<()> {
        let key = rounding.key(B::Elem::DTYPE);
        self.map_elements(backend, adapter, w, move |e, gain, w, update| {
            let sum = gain * (w + update);
            match key {
                None => B::Elem::from_f32(sum),
                Some(key) => round_stochastic(sum, rounding_words(key, e as u64 / 4)[e % 4]),
            }
        })
    }

    /// `W = diag(gains)⁻¹·W - scaling·B·A`, up to rounding.
    pub(super) fn unmerge<B: Backend>(&self, backend: &B, adapter: &Adapter<B>, w: &mut Tensor<B>) -> Result<()> {
        self.map_elements(backend, adapter, w, |_, gain, w, update| B::Elem::from_f32(w / gain - update))
    }

    /// Replaces each element of the weight by `new(index, gain of the row, element, element of scaling·B·A)`.
    fn map_elements<B: Backend>(
        &self,
        backend: &B,
        adapter: &Adapter<B>,
        w: &mut Tensor<B>,
        new: impl Fn(usize, f32, f32, f32) -> B::Elem + Sync,
    ) -> Result<()> {
        let widened =
            |tensor: &Tensor<B>| -> Result<Vec<f32>> { Ok(tensor.to_vec(backend)?.into_iter().map(Float::to_f32).collect()) };
        let (a, b, scale) = (widened(&adapter.a.tensor)?, widened(&adapter.b.tensor)?, adapter.scaling());
        let (k, r) = (w.cols().max(1), adapter.room());
        let mut host = w.to_vec(backend)?;
        host.par_chunks_mut(k).enumerate().zip(&self.gains).for_each(|((i, row), &gain)| {
            let mut update = vec![0.0f32; row.len()];
            for (b, a) in b[i * r..].iter().zip(a.chunks_exact(k)) {
                update.iter_mut().zip(a).for_each(|(update, a)| *update += b * a);
            }
            for (j, (w, update)) in row.iter_mut().zip(update).enumerate() {
                *w = new(i * k + j, gain, w.to_f32(), scale * update);
            }
        });
        w.copy_from_slice(backend, &host)
    }
}
