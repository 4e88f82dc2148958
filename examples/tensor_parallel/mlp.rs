//! Two linear layers with low-rank updates, cut over ranks as Megatron-LM cuts them (M. Shoeybi et al., 2019).
//!
//! ```text
//! z = relu(x·W₁ᵀ + scale·(x·A₁ᵀ)·B₁ᵀ)     column-parallel: a rank has some outputs, rows of W₁ and B₁, and all of A₁
//! y =      z·W₂ᵀ + scale·(z·A₂ᵀ)·B₂ᵀ      row-parallel: a rank has some inputs, columns of W₂ and A₂, and all of B₂
//! ```
//!
//! Each rank computes its part of `z`, which no other rank needs. Everything else that a rank computes in part is a sum over the
//! ranks, since it is linear in that part: `y` in the forward pass, and `dx`, `dA₁` and `dB₂` in the backward pass. So each pass
//! has one all-reduce. `dB₁` and `dA₂` are those of the rank's own rows and columns, and stay where they are.

use std::ops::Range;

use lowrank::distributed::{Communicator, shard};
use lowrank::op::{LoraBackward, LoraForward, Relu, ReluBackward};
use lowrank::{Cpu, MatMut, MatRef, Result};

/// A matrix in memory that the host framework lends.
type Matrix<'w> = MatRef<'w, Cpu<f32>>;

/// A linear layer with a low-rank update, `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`, or a part of one.
#[derive(Clone, Copy)]
pub struct Layer<'w> {
    /// `n×k`
    pub w: Matrix<'w>,
    /// `r×k`
    pub a: Matrix<'w>,
    /// `n×r`
    pub b: Matrix<'w>,
    /// Factor of the update.
    pub scale: f32,
}

impl Layer<'_> {
    /// Some outputs of the layer: column-parallel. Nothing is copied.
    fn column_parallel(self, outputs: Range<usize>) -> Result<Self> {
        Ok(Self { w: self.w.row_range(outputs.clone())?, b: self.b.row_range(outputs)?, ..self })
    }

    /// Some inputs of the layer: row-parallel. Nothing is copied.
    fn row_parallel(self, inputs: Range<usize>) -> Result<Self> {
        Ok(Self { w: self.w.column_range(inputs.clone())?, a: self.a.column_range(inputs)?, ..self })
    }

    fn inputs(&self) -> usize {
        self.w.cols()
    }

    fn outputs(&self) -> usize {
        self.w.rows()
    }

    fn rank(&self) -> usize {
        self.a.rows()
    }

    /// Returns `h = x·Aᵀ` and `y`.
    fn forward(&self, cpu: &Cpu<f32>, x: Matrix<'_>) -> Result<[Vec<f32>; 2]> {
        let m = x.rows();
        let [mut h, mut y] = [vec![0.0; m * self.rank()], vec![0.0; m * self.outputs()]];
        let Self { w, a, b, scale } = *self;
        let (to_h, to_y) = (MatMut::from_slice(&mut h, (m, self.rank()))?, MatMut::from_slice(&mut y, (m, self.outputs()))?);
        LoraForward { x, w: Some(w.into()), bias: None, a: a.into(), b: b.into(), scale, dropout: None, h: to_h, y: to_y.into() }
            .run(cpu)?;
        Ok([h, y])
    }

    /// Writes the gradients of the input and of the factors.
    fn backward(&self, cpu: &Cpu<f32>, [x, h, dy]: [Matrix<'_>; 3], [dx, da, db]: [&mut [f32]; 3]) -> Result<()> {
        let dx = MatMut::from_slice(dx, x.shape())?;
        let [da, db] = [MatMut::from_slice(da, self.a.shape())?, MatMut::from_slice(db, self.b.shape())?];
        let Self { w, a, b, scale } = *self;
        let (w, a, b, dx) = (Some(w.into()), a.into(), b.into(), Some(dx.into()));
        LoraBackward { x, w, a, b, h, dy, scale, dropout: None, da, db, dbias: None, dx }.run(cpu)
    }
}

