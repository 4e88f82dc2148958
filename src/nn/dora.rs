//! DoRA: `W' = diag(magnitude / ‖W + scaling·B·A‖)·(W + scaling·B·A)`, the norms by rows.
//!
//! S.-Y. Liu et al., "DoRA: weight-decomposed low-rank adaptation", 2024. On the tape it is two steps, `z = x·(W + scaling·B·A)ᵀ`
//! and `y = (magnitude / norm)·z + bias`; the norms come from the factors, and are constants to the gradient.

use rayon::prelude::*;

use super::{Adapter, Linear};
use crate::autograd::{LoraParams, Param, Tape, Var};
use crate::backend::Backend;
use crate::element::Float;
use crate::error::Result;
use crate::op::{Dropout, LoraRowNorm, Rounding, Weight, round_stochastic, rounding_words};
use crate::tensor::Tensor;

/// What a new adapter's magnitudes are: the lengths of the rows, so that it changes nothing.
pub(super) fn row_norms<B: Backend>(backend: &B, base: &Linear<B>, adapter: &Adapter<B>) -> Result<Tensor<B>> {
    let norms = norm(backend, base.operand(), adapter)?.to_vec(backend)?;
    let norms: Vec<_> = norms.into_iter().map(B::Elem::from_f32).collect();
    Tensor::from_slice(backend, (1, norms.len()), &norms)
}

/// `‖W + scaling·B·A‖` by rows
fn norm<B: Backend>(backend: &B, w: Weight<'_, B>, adapter: &Adapter<B>) -> Result<Tensor<B, f32>> {
    let mut norm = Tensor::unwritten(backend, (1, w.rows()))?;
    let (a, b, scale) = (&adapter.a.tensor, &adapter.b.tensor, adapter.scaling());
    LoraRowNorm { w, a: a.into(), b: b.into(), scale, norm: norm.view_mut() }.run(backend)?;
    Ok(norm)
}

/// What DoRA makes of `x`: alone, or added to what the base layer and other adapters made (`so_far`, with the bias).
///
/// As in PEFT, dropout acts on all that the adapter adds: `base(x) + (c - 1)·drop(x)·Wᵀ + c·scaling·drop(x)·Aᵀ·Bᵀ` with
/// `c = magnitude / norm`. That is `base(x) + c·z - drop(x)·Wᵀ`, and without dropout and others just `c·z + bias`.
pub(super) fn forward<'m, B: Backend>(
    tape: &mut Tape<'m, B>,
    x: Var,
    (base, bias): (&'m Linear<B>, Option<&'m Param<B>>),
    (adapter, magnitude): (&'m Adapter<B>, &'m Param<B>),
    (dropout, so_far): (Option<Dropout>, Option<Var>),
) -> Result<Var> {
    let w = base.layer_weight();
    let norm = norm(tape.backend(), w.operand(), adapter)?;
    let seen = dropout.map_or(Ok(x), |dropout| tape.dropout(x, dropout))?;
    let (a, b, scale) = (&adapter.a, &adapter.b, adapter.scaling());
    let z = tape.lora_linear(seen, LoraParams { w: Some(w), bias: None, a, b, lora_bias: None, scale, dropout: None })?;
    if dropout.is_none() && so_far.is_none() {
        return tape.magnitude(z, magnitude, norm, bias);
    }
    let so_far = so_far.map_or_else(|| tape.linear(x, w, bias), Ok)?;
    let scaled = tape.magnitude(z, magnitude, norm, None)?;
    let unscaled = tape.linear(seen, w, None)?;
    let added = tape.sub(scaled, unscaled)?;
    tape.add(so_far, added)
}

/// A merged weight on the host, made and unmade row by row.
#[derive(Debug)]
pub(super) struct Rows {
    /// `magnitude / norm`
    gains: Vec<f32>,
}

impl Rows {
    /// The gains for a weight that is about to be merged.
    pub(super) fn of<B: Backend>(backend: &B, w: &Tensor<B>, adapter: &Adapter<B>, magnitude: &Param<B>) -> Result<Self> {
        let (norms, magnitudes) = (norm(backend, w.into(), adapter)?.to_vec(backend)?, magnitude.tensor.to_vec(backend)?);
        // A row of zeros has no direction, and stays zero.
        let gain = |(norm, magnitude): (f32, B::Elem)| if norm == 0.0 { 0.0 } else { magnitude.to_f32() / norm };
        Ok(Self { gains: norms.into_iter().zip(magnitudes).map(gain).collect() })
    }

    /// How much memory they take.
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
        self.each(backend, adapter, w, move |e, gain, w, update| {
            let sum = gain * (w + update);
            match key {
                None => B::Elem::from_f32(sum),
                Some(key) => round_stochastic(sum, rounding_words(key, e as u64 / 4)[e % 4]),
            }
        })
    }

    /// `W = diag(gains)⁻¹·W - scaling·B·A`, up to rounding.
    pub(super) fn unmerge<B: Backend>(&self, backend: &B, adapter: &Adapter<B>, w: &mut Tensor<B>) -> Result<()> {
        self.each(backend, adapter, w, |_, gain, w, update| B::Elem::from_f32(w / gain - update))
    }

    /// Each element `e` of the weight from what it is, the gain of its row, and its element of `scaling·B·A`.
    fn each<B: Backend>(
        &self,
        backend: &B,
        adapter: &Adapter<B>,
        w: &mut Tensor<B>,
        new: impl Fn(usize, f32, f32, f32) -> B::Elem + Sync,
    ) -> Result<()> {
        let wide =
            |tensor: &Tensor<B>| -> Result<Vec<f32>> { Ok(tensor.to_vec(backend)?.into_iter().map(Float::to_f32).collect()) };
        let (a, b, scale) = (wide(&adapter.a.tensor)?, wide(&adapter.b.tensor)?, adapter.scaling());
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
