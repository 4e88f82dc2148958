//! The products of `matrixmultiply`. Its own threads are counted once a process, so the work is cut here: columns of the output,
//! a stretch a thread.

use super::composed::{Product, View};

pub struct MatrixMultiply;

impl Product<f32> for MatrixMultiply {
    const NAME: &'static str = "matrixmultiply";
    fn product(&self, out: &mut [f32], add: bool, alpha: f32, lhs: View<'_, f32>, rhs: View<'_, f32>, threads: usize) {
        let (m, n) = (lhs.rows, rhs.cols);
        assert_eq!((out.len(), lhs.cols), (m * n, rhs.rows));
        if m >= n {
            // Rows of the output are stretches of memory.
            let each = m.div_ceil(threads).max(1);
            rayon::scope(|scope| {
                for (i, out) in out.chunks_mut(each * n).enumerate() {
                    let rows = lhs.t().columns(i * each, out.len() / n).t();
                    scope.spawn(move |_| sgemm(Out { start: out.as_mut_ptr(), row_stride: n }, add, alpha, rows, rhs));
                }
            });
        } else {
            let each = n.div_ceil(threads);
            let start = Out { start: out.as_mut_ptr(), row_stride: n };
            let stretches: Vec<_> =
                (0..n).step_by(each).map(|first| (start.columns_from(first), first, each.min(n - first))).collect();
            rayon::scope(|scope| {
                for (out, first, count) in stretches {
                    scope.spawn(move |_| sgemm(out, add, alpha, lhs, rhs.columns(first, count)));
                }
            });
        }
    }
}

/// A part of the output, of its own for each thread.
#[derive(Clone, Copy)]
struct Out {
    start: *mut f32,
    row_stride: usize,
}

// SAFETY: the memory outlives the scope of the threads, and no two of them get the same elements.
#[allow(unsafe_code, reason = "the library takes pointers")]
unsafe impl Send for Out {}

impl Out {
    fn columns_from(self, first: usize) -> Self {
        Self { start: self.start.wrapping_add(first), ..self }
    }
}

/// `out = alpha·lhs·rhs`, or `out += …`
fn sgemm(out: Out, add: bool, alpha: f32, lhs: View<'_, f32>, rhs: View<'_, f32>) {
    let (m, k, n, beta) = (lhs.rows, lhs.cols, rhs.cols, if add { 1.0 } else { 0.0 });
    let [lhs_rows, lhs_cols, rhs_rows, rhs_cols, out_rows] =
        [lhs.row_stride, lhs.col_stride, rhs.row_stride, rhs.col_stride, out.row_stride].map(|stride| stride as isize);
    let (a, b) = (lhs.data.as_ptr(), rhs.data.as_ptr());
    // SAFETY: a view's strides stay within its data, and `out` is this thread's alone: m rows of n elements, a row stride apart.
    #[allow(unsafe_code, reason = "the library takes pointers")]
    unsafe {
        matrixmultiply::sgemm(m, k, n, alpha, a, lhs_rows, lhs_cols, b, rhs_rows, rhs_cols, beta, out.start, out_rows, 1);
    }
}
