//! Rotary positions: of each head, the elements `j` and `j + d/2` are turned by the angle `position · θⱼ`.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use crate::config::{ModelConfig, RopeScaling};
use crate::lend::{Elem, Lent, by_dtype, lend, rows_and_columns};
use crate::numeric::make_rows;

/// The frequencies `θⱼ` of a model.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
}

/// The angles of the tokens of a pass, as cosines and sines.
#[derive(Clone, Debug)]
pub(crate) struct Angles {
    half: usize,
    /// tokens × half
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let d = config.head_dim;
        let plain = (0..d / 2).map(|j| 1.0 / config.rope_theta.powf(2.0 * j as f64 / d as f64));
        let frequencies = plain.map(|frequency| match &config.rope_scaling {
            None => frequency as f32,
            Some(RopeScaling::Linear { factor }) => (frequency / factor) as f32,
            Some(scaling @ RopeScaling::Llama3 { .. }) => llama3(frequency, scaling) as f32,
        });
        Self { frequencies: frequencies.collect() }
    }

    /// The angles of tokens at these positions.
    pub(crate) fn angles(&self, positions: &[usize]) -> Angles {
        let angles = || positions.iter().flat_map(|&at| self.frequencies.iter().map(move |frequency| at as f32 * frequency));
        let (cos, sin) = (angles().map(f32::cos).collect(), angles().map(f32::sin).collect());
        Angles { half: self.frequencies.len(), cos: Arc::new(cos), sin: Arc::new(sin) }
    }
}

/// Llama 3's scaling: slow frequencies are divided by the factor, fast ones are not, and in between it is blended.
fn llama3(frequency: f64, scaling: &RopeScaling) -> f64 {
    let RopeScaling::Llama3 { factor, low, high, original } = scaling else { return frequency };
    let length = 2.0 * std::f64::consts::PI / frequency;
    if length > original / low {
        frequency / factor
    } else if length < original / high {
        frequency
    } else {
        let smooth = (original / length - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

impl Angles {
    /// Turns every head of `x`, tokens × (heads · d).
    pub(crate) fn turn(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1(self.clone())
    }

    /// Turns by the angles, or back for a sign of -1.
    pub(crate) fn run<E: Elem>(&self, x: &[E], columns: usize, sign: f32) -> Result<Vec<E>> {
        let (half, width) = (self.half, 2 * self.half);
        if columns * self.cos.len() != x.len() * half || !columns.is_multiple_of(width.max(1)) {
            candle_core::bail!(
                "rotary positions of {} tokens for heads of {width} got rows of {columns}",
                self.cos.len() / half.max(1)
            );
        }
        Ok(make_rows(
            x.len(),
            columns,
            #[inline(always)]
            |i, y: &mut [E]| {
                let (cos, sin) = (&self.cos[i * half..][..half], &self.sin[i * half..][..half]);
                let x = &x[i * columns..][..columns];
                for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                    let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
                    for j in 0..half {
                        let (left, right, sin) = (x0[j].to_f32(), x1[j].to_f32(), sign * sin[j]);
                        y0[j] = E::from_f32(left * cos[j] - right * sin);
                        y1[j] = E::from_f32(right * cos[j] + left * sin);
                    }
                }
            },
        ))
    }
}

impl CustomOp1 for Angles {
    fn name(&self) -> &'static str {
        "lowrank-rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let columns = rows_and_columns(layout).1;
        by_dtype!(x.dtype(), E => {
            let y = self.run::<E>(lend(x, layout)?, columns, 1.0)?;
            Ok((E::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    /// `dx` is `dy` turned back.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (lent, columns) = (Lent::new(&dy), rows_and_columns(x.layout()).1);
        by_dtype!(x.dtype(), E => {
            let dx = self.run::<E>(lent.slice()?, columns, -1.0)?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
