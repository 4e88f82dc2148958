//! The gradients of a backward pass: looked up by parameter, accumulated over batches, scaled and clipped.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use super::{Node, Param, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::op::{Accumulate, Add, LinearBackward, WeightGrad};
use crate::tensor::{Shape, Tensor};

pub(super) enum Gradient<B: Backend> {
    Dense(Tensor<B, f32>),
    /// `dyᵀ·x`, with `x` among the values of the tape.
    Factored {
        dy: Tensor<B>,
        x: Var,
    },
}

/// The gradients of a backward pass, by parameter.
///
/// The gradient of a weight is kept as its two factors, `dy` and `x` of `dyᵀ·x`. The product is computed, as a matrix in `f32`,
/// when the weight was used twice, or when gradients are added, scaled, clipped or measured.
pub struct Gradients<B: Backend> {
    pub(super) values: Vec<Tensor<B>>,
    pub(super) of: HashMap<u64, Gradient<B>>,
    /// The gradient of each value, as far as it has been summed.
    pub(super) of_values: Vec<Option<Tensor<B>>>,
    /// The tape's empty list of nodes, for [the next tape](super::Tape::reusing).
    pub(super) nodes: Vec<Node<'static, B>>,
    /// Scratch of [`norm`](Self::norm): the parameters in ascending order, and the elements of one gradient.
    order: Vec<u64>,
    host: Vec<f32>,
}

impl<B: Backend> Gradient<B> {
    /// Computes the product of a factored gradient; `values` are those of its tape.
    fn make_dense(&mut self, backend: &B, values: &[Tensor<B>]) -> Result<()> {
        let Gradient::Factored { dy, x } = self else { return Ok(()) };
        let x = &values[x.index];
        let shape = Shape::from((dy.cols(), x.cols()));
        let mut dw = Tensor::unwritten(backend, shape)?;
        LinearBackward { x: Some(x.view()), w: None, dy: dy.view(), dx: None, dw: Some(dw.view_mut()), dbias: None }
            .run(backend)?;
        *self = Gradient::Dense(dw);
        Ok(())
    }
}

impl<B: Backend> Default for Gradients<B> {
    /// No gradients.
    fn default() -> Self {
        let (values, of, of_values) = (Vec::new(), HashMap::new(), Vec::new());
        Self { values, of, of_values, nodes: Vec::new(), order: Vec::new(), host: Vec::new() }
    }
}

impl<B: Backend> fmt::Debug for Gradients<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gradients(of {} parameters)", self.len())
    }
}

