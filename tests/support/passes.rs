//! The verbs of a layer on a backend, with the outputs in the oracle's order.

use lowrank::op::{Dropout, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::{Backend, Error};

use super::data::{down, unwritten, up};
use super::oracle::Lora;

/// `h` and `y` of a layer.
pub fn forward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<(Vec<f32>, Vec<B::Elem>), Error> {
    let [x, w, a, b] = [&layer.x, &layer.w, &layer.a, &layer.b].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (scale, m) = (layer.scale as f32, x.rows());
    let (mut h, mut y) = (unwritten(backend, m, a.rows()), unwritten(backend, m, w.rows()));
    let op = LoraForward {
        x: x.view(),
        w: Some((&w).into()),
        bias: bias.as_ref().map(Into::into),
        a: (&a).into(),
        b: (&b).into(),
        scale,
        dropout,
        h: h.view_mut(),
        y: (&mut y).into(),
    };
    op.run(backend)?;
    Ok((down(backend, &h), down(backend, &y)))
}

/// `dA`, `dB`, `dbias` and `dx` of a layer.
pub type Gradients<E> = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<E>);

pub fn backward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<Gradients<B::Elem>, Error> {
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let (h, scale) = (up(backend, &layer.run().h), layer.scale as f32);
    let (mut da, mut db) = (unwritten(backend, a.rows(), x.cols()), unwritten(backend, w.rows(), a.rows()));
    let (mut dbias, mut dx) = (unwritten(backend, 1, w.rows()), unwritten(backend, x.rows(), x.cols()));
    let (x, w, a, b, h, dy) = (&x, Some(&w), &a, &b, &h, &dy);
    let (da_, db_, dbias_, dx_) = (&mut da, &mut db, Some(&mut dbias), Some(&mut dx));
    LoraBackward {
        x: x.view(),
        w: w.map(Into::into),
        a: a.into(),
        b: b.into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da_.view_mut(),
        db: db_.view_mut(),
        dbias: dbias_.map(Into::into),
        dx: dx_.map(Into::into),
    }
    .run(backend)?;
    Ok((down(backend, &da), down(backend, &db), down(backend, &dbias), down(backend, &dx)))
}

/// The merged weight of a layer.
pub fn merge<B: Backend>(backend: &B, layer: &Lora) -> Result<Vec<B::Elem>, Error> {
    let (a, b, mut w) = (up(backend, &layer.a), up(backend, &layer.b), up(backend, &layer.w));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: layer.scale as f32, rounding: Rounding::Nearest, w: w.view_mut() }
        .run(backend)?;
    Ok(down(backend, &w))
}
