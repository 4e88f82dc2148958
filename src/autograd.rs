//! The tape: what was computed, in order, so that it can be differentiated in reverse.
//!
//! A tape borrows the parameters it reads, so nobody can update a weight that the backward pass will need. [`Tape::backward`]
//! consumes the tape and hands out gradients that borrow nothing: only then may an optimizer run.
//!
//! ```
//! use lowrank::{Cpu, Tensor, autograd::{Param, Tape}, op::Labels};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let weight = Param::new(Tensor::from_slice(&cpu, (2, 3), &[0.1, 0.2, 0.3, -0.3, -0.2, -0.1])?);
//! let mut tape = Tape::new(&cpu);
//! let x = tape.input(Tensor::from_slice(&cpu, (1, 3), &[1.0, 2.0, 3.0])?);
//! let logits = tape.linear(x, &weight, None)?;
//! let loss = tape.cross_entropy(logits, &Labels::new(&cpu, 2, &[1])?)?;
//! let gradients = tape.backward()?;
//! assert!(loss.to_vec(&cpu)?[0] > 1.0);
//! assert!(gradients.get(&weight).is_some());
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! A training loop reuses its memory: a tape takes over the lists of the previous step ([`reusing`](Tape::reusing),
//! [`reset`](Tape::reset)), and dropped tensors go back to the backend's pool.

mod backward;
mod custom;
mod gradients;

use std::sync::atomic::{AtomicU64, Ordering};

pub use custom::{Backward, CustomGradients};
pub use gradients::Gradients;

use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::op::{
    Add, CrossEntropy, Dropout, DropoutForward, Labels, LinearForward, LoraForward, LoraMerge, Magnitude, Relu, Rounding,
};
use crate::tensor::Tensor;

/// A tensor that an optimizer may update.
#[derive(Debug)]
pub struct Param<B: Backend> {
    id: u64,
    /// The elements. Layers rely on the shape, so [`set_tensor`](Self::set_tensor) does not change it.
    pub(crate) tensor: Tensor<B>,
    /// If true, the backward pass computes its gradient. False for a frozen parameter.
    pub trainable: bool,
    /// If true, LoRA+ gives it the larger learning rate: `B`, biases and magnitudes.
    pub(crate) plus: bool,
}

impl<B: Backend> Param<B> {
    /// A trainable parameter.
    pub fn new(tensor: Tensor<B>) -> Self {
        Self { id: new_id(), tensor, trainable: true, plus: false }
    }

    /// A trainable parameter that LoRA+ gives the larger learning rate.
    pub(crate) fn plus(tensor: Tensor<B>) -> Self {
        Self { plus: true, ..Self::new(tensor) }
    }

    /// Its elements.
    pub fn tensor(&self) -> &Tensor<B> {
        &self.tensor
    }

    /// Replaces the tensor. Errors: [`Error::Shape`] for a tensor of another shape.
    pub fn set_tensor(&mut self, tensor: Tensor<B>) -> Result<()> {
        let (got, want) = (tensor.shape(), self.tensor.shape());
        if got != want {
            return Err(Error::Shape { verb: "set_tensor", name: "tensor", got, want });
        }
        self.tensor = tensor;
        Ok(())
    }

    /// Overwrites the elements with those of `host`, which is row-major; nothing is allocated. Errors: [`Error::Value`] for another
    /// number of elements.
    pub fn copy_from_slice(&mut self, backend: &B, host: &[B::Elem]) -> Result<()> {
        self.tensor.copy_from_slice(backend, host)
    }

    /// The number of elements.
    pub fn count(&self) -> usize {
        self.tensor.rows() * self.tensor.cols()
    }

    /// The key of its gradient and of its optimizer state; unique in this process.
    pub fn id(&self) -> u64 {
        self.id
    }
}

/// A number that is unique in this process, for a parameter or a tape.
fn new_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A value on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var {
    tape: u64,
    index: usize,
}

/// The parameters of a low-rank layer, as [`Tape::lora_linear`] reads them.
pub struct LoraParams<'m, B: Backend> {
    /// `n×k`. If `None`, only the update is computed; the caller adds it to the output of the layer.
    pub w: Option<&'m Param<B>>,
    /// `1×n`
    pub bias: Option<&'m Param<B>>,
    /// `r×k`
    pub a: &'m Param<B>,
    /// `n×r`
    pub b: &'m Param<B>,
    /// `1×n`: a bias of the update, multiplied with `scale` as well
    pub lora_bias: Option<&'m Param<B>>,
    /// The factor of the update.
    pub scale: f32,
    /// The dropout on the input of the adapter; the base layer reads `x` as it is.
    pub dropout: Option<Dropout>,
}

