//! The two big products of a layer, each one launch, by whichever kernel: `y` and `dx`.

use super::Chain;
use super::device::{Arg, Device};
use super::hopper;
use super::operand::{Matrix, MatrixMut};
use super::plan::{Forward, Plan};
use crate::error::Result;

/// `y = x·Wᵀ + bias + scale·h·Bᵀ`, overwritten or added to; what is `None` or [`Arg::Null`] is not there.
pub(super) struct ToY<'a, M> {
    pub(super) x: Matrix<'a, M>,
    pub(super) w: Option<Matrix<'a, M>>,
    pub(super) bias: Arg<'a, M>,
    /// Whether two neighbours of the bias can be read at once.
    pub(super) bias_has_pairs: bool,
    /// Only where the launch makes `h` besides.
    pub(super) a: Option<Matrix<'a, M>>,
    pub(super) b: Option<Matrix<'a, M>>,
    pub(super) h: Arg<'a, M>,
    pub(super) scale: f32,
    pub(super) y: MatrixMut<'a, M>,
    pub(super) adds: bool,
    pub(super) rank: u32,
}

impl<M: 'static> ToY<'_, M> {
    pub(super) fn launch<D: Device<Memory = M>>(self, chain: &mut Chain<'_, D>, plan: Forward) -> Result<()> {
        let Self { x, w, bias, bias_has_pairs, a, b, h, scale, y, adds, rank } = self;
        let dims = [y.rows, x.cols, y.cols, rank].map(Arg::U32);
        let product = hopper::products(chain.device.gpu(), plan.y, &x, w.as_ref(), &y, adds).filter(|_| bias_has_pairs);
        if let (Some(product), Some(w)) = (product, w) {
            let operands = [product.lhs(x), product.rhs(w), bias, read_if(b), h, scale.into(), product.out(y)];
            return chain.launch(product.plan, operands.into_iter().chain(dims).chain([stride_of(b)]).collect());
        }
        let strides = [Arg::U32(x.stride), stride_of(w)].into_iter().chain(plan.narrow.then(|| stride_of(a)));
        let strides = strides.chain([stride_of(b), y.stride.into(), u32::from(adds).into()]);
        let operands = [x.read(), read_if(w), bias].into_iter().chain(plan.narrow.then(|| read_if(a)));
        let operands = operands.chain([read_if(b), h, scale.into(), y.write()]);
        chain.launch(plan.y, operands.chain(dims).chain(strides).collect())
    }
}

/// `dx = dy·W + drop(dh·A)`, overwritten or added to; what is `None` or [`Arg::Null`] is not there.
pub(super) struct ToDx<'a, M> {
    pub(super) w: Option<Matrix<'a, M>>,
    pub(super) a: Option<Matrix<'a, M>>,
    pub(super) dy: Matrix<'a, M>,
    pub(super) dh: Arg<'a, M>,
    pub(super) dropout: [Arg<'a, M>; 4],
    pub(super) dx: MatrixMut<'a, M>,
    pub(super) adds: bool,
    pub(super) rank: u32,
}

impl<M: 'static> ToDx<'_, M> {
    pub(super) fn launch<D: Device<Memory = M>>(self, chain: &mut Chain<'_, D>, plan: Plan) -> Result<()> {
        let Self { w, a, dy, dh, dropout, dx, adds, rank } = self;
        let dims = [dx.rows, dx.cols, dy.cols, rank].map(Arg::U32);
        if let (Some(product), Some(w)) = (hopper::products(chain.device.gpu(), plan, &dy, w.as_ref(), &dx, adds), w) {
            let operands = [product.rhs(w), read_if(a), product.lhs(dy), dh].into_iter().chain(dropout);
            return chain.launch(product.plan, operands.chain([product.out(dx)]).chain(dims).chain([stride_of(a)]).collect());
        }
        let strides = [stride_of(w), stride_of(a), dy.stride.into(), dx.stride.into(), u32::from(adds).into()];
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