impl<B: Backend> Gradients<B> {
    /// The gradient of a parameter; `None` if it was frozen or not used.
    pub fn get(&self, param: &Param<B>) -> Option<WeightGrad<'_, B>> {
        self.of.get(&param.id).map(|gradient| match gradient {
            Gradient::Dense(gradient) => WeightGrad::Dense(gradient),
            Gradient::Factored { dy, x } => WeightGrad::Factored { dy, x: &self.values[x.index] },
        })
    }

    /// The number of parameters that have a gradient.
    pub fn len(&self) -> usize {
        self.of.len()
    }

    /// True if no parameter has a gradient.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Adds the gradients of another batch (gradient accumulation). A loss is the mean over its batch, so the sum over `n`
    /// batches of equal size is to be [scaled](Self::scale) by `1/n`.
    pub fn add(&mut self, backend: &B, mut other: Self) -> Result<()> {
        self.make_dense(backend)?;
        other.make_dense(backend)?;
        other.of.into_iter().try_for_each(|(id, gradient)| self.accumulate(backend, id, gradient))
    }

    /// Multiplies every gradient. Errors: [`Error::Value`] unless `by` is finite.
    pub fn scale(&mut self, backend: &B, by: f32) -> Result<()> {
        Error::unless(by.is_finite(), "scale", "by", by, "a finite number")?;
        self.make_dense(backend)?;
        for gradient in self.of.values_mut() {
            if let Gradient::Dense(x) = gradient {
                let mut y = Tensor::zeros(backend, x.shape())?;
                Accumulate { x: x.view(), scale: by, y: y.view_mut() }.run(backend)?;
                *x = y;
            }
        }
        Ok(())
    }

    /// The norm over all gradients together, `√Σ g²`; [`clip`](Self::clip) limits it.
    pub fn norm(&mut self, backend: &B) -> Result<f64> {
        self.make_dense(backend)?;
        self.order.clear();
        self.order.extend(self.of.keys());
        self.order.sort_unstable(); // the same order, hence the same bits, in every run
        let mut sum = 0.0;
        for id in &self.order {
            if let Some(Gradient::Dense(gradient)) = self.of.get(id) {
                self.host.resize(gradient.shape().elements()?, 0.0);
                gradient.copy_to_slice(backend, &mut self.host)?;
                sum += self.host.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
            }
        }
        Ok(sum.sqrt())
    }

    /// Multiplies every gradient by `max_norm / (norm + 1e-6)` if that is below 1, as PyTorch's `clip_grad_norm_` does. Returns
    /// the norm before clipping.
    ///
    /// Errors: [`Error::Value`] unless `max_norm` is finite and not negative and the norm is finite; no gradient is changed then.
    pub fn clip(&mut self, backend: &B, max_norm: f32) -> Result<f64> {
        let fine = max_norm.is_finite() && max_norm >= 0.0;
        Error::unless(fine, "clip", "max_norm", max_norm, "finite and not negative")?;
        let norm = self.norm(backend)?;
        Error::unless(norm.is_finite(), "clip", "norm", norm, "finite")?;
        let by = f64::from(max_norm) / (norm + 1e-6);
        if by < 1.0 {
            self.scale(backend, by as f32)?;
        }
        Ok(norm)
    }

    /// The gradient of a parameter as a matrix; `None` if it has none.
    pub(crate) fn dense(&mut self, backend: &B, param: &Param<B>) -> Result<Option<&Tensor<B, f32>>> {
        let Some(gradient) = self.of.get_mut(&param.id) else { return Ok(None) };
        gradient.make_dense(backend, &self.values)?;
        match gradient {
            Gradient::Dense(gradient) => Ok(Some(gradient)),
            Gradient::Factored { .. } => Ok(None), // made dense above
        }
    }

    /// Replaces the gradient of a parameter.
    pub(crate) fn set(&mut self, param: &Param<B>, gradient: Tensor<B, f32>) {
        self.of.insert(param.id, Gradient::Dense(gradient));
    }

    /// Removes all values and gradients; the lists keep their capacity.
    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.of.clear();
        self.of_values.clear();
    }

    /// Adds to the gradient of a value.
    pub(super) fn add_to_value(&mut self, backend: &B, var: Var, gradient: Tensor<B>) -> Result<()> {
        match &mut self.of_values[var.index] {
            Some(sum) => Add { x: gradient.view(), scale: 1.0, y: sum.view_mut() }.run(backend),
            empty => {
                *empty = Some(gradient);
                Ok(())
            }
        }
    }

    /// Adds to the gradient of a parameter, if both are there.
    pub(super) fn add_to_parameter(
        &mut self,
        backend: &B,
        param: Option<&Param<B>>,
        gradient: Option<Gradient<B>>,
    ) -> Result<()> {
        let (Some(param), Some(gradient)) = (param, gradient) else { return Ok(()) };
        self.accumulate(backend, param.id, gradient)
    }

    fn accumulate(&mut self, backend: &B, id: u64, mut gradient: Gradient<B>) -> Result<()> {
        let sum = match self.of.entry(id) {
            Entry::Occupied(sum) => sum.into_mut(),
            Entry::Vacant(new) => {
                new.insert(gradient);
                return Ok(());
            }
        };
        sum.make_dense(backend, &self.values)?;
        gradient.make_dense(backend, &self.values)?;
        match (sum, &gradient) {
            (Gradient::Dense(y), Gradient::Dense(x)) => Accumulate { x: x.view(), scale: 1.0, y: y.view_mut() }.run(backend),
            _ => Ok(()), // made dense above
        }
    }

    /// Computes the product of every factored gradient.
    fn make_dense(&mut self, backend: &B) -> Result<()> {
        self.of.values_mut().try_for_each(|gradient| gradient.make_dense(backend, &self.values))
    }
}
