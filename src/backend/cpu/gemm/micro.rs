//! The micro-kernel trait: the product of two panels, and the layout of panels. The blocked loop nest is generic in it.

use super::super::simd::{LANES, Lanes, Simd, Unit};
use super::Matrix;
use super::pack::{Part, Side};
use super::plan::KC;
use super::tile;
use crate::element::{Element, Float};

/// A micro-kernel: computes a tile of the output from a left panel and a right panel.
pub(super) trait Micro: Copy + Send + Sync {
    /// The element type of panels.
    type Number: Element;
    /// State of a thread while it computes tiles, such as the configuration of AMX.
    type Ready;
    /// Steps of the depth that are stored together in a panel. The depth of each term is filled up with zeros to a multiple of
    /// it.
    const STEP: usize;
    /// True if panels hold `f32`, so that any factor can be packed and scaled.
    const F32: bool;
    /// KC, the most depth of a block; a tile is written to the output once a block.
    const DEPTH: usize;

    /// `(MR, NR)`, rows and columns of the tile, for an output with `cols` columns.
    fn shape(self, unit: Unit, cols: usize) -> (usize, usize);

    /// Packs the [`Part`] of consecutive panels that one term fills.
    fn pack<S: Simd, T: Float>(self, s: S, side: Side, part: Part<'_, Self::Number>, lines: Matrix<'_, T>, scale: f32);

    /// Prepares the calling thread for [`tile`](Self::tile).
    fn begin(self) -> Self::Ready;

    /// `out[i][j] = Σ_p left[p][i]·right[p][j]`, `NV` vectors wide. The right panel is given in two pieces along the depth.
    fn tile<S: Simd, const NV: usize>(
        ready: &Self::Ready,
        s: S,
        left: &[Self::Number],
        right: [&[Self::Number]; 2],
        out: &mut [Lanes<f32>],
    );
}

/// Multiply-adds of the vector unit, on panels of `f32`: for each step of the depth, `MR` numbers on the left and `NV` vectors
/// on the right.
#[derive(Clone, Copy)]
pub(super) struct Fma;

impl Micro for Fma {
    type Number = f32;
    type Ready = ();
    const STEP: usize = 1;
    const F32: bool = true;
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
