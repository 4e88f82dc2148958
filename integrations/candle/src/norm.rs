//! `y = x / √(mean(x²) + eps) · w`, by rows: the norm of llama models, with a backward pass.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};

use crate::lend::{Elem, Lent, by_dtype, lend, rows_and_columns};
use crate::numeric::{dot, make_rows, widened};

/// `y = x / √(mean(x²) + eps) · w` over the last dimension; the weight is frozen.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    weight: Arc<Vec<f32>>,
    stored: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// From a weight of as many elements as the rows have.
    pub(crate) fn new(weight: Tensor, eps: f64) -> Result<Self> {
        let numbers = weight.to_dtype(DType::F32)?.to_vec1()?;
        Ok(Self { weight: Arc::new(numbers), stored: weight, eps: eps as f32 })
    }

    /// The weight as it is stored.
    pub(crate) fn weight(&self) -> &Tensor {
        &self.stored
    }

    /// The rows of `x` are as long as the weight, or a multiple of it: then each part is normed by itself, as heads are.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(self.clone())
    }

    /// `1 / √(mean(x²) + eps)`
    #[inline(always)]
    fn inverse(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }

    fn check(&self, columns: usize) -> Result<()> {
        let fits = !self.weight.is_empty() && columns.is_multiple_of(self.weight.len());
        if fits { Ok(()) } else { candle_core::bail!("a norm of {} elements got rows of {columns}", self.weight.len()) }
    }

    pub(crate) fn run<E: Elem>(&self, x: &[E]) -> Vec<E> {
        let n = self.weight.len();
        make_rows(
            x.len(),
            n,
            #[inline(always)]
            |i, y: &mut [E]| {
                let x = widened(&x[i * n..][..n]);
                let inverse = self.inverse(&x);
                for j in 0..n {
                    y[j] = E::from_f32(x[j] * inverse * self.weight[j]);
                }
            },
        )
    }

    /// With `x̂ = x·inverse` and `g = dy·w`: `dx = inverse·(g - x̂·mean(g·x̂))`.
    pub(crate) fn back<E: Elem>(&self, x: &[E], dy: &[E]) -> Vec<E> {
        let n = self.weight.len();
        make_rows(
            x.len(),
            n,
            #[inline(always)]
            |i, dx: &mut [E]| {
                let (x, mut g) = (widened(&x[i * n..][..n]), widened(&dy[i * n..][..n]));
                let inverse = self.inverse(&x);
                g.iter_mut().zip(self.weight.iter()).for_each(|(g, w)| *g *= w);
                let mean = dot(&g, &x) * inverse / n as f32;
                for j in 0..n {
                    dx[j] = E::from_f32(inverse * (g[j] - x[j] * inverse * mean));
                }
            },
        )
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "lowrank-rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        self.check(rows_and_columns(layout).1)?;
        by_dtype!(x.dtype(), E => Ok((E::to_cpu_storage_owned(self.run::<E>(lend(x, layout)?)), layout.shape().clone())))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (lx, ldy) = (Lent::new(x), Lent::new(&dy));
        by_dtype!(x.dtype(), E => {
            let dx = self.back::<E>(lx.slice()?, ldy.slice()?);
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
