//! Small requests run on the calling thread.
//!
//! Handing a verb to a thread pool and waiting for it takes 10 to 20 µs, as long as a product of 10×1000 by 1000×20.

use super::Cpu;
use crate::element::Float;
use crate::op::{
    Accumulate, Adam, Add, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge,
    LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward, Rounding, WeightGrad,
};
use crate::tensor::Shape;

/// Elements that one thread processes in about 10 µs; 128 KiB of `f32`.
pub(super) const SMALL_MATRIX: usize = 1 << 15;
/// Multiply-adds that one thread computes in about 10 µs.
const MULTIPLY_ADDS: usize = 16 * SMALL_MATRIX;

/// True if a product `m×k` by `k×n` is small work.
pub(super) fn is_small_product(m: usize, n: usize, k: usize) -> bool {
    let most = m.max(n).max(k).max(m.saturating_mul(n)).max(n.saturating_mul(k)).max(k.saturating_mul(m));
    most <= SMALL_MATRIX && m * n * k <= MULTIPLY_ADDS
}

/// A request, with its size.
pub(super) trait Request: Send {
    /// True if no loop of the verb is worth a second thread.
    fn is_small(&self) -> bool {
        false
    }
}

/// True if the products of a layer with `x`, and those of its update, are small work.
fn is_small_layer(x: Shape, outputs: usize, rank: usize) -> bool {
    let Shape { rows: m, cols: k } = x;
    is_small_product(m, outputs, k) && is_small_product(m, rank, k) && is_small_product(m, outputs, rank)
}

impl<E: Float> Request for LinearForward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        is_small_layer(self.x.shape(), self.w.rows(), 0)
    }
}

impl<E: Float> Request for LinearBackward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        let inputs = self.w.map(|w| w.cols()).or(self.x.map(|x| x.cols())).unwrap_or(1);
        is_small_layer((self.dy.rows(), inputs).into(), self.dy.cols(), 0)
    }
}

impl<E: Float> Request for LoraForward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        self.dropout.is_none() && is_small_layer(self.x.shape(), self.b.rows(), self.b.cols())
    }
}

impl<E: Float> Request for LoraBackward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        self.dropout.is_none() && is_small_layer(self.x.shape(), self.b.rows(), self.b.cols())
    }
}

impl<E: Float> Request for LoraMerge<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        self.rounding == Rounding::Nearest && is_small_product(self.b.rows(), self.a.cols(), self.b.cols())
    }
}

impl<E: Float> Request for LoraRowNorm<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        is_small_product(self.b.rows(), self.a.cols(), self.b.cols())
    }
}

impl<E: Float> Request for Adam<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        match self.grad {
            WeightGrad::Dense(g) => g.buffer().len() <= SMALL_MATRIX,
            WeightGrad::Factored { dy, x } => is_small_product(dy.cols(), x.cols(), x.rows()),
        }
    }
}

/// Requests that pass over a tensor once.
macro_rules! one_pass {
    ($($request:ident over $tensor:ident),*) => {$(
        impl<E: Float> Request for $request<'_, Cpu<E>> {
            fn is_small(&self) -> bool {
                self.$tensor.rows() * self.$tensor.cols() <= SMALL_MATRIX
            }
        }
    )*};
}

one_pass!(Relu over x, ReluBackward over y, Add over x, Accumulate over x, Magnitude over z, MagnitudeBackward over z);

/// Always runs on one thread.
impl<E: Float> Request for CrossEntropy<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        true
    }
}

impl<E: Float> Request for DropoutForward<'_, Cpu<E>> {}
