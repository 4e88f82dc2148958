//! AdamW over the factors of an adapter, on lowrank's verb, and LoRA+.

use candle_core::{Tensor, Var};
use lowrank::op::{Adam, AdamRate, WeightGrad};
use lowrank::{Cpu, Tensor as Matrix};

use crate::Result;
use crate::lend::{Elem, Lent, wrapped, write};

/// The scalars of the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rates {
    pub(crate) lr: f64,
    pub(crate) weight_decay: f32,
    /// LoRA+: how many times the learning rate of `A` that of `B` is.
    pub(crate) loraplus: f32,
}

/// A factor that is trained, and its moments.
pub(crate) struct Factor {
    /// `model.layers.0.self_attn.q_proj.lora_A`
    pub(crate) name: String,
    pub(crate) var: Var,
    /// Whether it is a `B`, which LoRA+ gives the larger learning rate.
    pub(crate) is_b: bool,
    m: Matrix<Cpu<f32>>,
    v: Matrix<Cpu<f32>>,
}

impl Factor {
    /// With moments of zero.
    pub(crate) fn new(name: String, var: Var, is_b: bool) -> Result<Self> {
        let (cpu, shape) = (f32::cpu()?, var.dims2()?);
        Ok(Self { name, var, is_b, m: Matrix::zeros(cpu, shape)?, v: Matrix::zeros(cpu, shape)? })
    }

    /// The two moments, row by row.
    pub(crate) fn moments(&self) -> Result<[Vec<f32>; 2]> {
        let cpu = f32::cpu()?;
        Ok([self.m.to_vec(cpu)?, self.v.to_vec(cpu)?])
    }

    /// Puts other moments in their place. Errors: unless they are as long.
    pub(crate) fn set_moments(&mut self, m: &[f32], v: &[f32]) -> Result<()> {
        let cpu = f32::cpu()?;
        self.m.copy_from_slice(cpu, m)?;
        Ok(self.v.copy_from_slice(cpu, v)?)
    }

    /// Step `t`, counted from 1, with the gradient multiplied by `factor`.
    pub(crate) fn step(&mut self, gradient: &Tensor, factor: f32, rates: &Rates, t: u64) -> Result<()> {
        let cpu = f32::cpu()?;
        let lr = rates.lr as f32 * if self.is_b { rates.loraplus } else { 1.0 };
        let rate = AdamRate::adamw(lr, 0.9, 0.999, 1e-8, rates.weight_decay, t)?;
        let shape = self.var.dims2()?;
        let gradient: Vec<f32> = Lent::new(gradient).slice::<f32>()?.iter().map(|g| factor * g).collect();
        let gradient = Matrix::<Cpu<f32>>::from_vec(shape, gradient)?;
        let (m, v) = (&mut self.m, &mut self.v);
        write(self.var.as_tensor(), |numbers: &mut [f32]| {
            let mut w = Matrix::from_slice(cpu, shape, numbers).map_err(wrapped)?;
            let (grad, w_mut) = (WeightGrad::Dense(&gradient), &mut w);
            Adam { grad, rate, m, v, master: None, w: w_mut }.run(cpu).map_err(wrapped)?;
            w.copy_to_slice(cpu, numbers).map_err(wrapped)
        })?;
        Ok(())
    }
}

/// `√Σ g²` over all gradients.
pub(crate) fn norm(gradients: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for gradient in gradients {
        sum += Lent::new(gradient).slice::<f32>()?.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    }
    Ok(sum.sqrt())
}
