//! The custom operations of the model, with their derivatives: RMS norm, softmax attention and the SiLU gate.
//!
//! They are computed on the host in f64 and rounded once, which is simple and fast enough for a model as small as this one.

use std::ops::Range;

use lowrank::autograd::{Backward, Param, Tape, Var};
use lowrank::{Backend, Error, Float, Result, Shape, Tensor};

/// `y = weight·x / √(mean(x²) + 1e-6)`, row by row. The weight is `1×k`.
pub fn rms_norm<'m, B: Backend>(tape: &mut Tape<'m, B>, x: Var, weight: &'m Param<B>) -> Result<Var> {
    let (backend, value) = (tape.backend(), tape.value(x)?);
    let (shape, xs, w) = (value.shape(), host(backend, value)?, host(backend, weight.tensor())?);
    let rms = |x: &[f64]| (dot(x, x) / x.len() as f64 + 1e-6).sqrt();
    let mut y = Vec::new();
    for x in xs.chunks_exact(shape.cols) {
        let rms = rms(x);
        y.extend(x.iter().zip(&w).map(|(x, w)| w * x / rms));
    }
    let y = device(backend, shape, &y)?;
    tape.custom("rms_norm", [x], [weight], y, move |Backward { backend, inputs: [x], dy, .. }| {
        let (xs, dy, w) = (host(backend, x)?, host(backend, dy)?, host(backend, weight.tensor())?);
        let (mut dx, mut dw) = (Vec::new(), vec![0.0; w.len()]);
        for (x, dy) in xs.chunks_exact(w.len()).zip(dy.chunks_exact(w.len())) {
            let rms = rms(x);
            let g: Vec<f64> = dy.iter().zip(&w).map(|(dy, w)| dy * w).collect();
            let along = dot(&g, x) / (w.len() as f64 * rms.powi(3));
            dx.extend(g.iter().zip(x).map(|(g, x)| g / rms - x * along));
            dw.iter_mut().zip(dy.iter().zip(x)).for_each(|(dw, (dy, x))| *dw += dy * x / rms);
        }
        let dw: Vec<f32> = dw.into_iter().map(|dw| dw as f32).collect();
        let dw = Tensor::from_slice(backend, weight.tensor().shape(), &dw)?;
        Ok(([Some(device(backend, x.shape(), &dx)?)], [Some(dw)]))
    })
}

/// `y = gate·σ(gate)·up`, element by element.
pub fn silu_gate<B: Backend>(tape: &mut Tape<'_, B>, gate: Var, up: Var) -> Result<Var> {
    let (backend, shape) = (tape.backend(), tape.value(gate)?.shape());
    let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
    let [g, u] = [host(backend, tape.value(gate)?)?, host(backend, tape.value(up)?)?];
    let y: Vec<f64> = g.iter().zip(&u).map(|(&g, u)| g * sigmoid(g) * u).collect();
    let y = device(backend, shape, &y)?;
    tape.custom("silu_gate", [gate, up], [], y, move |Backward { backend, inputs, dy, .. }| {
        let ([g, u], dy) = ([host(backend, inputs[0])?, host(backend, inputs[1])?], host(backend, dy)?);
        let of_gate = |((&g, u), dy): ((&f64, f64), f64)| dy * u * sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g)));
        let dup: Vec<f64> = g.iter().zip(&dy).map(|(&g, dy)| dy * g * sigmoid(g)).collect();
        let dgate: Vec<f64> = g.iter().zip(u).zip(dy).map(of_gate).collect();
        Ok(([Some(device(backend, shape, &dgate)?), Some(device(backend, shape, &dup)?)], []))
    })
}

/// Causal self-attention with several heads.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Number of heads; the columns are divided among them.
    pub heads: usize,
    /// Rows of a sequence. Each row attends to itself and to the rows before it in its sequence.
    pub length: usize,
}

