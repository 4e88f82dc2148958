//! The two large products of a layer, `y` and `dx`: one launch each, by the planned kernel.

use super::Chain;
use super::device::{Arg, Device};
use super::hopper;
use super::kernel::{self, Mask};
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
        let Self { x, w, bias, bias_has_aligned_pairs, a, b, h, scale, y, accumulate, rank: r } = self;
        let (m, k, n, b_stride) = (y.rows, x.cols, y.cols, stride_of(b));
        let product = hopper::replacement(chain.device.gpu(), plan.y, &x, w.as_ref(), &y, accumulate);
        let product = product.filter(|_| bias_has_aligned_pairs);
        if let (Some(product), Some(w)) = (product, w) {
            let (x, w, b, y) = (product.lhs(x), product.rhs(w), read_if(b), product.out(y));
            return chain.launch(product.plan, kernel::LoraForwardYHopper { x, w, bias, b, h, scale, y, m, k, n, r, b_stride });
        }
        let (x_stride, w_stride, a_stride, y_stride) = (x.stride, stride_of(w), stride_of(a), y.stride);
        let (x, w, a, b, y) = (x.read(), read_if(w), read_if(a), read_if(b), y.write());
        if plan.skinny {
            #[rustfmt::skip]
            let params = kernel::LoraForwardYSkinny {
                x, w, bias, a, b, h, scale, y, m, k, n, r, x_stride, w_stride, a_stride, b_stride, y_stride, accumulate,
            };
            return chain.launch(plan.y, params);
        }
        #[rustfmt::skip]
        let params = kernel::LoraForwardY {
            x, w, bias, b, h, scale, y, m, k, n, r, x_stride, w_stride, b_stride, y_stride, accumulate,
        };
        chain.launch(plan.y, params)
    }
}

/// `dx = dy·W + drop(dh·A)`, overwritten or accumulated into. `None` and [`Arg::Null`]: an operand that is not given.
pub(super) struct BackwardDx<'a, M> {
    pub(super) w: Option<Matrix<'a, M>>,
    pub(super) a: Option<Matrix<'a, M>>,
    pub(super) dy: Matrix<'a, M>,
    pub(super) dh: Arg<'a, M>,
    pub(super) mask: Mask,
    pub(super) dx: MatrixMut<'a, M>,
    pub(super) accumulate: bool,
    pub(super) rank: u32,
}

impl<M: 'static> BackwardDx<'_, M> {
    pub(super) fn launch<D: Device<Memory = M>>(self, chain: &mut Chain<'_, D>, plan: Plan) -> Result<()> {
        let Self { w, a, dy, dh, mask, dx, accumulate, rank: r } = self;
        let (m, k, n, a_stride) = (dx.rows, dx.cols, dy.cols, stride_of(a));
        let product = hopper::replacement(chain.device.gpu(), plan, &dy, w.as_ref(), &dx, accumulate);
        if let (Some(product), Some(w)) = (product, w) {
            let (w, a, dy, dx) = (product.rhs(w), read_if(a), product.lhs(dy), product.out(dx));
            return chain.launch(product.plan, kernel::LoraBackwardDxHopper { w, a, dy, dh, mask, dx, m, k, n, r, a_stride });
        }
        let (w_stride, dy_stride, dx_stride) = (stride_of(w), dy.stride, dx.stride);
        let (w, a, dy, dx) = (read_if(w), read_if(a), dy.read(), dx.write());
        #[rustfmt::skip]
        let params = kernel::LoraBackwardDx {
            w, a, dy, dh, mask, dx, m, k, n, r, w_stride, a_stride, dy_stride, dx_stride, accumulate,
        };
        chain.launch(plan, params)
    }
}

fn read_if<M>(matrix: Option<Matrix<'_, M>>) -> Arg<'_, M> {
    matrix.map_or(Arg::Null, Matrix::read)
}

fn stride_of<M>(matrix: Option<Matrix<'_, M>>) -> u32 {
    matrix.map_or(0, |matrix| matrix.stride)
}
