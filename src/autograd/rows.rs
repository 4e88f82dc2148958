//! A low-rank layer where each row of the batch has an adapter of its own.

use super::gradients::{Gradient, Gradients};
use super::{Op, Param, Tape, Var};
use crate::backend::Backend;
use crate::error::Result;
use crate::op::{Accumulate, Assignment, Bank, Dropout, LoraBackward, LoraForward};
use crate::tensor::Tensor;

/// The operands of a layer whose rows use the adapters of a bank, as [`Tape::lora_rows`] reads them.
pub struct LoraRows<'m, B: Backend> {
    /// `n×k`
    pub w: Option<&'m Param<B>>,
    /// `1×n`
    pub bias: Option<&'m Param<B>>,
    /// The adapters.
    pub bank: &'m Bank<B>,
    /// The slot of each row.
    pub rows: &'m Assignment<B>,
    /// Dropout of the input of the updates.
    pub dropout: Option<Dropout>,
    /// The parameters that get gradients, one entry for each of [`Assignment::segments`]; empty if the adapters are not trained.
    pub trained: Vec<TrainedSlot<'m, B>>,
}

/// The parameters that a slot of a bank was loaded from.
pub struct TrainedSlot<'m, B: Backend> {
    /// `r×k`
    pub a: &'m Param<B>,
    /// `B` transposed, `r×n`
    pub b: &'m Param<B>,
    /// Factor of the gradients.
    pub weight: f32,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// `y = x·Wᵀ + bias + scaling·h·Bᵀ`, `h = drop(x)·Aᵀ`, where each row uses the `A`, `B` and scaling of its slot.
    ///
    /// Errors: those of [`LoraForward`]; [`Error::Value`](crate::Error::Value) for `trained` of another length than there are segments.
    pub fn lora_rows(&mut self, x: Var, layer: LoraRows<'m, B>) -> Result<Var> {
        let LoraRows { w, bias, bank, rows, dropout, trained } = &layer;
        let fine = trained.is_empty() || trained.len() == rows.segments().len();
        crate::Error::unless(fine, "lora_rows", "trained", trained.len(), "none, or one for each segment")?;
        let (m, [a, b]) = (self.value(x)?.rows(), bank.factors(rows));
        let mut h = Tensor::unwritten(self.backend, (m, bank.rank()))?;
        let mut y = Tensor::unwritten(self.backend, (m, bank.layer().rows))?;
        LoraForward {
            x: self.value(x)?.view(),
            w: w.map(|w| (&w.tensor).into()),
            bias: bias.map(|bias| bias.tensor.view()),
            a,
            b,
            scale: 1.0,
            dropout: *dropout,
            h: h.view_mut(),
            y: (&mut y).into(),
        }
        .run(self.backend)?;
        let factors = trained.iter().flat_map(|slot| [slot.a, slot.b]);
        let needs_grad = self.needs_grad(x) || factors.chain(*w).chain(*bias).any(|param| param.trainable);
        Ok(self.push(Op::LoraRows { x, layer, h }, needs_grad, y))
    }
}

/// The derivative: from `dy`, the gradients of `x`, of the bias, and of the adapters that are trained.
pub(super) fn through<B: Backend>(
    backend: &B,
    (x, layer, h): (Var, &LoraRows<'_, B>, &Tensor<B, f32>),
    dy: Tensor<B>,
    (mut dx, mut dbias): (Option<Tensor<B>>, Option<Tensor<B, f32>>),
    gradients: &mut Gradients<B>,
) -> Result<()> {
    let LoraRows { w, bias, bank, rows, dropout, trained } = layer;
    let ([a, b], r, segments) = (bank.factors(rows), bank.rank(), rows.segments());
    let mut da = Tensor::unwritten(backend, (segments.len() * r, bank.layer().cols))?;
    let mut db = Tensor::unwritten(backend, (segments.len() * r, bank.layer().rows))?;
    LoraBackward {
        x: gradients.values[x.index].view(),
        w: w.map(|w| (&w.tensor).into()),
        a,
        b,
        h: h.view(),
        dy: dy.view(),
        scale: 1.0,
        dropout: *dropout,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: dbias.as_mut().map(Tensor::view_mut),
        dx: dx.as_mut().map(Into::into),
    }
    .run(backend)?;
    for (i, slot) in trained.iter().enumerate() {
        for (param, all) in [(slot.a, &da), (slot.b, &db)] {
            if param.trainable {
                let mut own = Tensor::zeros(backend, param.tensor.shape())?;
                let of_slot = all.view().row_range(i * r..i * r + own.rows())?;
                Accumulate { x: of_slot, scale: slot.weight, y: own.view_mut() }.run(backend)?;
                gradients.add_to_parameter(backend, Some(param), Some(Gradient::Dense(own)))?;
            }
        }
    }
    gradients.add_to_parameter(backend, *bias, dbias.map(Gradient::Dense))?;
    gradients.add_to_parameter(backend, *w, w.filter(|w| w.trainable).map(|_| Gradient::Factored { dy, x }))?;
    dx.map_or(Ok(()), |dx| gradients.add_to_value(backend, x, dx))
}
