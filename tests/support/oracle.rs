//! The oracle: every verb in f64, written as its formula; slow and simple.

use std::ops::{Add, Mul};

use lowrank::{DType, Float};

/// A row-major matrix of f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Mat {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Mat {
    pub fn new(rows: usize, cols: usize, at: impl Fn(usize, usize) -> f64) -> Self {
        let data = (0..rows * cols).map(|e| at(e / cols, e % cols)).collect();
        Self { rows, cols, data }
    }

    pub fn from_vec(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { rows, cols, data }
    }

    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.cols + j]
    }

    pub fn t(&self) -> Self {
        Self::new(self.cols, self.rows, |i, j| self.at(j, i))
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { data: self.data.iter().map(|&x| f(x)).collect(), ..*self }
    }

    pub fn abs(&self) -> Self {
        self.map(f64::abs)
    }

    /// Element by element.
    pub fn times(&self, other: &Self) -> Self {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols));
        Self::new(self.rows, self.cols, |i, j| self.at(i, j) * other.at(i, j))
    }

    /// One row, added to every row.
    pub fn plus_row(&self, row: &Self) -> Self {
        Self::new(self.rows, self.cols, |i, j| self.at(i, j) + row.at(0, j))
    }

    /// The sum of the rows, as one row.
    pub fn column_sums(&self) -> Self {
        Self::new(1, self.cols, |_, j| (0..self.rows).map(|i| self.at(i, j)).sum())
    }

    pub fn sum(&self) -> f64 {
        self.data.iter().sum()
    }

    pub fn norm(&self) -> f64 {
        self.data.iter().map(|x| x * x).sum::<f64>().sqrt()
    }
}

impl Mul for &Mat {
    type Output = Mat;
    fn mul(self, rhs: &Mat) -> Mat {
        assert_eq!(self.cols, rhs.rows);
        Mat::new(self.rows, rhs.cols, |i, j| (0..self.cols).map(|p| self.at(i, p) * rhs.at(p, j)).sum())
    }
}

impl Mul<f64> for &Mat {
    type Output = Mat;
    fn mul(self, scale: f64) -> Mat {
        self.map(|x| x * scale)
    }
}

impl Add for &Mat {
    type Output = Mat;
    fn add(self, rhs: &Mat) -> Mat {
        assert_eq!((self.rows, self.cols), (rhs.rows, rhs.cols));
        Mat::new(self.rows, self.cols, |i, j| self.at(i, j) + rhs.at(i, j))
    }
}

/// The operands of one low-rank layer.
#[derive(Clone, Debug)]
pub struct Lora {
    pub x: Mat,
    pub w: Mat,
    pub bias: Option<Mat>,
    pub a: Mat,
    pub b: Mat,
    pub dy: Mat,
    pub scale: f64,
    /// The dropout mask that the input of the adapter is multiplied by: all ones without dropout.
    pub mask: Mat,
}

/// The outputs of the forward and the backward pass.
pub struct LoraOut {
    pub h: Mat,
    pub y: Mat,
    pub da: Mat,
    pub db: Mat,
    pub dbias: Mat,
    pub dx: Mat,
}

impl Lora {
    /// `h = (x ⊙ mask)·Aᵀ`, `y = x·Wᵀ + bias + scale·h·Bᵀ`
    pub fn forward(&self) -> (Mat, Mat) {
        let h = &self.x.times(&self.mask) * &self.a.t();
        let y = &(&self.x * &self.w.t()) + &(&(&h * &self.b.t()) * self.scale);
        let y = self.bias.as_ref().map_or(y.clone(), |bias| y.plus_row(bias));
        (h, y)
    }

    /// `dh = scale·dy·B`, `dA = dhᵀ·(x ⊙ mask)`, `dB = scale·dyᵀ·h`, `dbias = Σ dy`, `dx = dy·W + (dh·A) ⊙ mask`
    pub fn run(&self) -> LoraOut {
        let (h, y) = self.forward();
        let dh = &(&self.dy * &self.b) * self.scale;
        let da = &dh.t() * &self.x.times(&self.mask);
        let db = &(&self.dy.t() * &h) * self.scale;
        let dx = &(&self.dy * &self.w) + &(&dh * &self.a).times(&self.mask);
        LoraOut { h, y, da, db, dbias: self.dy.column_sums(), dx }
    }

    /// `W + scale·B·A`
    pub fn merged(&self) -> Mat {
        &self.w + &(&(&self.b * &self.a) * self.scale)
    }

    /// `‖W + scale·B·A‖` by rows
    pub fn row_norms(&self) -> Mat {
        let merged = self.merged();
        Mat::new(1, merged.rows, |_, i| (0..merged.cols).map(|j| merged.at(i, j).powi(2)).sum::<f64>().sqrt())
    }

    /// The layer with every element replaced by its magnitude, for bounds on rounding errors.
    pub fn magnitudes(&self) -> Self {
        let [x, w, a, b, dy, mask] = [&self.x, &self.w, &self.a, &self.b, &self.dy, &self.mask].map(Mat::abs);
        Self { x, w, bias: self.bias.as_ref().map(Mat::abs), a, b, dy, scale: self.scale.abs(), mask }
    }
}

