//! `y = silu(g)·u`, `silu(g) = g·σ(g)`: the gate of llama models, with a backward pass.

use crate::lend::{Elem, Lent, by_dtype, lend};
use crate::numeric::{exp, make_rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};

/// `y = silu(g)·u`
pub(crate) struct Gate;

impl Gate {
    /// `silu(g)·u`, of two tensors of one shape.
    pub(crate) fn forward(g: &Tensor, u: &Tensor) -> Result<Tensor> {
        if g.shape() != u.shape() || g.dtype() != u.dtype() {
            bail!("a gate of {:?} got values of {:?}", g.dims(), u.dims());
        }
        g.contiguous()?.apply_op2(&u.contiguous()?, Gate)
    }
}

/// Elements that one call works on.
const RUN: usize = 256;

/// `y = each(x)` of three inputs of one length, element by element.
fn map<E: Elem>(inputs: [&[E]; 3], each: impl Fn([f32; 3]) -> f32 + Sync) -> Vec<E> {
    make_rows(
        inputs[0].len(),
        RUN,
        #[inline(always)]
        |i, y: &mut [E]| {
            let [x0, x1, x2] = inputs.map(|x| &x[i * RUN..][..y.len()]);
            for j in 0..y.len() {
                y[j] = E::from_f32(each([x0[j], x1[j], x2[j]].map(E::to_f32)));
            }
        },
    )
}

/// `σ(g)`
#[inline(always)]
fn sigmoid(g: f32) -> f32 {
    1.0 / (1.0 + exp(-g))
}

/// `silu(g)·u`
pub(crate) fn forward<E: Elem>(g: &[E], u: &[E]) -> Vec<E> {
    map(
        [g, u, u],
        #[inline(always)]
        |[g, u, _]| g * sigmoid(g) * u,
    )
}

/// `dg = dy·u·σ·(1 + g·(1 - σ))`, `du = dy·silu(g)`
pub(crate) fn backward<E: Elem>(g: &[E], u: &[E], dy: &[E]) -> [Vec<E>; 2] {
    let dg = map(
        [g, u, dy],
        #[inline(always)]
        |[g, u, dy]| {
            let s = sigmoid(g);
            dy * u * s * (1.0 + g * (1.0 - s))
        },
    );
    [
        dg,
        map(
            [g, u, dy],
            #[inline(always)]
            |[g, _, dy]| dy * g * sigmoid(g),
        ),
    ]
}

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "lowrank-gate"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(g.dtype(), E => Ok((E::to_cpu_storage_owned(forward::<E>(lend(g, lg)?, lend(u, lu)?)), lg.shape().clone())))
    }

    fn bwd(&self, g: &Tensor, u: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (lg, lu, ldy) = (Lent::new(g), Lent::new(u), Lent::new(&dy));
        by_dtype!(g.dtype(), E => {
            let [dg, du] = backward::<E>(lg.slice()?, lu.slice()?, ldy.slice()?);
            let tensor = |vec| Tensor::from_vec(vec, g.shape(), g.device());
            Ok((Some(tensor(dg)?), Some(tensor(du)?)))
        })
    }
}
