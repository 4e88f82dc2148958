//! Adam in one pass over memory: each weight, its master and its two moments are read and written once. A factored gradient is
//! computed in registers.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Init, Output, interleave, sum_of_products};
use super::linear::{matrix, product};
use super::simd::{Kernel, LANES, Lanes, Simd};
use super::small_work::{SMALL_MATRIX, is_small_product};
use super::{Cpu, Engine};
use crate::element::Float;
use crate::error::Result;
use crate::op::{Adam, AdamRate, WeightGrad};

/// Rows of the weight in a task with a factored gradient.
const ROWS: usize = 16;
/// Rows updated at the same time: each vector of `x` is loaded once for all of them.
const ROWS_AT_ONCE: usize = 4;
/// The largest batch for which a factored gradient is computed in registers. It takes a multiply-add for each element and row
/// of the batch, and saves 8 bytes of memory traffic for each element.
const BATCH: usize = 64;

/// `m = β₁·m + (1-β₁)·g`, `v = β₂·v + (1-β₂)·g²`, `w = decay·w - step_size·m / (√v·root_scale + eps)`
pub(super) fn adam<E: Float>(engine: &Engine, op: Adam<'_, Cpu<E>>) -> Result<()> {
    let (rate, n, k) = (op.rate, op.w.rows(), op.w.cols());
    let state = State {
        m: op.m.buffer_mut(),
        v: op.v.buffer_mut(),
        master: op.master.map(|master| &mut master.buffer_mut()[..]),
        w: op.w.buffer_mut(),
    };
    if state.w.is_empty() {
        return Ok(()); // its other dimension may be of any size
    }
    match op.grad {
        WeightGrad::Dense(g) => dense(engine, rate, g.buffer(), state),
        WeightGrad::Factored { dy, x } if x.rows() <= BATCH => {
            let (batch, dy, x) = (x.rows(), &dy.buffer()[..], interleave(engine, matrix(x.view()))?);
            let x = x.as_chunks().0;
            state.each_chunk(&engine.sequential_if(is_small_product(n, k, batch)), (ROWS * k).max(1), |chunk, state| {
                engine.unit.run(Factored { rate, dy, x, batch, n, k, first: chunk * ROWS, state });
            });
        }
        WeightGrad::Factored { dy, x } => {
            let mut g = engine.scratch.take(n * k)?;
            let product = product(matrix(dy.view()).t(), matrix(x.view()));
            sum_of_products(engine, Output::new(&mut g, n, k), Init::Zero, &[product])?;
            dense(engine, rate, &g, state);
        }
    }
    Ok(())
}

fn dense<E: Float>(engine: &Engine, rate: AdamRate, g: &[f32], state: State<'_, E>) {
    state.each_chunk(engine, SMALL_MATRIX, |chunk, state| engine.unit.run(Dense { rate, g: &g[chunk * SMALL_MATRIX..], state }));
}

/// The operands that a step updates.
struct State<'a, E> {
    m: &'a mut [f32],
    v: &'a mut [f32],
    /// The `f32` copy of `w`.
    master: Option<&'a mut [f32]>,
    w: &'a mut [E],
}

