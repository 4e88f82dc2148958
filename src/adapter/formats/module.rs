//! The update of one module, independent of the names and the layout of a format.

use std::path::Path;

use crate::adapter::files::{bad_file, bad_tensors};
use crate::adapter::tensors::dimensions;
use crate::adapter::{HostMatrix, HostTensor};
use crate::error::Result;

/// The update of one module.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Module {
    /// r×k; r×channels×… for a convolution.
    pub(super) a: HostTensor,
    /// n×r; n×r×1×… for a convolution.
    pub(super) b: HostTensor,
    /// n
    pub(super) magnitude: Option<HostTensor>,
    /// The scaling times the rank.
    pub(super) alpha: f64,
}

impl Module {
    pub(super) fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }

    pub(super) fn scaling(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    pub(super) fn tensors(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.magnitude)
    }
}

impl Module {
    /// Pads A with rows and B with columns of zeros to this rank; `B·A` does not change.
    pub(super) fn pad(&mut self, rank: usize) {
        let (Some(&r), Some(&n)) = (self.a.shape.first(), self.b.shape.first()) else { return };
        if r == rank {
            return;
        }
        let k = self.a.values.len() / r.max(1);
        self.a.values.resize(rank * k, 0.0);
        self.a.shape[0] = rank;
        let row = |i: usize| self.b.values[i * r..][..r].iter().copied().chain(std::iter::repeat_n(0.0, rank - r));
        self.b.values = (0..n).flat_map(row).collect();
        self.b.shape[1] = rank;
        self.alpha *= rank as f64 / r as f64;
    }

    /// Reorders the rows of B and the magnitudes: in each head, the two halves become interleaved, or are separated again.
    pub(super) fn reorder(&mut self, path: &Path, name: &str, heads: usize, interleave: bool) -> Result<()> {
        let n = self.b.shape.first().copied().unwrap_or(0);
        if heads == 0 || !n.is_multiple_of(2 * heads) {
            return Err(bad_file(path, format!("`{name}` has {n} rows, want a multiple of 2·{heads} for {heads} heads")));
        }
        let size = n / heads;
        let source = |row: usize| {
            let (head, at) = (row / size, row % size);
            let inside = if interleave { at % 2 * (size / 2) + at / 2 } else { at % (size / 2) * 2 + at / (size / 2) };
            head * size + inside
        };
        for tensor in [&mut self.b].into_iter().chain(&mut self.magnitude) {
            let width = tensor.values.len() / n;
            tensor.values = (0..n).flat_map(|row| tensor.values[source(row) * width..][..width].to_vec()).collect();
        }
        Ok(())
    }
}

/// A transposed matrix. Errors: [`Error::File`](crate::Error::File) for another number of dimensions.
pub(super) fn transposed(tensor: &HostTensor) -> Result<HostTensor> {
    let &[rows, cols] = &tensor.shape[..] else {
        return Err(bad_tensors(format!("a tensor is {}, want a matrix", dimensions(&tensor.shape))));
    };
    let matrix = HostMatrix::new((rows, cols), tensor.values.clone())?.transposed();
    Ok(HostTensor { shape: vec![cols, rows], dtype: tensor.dtype, values: matrix.values().to_vec() })
}
