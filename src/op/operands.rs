//! The operands of a layer: its weight, the factors of an update, and the output of a product.

use super::PerRow;
use crate::backend::Backend;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::quant::Quantised;
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};
use crate::{DType, Float, Passes};

/// The frozen weight of a layer, `n×k`: dense, with [packed](Packed) panels beside it or without, or [quantised](Quantised).
///
/// Converts from `&Tensor`, [`MatRef`], `&Packed` and `&Quantised`.
pub struct Weight<'t, B: Backend>(pub(crate) WeightForm<'t, B>);

/// The forms of a weight.
pub(crate) enum WeightForm<'t, B: Backend> {
    /// Numbers as they are stored, and panels where the weight is packed as well.
    Dense(MatRef<'t, B>, Option<&'t B::Panels>),
    Quantised(&'t Quantised<B>),
}

impl<B: Backend> Clone for WeightForm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for WeightForm<'_, B> {}

impl<B: Backend> Clone for Weight<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Weight<'_, B> {}

impl<'t, B: Backend> Weight<'t, B> {
    /// `n×k`: outputs × inputs.
    pub fn shape(&self) -> Shape {
        match self.0 {
            WeightForm::Dense(dense, _) => dense.shape(),
            WeightForm::Quantised(quantised) => quantised.shape(),
        }
    }

    /// `n`, the outputs of the layer.
    pub fn rows(&self) -> usize {
        self.shape().rows
    }

    /// `k`, the inputs of the layer.
    pub fn cols(&self) -> usize {
        self.shape().cols
    }

    /// The numbers as they are stored, for a backend that takes no other form.
    ///
    /// Errors: [`Error::Value`] for a quantised weight.
    #[cfg(any(feature = "webgpu", feature = "cuda"))]
    pub(crate) fn dense(&self, verb: &'static str) -> Result<MatRef<'t, B>> {
        match self.0 {
            WeightForm::Dense(dense, _) => Ok(dense),
            WeightForm::Quantised(quantised) => Err(crate::Error::Value {
                verb,
                name: "w",
                got: format!("quantised as {}", quantised.kind()),
                want: "a dense weight on this backend: `Quantised::dequantise` makes one".into(),
            }),
        }
    }
}

impl<'t, B: Backend> From<MatRef<'t, B>> for Weight<'t, B> {
    fn from(dense: MatRef<'t, B>) -> Self {
        Self(WeightForm::Dense(dense, None))
    }
}

impl<'t, B: Backend> From<&'t Tensor<B>> for Weight<'t, B> {
    /// Takes the panels along if [`Backend::keep_packed`] was called for this tensor.
    fn from(tensor: &'t Tensor<B>) -> Self {
        Self(WeightForm::Dense(tensor.view(), B::panels(tensor.buffer())))
    }
}

impl<'t, B: Backend> From<&'t Packed<'_, B>> for Weight<'t, B> {
    fn from(packed: &'t Packed<'_, B>) -> Self {
        Self(WeightForm::Dense(packed.dense, Some(&packed.panels)))
    }
}

impl<'t, B: Backend> From<&'t Quantised<B>> for Weight<'t, B> {
    fn from(quantised: &'t Quantised<B>) -> Self {
        Self(WeightForm::Quantised(quantised))
    }
}

/// A prepacked weight: the frozen weight, in memory that the caller lends, and its panels, which are a copy in the order in which
/// products read it.
///
/// The weight is borrowed, so it cannot change while the panels exist. For a weight in a [`Tensor`], use
/// [`Backend::keep_packed`]. Results have the same bits with panels and without.
pub struct Packed<'w, B: Backend> {
    dense: MatRef<'w, B>,
    panels: B::Panels,
}

impl<'w, B: Backend> Packed<'w, B> {
    /// Packs a weight for these passes. Each pass takes as many bytes as `w`. On backends that do not pack (WebGPU, CUDA),
    /// nothing is copied.
    ///
    /// Errors: [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn new(backend: &B, w: MatRef<'w, B>, passes: Passes) -> Result<Self> {
        Ok(Self { dense: w, panels: backend.pack(w, passes)? })
    }
}