/// The operation that computed a value, with the operands that its derivative reads.
enum Op<'m, B: Backend> {
    Input,
    Linear {
        x: Var,
        w: &'m Param<B>,
        bias: Option<&'m Param<B>>,
    },
    Lora {
        x: Var,
        layer: LoraParams<'m, B>,
        h: Tensor<B, f32>,
    },
    Magnitude {
        z: Var,
        magnitude: &'m Param<B>,
        norm: Tensor<B, f32>,
        bias: Option<&'m Param<B>>,
    },
    Relu {
        x: Var,
    },
    Dropout {
        x: Var,
        dropout: Dropout,
    },
    Sum {
        x: Var,
        y: Var,
        negate: bool,
    },
    /// An index into the tape's `customs`.
    Custom {
        index: usize,
    },
}

struct Node<'m, B: Backend> {
    op: Op<'m, B>,
    /// True if the value depends on a trainable parameter.
    needs_grad: bool,
}

/// A Wengert list: the values computed so far, in order.
///
/// Its methods refuse a value of another tape with [`Error::Value`].
pub struct Tape<'m, B: Backend> {
    id: u64,
    backend: &'m B,
    nodes: Vec<Node<'m, B>>,
    /// The derivatives of custom operations, in the order of their calls.
    customs: Vec<custom::BoxedDerivative<'m, B>>,
    /// The values, their gradients so far, and the map that will hold the gradients of parameters.
    gradients: Gradients<B>,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// An empty tape for one step.
    pub fn new(backend: &'m B) -> Self {
        Self::reusing(backend, Gradients::default())
    }

    /// An empty tape that reuses the memory of an earlier step. After the first few steps a loop allocates nothing.
    ///
    /// ```
    /// # use lowrank::{Cpu, Tensor, autograd::{Gradients, Tape}, nn::{Adam, Adaptable, Mlp}, op::Labels, random::Rng};
    /// # let cpu = Cpu::<f32>::new()?;
    /// # let (mut model, mut adam) = (Mlp::new(&cpu, &[3, 2], &mut Rng::new(0))?, Adam::new(1e-3)?);
    /// let mut gradients = Gradients::default();
    /// for _ in 0..3 {
    ///     let mut tape = Tape::reusing(&cpu, gradients);
    ///     let x = tape.input(Tensor::from_slice(&cpu, (1, 3), &[1.0, 2.0, 3.0])?);
    ///     let logits = model.forward(&mut tape, x, None)?;
    ///     tape.cross_entropy(logits, &Labels::new(&cpu, 2, &[1])?)?;
    ///     gradients = tape.backward()?;
    ///     adam.step(&cpu, model.params_mut(), &gradients)?;
    /// }
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    pub fn reusing(backend: &'m B, gradients: Gradients<B>) -> Self {
        let mut tape = Self { id: new_id(), backend, nodes: Vec::new(), customs: Vec::new(), gradients };
        tape.nodes = std::mem::take(&mut tape.gradients.nodes);
        tape.reset();
        tape
    }

    /// Drops all values and keeps the memory for the next step. Each earlier [`Var`] is then refused as one of another tape. For
    /// loops without a gradient, such as decoding.
    pub fn reset(&mut self) {
        self.id = new_id();
        self.nodes.clear();
        self.customs.clear();
        self.gradients.clear();
    }

    /// The backend that computes.
    pub fn backend(&self) -> &'m B {
        self.backend
    }

    /// Puts data on the tape. It gets no gradient.
    pub fn input(&mut self, x: Tensor<B>) -> Var {
        self.push(Op::Input, false, x)
    }

    /// The tensor of a value. Errors: [`Error::Value`] for a value of another tape.
    pub fn value(&self, var: Var) -> Result<&Tensor<B>> {
        let known = self.gradients.values.get(var.index).filter(|_| var.tape == self.id);
        known.ok_or_else(|| Error::Value {
            verb: "tape",
            name: "value",
            got: "of another tape".into(),
            want: "of this one".into(),
        })
    }

    fn needs_grad(&self, var: Var) -> bool {
        self.nodes.get(var.index).is_some_and(|node| node.needs_grad)
    }

    /// `y = x·Wᵀ + bias`
    pub fn linear(&mut self, x: Var, w: &'m Param<B>, bias: Option<&'m Param<B>>) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, (self.value(x)?.rows(), w.tensor.rows()))?;
        let bias_tensor = bias.map(|bias| &bias.tensor);
        LinearForward {
            x: self.value(x)?.view(),
            w: (&w.tensor).into(),
            bias: bias_tensor.map(Tensor::view),
            y: (&mut y).into(),
        }
        .run(self.backend)?;
        let needs_grad = self.needs_grad(x) || w.trainable || bias.is_some_and(|bias| bias.trainable);
        Ok(self.push(Op::Linear { x, w, bias }, needs_grad, y))
    }

    /// `y = x·Wᵀ + bias + scale·(h·Bᵀ + lora_bias)`, `h = drop(x)·Aᵀ`
    pub fn lora_linear(&mut self, x: Var, layer: LoraParams<'m, B>) -> Result<Var> {
        let LoraParams { w, bias, a, b, lora_bias, scale, dropout } = &layer;
        let m = self.value(x)?.rows();
        let mut h = Tensor::unwritten(self.backend, (m, a.tensor.rows()))?;
        let mut y = Tensor::unwritten(self.backend, (m, b.tensor.rows()))?;
        let sum = bias_sum(self.backend, *bias, *lora_bias, *scale)?;
        LoraForward {
            x: self.value(x)?.view(),
            w: w.map(|w| (&w.tensor).into()),
            bias: sum.as_ref().or(bias.map(|bias| &bias.tensor)).map(Tensor::view),
            a: (&a.tensor).into(),
            b: (&b.tensor).into(),
            scale: *scale,
            dropout: *dropout,
            h: h.view_mut(),
            y: (&mut y).into(),
        }
        .run(self.backend)?;
        let params = [*w, *bias, Some(a), Some(b), *lora_bias];
        let needs_grad = self.needs_grad(x) || params.iter().flatten().any(|param| param.trainable);
        Ok(self.push(Op::Lora { x, layer, h }, needs_grad, y))
    }

    /// `y = (magnitude / norm)·z + bias`, for each column. The gradient treats `norm` as a constant.
    pub fn magnitude(
        &mut self,
        z: Var,
        magnitude: &'m Param<B>,
        norm: Tensor<B, f32>,
        bias: Option<&'m Param<B>>,
    ) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, self.value(z)?.shape())?;
        let bias_tensor = bias.map(|bias| &bias.tensor);
        let magnitude_tensor = &magnitude.tensor;
        Magnitude {
            z: self.value(z)?.view(),
            magnitude: magnitude_tensor.view(),
            norm: norm.view(),
            bias: bias_tensor.map(Tensor::view),
            y: y.view_mut(),
        }
        .run(self.backend)?;
        let needs_grad = self.needs_grad(z) || magnitude.trainable || bias.is_some_and(|bias| bias.trainable);
        Ok(self.push(Op::Magnitude { z, magnitude, norm, bias }, needs_grad, y))
    }

    /// `y = max(x, 0)`
    pub fn relu(&mut self, x: Var) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, self.value(x)?.shape())?;
        Relu { x: self.value(x)?.view(), y: y.view_mut() }.run(self.backend)?;
        let needs_grad = self.needs_grad(x);
        Ok(self.push(Op::Relu { x }, needs_grad, y))
    }

    /// `y = drop(x)`: each element is zero or `x / (1 - p)`
    pub fn dropout(&mut self, x: Var, dropout: Dropout) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, self.value(x)?.shape())?;
        DropoutForward { x: self.value(x)?.view(), dropout, y: y.view_mut() }.run(self.backend)?;
        let needs_grad = self.needs_grad(x);
        Ok(self.push(Op::Dropout { x, dropout }, needs_grad, y))
    }

    /// `x + y`
    pub fn add(&mut self, x: Var, y: Var) -> Result<Var> {
        self.sum(x, y, false)
    }

    /// `x - y`
    pub fn sub(&mut self, x: Var, y: Var) -> Result<Var> {
        self.sum(x, y, true)
    }

    fn sum(&mut self, x: Var, y: Var, negate: bool) -> Result<Var> {
        let mut sum = copy(self.backend, self.value(y)?, negate)?;
        Add { x: self.value(x)?.view(), y: sum.view_mut() }.run(self.backend)?;
        let needs_grad = self.needs_grad(x) || self.needs_grad(y);
        Ok(self.push(Op::Sum { x, y, negate }, needs_grad, sum))
    }

    /// `mean(-log softmax(logits)[label])`, as a 1×1 tensor. It is a loss: [`backward`](Self::backward) differentiates the sum of all
    /// losses.
    pub fn cross_entropy(&mut self, logits: Var, labels: &Labels<B>) -> Result<Tensor<B, f32>> {
        let mut loss = Tensor::unwritten(self.backend, (1, 1))?;
        let mut dlogits = Tensor::unwritten(self.backend, self.value(logits)?.shape())?;
        CrossEntropy { logits: self.value(logits)?.view(), labels, loss: loss.view_mut(), dlogits: dlogits.view_mut() }
            .run(self.backend)?;
        self.gradients.add_to_value(self.backend, logits, dlogits)?;
        Ok(loss)
    }

    /// Adds to the gradient of a value: for a loss that the caller computes elsewhere. Errors: [`Error::Shape`].
    pub fn seed(&mut self, var: Var, gradient: Tensor<B>) -> Result<()> {
        let (got, want) = (gradient.shape(), self.value(var)?.shape());
        if got != want {
            return Err(Error::Shape { verb: "seed", name: "gradient", got, want });
        }
        self.gradients.add_to_value(self.backend, var, gradient)
    }

    /// The gradients of the sum of all losses, for every trainable parameter.
    ///
    /// The gradient of a weight is kept as two factors. For a weight that was used several times, such as a tied one, it is the sum, a
    /// matrix in `f32`.
    ///
    /// Errors: [`Error::Value`] without a loss and without a [`seed`](Self::seed); those of the verbs and of custom operations.
    pub fn backward(self) -> Result<Gradients<B>> {
        let Tape { id, backend, nodes, customs, mut gradients } = self;
        let has_loss = gradients.of_values.iter().any(Option::is_some);
        Error::unless(has_loss, "backward", "loss", "missing", "a cross_entropy or a seed on the tape")?;
        for (index, node) in nodes.iter().enumerate().rev() {
            if let (true, Some(dy)) = (node.needs_grad, gradients.of_values[index].take()) {
                backward::node(backend, (&nodes, &customs), Var { tape: id, index }, dy, &mut gradients)?;
            }
        }
        gradients.of_values.clear();
        gradients.nodes = recycled(nodes);
        Ok(gradients)
    }

    fn push(&mut self, op: Op<'m, B>, needs_grad: bool, value: Tensor<B>) -> Var {
        self.nodes.push(Node { op, needs_grad });
        self.gradients.values.push(value);
        self.gradients.of_values.push(None);
        Var { tape: self.id, index: self.gradients.values.len() - 1 }
    }
}

