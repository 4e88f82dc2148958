//! What every contender computes on, and the verbs.
#![allow(unsafe_code, reason = "one stream needs none of cudarc's events")]

use std::cell::RefCell;
use std::error::Error;

use cudarc::driver::{CudaContext, CudaSlice};
use lowrank::op::{LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::random::Rng;
use lowrank::{Cuda, DType, Float, Tensor, bf16, f16};

use crate::blas::{Blas, Operand};
use crate::measure::Call;
use crate::shapes::Shape;

/// What the update is multiplied with.
const SCALE: f32 = 2.0;
/// Weights of all layers together: several times the L2 cache of any GPU.
const ENOUGH: usize = 256 << 20;

/// Multiplications and additions.
pub fn flop(verb: &str, Shape { m, k, n, r, .. }: Shape) -> f64 {
    let (base, update) = (m * n * k, m * r * (n + k));
    2.0 * match verb {
        "linear_forward" => base,
        "lora_forward" => base + update,
        "lora_merge" => n * k * r,
        _ => 2 * base + 3 * update,
    } as f64
}

/// Bytes that must pass through memory at least.
pub fn bytes(verb: &str, dtype: DType, Shape { m, k, n, r, .. }: Shape) -> f64 {
    let (w, adapter, activations) = (n * k, r * (n + k), m * (n + k));
    let elements = match verb {
        "linear_forward" => w + activations,
        "lora_forward" => w + adapter + activations,
        "lora_merge" => 2 * w + adapter,
        _ => 2 * w + 2 * adapter + 2 * activations,
    };
    (elements * dtype.size()) as f64
}

/// Turns off cudarc's events, which a graph cannot hold.
pub fn forget_events(context: &CudaContext) {
    // SAFETY: all work of this program is on one stream.
    unsafe { context.disable_event_tracking() };
}

/// Numbers in [-0.5, 0.5).
pub fn random<E: Float>(gpu: &Cuda<E>, rows: usize, cols: usize, seed: u64) -> lowrank::Result<Tensor<Cuda<E>>> {
    let mut rng = Rng::new(seed);
    let host: Vec<E> = (0..rows * cols).map(|_| E::from_f32(rng.unit() as f32 - 0.5)).collect();
    Tensor::from_slice(gpu, (rows, cols), &host)
}

/// A number as it is stored.
fn widen(dtype: DType, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (DType::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        _ => unreachable!("as long as the type says"),
    }
}

/// Several layers of one shape; what is put out lies in memory that all share.
pub struct Layers<E: Float> {
    shape: Shape,
    x: Tensor<Cuda<E>>,
    dy: Tensor<Cuda<E>>,
    w: Vec<RefCell<Tensor<Cuda<E>>>>,
    a: Vec<Tensor<Cuda<E>>>,
    b: Vec<Tensor<Cuda<E>>>,
    ours: RefCell<Ours<E>>,
    theirs: RefCell<Theirs>,
}

struct Ours<E: Float> {
    h: Tensor<Cuda<E>, f32>,
    y: Tensor<Cuda<E>>,
    da: Tensor<Cuda<E>, f32>,
    db: Tensor<Cuda<E>, f32>,
    dx: Tensor<Cuda<E>>,
}

/// A library that multiplies has `h`, `dh` and gradients in the element type.
struct Theirs {
    h: CudaSlice<u8>,
    y: CudaSlice<u8>,
    dh: CudaSlice<u8>,
    da: CudaSlice<u8>,
    db: CudaSlice<u8>,
    dx: CudaSlice<u8>,
    w: CudaSlice<u8>,
}

impl<E: Float> Layers<E> {
    pub fn new(gpu: &Cuda<E>, shape: Shape) -> Result<Self, Box<dyn Error>> {
        let Shape { m, k, n, r, .. } = shape;
        let count = ENOUGH.div_ceil(n * k * size_of::<E>());
        let each = |rows, cols, seed: u64| (0..count as u64).map(move |i| random(gpu, rows, cols, seed + 100 * i));
        let zeros = |rows, cols| Tensor::zeros(gpu, (rows, cols));
        let wide = |rows, cols| Tensor::zeros(gpu, (rows, cols));
        let bytes = |elements: usize| gpu.on_device().stream().alloc_zeros::<u8>(elements * size_of::<E>());
        Ok(Self {
            shape,
            x: random(gpu, m, k, 1)?,
            dy: random(gpu, m, n, 2)?,
            w: each(n, k, 3).map(|w| w.map(RefCell::new)).collect::<Result<_, _>>()?,
            a: each(r, k, 4).collect::<Result<_, _>>()?,
            b: each(n, r, 5).collect::<Result<_, _>>()?,
            ours: RefCell::new(Ours { h: wide(m, r)?, y: zeros(m, n)?, da: wide(r, k)?, db: wide(n, r)?, dx: zeros(m, k)? }),
            theirs: RefCell::new(Theirs {
                h: bytes(m * r)?,
                y: bytes(m * n)?,
                dh: bytes(m * r)?,
                da: bytes(r * k)?,
                db: bytes(n * r)?,
                dx: bytes(m * k)?,
                w: bytes(n * k)?,
            }),
        })
    }

    /// Each verb, and who does it; ours first.
    pub fn contenders<'c>(&'c self, gpu: &'c Cuda<E>, blas: &'c Blas) -> Vec<(&'static str, Vec<Call<'c>>)> {
        let mut verbs: Vec<(&'static str, Vec<Call<'c>>)> = vec![
            (
                "linear_forward",
                vec![("ours", Box::new(move |i| self.linear(gpu, i))), ("cublas", Box::new(move |i| self.product(blas, i)))],
            ),
            (
                "lora_forward",
                vec![
                    ("ours", Box::new(move |i| self.forward(gpu, i))),
                    ("cublas's bare product", Box::new(move |i| self.product(blas, i))),
                    ("cublas", Box::new(move |i| self.composed_forward(blas, i))),
                ],
            ),
        ];
        if self.shape.m >= 1024 {
            verbs.push((
                "lora_forward_backward",
                vec![
                    ("ours", Box::new(move |i| self.forward(gpu, i).and_then(|()| self.backward(gpu, i)))),
                    ("cublas", Box::new(move |i| self.composed_forward(blas, i).and_then(|()| self.composed_backward(blas, i)))),
                ],
            ));
            verbs.push((
                "lora_merge",
                vec![
                    ("ours", Box::new(move |i| self.merge(gpu, i))),
                    ("cublas", Box::new(move |i| self.composed_merge(blas, i))),
                ],
            ));
        }
        verbs
    }

    /// Everyone's `y` against f64, at some places; our merged weight too.
    pub fn check(&self, gpu: &Cuda<E>, blas: &Blas) -> Result<(), Box<dyn Error>> {
        let Shape { m, k, n, r, name } = self.shape;
        let wide = |tensor: &Tensor<Cuda<E>>| -> lowrank::Result<Vec<f64>> {
            Ok(tensor.to_vec(gpu)?.into_iter().map(|value| f64::from(value.to_f32())).collect())
        };
        let (x, w, a, b) = (wide(&self.x)?, wide(&self.w[0].borrow())?, wide(&self.a[0])?, wide(&self.b[0])?);
        let dot = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(left, right)| left * right).sum::<f64>();
        let row = |mat: &'_ [f64], i: usize, cols: usize| mat[i * cols..(i + 1) * cols].to_vec();
        self.forward(gpu, 0)?;
        let ours = wide(&self.ours.borrow().y)?;
        self.composed_forward(blas, 0)?;
        let stored = gpu.on_device().stream().clone_dtoh(&self.theirs.borrow().y)?;
        let theirs: Vec<f64> = stored.chunks_exact(size_of::<E>()).map(|bytes| widen(E::DTYPE, bytes)).collect();
        for place in 0..40 {
            let (i, j) = (place * 977 % m, place * 3571 % n);
            let h: Vec<f64> = (0..r).map(|d| dot(&row(&x, i, k), &row(&a, d, k))).collect();
            let want = dot(&row(&x, i, k), &row(&w, j, k)) + f64::from(SCALE) * dot(&h, &row(&b, j, r));
            // Of the size of the sum, not of the result: numbers in [-0.5, 0.5) cancel.
            let limit = 16.0 * E::DTYPE.unit_roundoff() * (k as f64).sqrt() * (1.0 + r as f64);
            for (who, got) in [("ours", ours[i * n + j]), ("cublas", theirs[i * n + j])] {
                if (got - want).abs() > limit {
                    return Err(format!("{name}: {who}: y[{i}, {j}] is {got}, want {want} ± {limit:.1e}").into());
                }
            }
        }
        Ok(())
    }

    fn one(&self, i: usize) -> usize {
        i % self.w.len()
    }

    fn linear(&self, gpu: &Cuda<E>, i: usize) -> Result<(), Box<dyn Error>> {
        let (w, y) = (&*self.w[self.one(i)].borrow(), &mut self.ours.borrow_mut().y);
        Ok(LinearForward { x: self.x.view(), w: w.into(), bias: None, y: y.into() }.run(gpu)?)
    }

    fn forward(&self, gpu: &Cuda<E>, i: usize) -> Result<(), Box<dyn Error>> {
        let (i, Ours { h, y, .. }) = (self.one(i), &mut *self.ours.borrow_mut());
        let (w, a, b) = (&*self.w[i].borrow(), &self.a[i], &self.b[i]);
        Ok(LoraForward {
            x: self.x.view(),
            w: Some(w.into()),
            bias: None,
            a: a.into(),
            b: b.into(),
            scale: SCALE,
            dropout: None,
            h: h.view_mut(),
            y: y.into(),
        }
        .run(gpu)?)
    }

    fn backward(&self, gpu: &Cuda<E>, i: usize) -> Result<(), Box<dyn Error>> {
        let (i, Ours { h, da, db, dx, .. }) = (self.one(i), &mut *self.ours.borrow_mut());
        let (x, w, a, b, dy, dx) = (&self.x, Some(&*self.w[i].borrow()), &self.a[i], &self.b[i], &self.dy, Some(dx));
        Ok(LoraBackward {
            x: x.view(),
            w: w.map(Into::into),
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
        .run(gpu)?)
    }

    fn merge(&self, gpu: &Cuda<E>, i: usize) -> Result<(), Box<dyn Error>> {
        let (i, scale) = (self.one(i), if i.is_multiple_of(2) { 1e-3 } else { -1e-3 });
        let w = &mut *self.w[i].borrow_mut();
        Ok(LoraMerge { a: (&self.a[i]).into(), b: (&self.b[i]).into(), scale, rounding: Rounding::Nearest, w: w.view_mut() }
            .run(gpu)?)
    }

    /// `y = x·Wᵀ`
    fn product(&self, blas: &Blas, i: usize) -> Result<(), Box<dyn Error>> {
        let Shape { m, k, n, .. } = self.shape;
        let w = self.w[self.one(i)].borrow();
        let operands = [Operand(self.x.buffer().memory().slice(), false), Operand(w.buffer().memory().slice(), true)];
        blas.multiply([m, n, k], 1.0, operands, 0.0, &mut self.theirs.borrow_mut().y)
    }

    /// `y = x·Wᵀ`, `h = x·Aᵀ`, `y += scale·h·Bᵀ`
    fn composed_forward(&self, blas: &Blas, i: usize) -> Result<(), Box<dyn Error>> {
        self.product(blas, i)?;
        let (Shape { m, k, n, r, .. }, i) = (self.shape, self.one(i));
        let Theirs { h, y, .. } = &mut *self.theirs.borrow_mut();
        let (x, a, b) =
            (self.x.buffer().memory().slice(), self.a[i].buffer().memory().slice(), self.b[i].buffer().memory().slice());
        blas.multiply([m, r, k], 1.0, [Operand(x, false), Operand(a, true)], 0.0, h)?;
        blas.multiply([m, n, r], SCALE, [Operand(h, false), Operand(b, true)], 1.0, y)
    }

    /// `dx = dy·W`, `dh = scale·dy·B`, `dx += dh·A`, `dA = dhᵀ·x`, `dB = scale·dyᵀ·h`
    fn composed_backward(&self, blas: &Blas, i: usize) -> Result<(), Box<dyn Error>> {
        let (Shape { m, k, n, r, .. }, i) = (self.shape, self.one(i));
        let Theirs { h, dh, da, db, dx, .. } = &mut *self.theirs.borrow_mut();
        let (x, dy, w) = (self.x.buffer().memory().slice(), self.dy.buffer().memory().slice(), self.w[i].borrow());
        let (w, a, b) = (w.buffer().memory().slice(), self.a[i].buffer().memory().slice(), self.b[i].buffer().memory().slice());
        blas.multiply([m, k, n], 1.0, [Operand(dy, false), Operand(w, false)], 0.0, dx)?;
        blas.multiply([m, r, n], SCALE, [Operand(dy, false), Operand(b, false)], 0.0, dh)?;
        blas.multiply([m, k, r], 1.0, [Operand(dh, false), Operand(a, false)], 1.0, dx)?;
        blas.multiply([r, k, m], 1.0, [Operand(dh, true), Operand(x, false)], 0.0, da)?;
        blas.multiply([n, r, m], SCALE, [Operand(dy, true), Operand(h, false)], 0.0, db)
    }

    /// `W += scale·B·A`, onto one weight, which is large enough
    fn composed_merge(&self, blas: &Blas, i: usize) -> Result<(), Box<dyn Error>> {
        let (Shape { k, n, r, .. }, i) = (self.shape, self.one(i));
        let operands = [Operand(self.b[i].buffer().memory().slice(), false), Operand(self.a[i].buffer().memory().slice(), false)];
        blas.multiply([n, k, r], 1e-3, operands, 1.0, &mut self.theirs.borrow_mut().w)
    }
}