/// A factor of a low-rank update, `A r×k` or `B n×r`: of the element type of the weights, or `f32` beside 16-bit weights, as
/// PEFT trains it.
///
/// Converts from `&Tensor` and [`MatRef`] of the backend's element type.
pub enum Factor<'t, B: Backend> {
    /// Of the backend's element type.
    Elem(MatRef<'t, B>),
    /// `f32`, whatever the element type of the backend.
    F32(MatRef<'t, B, f32>),
    /// Another one for each row of the batch; see [`Bank`](super::Bank).
    PerRow(PerRow<'t, B>),
}

impl<B: Backend> Clone for Factor<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Factor<'_, B> {}

impl<B: Backend> Factor<'_, B> {
    /// Rows × columns; of one for each row, those of one adapter with the rank of the bank.
    pub fn shape(&self) -> Shape {
        match self {
            Factor::Elem(matrix) => matrix.shape(),
            Factor::F32(matrix) => matrix.shape(),
            Factor::PerRow(factor) => factor.shape(),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.shape().rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.shape().cols
    }

    /// For backends that take the factors of one adapter alone. Errors: [`Error::Value`] for one that differs from row to row.
    #[allow(dead_code, reason = "of backends that are features")]
    pub(crate) fn refuse_per_row(&self, verb: &'static str, want: &'static str) -> Result<()> {
        Error::unless(!matches!(self, Factor::PerRow(_)), verb, "a", "one for each row", want)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Factor::Elem(_) => B::Elem::DTYPE,
            Factor::F32(_) => DType::F32,
            Factor::PerRow(factor) => factor.bank().dtype(),
        }
    }
}

impl<'t, B: Backend> From<MatRef<'t, B>> for Factor<'t, B> {
    fn from(matrix: MatRef<'t, B>) -> Self {
        Factor::Elem(matrix)
    }
}

impl<'t, B: Backend> From<&'t Tensor<B>> for Factor<'t, B> {
    fn from(tensor: &'t Tensor<B>) -> Self {
        Factor::Elem(tensor.view())
    }
}

/// The output of a product: overwritten, or added to (`beta = 1` in BLAS).
///
/// `&mut Tensor` and [`MatMut`] convert to [`Output::Overwrite`].
pub enum Output<'t, B: Backend, T: Element = <B as Backend>::Elem> {
    /// The matrix is overwritten with the result; its old elements are not read.
    Overwrite(MatMut<'t, B, T>),
    /// The result is added to the elements of the matrix: summed in `f32`, rounded once.
    AddTo(MatMut<'t, B, T>),
}

impl<'t, B: Backend, T: Element> Output<'t, B, T> {
    /// Rows × columns.
    pub fn shape(&self) -> Shape {
        match self {
            Output::Overwrite(matrix) | Output::AddTo(matrix) => matrix.shape(),
        }
    }

    /// The matrix, and `true` if the result is added to it.
    pub(crate) fn into_parts(self) -> (MatMut<'t, B, T>, bool) {
        match self {
            Output::Overwrite(matrix) => (matrix, false),
            Output::AddTo(matrix) => (matrix, true),
        }
    }
}

impl<'t, B: Backend, T: Element> From<MatMut<'t, B, T>> for Output<'t, B, T> {
    fn from(matrix: MatMut<'t, B, T>) -> Self {
        Output::Overwrite(matrix)
    }
}

impl<'t, B: Backend, T: Element> From<&'t mut Tensor<B, T>> for Output<'t, B, T> {
    fn from(tensor: &'t mut Tensor<B, T>) -> Self {
        Output::Overwrite(tensor.view_mut())
    }
}

impl<'t, B: Backend, T: Element> From<&'t Tensor<B, T>> for MatRef<'t, B, T> {
    fn from(tensor: &'t Tensor<B, T>) -> Self {
        tensor.view()
    }
}

impl<'t, B: Backend, T: Element> From<&'t mut Tensor<B, T>> for MatMut<'t, B, T> {
    fn from(tensor: &'t mut Tensor<B, T>) -> Self {
        tensor.view_mut()
    }
}
