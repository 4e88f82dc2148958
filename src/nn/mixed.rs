//! A batch whose rows go through adapters of their own.

use super::Mlp;
use crate::autograd::Tape;
use crate::backend::Backend;
use crate::element::Float as _;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

impl<B: Backend> Mlp<B> {
    /// [`predict`](Self::predict) where each row names its adapter; `None` is the base model. The rows of an adapter make a batch.
    ///
    /// Errors: [`Error::NoSuchAdapter`]; [`Error::Value`] for another number of names than rows, or while an adapter is merged.
    pub fn predict_mixed(&self, backend: &B, x: &Tensor<B>, adapters: &[Option<&str>]) -> Result<Vec<B::Elem>> {
        Error::unless(adapters.len() == x.rows(), "predict_mixed", "adapters", adapters.len(), "one a row")?;
        self.unmerged("predict_mixed")?;
        let named: Vec<&str> = adapters.iter().flatten().copied().collect();
        self.known(&named)?;

        let outputs = self.layers.last().map_or(0, |(_, layer)| layer.base().weight().tensor.rows());
        let (inputs, mut logits) = (x.to_vec(backend)?, vec![B::Elem::from_f32(0.0); x.rows() * outputs]);
        let mut left: Vec<usize> = (0..x.rows()).collect();
        while let Some(&first) = left.first() {
            let rows: Vec<usize>;
            (rows, left) = left.into_iter().partition(|&row| adapters[row] == adapters[first]);
            let batch: Vec<B::Elem> = rows.iter().flat_map(|&row| inputs[row * x.cols()..][..x.cols()].iter().copied()).collect();
            let batch = Tensor::from_slice(backend, (rows.len(), x.cols()), &batch)?;
            let made = self.predict_as(backend, batch, adapters[first])?;
            for (row, made) in rows.into_iter().zip(made.chunks_exact(outputs.max(1))) {
                logits[row * outputs..][..outputs].copy_from_slice(made);
            }
        }
        Ok(logits)
    }

    fn predict_as(&self, backend: &B, x: Tensor<B>, adapter: Option<&str>) -> Result<Vec<B::Elem>> {
        let mut tape = Tape::new(backend);
        let x = tape.input(x);
        let logits =
            self.forward_with(&mut tape, x, None, |lora, tape, x, seed| lora.forward_as(tape, x, seed, adapter.as_slice()))?;
        tape.value(logits)?.to_vec(backend)
    }
}
