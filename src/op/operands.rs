//! The operands of a layer: its weight, the factors of an update, and the output of a product.

use crate::backend::Backend;
use crate::element::Element;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};
use crate::{DType, Float, Passes};

/// The frozen weight of a layer, `n×k`: dense, with [packed](Packed) panels beside it or without.
///
/// Converts from `&Tensor`, [`MatRef`] and `&Packed`.
pub struct Weight<'t, B: Backend> {
    dense: MatRef<'t, B>,
    panels: Option<&'t B::Panels>,
}

impl<B: Backend> Clone for Weight<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Weight<'_, B> {}

impl<'t, B: Backend> Weight<'t, B> {
    /// `n×k`: outputs × inputs.
    pub fn shape(&self) -> Shape {
        self.dense.shape()
    }

    /// `n`, the outputs of the layer.
    pub fn rows(&self) -> usize {
        self.dense.rows()
    }

    /// `k`, the inputs of the layer.
    pub fn cols(&self) -> usize {
        self.dense.cols()
    }

    /// The dense matrix.
    pub(crate) fn dense(&self) -> MatRef<'t, B> {
        self.dense
    }

    /// The panels, if the weight is packed.
    pub(crate) fn panels(&self) -> Option<&'t B::Panels> {
        self.panels
    }
}

impl<'t, B: Backend> From<MatRef<'t, B>> for Weight<'t, B> {
    fn from(dense: MatRef<'t, B>) -> Self {
        Self { dense, panels: None }
    }
}

impl<'t, B: Backend> From<&'t Tensor<B>> for Weight<'t, B> {
    /// Takes the panels along if [`Backend::keep_packed`] was called for this tensor.
    fn from(tensor: &'t Tensor<B>) -> Self {
        Self { dense: tensor.view(), panels: B::panels(tensor.buffer()) }
    }
}

impl<'t, B: Backend> From<&'t Packed<'_, B>> for Weight<'t, B> {
    fn from(packed: &'t Packed<'_, B>) -> Self {
        Self { dense: packed.dense, panels: Some(&packed.panels) }
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
}

impl<B: Backend> Clone for Factor<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Factor<'_, B> {}

impl<B: Backend> Factor<'_, B> {
    /// Rows × columns.
    pub fn shape(&self) -> Shape {
        match self {
            Factor::Elem(matrix) => matrix.shape(),
            Factor::F32(matrix) => matrix.shape(),
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

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Factor::Elem(_) => B::Elem::DTYPE,
            Factor::F32(_) => DType::F32,
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
