//! Work so little that one thread has done it before another is awake: it stays on the thread that asks.
//!
//! Handing a verb to a pool and waiting for it takes 10 to 20 µs, as long as a product of 10×1000→20.

use super::Cpu;
use crate::element::Float;
use crate::op::{
    Accumulate, Adam, Add, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge,
    LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward, Rounding, WeightGrad,
};
use crate::tensor::Shape;

/// Elements that one thread passes over in 10 µs; 128 KiB of `f32`.
pub(super) const SMALL_MATRIX: usize = 1 << 15;
/// Multiply-adds that one thread makes in as long.
const MULTIPLY_ADDS: usize = 16 * SMALL_MATRIX;

/// Whether a product `m×k` by `k×n` is little work.
pub(super) fn is_small_product(m: usize, n: usize, k: usize) -> bool {
    let most = m.max(n).max(k).max(m.saturating_mul(n)).max(n.saturating_mul(k)).max(k.saturating_mul(m));
    most <= SMALL_MATRIX && m * n * k <= MULTIPLY_ADDS
}

/// What a verb is asked for.
pub(super) trait Request: Send {
    /// Whether it is little work, in none of its loops enough for two.
    fn is_small(&self) -> bool {
        false
    }
}

/// The products of a layer, and those of its adapter.
fn layer(x: Shape, outputs: usize, rank: usize) -> bool {
    let Shape { rows: m, cols: k } = x;
    is_small_product(m, outputs, k) && is_small_product(m, rank, k) && is_small_product(m, outputs, rank)
}

impl<E: Float> Request for LinearForward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        layer(self.x.shape(), self.w.rows(), 0)
    }
}

impl<E: Float> Request for LinearBackward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        let inputs = self.w.map(|w| w.cols()).or(self.x.map(|x| x.cols())).unwrap_or(1);
        layer((self.dy.rows(), inputs).into(), self.dy.cols(), 0)
    }
}

impl<E: Float> Request for LoraForward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        self.dropout.is_none() && layer(self.x.shape(), self.b.rows(), self.b.cols())
    }
}

impl<E: Float> Request for LoraBackward<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        self.dropout.is_none() && layer(self.x.shape(), self.b.rows(), self.b.cols())
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

/// One pass over a tensor.
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

/// Its loop is one thread's in any case.
impl<E: Float> Request for CrossEntropy<'_, Cpu<E>> {
    fn is_small(&self) -> bool {
        true
    }
}

impl<E: Float> Request for DropoutForward<'_, Cpu<E>> {}
