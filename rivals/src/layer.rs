//! What every contender computes on: one layer in one memory, and the verbs.

use std::fmt;

use lowrank::random::Rng;
use lowrank::{Backend, Float, Result, Tensor};

use crate::shapes::Shape;

/// What the update is multiplied with.
pub const SCALE: f32 = 2.0;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Verb {
    /// `y = x·Wᵀ`
    LinearForward,
    /// `h = x·Aᵀ`, `y = x·Wᵀ + scale·h·Bᵀ`
    LoraForward,
    /// The same, then `dh = scale·dy·B`, `dA = dhᵀ·x`, `dB = scale·dyᵀ·h`, `dx = dy·W + dh·A`
    LoraForwardBackward,
    /// `W += scale·B·A`
    LoraMerge,
}

impl Verb {
    /// Multiplications and additions.
    pub fn flop(self, Shape { m, k, n, r, .. }: Shape) -> f64 {
        let (base, update) = (m * n * k, m * r * (n + k));
        2.0 * match self {
            Verb::LinearForward => base,
            Verb::LoraForward => base + update,
            Verb::LoraForwardBackward => 2 * base + 3 * update,
            Verb::LoraMerge => n * k * r,
        } as f64
    }

    /// Elements that must come from memory at least: `W` for each product with it, and the rest once. Merging writes `W` as well.
    pub fn elements(self, Shape { m, k, n, r, .. }: Shape) -> f64 {
        let (w, adapter, activations) = (n * k, r * (n + k), m * (n + k));
        (match self {
            Verb::LinearForward => w + activations,
            Verb::LoraForward => w + adapter + activations,
            Verb::LoraForwardBackward => 2 * w + 2 * adapter + 2 * activations,
            Verb::LoraMerge => 2 * w + adapter,
        }) as f64
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::LinearForward => "linear_forward",
            Verb::LoraForward => "lora_forward",
            Verb::LoraForwardBackward => "lora_forward_backward",
            Verb::LoraMerge => "lora_merge",
        })
    }
}

/// The inputs, the same memory for everyone.
pub struct Layer<B: Backend> {
    pub shape: Shape,
    pub backend: B,
    pub x: Tensor<B>,
    pub w: Tensor<B>,
    pub a: Tensor<B>,
    pub b: Tensor<B>,
    pub dy: Tensor<B>,
}

impl<B: Backend> Layer<B> {
    /// Numbers in `[-0.5, 0.5)` that the backend's element type holds exactly.
    pub fn new(backend: B, shape: Shape) -> Result<Self> {
        let mut rng = Rng::new(1);
        let mut new = |rows: usize, cols: usize| {
            let number = |word: u32| B::Elem::from_f32((word >> 8) as f32 / (1 << 24) as f32 - 0.5);
            let host: Vec<B::Elem> = (0..rows * cols).map(|_| number(rng.word())).collect();
            Tensor::from_slice(&backend, (rows, cols), &host)
        };
        let Shape { m, k, n, r, .. } = shape;
        let (x, w, a, b, dy) = (new(m, k)?, new(n, k)?, new(r, k)?, new(n, r)?, new(m, n)?);
        Ok(Self { shape, backend, x, w, a, b, dy })
    }
}

/// What a contender's last run put out, widened; what the verb does not compute is empty.
#[derive(Default)]
pub struct Outputs {
    pub y: Vec<f32>,
    pub da: Vec<f32>,
    pub db: Vec<f32>,
    pub dx: Vec<f32>,
    pub w: Vec<f32>,
}

/// Whoever computes the verbs. Outputs are allocated when it is made and not in a run, if the library lets its users do so.
pub trait Contender<B: Backend> {
    /// As the table's head and the rows of JSON call it.
    fn name(&self) -> &'static str;
    /// The verb it was made for.
    fn verb(&self) -> Verb;
    /// That verb, once.
    fn run(&mut self, layer: &Layer<B>);
    /// What the last run put out.
    fn outputs(&self, layer: &Layer<B>) -> Outputs;
    /// How many more roundings to `E` a result goes through than one that is summed in `f32` and rounded once.
    fn roundings(&self) -> usize {
        0
    }
}

/// Exact.
pub fn widened<T: Float>(stored: &[T]) -> Vec<f32> {
    stored.iter().map(|x| x.to_f32()).collect()
}
