//! The products of `rten-gemm`. It shares its work among the threads of the pool that calls it.

use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::Matrix;

use super::composed::{Product, View};

#[derive(Default)]
pub struct Rten(GemmExecutor<f32, f32, f32>);

impl Product<f32> for Rten {
    const NAME: &'static str = "rten-gemm";
    fn product(&self, out: &mut [f32], add: bool, alpha: f32, lhs: View<'_, f32>, rhs: View<'_, f32>, _: usize) {
        let (lhs, rhs) = (GemmInputA::Unpacked(matrix(lhs)), GemmInputB::Unpacked(matrix(rhs)));
        let options = GemmOptions { alpha, beta: if add { 1.0 } else { 0.0 }, ..Default::default() };
        self.0.gemm(out, lhs, rhs, options).expect("the shapes fit");
    }
}

fn matrix(view: View<'_, f32>) -> Matrix<'_, f32> {
    Matrix::from_slice_with_strides([view.rows, view.cols], view.data, [view.row_stride, view.col_stride]).expect("strides fit")
}