impl<E: Float> State<'_, E> {
    /// A range of the elements.
    #[inline(always)]
    fn part(&mut self, range: Range<usize>) -> State<'_, E> {
        State {
            m: &mut self.m[range.clone()],
            v: &mut self.v[range.clone()],
            master: self.master.as_mut().map(|master| &mut master[range.clone()]),
            w: &mut self.w[range],
        }
    }

    /// Calls `task` with the number of each chunk of `len` elements, and the chunk.
    fn each_chunk(self, engine: &Engine, len: usize, task: impl Fn(usize, State<'_, E>) + Send + Sync) {
        let State { m, v, master, w } = self;
        let chunks = m.par_chunks_mut(len).zip(v.par_chunks_mut(len)).zip(w.par_chunks_mut(len)).enumerate();
        match master {
            None => engine.each(chunks, |(chunk, ((m, v), w))| task(chunk, State { m, v, master: None, w })),
            Some(master) => engine.each(chunks.zip(master.par_chunks_mut(len)), |((chunk, ((m, v), w)), master)| {
                task(chunk, State { m, v, master: Some(master), w });
            }),
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
    decay: S::V,
}

impl<S: Simd> Lanewise<S> {
    #[inline(always)]
    fn new(s: S, rate: AdamRate) -> Self {
        let AdamRate { beta1, beta2, step_size, root_scale, eps, decay } = rate;
        let (rest1, rest2) = (s.splat(1.0 - beta1), s.splat(1.0 - beta2));
        let (beta1, beta2, step) = (s.splat(beta1), s.splat(beta2), s.splat(-step_size));
        let (root_scale, eps, decay) = (s.splat(root_scale), s.splat(eps), s.splat(decay));
        Self { s, beta1, beta2, rest1, rest2, step, root_scale, eps, decay }
    }

    /// The step of one vector. Moments that decay to subnormal numbers are set to 0. The moments of a neuron that no longer has
    /// a gradient would stay subnormal, since 0.9 times the smallest number rounds to itself, and arithmetic on them takes a
    /// hundred times as long.
    #[inline(always)]
    fn step<E: Float>(&self, g: S::V, state: State<'_, E>) {
        let (s, State { m, v, master, w }) = (self.s, state);
        let first = s.flush(s.mul_add(self.beta1, s.widen_at(m, 0), s.mul(self.rest1, g)));
        let second = s.flush(s.mul_add(s.mul(self.rest2, g), g, s.mul(self.beta2, s.widen_at(v, 0))));
        let root = s.mul_add(s.sqrt(second), self.root_scale, self.eps);
        let before = match &master {
            Some(master) => self.weight(master, w),
            None => s.widen_at(w, 0),
        };
        let weight = s.mul_add(self.step, s.div(first, root), s.mul(self.decay, before));
        s.narrow_to(first, m);
        s.narrow_to(second, v);
        s.narrow_to(weight, w);
        if let Some(master) = master {
            s.narrow_to(weight, master);
        }
    }

    /// The weight in `f32`: the master where `w` is the rounded master, else `w`.
    #[inline(always)]
    fn weight<E: Float>(&self, master: &[f32], w: &[E]) -> S::V {
        let (s, mut rounded) = (self.s, [E::default(); LANES]);
        let (master, w) = (s.widen_at(master, 0), s.widen_at(w, 0));
        s.narrow(master, &mut rounded);
        s.if_equal(s.widen(&rounded), w, master, w)
    }
}

struct Dense<'a, E> {
    rate: AdamRate,
    /// Starts with the element that belongs to the first of `state`.
    g: &'a [f32],
    state: State<'a, E>,
}

impl<E: Float> Kernel for Dense<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (lanewise, len) = (Lanewise::new(s, self.rate), self.state.w.len());
        for i in 0..len.div_ceil(LANES) {
            lanewise.step(s.widen_at(self.g, i), self.state.part(i * LANES..len.min((i + 1) * LANES)));
        }
    }
}

/// A step with `g = dyᵀ·x`, computed a vector at a time in registers. For a batch of 10 rows, its 10 multiply-adds for each
/// vector take less time than the memory traffic of the update, 24 bytes for each element.
struct Factored<'a, E> {
    rate: AdamRate,
    dy: &'a [E],
    x: &'a [Lanes<f32>],
    batch: usize,
    n: usize,
    k: usize,
    first: usize,
    state: State<'a, E>,
}

impl<E: Float> Kernel for Factored<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.state.w.len() / self.k;
        let whole = rows / ROWS_AT_ONCE * ROWS_AT_ONCE;
        for row in (0..whole).step_by(ROWS_AT_ONCE) {
            self.update::<S, ROWS_AT_ONCE>(s, row);
        }
        for row in whole..rows {
            self.update::<S, 1>(s, row);
        }
    }
}

impl<E: Float> Factored<'_, E> {
    /// Updates R rows of the task, from `row` on.
    #[inline(always)]
    fn update<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (k, lanewise) = (self.k, Lanewise::new(s, self.rate));
        let mut dy = [[0.0; R]; BATCH];
        for i in 0..self.batch {
            for q in 0..R {
                dy[i][q] = self.dy[i * self.n + self.first + row + q].to_f32();
            }
        }
        let mut state = self.state.part(row * k..(row + R) * k);
        for i in 0..k.div_ceil(LANES) {
            let mut g = [s.splat(0.0); R];
            for (dy, x) in dy.iter().zip(&self.x[i * self.batch..][..self.batch]) {
                let x = s.load(x);
                for q in 0..R {
                    g[q] = s.mul_add(s.splat(dy[q]), x, g[q]);
                }
            }
            for q in 0..R {
                lanewise.step(g[q], state.part(q * k + i * LANES..q * k + k.min((i + 1) * LANES)));
            }
        }
    }
}
