//! `loss = mean(-log softmax(logits)[label])` over the rows, with its derivative in the same pass.

use super::{Checked, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};

/// One class a row. Exists only with every label below `classes`.
#[derive(Debug)]
pub struct Labels<B: Backend> {
    classes: usize,
    tensor: Tensor<B, u32>,
}

impl<B: Backend> Labels<B> {
    /// Puts the labels on the device. Errors: [`Error::Value`] if one is not below `classes`.
    pub fn new(backend: &B, classes: usize, labels: &[u32]) -> Result<Self> {
        if let Some((row, wrong)) = labels.iter().enumerate().find(|&(_, &label)| label as usize >= classes) {
            let got = format!("{wrong} in row {row} of {classes} classes");
            return Err(Error::Value { verb: "cross_entropy", name: "labels", got, want: "below the number of classes".into() });
        }
        Ok(Self { classes, tensor: Tensor::from_slice(backend, (labels.len(), 1), labels)? })
    }

    /// Every label is below this.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// `m×1`
    pub fn tensor(&self) -> &Tensor<B, u32> {
        &self.tensor
    }
}

/// `loss = mean(-log softmax(logits)[label])` over the rows, `dlogits = (softmax(logits) - onehot(label)) / m`
///
/// The largest logit of a row is subtracted first, so that no exponential overflows. The mean over no rows is 0.
pub struct CrossEntropy<'t, B: Backend> {
    /// `m×n`: a row of scores an example
    pub logits: &'t Tensor<B>,
    /// `m` labels, below `n`
    pub labels: &'t Labels<B>,
    /// `1×1`, overwritten
    pub loss: &'t mut Tensor<B, f32>,
    /// `m×n`, overwritten
    pub dlogits: &'t mut Tensor<B>,
}

impl<B: Backend> CrossEntropy<'_, B> {
    const VERB: &'static str = "cross_entropy";

    /// Compares the shapes; the logits must have a column for every class.
    pub fn check(self) -> Result<Checked<Self>> {
        let Shape { rows: m, cols: n } = self.logits.shape();
        fits(Self::VERB, "labels", (m, 1), self.labels.tensor.shape())?;
        Error::unless(
            self.labels.classes <= n,
            Self::VERB,
            "labels",
            self.labels.classes,
            "at most a class a column of `logits`",
        )?;
        fits(Self::VERB, "loss", (1, 1), self.loss.shape())?;
        fits(Self::VERB, "dlogits", (m, n), self.dlogits.shape())?;
        Ok(Checked(self))
    }

    /// Checks the shapes and computes.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.cross_entropy(self.check()?)
    }
}
