//! The mean of the gradients of all ranks.

use super::Communicator;
use crate::autograd::{Gradients, Param};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::op::Accumulate;
use crate::tensor::{Shape, Tensor};
use crate::view::{MatMut, MatRef};

/// A part of a batch: how many rows, and their mean loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchShare {
    /// The number of rows that the loss is the mean of: samples, or tokens with a label. 0 for a rank without work.
    pub rows: usize,
    /// The mean loss of these rows; ignored without rows.
    pub loss: f32,
}

/// `rows` travels in two parts, so that sums over many ranks stay whole numbers in `f32`.
const PART: usize = 1 << 12;
/// The largest number of rows of a rank.
const MOST_ROWS: usize = PART * PART;
/// The elements after the gradients and the flags: the sum of the losses, and the two parts of the number of rows.
const TAIL: usize = 3;

impl<B: Backend> Gradients<B> {
    /// Replaces the gradients of each rank, which are means over its `share.rows` rows, by the mean over the rows of all ranks:
    /// `Σ rows·g / Σ rows`. Returns the rows and the mean loss of all ranks. One collective, of
    /// `4·(elements + parameters + 3)` bytes.
    ///
    /// Every rank passes the same parameters in the same order, `model.params_mut()`. A parameter gets a gradient if any rank has
    /// one, so that all optimizers make the same steps. With [accumulation](Self::add) over micro-batches, call it once, for
    /// their mean. [`norm`](Self::norm) and [`clip`](Self::clip) afterwards are those of the whole batch, on all ranks. On one
    /// rank nothing is changed.
    ///
    /// Errors: [`Error::Value`] for a gradient of a parameter that is not among `params` or is frozen, for more than 2²⁴ rows of
    /// a rank, and if no rank has rows; those of the communicator and of the device.
    pub fn all_reduce_mean<'p>(
        &mut self,
        backend: &B,
        params: impl IntoIterator<Item = &'p mut Param<B>>,
        share: BatchShare,
        comm: &impl Communicator,
    ) -> Result<BatchShare> {
        const VERB: &str = "all_reduce_mean";
        Error::unless(share.rows <= MOST_ROWS, VERB, "rows", share.rows, "at most 2^24")?;
        if comm.size() == 1 {
            Error::unless(share.rows > 0, VERB, "rows", 0, "at least 1, of all ranks together")?;
            return Ok(share);
        }
        let params: Vec<_> = params.into_iter().filter(|param| param.trainable).collect();
        let known = params.iter().filter(|param| self.get(param).is_some()).count();
        let foreign = self.len() - known;
        Error::unless(foreign == 0, VERB, "params", format!("without {foreign} that have a gradient"), "all that have one")?;

        let (flat, layout) = self.flatten(backend, &params, share)?;
        let flat = comm.all_reduce_tensor(backend, flat)?;
        let tail = layout.read_tail(backend, &flat)?;
        let whole = tail.whole();
        Error::unless(whole.rows > 0, VERB, "rows", 0, "at least 1, of all ranks together")?;
        let scale = (1.0 / whole.rows as f64) as f32;
        for (at, param) in params.iter().enumerate() {
            if tail.used[at] == 0.0 {
                continue;
            }
            let mut mean = Tensor::zeros(backend, param.tensor().shape())?;
            let sum = layout.gradient(&flat, at)?;
            Accumulate { x: sum, scale, y: mean.view_mut() }.run(backend)?;
            self.set(param, mean);
        }
        Ok(whole)
    }

    /// `rows·g` of all parameters, one after another, and the tail.
    fn flatten(&mut self, backend: &B, params: &[&mut Param<B>], share: BatchShare) -> Result<(Tensor<B, f32>, FlatLayout)> {
        let layout = FlatLayout::new(params)?;
        let mut flat = Tensor::zeros(backend, (1, layout.elements()))?;
        let mut tail = vec![0.0; layout.shapes.len() + TAIL];
        let rows = share.rows as f32;
        for (at, param) in params.iter().enumerate() {
            // A rank without rows adds zeros, and not 0·g, which may be NaN.
            let Some(gradient) = self.dense(backend, param)?.filter(|_| share.rows > 0) else { continue };
            tail[at] = 1.0;
            let y =
                MatMut::strided(B::slice_mut(flat.buffer_mut()), layout.shapes[at], layout.starts[at], layout.shapes[at].cols)?;
            Accumulate { x: gradient.view(), scale: rows, y }.run(backend)?;
        }
        if share.rows > 0 {
            let end = [share.loss * rows, (share.rows / PART) as f32, (share.rows % PART) as f32];
            tail[layout.shapes.len()..].copy_from_slice(&end);
        }
        let tail = Tensor::<B, f32>::from_slice(backend, (1, tail.len()), &tail)?;
        flat.view_mut().column_range(layout.tail()..layout.elements())?.copy_from(backend, tail.view())?;
        Ok((flat, layout))
    }
}

/// Where each gradient lies in the flat buffer.
struct FlatLayout {
    shapes: Vec<Shape>,
    starts: Vec<usize>,
    end: usize,
}

impl FlatLayout {
    fn new<B: Backend>(params: &[&mut Param<B>]) -> Result<Self> {
        let shapes: Vec<Shape> = params.iter().map(|param| param.tensor().shape()).collect();
        let (mut starts, mut end) = (Vec::with_capacity(shapes.len()), 0);
        for shape in &shapes {
            starts.push(end);
            end += shape.elements()?;
        }
        Ok(Self { shapes, starts, end })
    }

    /// The first element after the gradients.
    fn tail(&self) -> usize {
        self.end
    }

    fn elements(&self) -> usize {
        self.end + self.shapes.len() + TAIL
    }

    fn gradient<'f, B: Backend>(&self, flat: &'f Tensor<B, f32>, at: usize) -> Result<MatRef<'f, B, f32>> {
        MatRef::strided(B::slice(flat.buffer()), self.shapes[at], self.starts[at], self.shapes[at].cols)
    }

    fn read_tail<B: Backend>(&self, backend: &B, flat: &Tensor<B, f32>) -> Result<Tail> {
        let mut tail = Tensor::<B, f32>::zeros(backend, (1, self.elements() - self.tail()))?;
        tail.view_mut().copy_from(backend, flat.view().column_range(self.tail()..self.elements())?)?;
        let mut used = tail.to_vec(backend)?;
        let sums = used.split_off(self.shapes.len());
        Ok(Tail { used, loss: sums[0], rows: sums[1] as usize * PART + sums[2] as usize })
    }
}

/// What came with the gradients.
struct Tail {
    /// For each parameter, the number of ranks that have a gradient.
    used: Vec<f32>,
    /// `Σ rows·loss`
    loss: f32,
    rows: usize,
}

impl Tail {
    /// The batch of all ranks.
    fn whole(&self) -> BatchShare {
        BatchShare { rows: self.rows, loss: (f64::from(self.loss) / self.rows as f64) as f32 }
    }
}
