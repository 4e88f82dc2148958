//! Adam in one pass: each weight and its two moments are read and written once, whatever the gradient is made of.

use rayon::prelude::*;

use super::Cpu;
use super::simd::{Kernel, LANES, Simd, Unit};
use crate::element::Float;
use crate::op::{Adam, AdamRate, WeightGrad};

/// Elements a task takes of a dense gradient.
const CHUNK: usize = 1 << 14;
/// Rows of weights a task takes of a factored one.
const ROWS: usize = 16;

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w -= step_size·m / (√v·root_scale + eps)`
pub(super) fn adam<E: Float>(unit: Unit, op: Adam<'_, Cpu<E>>) {
    let (rate, k) = (op.rate, op.w.cols());
    let (m, v, w) = (op.m.buffer_mut(), op.v.buffer_mut(), op.w.buffer_mut());
    match op.grad {
        WeightGrad::Dense(grad) => {
            let chunks = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)).zip(w.par_chunks_mut(CHUNK));
            let task = |(((m, v), w), g)| unit.run(Dense { rate, g, m, v, w });
            chunks.zip(grad.buffer().par_chunks(CHUNK)).for_each(task);
        }
        WeightGrad::Factored { dy, x } => {
            let (dy, x, n) = (&dy.buffer()[..], &x.buffer()[..], dy.cols());
            let rows = (ROWS * k).max(1);
            let chunks = m.par_chunks_mut(rows).zip(v.par_chunks_mut(rows)).zip(w.par_chunks_mut(rows)).enumerate();
            chunks.for_each(|(chunk, ((m, v), w))| {
                unit.run(Factored { rate, dy, x, n, k, first: chunk * ROWS, m, v, w });
            });
        }
    }
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

    /// One vector's step.
    #[inline(always)]
    fn step<E: Float>(&self, g: S::V, m: &mut [f32], v: &mut [f32], w: &mut [E]) {
        let s = self.s;
        let first = s.mul_add(self.beta1, s.widen_at(m, 0), s.mul(self.rest1, g));
        let second = s.mul_add(self.beta2, s.widen_at(v, 0), s.mul(self.rest2, s.mul(g, g)));
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
    x: &'a [E],
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
    fn run<S: Simd>(self, s: S) {
        let (k, lanewise) = (self.k, Lanewise::new(s, self.rate));
        let lines = self.m.chunks_mut(k).zip(self.v.chunks_mut(k)).zip(self.w.chunks_mut(k));
        for (row, ((m, v), w)) in lines.enumerate() {
            let dy = self.dy.iter().skip(self.first + row).step_by(self.n);
            let vectors = m.chunks_mut(LANES).zip(v.chunks_mut(LANES)).zip(w.chunks_mut(LANES));
            for (i, ((m, v), w)) in vectors.enumerate() {
                let mut g = s.splat(0.0);
                for (dy, x) in dy.clone().zip(self.x.chunks_exact(k)) {
                    g = s.mul_add(s.splat(dy.to_f32()), s.widen_at(x, i), g);
                }
                lanewise.step(g, m, v, w);
            }
        }
    }
}