/// The operands of DoRA's second operation.
#[derive(Clone, Debug)]
pub struct Decomposed {
    pub z: Mat,
    pub magnitude: Mat,
    pub norm: Mat,
    pub bias: Option<Mat>,
    pub dy: Mat,
}

impl Decomposed {
    /// `magnitude / norm`, and 0 where `norm` is 0, in every row
    fn factors(&self) -> Mat {
        let factor = |j| if self.norm.at(0, j) == 0.0 { 0.0 } else { self.magnitude.at(0, j) / self.norm.at(0, j) };
        Mat::new(self.z.rows, self.z.cols, |_, j| factor(j))
    }

    /// `y = (magnitude / norm)·z + bias`
    pub fn forward(&self) -> Mat {
        let y = self.factors().times(&self.z);
        self.bias.as_ref().map_or(y.clone(), |bias| y.plus_row(bias))
    }

    /// `dz = (magnitude / norm)·dy`, `dmagnitude = Σ dy·z / norm`, `dbias = Σ dy`
    pub fn backward(&self) -> (Mat, Mat, Mat) {
        let ones = Self { magnitude: self.magnitude.map(|_| 1.0), ..self.clone() };
        let dmagnitude = ones.factors().times(&self.dy).times(&self.z).column_sums();
        (self.factors().times(&self.dy), dmagnitude, self.dy.column_sums())
    }

    /// The operands with every element replaced by its magnitude.
    pub fn magnitudes(&self) -> Self {
        let [z, magnitude, norm, dy] = [&self.z, &self.magnitude, &self.norm, &self.dy].map(Mat::abs);
        Self { z, magnitude, norm, bias: self.bias.as_ref().map(Mat::abs), dy }
    }
}

/// Stochastic rounding: the neighbour of `value` in `T` away from zero if the position of `value` between its two neighbours, from 0 to 1,
/// plus the low bits of `word`, as a fraction, is at least 1; else the other neighbour.
pub fn round_stochastic<T: Float>(value: f64, word: u32) -> f64 {
    let (significant, least, largest) = match T::DTYPE {
        DType::F32 => return f64::from(value as f32),
        DType::F16 => (11, -14, 65504.0),
        DType::BF16 => (8, -126, 3.3895313892515355e38),
    };
    let size = value.abs();
    if size >= largest {
        return f64::from(T::from_f32(value as f32).to_f32());
    }
    let exponent = if size == 0.0 { least } else { (size.log2().floor() as i32).max(least) };
    let step = 2f64.powi(exponent - (significant - 1));
    let bits = if T::DTYPE == DType::F16 && size < 2f64.powi(least) { 21 } else { 24 - significant as u32 };
    let chance = f64::from(word % (1 << bits)) / f64::from(1 << bits);
    let below = (size / step).floor();
    let up = if size / step - below + chance >= 1.0 { 1.0 } else { 0.0 };
    (step * (below + up)).copysign(value)
}

/// `mean(-log softmax(logits)[label])`, `(softmax(logits) - onehot(label)) / m`
pub fn cross_entropy(logits: &Mat, labels: &[u32]) -> (f64, Mat) {
    let m = logits.rows as f64;
    let power_sum = |i: usize| (0..logits.cols).map(|j| logits.at(i, j).exp()).sum::<f64>();
    let softmax = Mat::new(logits.rows, logits.cols, |i, j| logits.at(i, j).exp() / power_sum(i));
    let loss = labels.iter().enumerate().map(|(i, &label)| -softmax.at(i, label as usize).ln()).sum::<f64>() / m;
    let onehot = |i: usize, j: usize| if labels[i] as usize == j { 1.0 } else { 0.0 };
    (loss, Mat::new(logits.rows, logits.cols, |i, j| (softmax.at(i, j) - onehot(i, j)) / m))
}

/// One step of AdamW at time `t`: `(m, v, w)` after it. Without weight decay it is Adam's.
pub fn adam(g: &Mat, m: &Mat, v: &Mat, w: &Mat, rate: [f64; 5], t: i32) -> (Mat, Mat, Mat) {
    let [lr, beta1, beta2, eps, weight_decay] = rate;
    let m = &(m * beta1) + &(g * (1.0 - beta1));
    let v = &(v * beta2) + &(&g.times(g) * (1.0 - beta2));
    let step = |i: usize, j: usize| {
        let (m_hat, v_hat) = (m.at(i, j) / (1.0 - beta1.powi(t)), v.at(i, j) / (1.0 - beta2.powi(t)));
        (1.0 - lr * weight_decay) * w.at(i, j) - lr * m_hat / (v_hat.sqrt() + eps)
    };
    let w = Mat::new(w.rows, w.cols, step);
    (m, v, w)
}

/// The element that a step starts from: the master if it rounds to `w`, else `w`.
pub fn master_or_weight<T: Float>(master: &Mat, w: &Mat) -> Mat {
    let rounded = |x: f64| f64::from(T::from_f32(x as f32).to_f32());
    Mat::new(w.rows, w.cols, |i, j| if rounded(master.at(i, j)) == w.at(i, j) { master.at(i, j) } else { w.at(i, j) })
}
