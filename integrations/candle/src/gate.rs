//! `y = silu(g)·u`, `silu(g) = g·σ(g)`: the gate of llama models, with a backward pass.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};

use lowrank::Float;

use crate::lend::{Elem, Lent, by_dtype, lend};
use crate::numeric::{exp, make_rows};

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

fn run<E: Elem>(len: usize, each: impl Fn(usize) -> f32 + Sync) -> Vec<E> {
    let whole = len - len % RUN;
    let mut out = make_rows(whole, RUN, |i, y: &mut [E]| {
        for j in 0..y.len() {
            y[j] = E::from_f32(each(i * RUN + j));
        }
    });
    out.extend((whole..len).map(|i| E::from_f32(each(i))));
    out
}

/// `σ(g)`
#[inline(always)]
fn sigmoid(g: f32) -> f32 {
    1.0 / (1.0 + exp(-g))
}

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "lowrank-gate"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(g.dtype(), E => {
            let (g, u) = (lend::<E>(g, lg)?, lend::<E>(u, lu)?);
            let y = run::<E>(g.len(), |i| g[i].to_f32() * sigmoid(g[i].to_f32()) * u[i].to_f32());
            Ok((E::to_cpu_storage_owned(y), lg.shape().clone()))
        })
    }

    /// `dg = dy·u·σ·(1 + g·(1 - σ))`, `du = dy·silu(g)`
    fn bwd(&self, g: &Tensor, u: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (lg, lu, ldy) = (Lent::new(g), Lent::new(u), Lent::new(&dy));
        by_dtype!(g.dtype(), E => {
            let (gs, us, dys) = (lg.slice::<E>()?, lu.slice::<E>()?, ldy.slice::<E>()?);
            let dg = run::<E>(gs.len(), |i| {
                let (g, s) = (gs[i].to_f32(), sigmoid(gs[i].to_f32()));
                dys[i].to_f32() * us[i].to_f32() * s * (1.0 + g * (1.0 - s))
            });
            let du = run::<E>(gs.len(), |i| dys[i].to_f32() * gs[i].to_f32() * sigmoid(gs[i].to_f32()));
            let tensor = |vec| Tensor::from_vec(vec, g.shape(), g.device());
            Ok((Some(tensor(dg)?), Some(tensor(du)?)))
        })
    }
}
