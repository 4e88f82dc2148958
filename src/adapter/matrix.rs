//! Matrices in host memory: what adapters on disk are made of, whatever the backend.

use crate::error::{Error, Result};
use crate::tensor::Shape;

/// A row-major matrix of `f32` in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMatrix {
    shape: Shape,
    values: Vec<f32>,
}

impl HostMatrix {
    /// Takes the elements, row by row. Errors: [`Error::Value`] if their number is not `rows · cols`.
    pub fn new(shape: impl Into<Shape>, values: Vec<f32>) -> Result<Self> {
        let shape = shape.into();
        Error::unless(values.len() == shape.elements()?, "matrix", "values", values.len(), "rows · cols elements")?;
        Ok(Self { shape, values })
    }

    /// Rows × columns.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// How many columns.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// The elements, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Rows as columns.
    pub fn transposed(&self) -> Self {
        let (rows, cols) = (self.rows(), self.cols());
        let values = (0..cols).flat_map(|j| (0..rows).map(move |i| (i, j))).map(|(i, j)| self.values[i * cols + j]);
        Self { shape: (cols, rows).into(), values: values.collect() }
    }

    /// The number `at(i, j)` in row i and column j, rounded to `f32`.
    pub(super) fn from_fn(rows: usize, cols: usize, at: impl Fn(usize, usize) -> f64) -> Self {
        let at = &at;
        let values = (0..rows).flat_map(|i| (0..cols).map(move |j| at(i, j) as f32));
        Self { shape: (rows, cols).into(), values: values.collect() }
    }

    /// Whether no element is infinite or NaN.
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|value| value.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_twice_is_the_matrix_and_a_wrong_length_is_refused() {
        let matrix = HostMatrix::new((2, 3), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        assert_eq!(matrix.transposed().values(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(matrix.transposed().transposed(), matrix);
        assert!(matches!(HostMatrix::new((2, 3), vec![0.0; 5]), Err(Error::Value { .. })));
        assert!(HostMatrix::new((0, 3), vec![]).unwrap().transposed().is_finite());
    }
}
