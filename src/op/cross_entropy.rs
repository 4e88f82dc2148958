//! `loss = mean(-log softmax(logits)[label])` over the rows, and its derivative in the same pass.

use super::{Checked, contiguous, fits};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};

/// The class of each row, or none. Every label is below `classes`: the constructors check it.
#[derive(Debug)]
pub struct Labels<B: Backend> {
    classes: usize,
    /// Number of rows with a label.
    counted: usize,
    tensor: Tensor<B, u32>,
}

/// The stored number of a row without a label (`ignore_index` in PyTorch).
pub(crate) const IGNORED: u32 = u32::MAX;

impl<B: Backend> Labels<B> {
    /// Copies the labels to the device. Errors: [`Error::Value`] if one is not below `classes`.
    pub fn new(backend: &B, classes: usize, labels: &[u32]) -> Result<Self> {
        if let Some((row, &wrong)) = labels.iter().enumerate().find(|&(_, &label)| label as usize >= classes) {
            return Err(too_large(classes, row, wrong));
        }
        Self::checked(backend, classes, labels.len(), labels)
    }

    /// Copies the labels to the device. Rows with `None` are ignored: their loss and gradient are 0, and the mean is over the
    /// other rows. Use it for padding and prompts of a language model.
    ///
    /// Errors: [`Error::Value`] if a label is not below `classes`.
    pub fn with_ignored(backend: &B, classes: usize, labels: &[Option<u32>]) -> Result<Self> {
        if let Some((row, &Some(wrong))) =
            labels.iter().enumerate().find(|(_, label)| label.is_some_and(|l| l as usize >= classes))
        {
            return Err(too_large(classes, row, wrong));
        }
        let stored: Vec<u32> = labels.iter().map(|label| label.unwrap_or(IGNORED)).collect();
        Self::checked(backend, classes, labels.iter().flatten().count(), &stored)
    }

    fn checked(backend: &B, classes: usize, counted: usize, labels: &[u32]) -> Result<Self> {
        Ok(Self { classes, counted, tensor: Tensor::from_slice(backend, (labels.len(), 1), labels)? })
    }

    /// Number of rows with a label.
    pub fn counted(&self) -> usize {
        self.counted
    }

    /// Number of classes: every label is below it.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The stored labels, `m×1`; `u32::MAX` for a row without one
    pub fn tensor(&self) -> &Tensor<B, u32> {
        &self.tensor
    }
}

fn too_large(classes: usize, row: usize, label: u32) -> Error {
    let got = format!("{label} in row {row} of {classes} classes");
    Error::Value { verb: "cross_entropy", name: "labels", got, want: "below the number of classes".into() }
}

/// `loss = mean(-log softmax(logits)[label])`, `dlogits = (softmax(logits) - onehot(label)) / c`, over the `c` rows that have a
/// label
///
/// The gradient of a row without a label is 0, and the loss is 0 if no row has one. The largest logit of each row is subtracted
/// first, so no exponential overflows.
pub struct CrossEntropy<'t, B: Backend> {
    /// `m×n`: the scores of the classes, a row for each example
    pub logits: MatRef<'t, B>,
    /// `m` labels, each below `n` or none
    pub labels: &'t Labels<B>,
    /// `1×1`, overwritten
    pub loss: MatMut<'t, B, f32>,
    /// `m×n`, overwritten
    pub dlogits: MatMut<'t, B>,
}

impl<B: Backend> CrossEntropy<'_, B> {
    const VERB: &'static str = "cross_entropy";

    /// Checks the request. Errors: [`Error::Shape`] naming the operand that does not fit; [`Error::Value`] if there are more
    /// classes than columns of `logits`, or `logits` or `dlogits` is not contiguous.
    pub fn check(self) -> Result<Checked<Self>> {
        let Shape { rows: m, cols: n } = self.logits.shape();
        fits(Self::VERB, "labels", (m, 1), self.labels.tensor.shape())?;
        Error::unless(
            self.labels.classes <= n,
            Self::VERB,
            "labels",
            self.labels.classes,
            "at most the number of columns of `logits`",
        )?;
        fits(Self::VERB, "loss", (1, 1), self.loss.shape())?;
        fits(Self::VERB, "dlogits", (m, n), self.dlogits.shape())?;
        contiguous(Self::VERB, "logits", self.logits.is_contiguous())?;
        contiguous(Self::VERB, "dlogits", self.dlogits.is_contiguous())?;
        Ok(Checked(self))
    }

    /// [`check`](Self::check)s the request and computes it. Errors: those of `check` and of the device.
    pub fn run(self, backend: &B) -> Result<()> {
        backend.cross_entropy(self.check()?)
    }
}