impl Attention {
    /// `y = softmax(q·kᵀ/√d)·v` for each head of `d` columns. `q`, `k` and `v` have the same shape.
    ///
    /// Errors: [`Error::Value`] unless the number of rows is a multiple of `length`, and that of columns a multiple of `heads`.
    pub fn forward<B: Backend>(self, tape: &mut Tape<'_, B>, [q, k, v]: [Var; 3]) -> Result<Var> {
        let (backend, shape) = (tape.backend(), tape.value(q)?.shape());
        let whole = |count: usize, of: usize| count.checked_rem(of) == Some(0);
        if !(whole(shape.rows, self.length) && whole(shape.cols, self.heads)) {
            let want = "rows of whole sequences, and a multiple of `heads` columns".into();
            return Err(Error::Value { verb: "attention", name: "q", got: shape.to_string(), want });
        }
        let hosts = [host(backend, tape.value(q)?)?, host(backend, tape.value(k)?)?, host(backend, tape.value(v)?)?];
        let [qs, ks, vs] = hosts.map(|numbers| Rows { numbers, cols: shape.cols });
        let mut y = Rows::zeros(shape);
        for (i, seen, head) in self.queries(shape) {
            for (weight, j) in weights(&qs, &ks, i, seen.clone(), head.clone()).into_iter().zip(seen) {
                y.add(i, &head, weight, vs.part(j, &head));
            }
        }
        let y = device(backend, shape, &y.numbers)?;
        tape.custom("attention", [q, k, v], [], y, move |Backward { backend, inputs: [q, k, v], dy, .. }| {
            let hosts = [host(backend, q)?, host(backend, k)?, host(backend, v)?, host(backend, dy)?];
            let [q, k, v, dy] = hosts.map(|numbers| Rows { numbers, cols: shape.cols });
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Rows::zeros(shape));
            for (i, seen, head) in self.queries(shape) {
                let weights = weights(&q, &k, i, seen.clone(), head.clone());
                let dweights: Vec<f64> = seen.clone().map(|j| dot(dy.part(i, &head), v.part(j, &head))).collect();
                let mean = dot(&weights, &dweights);
                for ((weight, dweight), j) in weights.into_iter().zip(dweights).zip(seen) {
                    let dscore = weight * (dweight - mean) / (head.len() as f64).sqrt();
                    dq.add(i, &head, dscore, k.part(j, &head));
                    dk.add(j, &head, dscore, q.part(i, &head));
                    dv.add(j, &head, weight, dy.part(i, &head));
                }
            }
            let [dq, dk, dv] = [dq, dk, dv].map(|rows| device(backend, shape, &rows.numbers));
            Ok(([Some(dq?), Some(dk?), Some(dv?)], []))
        })
    }

    /// For every row and head: the row, the rows that it attends to, and the columns of the head.
    fn queries(self, shape: Shape) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
        let (width, first) = (shape.cols / self.heads, move |i| i / self.length * self.length);
        let head = move |head: usize| head * width..(head + 1) * width;
        (0..shape.rows).flat_map(move |i| (0..self.heads).map(move |at| (i, first(i)..i + 1, head(at))))
    }
}

/// `softmax(q·kᵀ/√d)` of a row, over the rows that it attends to.
fn weights(q: &Rows, k: &Rows, i: usize, seen: Range<usize>, head: Range<usize>) -> Vec<f64> {
    let root = (head.len() as f64).sqrt();
    let scores: Vec<f64> = seen.map(|j| dot(q.part(i, &head), k.part(j, &head)) / root).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = scores.into_iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|exp| exp / sum).collect()
}

/// A row-major matrix on the host.
struct Rows {
    numbers: Vec<f64>,
    cols: usize,
}

impl Rows {
    fn zeros(shape: Shape) -> Self {
        Self { numbers: vec![0.0; shape.rows * shape.cols], cols: shape.cols }
    }

    /// The columns of a head in a row.
    fn part(&self, row: usize, head: &Range<usize>) -> &[f64] {
        &self.numbers[row * self.cols..][head.clone()]
    }

    /// Adds `factor·other` to the columns of a head in a row.
    fn add(&mut self, row: usize, head: &Range<usize>, factor: f64, other: &[f64]) {
        let part = &mut self.numbers[row * self.cols..][head.clone()];
        part.iter_mut().zip(other).for_each(|(x, other)| *x += factor * other);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn host<B: Backend>(backend: &B, tensor: &Tensor<B>) -> Result<Vec<f64>> {
    Ok(tensor.to_vec(backend)?.into_iter().map(|x| x.to_f32().into()).collect())
}

fn device<B: Backend>(backend: &B, shape: Shape, numbers: &[f64]) -> Result<Tensor<B>> {
    let numbers: Vec<B::Elem> = numbers.iter().map(|&x| B::Elem::from_f32(x as f32)).collect();
    Tensor::from_slice(backend, shape, &numbers)
}
