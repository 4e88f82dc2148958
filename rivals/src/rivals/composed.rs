//! The verbs out of a library's products: strides instead of copies, `out += …` instead of an addition, nothing allocated.

use lowrank::{Backend, Cpu, Float, Result};

use crate::layer::{Contender, Layer, Outputs, SCALE, Verb, widened};

type Buffer<E> = <Cpu<E> as Backend>::Buffer<E>;

/// A matrix anywhere in memory.
#[derive(Clone, Copy)]
pub struct View<'a, E> {
    pub data: &'a [E],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, E> View<'a, E> {
    fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Transposed.
    pub fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// The columns from `first` on, `count` of them.
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols);
        let skipped = if self.rows * count == 0 { 0 } else { first * self.col_stride };
        Self { data: &self.data[skipped..], cols: count, ..self }
    }
}

/// What a library offers.
pub trait Product<E> {
    /// As the table calls the library.
    const NAME: &'static str;
    /// How many roundings to `E` a product of that depth goes through.
    fn roundings(_depth: usize) -> usize {
        1
    }
    /// `out = alpha·lhs·rhs`, or `out += …`; `out` is row-major. Runs inside a pool of `threads` threads.
    fn product(&self, out: &mut [E], add: bool, alpha: f32, lhs: View<'_, E>, rhs: View<'_, E>, threads: usize);
}

pub struct Composed<E: Float, P> {
    verb: Verb,
    library: P,
    pool: rayon::ThreadPool,
    results: Results<E>,
    /// Merging and unmerging take turns, so that the weights stay as large as they are.
    scale: f32,
    roundings: usize,
}

struct Results<E: Float> {
    h: Buffer<E>,
    y: Buffer<E>,
    dh: Buffer<E>,
    da: Buffer<E>,
    db: Buffer<E>,
    dx: Buffer<E>,
    w: Buffer<E>,
}

impl<E: Float, P: Product<E>> Composed<E, P> {
    pub fn new(library: P, layer: &Layer<Cpu<E>>, verb: Verb) -> Result<Self> {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let cpu = &layer.backend;
        let zeros = |len| cpu.zeros(len);
        let w = if verb == Verb::LoraMerge { cpu.upload(layer.w.buffer())? } else { zeros(0)? };
        let (h, dh, y, dx) = (zeros(m * r)?, zeros(m * r)?, zeros(m * n)?, zeros(m * k)?);
        let results = Results { h, y, dh, da: zeros(r * k)?, db: zeros(n * r)?, dx, w };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(cpu.threads()).build().expect("threads");
        let roundings = P::roundings(n.max(k)) + P::roundings(r);
        Ok(Self { verb, library, pool, results, scale: SCALE, roundings })
    }
}

impl<E: Float, P: Product<E> + Sync> Contender<Cpu<E>> for Composed<E, P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn verb(&self) -> Verb {
        self.verb
    }

    fn run(&mut self, layer: &Layer<Cpu<E>>) {
        let (m, k, n, r) = (layer.shape.m, layer.shape.k, layer.shape.n, layer.shape.r);
        let x = View::new(layer.x.buffer(), m, k);
        let (a, b, dy) =
            (View::new(layer.a.buffer(), r, k), View::new(layer.b.buffer(), n, r), View::new(layer.dy.buffer(), m, n));
        let base = View::new(layer.w.buffer(), n, k);
        let (verb, scale, threads) = (self.verb, self.scale, self.pool.current_num_threads());
        let (library, Results { h, y, dh, da, db, dx, w }) = (&self.library, &mut self.results);
        self.pool.install(|| {
            let set = |out: &mut [E], alpha, lhs, rhs| library.product(out, false, alpha, lhs, rhs, threads);
            let add = |out: &mut [E], alpha, lhs, rhs| library.product(out, true, alpha, lhs, rhs, threads);
            if verb == Verb::LoraMerge {
                return add(w, scale, b, a);
            }
            set(y, 1.0, x, base.t());
            if verb == Verb::LinearForward {
                return;
            }
            set(h, 1.0, x, a.t());
            let h = View::new(h, m, r);
            add(y, scale, h, b.t());
            if verb == Verb::LoraForward {
                return;
            }
            set(dh, scale, dy, b);
            let dh = View::new(dh, m, r);
            set(da, 1.0, dh.t(), x);
            set(db, scale, dy.t(), h);
            set(dx, 1.0, dy, base);
            add(dx, 1.0, dh, a);
        });
        if verb == Verb::LoraMerge {
            self.scale = -self.scale;
        }
    }

    fn outputs(&self, _: &Layer<Cpu<E>>) -> Outputs {
        let Results { y, da, db, dx, w, .. } = &self.results;
        Outputs { y: widened(y), da: widened(da), db: widened(db), dx: widened(dx), w: widened(w) }
    }

    fn roundings(&self) -> usize {
        self.roundings
    }
}
