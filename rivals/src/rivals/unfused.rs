//! lowrank's own verbs, unfused: the base layer, the adapter as two layers more, and an addition, as a framework would call them.

use lowrank::op::{Add, LinearBackward, LinearForward};
use lowrank::{Cpu, Float, Result, Tensor};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

pub struct Unfused<E: Float> {
    verb: Verb,
    /// `scale·B`, made once: nobody need scale at every call.
    b: Tensor<Cpu<E>>,
    h: Tensor<Cpu<E>>,
    y: Tensor<Cpu<E>>,
    update: Tensor<Cpu<E>>,
    dh: Tensor<Cpu<E>>,
    da: Tensor<Cpu<E>, f32>,
    /// Of `scale·B`.
    db: Tensor<Cpu<E>, f32>,
    dx: Tensor<Cpu<E>>,
    dx_update: Tensor<Cpu<E>>,
}

impl<E: Float> Unfused<E> {
    pub fn new(layer: &Layer<E>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let cpu = &layer.cpu;
        let zeros = |rows, cols| Tensor::zeros(cpu, (rows, cols));
        let scaled: Vec<E> = layer.b.buffer().iter().map(|b| E::from_f32(SCALE * b.to_f32())).collect();
        let b = Tensor::from_slice(cpu, (n, r), &scaled)?;
        let (h, dh, y, update, dx, dx_update) =
            (zeros(m, r)?, zeros(m, r)?, zeros(m, n)?, zeros(m, n)?, zeros(m, k)?, zeros(m, k)?);
        let (da, db) = (Tensor::zeros(cpu, (r, k))?, Tensor::zeros(cpu, (n, r))?);
        Ok(Self { verb, b, h, y, update, dh, da, db, dx, dx_update })
    }

    fn forward(&mut self, Layer { cpu, x, w, a, .. }: &Layer<E>) -> Result<()> {
        LinearForward { x, w, bias: None, y: &mut self.y }.run(cpu)?;
        LinearForward { x, w: a, bias: None, y: &mut self.h }.run(cpu)?;
        LinearForward { x: &self.h, w: &self.b, bias: None, y: &mut self.update }.run(cpu)?;
        Add { x: &self.update, y: &mut self.y }.run(cpu)
    }

    fn backward(&mut self, Layer { cpu, x, w, a, dy, .. }: &Layer<E>) -> Result<()> {
        let (dh, db) = (Some(&mut self.dh), Some(&mut self.db));
        LinearBackward { x: &self.h, w: &self.b, dy, dx: dh, dw: db, dbias: None }.run(cpu)?;
        let (dx, da) = (Some(&mut self.dx_update), Some(&mut self.da));
        LinearBackward { x, w: a, dy: &self.dh, dx, dw: da, dbias: None }.run(cpu)?;
        LinearBackward { x, w, dy, dx: Some(&mut self.dx), dw: None, dbias: None }.run(cpu)?;
        Add { x: &self.dx_update, y: &mut self.dx }.run(cpu)
    }
}

impl<E: Float> Contender<E> for Unfused<E> {
    fn name(&self) -> &'static str {
        "unfused"
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<E>) {
        let backward = self.verb == Verb::LoraForwardBackward;
        let done = self.forward(layer).and_then(|()| if backward { self.backward(layer) } else { Ok(()) });
        done.expect("the shapes fit");
    }

    fn outputs(&self, _: &Layer<E>) -> Outputs {
        let db = self.db.buffer().iter().map(|db| SCALE * db).collect();
        let (y, da, dx) = (widened(self.y.buffer()), self.da.buffer().to_vec(), widened(self.dx.buffer()));
        Outputs { y, da, db, dx, w: Vec::new() }
    }

    /// `h` or `dh`, the product, the update and the sum.
    fn roundings(&self) -> usize {
        3
    }
}
