//! The verbs as somebody with candle would write them: three `Linear`s, and autograd.

use candle_core::{Device, Tensor, Var, WithDType};
use candle_nn::{Linear, Module};
use lowrank::{Cpu, DType, Float, Result};
use rivals::layer::{Contender, Layer, Outputs, SCALE, Verb};
use rivals::race::{Contenders, Others};

/// candle, on the threads of its own that `RAYON_NUM_THREADS` gives it.
pub struct Candle;

impl Candle {
    pub const NAMES: [&str; 1] = ["candle"];
}

impl<E: Float + WithDType> Others<Cpu<E>> for Candle {
    const BACKEND: &'static str = "cpu";

    fn contenders(&self, layer: &Layer<Cpu<E>>, verb: Verb) -> Result<Contenders<Cpu<E>>> {
        Ok(vec![Box::new(ByHand::new(layer, verb).expect("the shapes fit"))])
    }
}

struct ByHand {
    verb: Verb,
    x: Var,
    /// Frozen.
    base: Linear,
    a: Var,
    b: Var,
    dy: Tensor,
    /// Of the last run.
    results: Results,
    /// Merging and unmerging take turns, so that the weights stay as large as they are.
    scale: f64,
}

#[derive(Default)]
struct Results {
    y: Option<Tensor>,
    da: Option<Tensor>,
    db: Option<Tensor>,
    dx: Option<Tensor>,
    w: Option<Tensor>,
}

impl ByHand {
    fn new<E: Float + WithDType>(layer: &Layer<Cpu<E>>, verb: Verb) -> candle_core::Result<Self> {
        let copy = |tensor: &lowrank::Tensor<Cpu<E>>| {
            let host = tensor.to_vec(&layer.backend).expect("memory");
            Tensor::from_vec(host, (tensor.rows(), tensor.cols()), &Device::Cpu)
        };
        let trained = |tensor| Var::from_tensor(&copy(tensor)?);
        let (x, a, b) = (trained(&layer.x)?, trained(&layer.a)?, trained(&layer.b)?);
        let base = Linear::new(copy(&layer.w)?, None);
        Ok(Self { verb, x, base, a, b, dy: copy(&layer.dy)?, results: Results::default(), scale: SCALE.into() })
    }

    /// `x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`. Where nothing is trained, candle keeps nothing for a backward pass.
    fn forward(&self, trained: bool) -> candle_core::Result<Tensor> {
        let of = |var: &Var| if trained { var.as_tensor().clone() } else { var.as_detached_tensor() };
        let (x, a, b) = (of(&self.x), Linear::new(of(&self.a), None), Linear::new(of(&self.b), None));
        let update = (b.forward(&a.forward(&x)?)? * f64::from(SCALE))?;
        self.base.forward(&x)? + update
    }

    /// As a loss whose derivative by `y` is `dy`.
    fn forward_backward(&mut self) -> candle_core::Result<()> {
        let y = self.forward(true)?;
        let gradients = (&y * &self.dy)?.sum_all()?.backward()?;
        let of = |var: &Var| gradients.get(var.as_tensor()).cloned();
        self.results = Results { dx: of(&self.x), da: of(&self.a), db: of(&self.b), y: Some(y.detach()), w: None };
        Ok(())
    }

    fn merge(&mut self) -> candle_core::Result<()> {
        let w = self.results.w.take().unwrap_or_else(|| self.base.weight().clone());
        let update = (self.b.as_detached_tensor().matmul(&self.a.as_detached_tensor())? * self.scale)?;
        self.results.w = Some((w + update)?);
        self.scale = -self.scale;
        Ok(())
    }
}

impl<E: Float + WithDType> Contender<Cpu<E>> for ByHand {
    fn name(&self) -> &'static str {
        Candle::NAMES[0]
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, _: &Layer<Cpu<E>>) {
        let done = match self.verb {
            Verb::LinearForward => self.base.forward(&self.x.as_detached_tensor()).map(|y| self.results.y = Some(y)),
            Verb::LoraForward => self.forward(false).map(|y| self.results.y = Some(y)),
            Verb::LoraForwardBackward => self.forward_backward(),
            Verb::LoraMerge => self.merge(),
        };
        done.expect("the shapes fit");
    }

    fn outputs(&self, _: &Layer<Cpu<E>>) -> Outputs {
        let Results { y, da, db, dx, w } = &self.results;
        Outputs { y: host(y), da: host(da), db: host(db), dx: host(dx), w: host(w) }
    }

    /// `h` or `dh`, the product, scaling and the sum; in f16 its products are rounded after each block of the depth.
    fn roundings(&self) -> usize {
        let [n, k] = [0, 1].map(|side| self.base.weight().dims()[side]);
        let products = if <E as Float>::DTYPE == DType::F16 { n.max(k).div_ceil(256) } else { 1 };
        3 + products
    }
}

fn host(tensor: &Option<Tensor>) -> Vec<f32> {
    let widened = |tensor: &Tensor| tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1();
    tensor.as_ref().map_or(Vec::new(), |tensor| widened(tensor).expect("memory"))
}
