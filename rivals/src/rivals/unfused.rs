//! lowrank's own verbs, unfused: the base layer, the adapter as two layers more, and an addition, as a framework would call them.

use lowrank::op::{Add, LinearBackward, LinearForward};
use lowrank::{Backend, Float, Result, Tensor};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

pub struct Unfused<B: Backend> {
    verb: Verb,
    /// `scale·B`, made once: nobody need scale at every call.
    b: Tensor<B>,
    h: Tensor<B>,
    y: Tensor<B>,
    update: Tensor<B>,
    dh: Tensor<B>,
    da: Tensor<B, f32>,
    /// Of `scale·B`.
    db: Tensor<B, f32>,
    dx: Tensor<B>,
    dx_update: Tensor<B>,
}

impl<B: Backend> Unfused<B> {
    pub fn new(layer: &Layer<B>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let backend = &layer.backend;
        let zeros = |rows, cols| Tensor::zeros(backend, (rows, cols));
        let scaled: Vec<B::Elem> = layer.b.to_vec(backend)?.iter().map(|b| B::Elem::from_f32(SCALE * b.to_f32())).collect();
        let b = Tensor::from_slice(backend, (n, r), &scaled)?;
        let (h, dh, y, update, dx, dx_update) =
            (zeros(m, r)?, zeros(m, r)?, zeros(m, n)?, zeros(m, n)?, zeros(m, k)?, zeros(m, k)?);
        let (da, db) = (Tensor::zeros(backend, (r, k))?, Tensor::zeros(backend, (n, r))?);
        Ok(Self { verb, b, h, y, update, dh, da, db, dx, dx_update })
    }

    fn forward(&mut self, Layer { backend, x, w, a, .. }: &Layer<B>) -> Result<()> {
        LinearForward { x: x.view(), w: w.into(), bias: None, y: (&mut self.y).into() }.run(backend)?;
        LinearForward { x: x.view(), w: a.into(), bias: None, y: (&mut self.h).into() }.run(backend)?;
        LinearForward { x: self.h.view(), w: (&self.b).into(), bias: None, y: (&mut self.update).into() }.run(backend)?;
        Add { x: self.update.view(), scale: 1.0, y: self.y.view_mut() }.run(backend)
    }

    fn backward(&mut self, Layer { backend, x, w, a, dy, .. }: &Layer<B>) -> Result<()> {
        let (dh, db) = (Some(&mut self.dh), Some(&mut self.db));
        LinearBackward {
            x: Some(self.h.view()),
            w: Some((&self.b).into()),
            dy: dy.view(),
            dx: dh.map(Into::into),
            dw: db.map(Tensor::view_mut),
            dbias: None,
        }
        .run(backend)?;
        let (dx, da) = (Some(&mut self.dx_update), Some(&mut self.da));
        LinearBackward {
            x: Some(x.view()),
            w: Some(a.into()),
            dy: self.dh.view(),
            dx: dx.map(Into::into),
            dw: da.map(Tensor::view_mut),
            dbias: None,
        }
        .run(backend)?;
        LinearBackward {
            x: Some(x.view()),
            w: Some(w.into()),
            dy: dy.view(),
            dx: Some((&mut self.dx).into()),
            dw: None,
            dbias: None,
        }
        .run(backend)?;
        Add { x: self.dx_update.view(), scale: 1.0, y: self.dx.view_mut() }.run(backend)
    }
}

impl<B: Backend> Contender<B> for Unfused<B> {
    fn name(&self) -> &'static str {
        "unfused"
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<B>) {
        let backward = self.verb == Verb::LoraForwardBackward;
        let done = self.forward(layer).and_then(|()| if backward { self.backward(layer) } else { Ok(()) });
        done.expect("the shapes fit");
    }

    fn outputs(&self, Layer { backend, .. }: &Layer<B>) -> Outputs {
        let host = |tensor: &Tensor<B>| widened(&tensor.to_vec(backend).expect("memory"));
        let [da, db] = [&self.da, &self.db].map(|tensor| tensor.to_vec(backend).expect("memory"));
        let db = db.iter().map(|db| SCALE * db).collect();
        Outputs { y: host(&self.y), da, db, dx: host(&self.dx), w: Vec::new() }
    }

    /// `h` or `dh`, the product, the update and the sum.
    fn roundings(&self) -> usize {
        3
    }
}
