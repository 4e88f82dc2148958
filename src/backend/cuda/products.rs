//! The two large products of a layer, `y` and `dx`: one launch each, by the planned kernel.

use super::Chain;
use super::device::{Arg, Device};
use super::hopper;
use super::operand::{Matrix, MatrixMut};
use super::plan::{Forward, Plan};
use crate::error::Result;

/// `y = x·Wᵀ + bias + scale·h·Bᵀ`, overwritten or accumulated into. `None` and [`Arg::Null`]: an operand that is not given.
pub(super) struct ForwardY<'a, M> {
    pub(super) x: Matrix<'a, M>,
    pub(super) w: Option<Matrix<'a, M>>,
    pub(super) bias: Arg<'a, M>,
    /// True if two consecutive elements of the bias can be read at once.
    pub(super) bias_has_aligned_pairs: bool,
    /// Given only if the launch also makes `h`.
    pub(super) a: Option<Matrix<'a, M>>,
    pub(super) b: Option<Matrix<'a, M>>,
    pub(super) h: Arg<'a, M>,
    pub(super) scale: f32,
    pub(super) y: MatrixMut<'a, M>,
    pub(super) accumulate: bool,
    pub(super) rank: u32,
}

impl<M: 'static> ForwardY<'_, M> {
    pub(super) fn launch<D: Device<Memory = M>>(self, chain: &mut Chain<'_, D>, plan: Forward) -> Result<()> {
        let Self { x, w, bias, bias_has_aligned_pairs, a, b, h, scale, y, accumulate, rank } = self;
        let dims = [y.rows, x.cols, y.cols, rank].map(Arg::U32);
        let product =
            hopper::replacement(chain.device.gpu(), plan.y, &x, w.as_ref(), &y, accumulate).filter(|_| bias_has_aligned_pairs);
        if let (Some(product), Some(w)) = (product, w) {
            let operands = [product.lhs(x), product.rhs(w), bias, read_if(b), h, scale.into(), product.out(y)];
            return chain.launch(product.plan, operands.into_iter().chain(dims).chain([stride_of(b)]).collect());
        }
        let strides = [Arg::U32(x.stride), stride_of(w)].into_iter().chain(plan.skinny.then(|| stride_of(a)));
        let strides = strides.chain([stride_of(b), y.stride.into(), u32::from(accumulate).into()]);
        let operands = [x.read(), read_if(w), bias].into_iter().chain(plan.skinny.then(|| read_if(a)));
        let operands = operands.chain([read_if(b), h, scale.into(), y.write()]);
        chain.launch(plan.y, operands.chain(dims).chain(strides).collect())
    }
}

/// `dx = dy·W + drop(dh·A)`, overwritten or accumulated into. `None` and [`Arg::Null`]: an operand that is not given.
pub(super) struct BackwardDx<'a, M> {
    pub(super) w: Option<Matrix<'a, M>>,
    pub(super) a: Option<Matrix<'a, M>>,
    pub(super) dy: Matrix<'a, M>,
    pub(super) dh: Arg<'a, M>,
    pub(super) dropout: [Arg<'a, M>; 4],
    pub(super) dx: MatrixMut<'a, M>,
    pub(super) accumulate: bool,
    pub(super) rank: u32,
}

impl<M: 'static> BackwardDx<'_, M> {
    pub(super) fn launch<D: Device<Memory = M>>(self, chain: &mut Chain<'_, D>, plan: Plan) -> Result<()> {
        let Self { w, a, dy, dh, dropout, dx, accumulate, rank } = self;
        let dims = [dx.rows, dx.cols, dy.cols, rank].map(Arg::U32);
        if let (Some(product), Some(w)) = (hopper::replacement(chain.device.gpu(), plan, &dy, w.as_ref(), &dx, accumulate), w) {
            let operands = [product.rhs(w), read_if(a), product.lhs(dy), dh].into_iter().chain(dropout);
            return chain.launch(product.plan, operands.chain([product.out(dx)]).chain(dims).chain([stride_of(a)]).collect());
        }
        let strides = [stride_of(w), stride_of(a), dy.stride.into(), dx.stride.into(), u32::from(accumulate).into()];
        let operands = [read_if(w), read_if(a), dy.read(), dh].into_iter().chain(dropout);
        chain.launch(plan, operands.chain([dx.write()]).chain(dims).chain(strides).collect())
    }
}

fn read_if<M>(matrix: Option<Matrix<'_, M>>) -> Arg<'_, M> {
    matrix.map_or(Arg::Null, Matrix::read)
}

fn stride_of<'a, M>(matrix: Option<Matrix<'_, M>>) -> Arg<'a, M> {
    Arg::U32(matrix.map_or(0, |matrix| matrix.stride))
}
