//! What multiplies two panels, and how the numbers lie in them. The blocked nest is written once against this.

use super::super::simd::{LANES, Lanes, Simd, Unit};
use super::Matrix;
use super::pack::{Part, Side};
use super::plan::KC;
use super::tile;
use crate::element::{Element, Float};

/// A micro-kernel: a tile of the output from a panel of rows and a panel of columns.
pub(super) trait Micro: Copy + Send + Sync {
    /// What panels hold.
    type Number: Element;
    /// What a thread holds while it makes tiles.
    type Ready;
    /// Steps of the depth that lie together in a panel. Each term is as deep as a multiple of it; the rest is zeros.
    const STEP: usize;
    /// Whether panels hold `f32`, and so any factor.
    const WIDE: bool;
    /// KC, the most depth of a block: the sums of a tile are added to the output once for each.
    const DEPTH: usize;

    /// Rows and columns of the tile, for an output with so many columns.
    fn shape(self, unit: Unit, cols: usize) -> (usize, usize);

    /// What one term gives to neighbouring panels; see [`Part`].
    fn pack<S: Simd, T: Float>(self, s: S, side: Side, part: Part<'_, Self::Number>, lines: Matrix<'_, T>, scale: f32);

    /// Makes this thread ready for [`tile`](Self::tile).
    fn begin(self) -> Self::Ready;

    /// `out[i][j] = Σ_p left[p][i]·right[p][j]`, `NV` vectors wide. The right panel comes in two pieces, one after the other.
    fn tile<S: Simd, const NV: usize>(
        ready: &Self::Ready,
        s: S,
        left: &[Self::Number],
        right: [&[Self::Number]; 2],
        out: &mut [Lanes<f32>],
    );
}

/// The unit's multiply-adds, on panels of `f32`. Each step of the depth has `MR` numbers on the left, `NV` vectors on the right.
#[derive(Clone, Copy)]
pub(super) struct Fma;

impl Micro for Fma {
    type Number = f32;
    type Ready = ();
    const STEP: usize = 1;
    const WIDE: bool = true;
    const DEPTH: usize = KC;

    fn shape(self, unit: Unit, cols: usize) -> (usize, usize) {
        let (rows, vectors) = unit.run(tile::Shape);
        (rows, if cols <= LANES { LANES } else { vectors * LANES })
    }

    #[inline(always)]
    fn pack<S: Simd, T: Float>(self, s: S, _: Side, part: Part<'_, f32>, lines: Matrix<'_, T>, scale: f32) {
        part.pack(s, lines, scale);
    }

    #[inline(always)]
    fn begin(self) {}

    #[inline(always)]
    fn tile<S: Simd, const NV: usize>(_: &(), s: S, left: &[f32], right: [&[f32]; 2], out: &mut [Lanes<f32>]) {
        s.tile::<NV>(left, right, out);
    }
}
