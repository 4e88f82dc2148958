//! Inputs: whole numbers whose sums are exact, and random numbers that the element type holds exactly.

use lowrank::op::Dropout;
use lowrank::random::Rng;
use lowrank::{Backend, Element, Float, Tensor};

use super::oracle::{Lora, Mat};

/// Rows, inputs, outputs, rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
}

/// Shapes for every kind of edge: empty, one, a prime, a tile plus or minus one, a rank above both dimensions, several blocks of the depth,
/// both sides of the limit between regimes.
pub fn shapes() -> Vec<Dims> {
    let odd = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 7, 2, 1), (7, 31, 29, 4), (10, 20, 30, 1), (5, 17, 33, 16), (13, 64, 15, 2)];
    let empty = [(0, 4, 3, 2), (4, 0, 3, 2), (4, 3, 0, 2), (0, 0, 0, 1)];
    let edges = [(15, 16, 17, 3), (16, 15, 16, 1), (17, 33, 63, 8), (63, 64, 65, 9), (64, 65, 64, 16), (65, 63, 33, 2)];
    let deep = [(4, 400, 6, 3), (20, 385, 40, 20), (33, 769, 18, 4), (10, 784, 100, 1), (1, 300, 257, 64), (170, 50, 400, 5)];
    let all = [&odd[..], &empty, &edges, &deep].concat();
    all.into_iter().map(|(m, k, n, r)| Dims { m, k, n, r }).collect()
}

/// Whole numbers in -4..=4 and a power of two as scale: each partial sum is a multiple of 1/4 below 2²², so any order of
/// summation gives the same bits.
pub fn whole(dims: Dims, seed: u64) -> Lora {
    let mut rng = Rng::new(seed);
    layer(dims, 0.25, || rng.below(9) as f64 - 4.0)
}

/// Gaussian numbers that `T` holds exactly.
pub fn random<T: Float>(dims: Dims, scale: f64, seed: u64) -> Lora {
    let mut rng = Rng::new(seed);
    layer(dims, f64::from(scale as f32), || f64::from(T::from_f32(rng.gaussian() as f32).to_f32()))
}

fn layer(Dims { m, k, n, r }: Dims, scale: f64, mut number: impl FnMut() -> f64) -> Lora {
    let mut mat = |rows, cols| Mat::from_vec(rows, cols, (0..rows * cols).map(|_| number()).collect());
    let (x, w, bias) = (mat(m, k), mat(n, k), Some(mat(1, n)));
    let (a, b, dy) = (mat(r, k), mat(n, r), mat(m, n));
    Lora { x, w, bias, a, b, dy, scale, mask: Mat::new(m, k, |_, _| 1.0) }
}

/// The factors of a dropout mask over `rows × cols`.
pub fn mask(dropout: Dropout, rows: usize, cols: usize) -> Mat {
    let factor = |e: usize| f64::from(dropout.factors(e as u64 / 4)[e % 4]);
    Mat::new(rows, cols, |i, j| factor(i * cols + j))
}

/// Uploads a matrix.
pub fn up<B: Backend, T: Float>(backend: &B, mat: &Mat) -> Tensor<B, T> {
    let host: Vec<T> = mat.data.iter().map(|&x| T::from_f32(x as f32)).collect();
    Tensor::from_slice(backend, (mat.rows, mat.cols), &host).unwrap()
}

/// An output filled with NaN, so that elements which a verb does not write are detected.
pub fn unwritten<B: Backend, T: Float>(backend: &B, rows: usize, cols: usize) -> Tensor<B, T> {
    Tensor::from_slice(backend, (rows, cols), &vec![T::from_f32(f32::NAN); rows * cols]).unwrap()
}

/// Downloads a matrix.
pub fn down<B: Backend, T: Element>(backend: &B, tensor: &Tensor<B, T>) -> Vec<T> {
    tensor.to_vec(backend).unwrap()
}
