//! The products of `faer`.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::composed::{Product, View};

pub struct Faer;

impl Product<f32> for Faer {
    const NAME: &'static str = "faer";
    fn product(&self, out: &mut [f32], add: bool, alpha: f32, lhs: View<'_, f32>, rhs: View<'_, f32>, threads: usize) {
        let out = MatMut::from_row_major_slice_mut(out, lhs.rows, rhs.cols);
        let accum = if add { Accum::Add } else { Accum::Replace };
        let par = if threads > 1 { Par::rayon(threads) } else { Par::Seq };
        matmul(out, accum, matrix(lhs), matrix(rhs), alpha, par);
    }
}

fn matrix(view: View<'_, f32>) -> MatRef<'_, f32> {
    if view.col_stride == 1 && view.row_stride == view.cols {
        MatRef::from_row_major_slice(view.data, view.rows, view.cols)
    } else {
        assert_eq!((view.row_stride, view.col_stride), (1, view.rows));
        MatRef::from_column_major_slice(view.data, view.rows, view.cols)
    }
}
