//! The products of `gemm`, with its AVX-512 kernels.

use super::composed::{Product, View};
use lowrank::{Float, f16};

pub struct Gemm;

impl Product<f32> for Gemm {
    const NAME: &'static str = "gemm";
    fn product(&self, out: &mut [f32], add: bool, alpha: f32, lhs: View<'_, f32>, rhs: View<'_, f32>, threads: usize) {
        product(out, add, [1.0, alpha], lhs, rhs, threads);
    }
}

impl Product<f16> for Gemm {
    const NAME: &'static str = "gemm";
    /// It sums in `f32`, and rounds after each block of the depth.
    fn roundings(depth: usize) -> usize {
        depth.div_ceil(256)
    }
    fn product(&self, out: &mut [f16], add: bool, alpha: f32, lhs: View<'_, f16>, rhs: View<'_, f16>, threads: usize) {
        product(out, add, [f16::ONE, <f16 as Float>::from_f32(alpha)], lhs, rhs, threads);
    }
}

/// `out = factors[1]·lhs·rhs`, plus `factors[0]·out` if `add`
fn product<E: Copy + 'static>(out: &mut [E], add: bool, factors: [E; 2], lhs: View<'_, E>, rhs: View<'_, E>, threads: usize) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!((out.len(), k), (m * n, rhs.rows));
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    let [keep, alpha] = factors;
    // SAFETY: a view's strides stay within its data (they are those of a dense matrix), `out` has m·n elements, and it is borrowed
    // alone.
    #[allow(unsafe_code, reason = "the library takes pointers")]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            keep,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
