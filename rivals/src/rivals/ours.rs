//! lowrank's own verbs.

use lowrank::op::{LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::{Cpu, Float, Result, Tensor};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

pub struct Ours<E: Float> {
    name: &'static str,
    verb: Verb,
    h: Tensor<Cpu<E>, f32>,
    y: Tensor<Cpu<E>>,
    da: Tensor<Cpu<E>, f32>,
    db: Tensor<Cpu<E>, f32>,
    dx: Tensor<Cpu<E>>,
    w: Tensor<Cpu<E>>,
    /// Merging and unmerging take turns, so that the weights stay as large as they are.
    scale: f32,
}

impl<E: Float> Ours<E> {
    pub fn new(name: &'static str, layer: &Layer<E>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let cpu = &layer.cpu;
        let w = match verb {
            Verb::LoraMerge => Tensor::from_slice(cpu, (n, k), layer.w.buffer())?,
            _ => Tensor::zeros(cpu, (0, 0))?,
        };
        let (h, y, dx) = (Tensor::zeros(cpu, (m, r))?, Tensor::zeros(cpu, (m, n))?, Tensor::zeros(cpu, (m, k))?);
        let (da, db) = (Tensor::zeros(cpu, (r, k))?, Tensor::zeros(cpu, (n, r))?);
        Ok(Self { name, verb, h, y, da, db, dx, w, scale: SCALE })
    }

    fn linear_forward(&mut self, Layer { cpu, x, w, .. }: &Layer<E>) -> Result<()> {
        LinearForward { x, w, bias: None, y: &mut self.y }.run(cpu)
    }

    fn lora_forward(&mut self, Layer { cpu, x, w, a, b, .. }: &Layer<E>) -> Result<()> {
        let (h, y) = (&mut self.h, &mut self.y);
        LoraForward { x, w: Some(w), bias: None, a, b, scale: SCALE, dropout: None, h, y }.run(cpu)
    }

    fn lora_backward(&mut self, Layer { cpu, x, w, a, b, dy, .. }: &Layer<E>) -> Result<()> {
        let (h, da, db, dx) = (&self.h, &mut self.da, &mut self.db, Some(&mut self.dx));
        LoraBackward { x, w: Some(w), a, b, h, dy, scale: SCALE, dropout: None, da, db, dbias: None, dx }.run(cpu)
    }

    fn lora_merge(&mut self, Layer { cpu, a, b, .. }: &Layer<E>) -> Result<()> {
        LoraMerge { a, b, scale: self.scale, rounding: Rounding::Nearest, w: &mut self.w }.run(cpu)?;
        self.scale = -self.scale;
        Ok(())
    }
}

impl<E: Float> Contender<E> for Ours<E> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<E>) {
        let done = match self.verb {
            Verb::LinearForward => self.linear_forward(layer),
            Verb::LoraForward => self.lora_forward(layer),
            Verb::LoraForwardBackward => self.lora_forward(layer).and_then(|()| self.lora_backward(layer)),
            Verb::LoraMerge => self.lora_merge(layer),
        };
        done.expect("the shapes fit");
    }

    fn outputs(&self, _: &Layer<E>) -> Outputs {
        let (da, db) = (self.da.buffer().to_vec(), self.db.buffer().to_vec());
        Outputs { y: widened(self.y.buffer()), da, db, dx: widened(self.dx.buffer()), w: widened(self.w.buffer()) }
    }
}