/// An empty list in the same allocation, with another lifetime: collecting a `Vec` into one of equal layout reuses its memory.
fn recycled<'n, B: Backend>(nodes: Vec<Node<'_, B>>) -> Vec<Node<'n, B>> {
    nodes.into_iter().map_while(|_| None).collect()
}

/// `bias + scale·lora_bias`, if the update has a bias: a merge with `A = lora_bias` (1×n) and `B = 1` (1×1).
fn bias_sum<B: Backend>(
    backend: &B,
    bias: Option<&Param<B>>,
    lora_bias: Option<&Param<B>>,
    scale: f32,
) -> Result<Option<Tensor<B>>> {
    let Some(Param { tensor: a, .. }) = lora_bias else { return Ok(None) };
    let mut w = match bias {
        Some(bias) => copy(backend, &bias.tensor, false)?,
        None => Tensor::zeros(backend, a.shape())?,
    };
    let b = &Tensor::from_slice(backend, (1, 1), &[B::Elem::from_f32(1.0)])?;
    LoraMerge { a: a.into(), b: b.into(), scale, rounding: Rounding::Nearest, w: w.view_mut() }.run(backend)?;
    Ok(Some(w))
}

/// `x`, or `-x`: the latter by the verb `magnitude`, with magnitudes of -1 and norms of 1.
fn copy<B: Backend>(backend: &B, x: &Tensor<B>, negate: bool) -> Result<Tensor<B>> {
    let mut y = Tensor::zeros(backend, x.shape())?;
    if !negate {
        Add { x: x.view(), y: y.view_mut() }.run(backend)?;
        return Ok(y);
    }
    let row = (1, x.cols());
    let magnitude = &Tensor::from_slice(backend, row, &vec![B::Elem::from_f32(-1.0); x.cols()])?;
    let norm = &Tensor::from_slice(backend, row, &vec![1.0; x.cols()])?;
    Magnitude { z: x.view(), magnitude: magnitude.view(), norm: norm.view(), bias: None, y: y.view_mut() }.run(backend)?;
    Ok(y)
}
