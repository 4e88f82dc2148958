//! Matrices in host memory, for adapters on disk; independent of backends.

use crate::error::{Error, Result};
use crate::tensor::Shape;

/// A row-major matrix of `f32` in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMatrix {
    shape: Shape,
    values: Vec<f32>,
}

impl HostMatrix {
    /// A matrix of these elements, in row-major order. Errors: [`Error::Value`] unless there are `rows · cols` of them.
    pub fn new(shape: impl Into<Shape>, values: Vec<f32>) -> Result<Self> {
        let shape = shape.into();
        Error::unless(values.len() == shape.elements()?, "matrix", "values", values.len(), "rows · cols elements")?;
        Ok(Self { shape, values })
    }

    /// Rows × columns.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// The elements, in row-major order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The transposed matrix.
    pub fn transposed(&self) -> Self {
        let (rows, cols) = (self.rows(), self.cols());
        let values = (0..cols).flat_map(|j| (0..rows).map(move |i| (i, j))).map(|(i, j)| self.values[i * cols + j]);
        Self { shape: (cols, rows).into(), values: values.collect() }
    }

    /// The matrix of the elements `at(i, j)` in row i and column j, rounded to `f32`.
    pub(super) fn from_fn(rows: usize, cols: usize, at: impl Fn(usize, usize) -> f64) -> Self {
        let at = &at;
        let values = (0..rows).flat_map(|i| (0..cols).map(move |j| at(i, j) as f32));
        Self { shape: (rows, cols).into(), values: values.collect() }
    }

    /// True if no element is infinite or NaN.
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|value| value.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_gives_the_matrix_and_a_wrong_length_is_refused() {
        let matrix = HostMatrix::new((2, 3), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        assert_eq!(matrix.transposed().values(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(matrix.transposed().transposed(), matrix);
        assert!(matches!(HostMatrix::new((2, 3), vec![0.0; 5]), Err(Error::Value { .. })));
        assert!(HostMatrix::new((0, 3), vec![]).unwrap().transposed().is_finite());
    }
}
