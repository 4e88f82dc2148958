//! lowrank's own verbs.

use lowrank::op::{LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::{Backend, Passes, Result, Tensor};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

pub struct Ours<B: Backend> {
    name: &'static str,
    verb: Verb,
    h: Tensor<B, f32>,
    y: Tensor<B>,
    da: Tensor<B, f32>,
    db: Tensor<B, f32>,
    dx: Tensor<B>,
    /// What merging adds to, or what is kept packed; else empty.
    w: Tensor<B>,
    packed: bool,
    /// Merging and unmerging take turns, so that the weights stay as large as they are.
    scale: f32,
}

impl<B: Backend> Ours<B> {
    pub fn new(name: &'static str, layer: &Layer<B>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let backend = &layer.backend;
        let w = match verb {
            Verb::LoraMerge => Tensor::from_slice(backend, (n, k), &layer.w.to_vec(backend)?)?,
            _ => Tensor::zeros(backend, (0, 0))?,
        };
        let (h, y, dx) = (Tensor::zeros(backend, (m, r))?, Tensor::zeros(backend, (m, n))?, Tensor::zeros(backend, (m, k))?);
        let (da, db) = (Tensor::zeros(backend, (r, k))?, Tensor::zeros(backend, (n, r))?);
        Ok(Self { name, verb, h, y, da, db, dx, w, packed: false, scale: SCALE })
    }

    /// With the frozen weight kept packed.
    pub fn packed(name: &'static str, layer: &Layer<B>, verb: Verb) -> Result<Self> {
        let mut w = Tensor::from_slice(&layer.backend, layer.w.shape(), &layer.w.to_vec(&layer.backend)?)?;
        let backward = verb == Verb::LoraForwardBackward;
        layer.backend.keep_packed(&mut w, if backward { Passes::ForwardAndBackward } else { Passes::Forward })?;
        Ok(Self { w, packed: true, ..Self::new(name, layer, verb)? })
    }

    fn linear_forward(&mut self, Layer { backend, x, w, .. }: &Layer<B>) -> Result<()> {
        LinearForward { x: x.view(), w: w.into(), bias: None, y: (&mut self.y).into() }.run(backend)
    }

    fn lora_forward(&mut self, Layer { backend, x, w, a, b, .. }: &Layer<B>) -> Result<()> {
        let w = if self.packed { &self.w } else { w };
        let (h, y) = (&mut self.h, &mut self.y);
        LoraForward {
            x: x.view(),
            w: Some(w.into()),
            bias: None,
            a: a.into(),
            b: b.into(),
            scale: SCALE,
            dropout: None,
            h: h.view_mut(),
            y: y.into(),
        }
        .run(backend)
    }

    fn lora_backward(&mut self, Layer { backend, x, w, a, b, dy, .. }: &Layer<B>) -> Result<()> {
        let w = if self.packed { &self.w } else { w };
        let (h, da, db, dx) = (&self.h, &mut self.da, &mut self.db, Some(&mut self.dx));
        LoraBackward {
            x: x.view(),
            w: Some(w.into()),
            a: a.into(),
            b: b.into(),
            h: h.view(),
            dy: dy.view(),
            scale: SCALE,
            dropout: None,
            da: da.view_mut(),
            db: db.view_mut(),
            dbias: None,
            dx: dx.map(Into::into),
        }
        .run(backend)
    }

    fn lora_merge(&mut self, Layer { backend, a, b, .. }: &Layer<B>) -> Result<()> {
        LoraMerge { a: a.into(), b: b.into(), scale: self.scale, rounding: Rounding::Nearest, w: self.w.view_mut() }
            .run(backend)?;
        self.scale = -self.scale;
        Ok(())
    }
}

impl<B: Backend> Contender<B> for Ours<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<B>) {
        let done = match self.verb {
            Verb::LinearForward => self.linear_forward(layer),
            Verb::LoraForward => self.lora_forward(layer),
            Verb::LoraForwardBackward => self.lora_forward(layer).and_then(|()| self.lora_backward(layer)),
            Verb::LoraMerge => self.lora_merge(layer),
        };
        done.expect("the shapes fit");
    }

    fn outputs(&self, Layer { backend, .. }: &Layer<B>) -> Outputs {
        let host = |tensor: &Tensor<B>| widened(&tensor.to_vec(backend).expect("memory"));
        let [da, db] = [&self.da, &self.db].map(|tensor| tensor.to_vec(backend).expect("memory"));
        let w = if self.packed { Vec::new() } else { host(&self.w) };
        Outputs { y: host(&self.y), da, db, dx: host(&self.dx), w }
    }
}
