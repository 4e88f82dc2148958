//! Adam in one pass: each weight and its two moments are read and written once, whatever the gradient is made of.

use rayon::prelude::*;

use super::few::{FEW, few};
use super::gemm::{Init, Output, interleave, sum_of_products};
use super::linear::{matrix, product};
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::{Cpu, Engine};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Adam, AdamRate, WeightGrad};

/// Rows of weights a task takes of a factored one.
const ROWS: usize = 16;
/// Rows updated side by side, so that each vector of `x` is loaded once for all of them.
const SIDE_BY_SIDE: usize = 4;
/// The longest batch whose gradient is cheaper to make on the way than to store: 2 multiply-adds an element and row against
/// 8 bytes of traffic.
const BATCH: usize = 64;

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w -= step_size·m / (√v·root_scale + eps)`
pub(super) fn adam<E: Float>(engine: &Engine, op: Adam<'_, Cpu<E>>) -> Result<()> {
    let (rate, n, k) = (op.rate, op.w.rows(), op.w.cols());
    let (m, v, w) = (op.m.buffer_mut(), op.v.buffer_mut(), op.w.buffer_mut());
    if w.is_empty() {
        return Ok(()); // whose other side may be any number
    }
    match op.grad {
        WeightGrad::Dense(g) => dense(engine, rate, g.buffer(), m, v, w),
        WeightGrad::Factored { dy, x } if x.rows() <= BATCH => {
            let (batch, dy, x) = (x.rows(), &dy.buffer()[..], interleave(engine, matrix(x.view()))?);
            let x = x.as_chunks().0;
            let rows = (ROWS * k).max(1);
            let chunks = m.par_chunks_mut(rows).zip(v.par_chunks_mut(rows)).zip(w.par_chunks_mut(rows)).enumerate();
            engine.alone_if(few(n, k, batch)).each(chunks, |(chunk, ((m, v), w))| {
                engine.unit.run(Factored { rate, dy, x, batch, n, k, first: chunk * ROWS, m, v, w });
            });
        }
        WeightGrad::Factored { dy, x } => {
            let mut g = engine.scratch.take(n * k)?;
            let product = product(matrix(dy.view()).t(), matrix(x.view()));
            sum_of_products(engine, Output::new(&mut g, n, k), Init::Zero, &[product])?;
            dense(engine, rate, &g, m, v, w);
        }
    }
    Ok(())
}

fn dense<E: Float>(engine: &Engine, rate: AdamRate, g: &[f32], m: &mut [f32], v: &mut [f32], w: &mut [E]) {
    let chunks = m.par_chunks_mut(FEW).zip(v.par_chunks_mut(FEW)).zip(w.par_chunks_mut(FEW));
    let task = |(((m, v), w), g)| engine.unit.run(Dense { rate, g, m, v, w });
    engine.each(chunks.zip(g.par_chunks(FEW)), task);
}

/// The scalars of a step in every lane.
struct Lanewise<S: Simd> {
    s: S,
    beta1: S::V,
    beta2: S::V,
    rest1: S::V,
    rest2: S::V,
    step: S::V,
    root_scale: S::V,
    eps: S::V,
}

impl<S: Simd> Lanewise<S> {
    #[inline(always)]
    fn new(s: S, rate: AdamRate) -> Self {
        let AdamRate { beta1, beta2, step_size, root_scale, eps } = rate;
        let (rest1, rest2) = (s.splat(1.0 - beta1), s.splat(1.0 - beta2));
        let (beta1, beta2, step) = (s.splat(beta1), s.splat(beta2), s.splat(-step_size));
        Self { s, beta1, beta2, rest1, rest2, step, root_scale: s.splat(root_scale), eps: s.splat(eps) }
    }

    /// One vector's step. Moments that have decayed to subnormal numbers are made 0: a unit that has died leaves thousands of
    /// them, each costs a hundred times what a normal number does, and 0.9 times the smallest rounds to itself for ever.
    #[inline(always)]
    fn step<E: Float>(&self, g: S::V, m: &mut [f32], v: &mut [f32], w: &mut [E]) {
        let s = self.s;
        let first = s.flush(s.mul_add(self.beta1, s.widen_at(m, 0), s.mul(self.rest1, g)));
        let second = s.flush(s.mul_add(s.mul(self.rest2, g), g, s.mul(self.beta2, s.widen_at(v, 0))));
        let root = s.mul_add(s.sqrt(second), self.root_scale, self.eps);
        let weight = s.mul_add(self.step, s.div(first, root), s.widen_at(w, 0));
        s.narrow_to(first, m);
        s.narrow_to(second, v);
        s.narrow_to(weight, w);
    }
}

struct Dense<'a, E> {
    rate: AdamRate,
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    w: &'a mut [E],
}

impl<E: Float> Kernel for Dense<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let lanewise = Lanewise::new(s, self.rate);
        let vectors = self.m.chunks_mut(LANES).zip(self.v.chunks_mut(LANES)).zip(self.w.chunks_mut(LANES));
        for (i, ((m, v), w)) in vectors.enumerate() {
            lanewise.step(s.widen_at(self.g, i), m, v, w);
        }
    }
}

/// `g = dyᵀ·x`, made a vector at a time and never stored: a batch of 10 makes it 10 multiply-adds a vector, hidden behind
/// the 24 bytes an element that the update moves.
struct Factored<'a, E> {
    rate: AdamRate,
    dy: &'a [E],
    x: &'a [Lanes<f32>],
    batch: usize,
    n: usize,
    k: usize,
    first: usize,
    m: &'a mut [f32],
    v: &'a mut [f32],
    w: &'a mut [E],
}

impl<E: Float> Kernel for Factored<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.w.len() / self.k;
        let whole = rows / SIDE_BY_SIDE * SIDE_BY_SIDE;
        for row in (0..whole).step_by(SIDE_BY_SIDE) {
            self.update::<S, SIDE_BY_SIDE>(s, row);
        }
        for row in whole..rows {
            self.update::<S, 1>(s, row);
        }
    }
}

impl<E: Float> Factored<'_, E> {
    /// R rows of the task's weights, from `row` on.
    #[inline(always)]
    fn update<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (k, lanewise) = (self.k, Lanewise::new(s, self.rate));
        let mut dy = [[0.0; R]; BATCH];
        for i in 0..self.batch {
            for q in 0..R {
                dy[i][q] = self.dy[i * self.n + self.first + row + q].to_f32();
            }
        }
        let lines = row * k..(row + R) * k;
        let (m, v, w) = (&mut self.m[lines.clone()], &mut self.v[lines.clone()], &mut self.w[lines]);
        for i in 0..k.div_ceil(LANES) {
            let mut g = [s.splat(0.0); R];
            for (dy, x) in dy.iter().zip(&self.x[i * self.batch..][..self.batch]) {
                let x = s.load(x);
                for q in 0..R {
                    g[q] = s.mul_add(s.splat(dy[q]), x, g[q]);
                }
            }
            for q in 0..R {
                let at = q * k + i * LANES..q * k + k.min((i + 1) * LANES);
                lanewise.step(g[q], &mut m[at.clone()], &mut v[at.clone()], &mut w[at]);
            }
        }
    }
}