/// The part of two layers that a rank computes.
pub struct ParallelMlp<'w, C> {
    first: Layer<'w>,
    second: Layer<'w>,
    comm: &'w C,
}

/// What the backward pass needs, and `y`, which all ranks have.
pub struct Forward {
    h1: Vec<f32>,
    z: Vec<f32>,
    h2: Vec<f32>,
    /// `m×n`
    pub y: Vec<f32>,
}

/// The gradients of a batch.
pub struct Gradients {
    /// `m×k`, on all ranks.
    pub dx: Vec<f32>,
    /// `r×k`, on all ranks.
    pub da1: Vec<f32>,
    /// Of this rank's rows of `B₁`.
    pub db1: Vec<f32>,
    /// Of this rank's columns of `A₂`.
    pub da2: Vec<f32>,
    /// `n×r`, on all ranks.
    pub db2: Vec<f32>,
}

impl<'w, C: Communicator> ParallelMlp<'w, C> {
    /// This rank's part of two whole layers, as views of their memory. The numbers between the layers are shared out evenly.
    pub fn new(first: Layer<'w>, second: Layer<'w>, comm: &'w C) -> Result<Self> {
        let mine = shard(first.outputs(), comm.rank(), comm.size());
        Ok(Self { first: first.column_parallel(mine.clone())?, second: second.row_parallel(mine)?, comm })
    }

    /// One all-reduce, of `y`: `4·m·n` bytes. Every rank has the same `x`.
    pub fn forward(&self, cpu: &Cpu<f32>, x: Matrix<'_>) -> Result<Forward> {
        let hidden = (x.rows(), self.first.outputs());
        let [h1, before] = self.first.forward(cpu, x)?;
        let mut z = vec![0.0; before.len()];
        Relu { x: MatRef::from_slice(&before, hidden)?, y: MatMut::from_slice(&mut z, hidden)? }.run(cpu)?;
        let [h2, mut y] = self.second.forward(cpu, MatRef::from_slice(&z, hidden)?)?;
        self.comm.all_reduce(&mut y)?;
        Ok(Forward { h1, z, h2, y })
    }

    /// One all-reduce, of `dx`, `dA₁` and `dB₂`: `4·(m·k + r·k + n·r)` bytes. Every rank has the same `dy`.
    pub fn backward(&self, cpu: &Cpu<f32>, x: Matrix<'_>, forward: &Forward, dy: Matrix<'_>) -> Result<Gradients> {
        let (Self { first, second, comm }, m) = (self, x.rows());
        let hidden = (m, first.outputs());
        let mut summed = vec![0.0; m * first.inputs() + first.rank() * first.inputs() + second.outputs() * second.rank()];
        let (dx, rest) = summed.split_at_mut(m * first.inputs());
        let (da1, db2) = rest.split_at_mut(first.rank() * first.inputs());
        let [mut dz, mut dbefore] = [vec![0.0; hidden.0 * hidden.1], vec![0.0; hidden.0 * hidden.1]];
        let mut da2 = vec![0.0; second.rank() * second.inputs()];
        let mut db1 = vec![0.0; first.outputs() * first.rank()];

        let (z, h2) = (MatRef::from_slice(&forward.z, hidden)?, MatRef::from_slice(&forward.h2, (m, second.rank()))?);
        second.backward(cpu, [z, h2, dy], [&mut dz, &mut da2, db2])?;
        ReluBackward { y: z, dy: MatRef::from_slice(&dz, hidden)?, dx: MatMut::from_slice(&mut dbefore, hidden)? }.run(cpu)?;
        let (dbefore, h1) = (MatRef::from_slice(&dbefore, hidden)?, MatRef::from_slice(&forward.h1, (m, first.rank()))?);
        first.backward(cpu, [x, h1, dbefore], [dx, da1, &mut db1])?;

        comm.all_reduce(&mut summed)?;
        let db2 = summed.split_off(m * first.inputs() + first.rank() * first.inputs());
        let da1 = summed.split_off(m * first.inputs());
        Ok(Gradients { dx: summed, da1, db1, da2, db2 })
    }
}
