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
//! A loop works in the same memory again and again: a tape takes over the lists of a step that is done
//! ([`reusing`](Tape::reusing), [`reset`](Tape::reset)), and the backend lends again what tensors gave back.

mod backward;
mod custom;
mod gradients;
mod weight;

use std::sync::atomic::{AtomicU64, Ordering};

pub use custom::{Backward, CustomGradients};
pub use gradients::Gradients;
pub use weight::LayerWeight;

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
    /// The numbers. Who holds a parameter relies on its shape: [`set_tensor`](Self::set_tensor) keeps it.
    pub(crate) tensor: Tensor<B>,
    /// Whether the backward pass computes its gradient. A frozen parameter is `false`.
    pub trainable: bool,
    /// Whether LoRA+ gives it the larger learning rate: `B`, biases and magnitudes.
    pub(crate) plus: bool,
}

impl<B: Backend> Param<B> {
    /// A trainable parameter.
    pub fn new(tensor: Tensor<B>) -> Self {
        Self { id: new_id(), tensor, trainable: true, plus: false }
    }

    /// A parameter that is not trained.
    pub(crate) fn frozen(tensor: Tensor<B>) -> Self {
        Self { trainable: false, ..Self::new(tensor) }
    }

    /// A trainable parameter that LoRA+ gives the larger learning rate.
    pub(crate) fn plus(tensor: Tensor<B>) -> Self {
        Self { plus: true, ..Self::new(tensor) }
    }

    /// The numbers.
    pub fn tensor(&self) -> &Tensor<B> {
        &self.tensor
    }

    /// Puts other numbers in the place of those that are there. Errors: [`Error::Shape`] for a tensor of another shape.
    pub fn set_tensor(&mut self, tensor: Tensor<B>) -> Result<()> {
        let (got, want) = (tensor.shape(), self.tensor.shape());
        if got != want {
            return Err(Error::Shape { verb: "set_tensor", name: "tensor", got, want });
        }
        self.tensor = tensor;
        Ok(())
    }

    /// Overwrites the numbers with those of `host`, row by row; nothing is allocated. Errors: [`Error::Value`] if there are more or
    /// fewer.
    pub fn copy_from_slice(&mut self, backend: &B, host: &[B::Elem]) -> Result<()> {
        self.tensor.copy_from_slice(backend, host)
    }

    /// How many numbers it holds.
    pub fn count(&self) -> usize {
        self.tensor.rows() * self.tensor.cols()
    }

    /// What gradients and optimizer state are filed under; no two parameters of a process share it.
    pub fn id(&self) -> u64 {
        self.id
    }
}

/// A number that no other parameter and no other tape of this process has.
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
    /// `n×k`; without it only the update is computed, to be added to what else feeds the same output.
    pub w: Option<LayerWeight<'m, B>>,
    /// `1×n`
    pub bias: Option<&'m Param<B>>,
    /// `r×k`
    pub a: &'m Param<B>,
    /// `n×r`
    pub b: &'m Param<B>,
    /// `1×n`: a bias of the update, multiplied with `scale` as well
    pub lora_bias: Option<&'m Param<B>>,
    /// What the update is multiplied with.
    pub scale: f32,
    /// Which elements of the input the adapter does not see.
    pub dropout: Option<Dropout>,
}

/// What made a value.
enum Op<'m, B: Backend> {
    Input,
    Linear {
        x: Var,
        w: LayerWeight<'m, B>,
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
        minus: bool,
    },
    /// One of the tape's `customs`.
    Custom {
        index: usize,
    },
}

struct Node<'m, B: Backend> {
    op: Op<'m, B>,
    /// Whether a gradient has anywhere to go from here.
    wanted: bool,
}

/// A Wengert list: the values computed so far, in order.
///
/// Its methods refuse a value of another tape with [`Error::Value`].
pub struct Tape<'m, B: Backend> {
    id: u64,
    backend: &'m B,
    nodes: Vec<Node<'m, B>>,
    /// The derivatives of the caller's operations, in order.
    customs: Vec<custom::BoxedDerivative<'m, B>>,
    /// The values, what losses sent to them, and where the gradients of parameters will be filed.
    gradients: Gradients<B>,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// An empty tape for one step.
    pub fn new(backend: &'m B) -> Self {
        Self::reusing(backend, Gradients::default())
    }

    /// An empty tape in the memory of a step that is done: a loop of such steps allocates nothing after the first few.
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

    /// Forgets what was computed, so that the next step can work in its memory; values of before are those of another tape. For
    /// loops without a gradient, such as decoding.
    pub fn reset(&mut self) {
        self.id = new_id();
        self.nodes.clear();
        self.customs.clear();
        self.gradients.clear();
    }

    /// The backend it computes on.
    pub fn backend(&self) -> &'m B {
        self.backend
    }

    /// Data: no gradient flows into it.
    pub fn input(&mut self, x: Tensor<B>) -> Var {
        self.push(Op::Input, false, x)
    }

    /// A value computed on this tape.
    pub fn value(&self, var: Var) -> Result<&Tensor<B>> {
        let known = self.gradients.values.get(var.index).filter(|_| var.tape == self.id);
        known.ok_or_else(|| Error::Value {
            verb: "tape",
            name: "value",
            got: "of another tape".into(),
            want: "of this one".into(),
        })
    }

    fn is_wanted(&self, var: Var) -> bool {
        self.nodes.get(var.index).is_some_and(|node| node.wanted)
    }

    /// `y = x·Wᵀ + bias`
    pub fn linear(&mut self, x: Var, w: impl Into<LayerWeight<'m, B>>, bias: Option<&'m Param<B>>) -> Result<Var> {
        let w = w.into();
        let mut y = Tensor::unwritten(self.backend, (self.value(x)?.rows(), w.operand().rows()))?;
        let bias_tensor = bias.map(|bias| &bias.tensor);
        LinearForward { x: self.value(x)?.view(), w: w.operand(), bias: bias_tensor.map(Tensor::view), y: (&mut y).into() }
            .run(self.backend)?;
        let wanted = self.is_wanted(x) || w.trained().is_some() || bias.is_some_and(|bias| bias.trainable);
        Ok(self.push(Op::Linear { x, w, bias }, wanted, y))
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
            w: w.map(LayerWeight::operand),
            bias: sum.as_ref().or(bias.map(|bias| &bias.tensor)).map(Tensor::view),
            a: (&a.tensor).into(),
            b: (&b.tensor).into(),
            scale: *scale,
            dropout: *dropout,
            h: h.view_mut(),
            y: (&mut y).into(),
        }
        .run(self.backend)?;
        let params = [w.and_then(LayerWeight::trained), *bias, Some(a), Some(b), *lora_bias];
        let wanted = self.is_wanted(x) || params.iter().flatten().any(|param| param.trainable);
        Ok(self.push(Op::Lora { x, layer, h }, wanted, y))
    }

    /// `y = (magnitude / norm)·z + bias`, column by column; `norm` is a constant to the gradient.
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
        let wanted = self.is_wanted(z) || magnitude.trainable || bias.is_some_and(|bias| bias.trainable);
        Ok(self.push(Op::Magnitude { z, magnitude, norm, bias }, wanted, y))
    }

    /// `y = max(x, 0)`
    pub fn relu(&mut self, x: Var) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, self.value(x)?.shape())?;
        Relu { x: self.value(x)?.view(), y: y.view_mut() }.run(self.backend)?;
        let wanted = self.is_wanted(x);
        Ok(self.push(Op::Relu { x }, wanted, y))
    }

    /// `y = drop(x)`
    pub fn dropout(&mut self, x: Var, dropout: Dropout) -> Result<Var> {
        let mut y = Tensor::unwritten(self.backend, self.value(x)?.shape())?;
        DropoutForward { x: self.value(x)?.view(), dropout, y: y.view_mut() }.run(self.backend)?;
        let wanted = self.is_wanted(x);
        Ok(self.push(Op::Dropout { x, dropout }, wanted, y))
    }

    /// `x + y`
    pub fn add(&mut self, x: Var, y: Var) -> Result<Var> {
        self.sum(x, y, false)
    }

    /// `x - y`
    pub fn sub(&mut self, x: Var, y: Var) -> Result<Var> {
        self.sum(x, y, true)
    }

    fn sum(&mut self, x: Var, y: Var, minus: bool) -> Result<Var> {
        let mut sum = signed(self.backend, self.value(y)?, minus)?;
        Add { x: self.value(x)?.view(), y: sum.view_mut() }.run(self.backend)?;
        let wanted = self.is_wanted(x) || self.is_wanted(y);
        Ok(self.push(Op::Sum { x, y, minus }, wanted, sum))
    }

    /// `mean(-log softmax(logits)[label])`, as a 1×1 tensor. What [`backward`](Self::backward) differentiates.
    pub fn cross_entropy(&mut self, logits: Var, labels: &Labels<B>) -> Result<Tensor<B, f32>> {
        let mut loss = Tensor::unwritten(self.backend, (1, 1))?;
        let mut dlogits = Tensor::unwritten(self.backend, self.value(logits)?.shape())?;
        CrossEntropy { logits: self.value(logits)?.view(), labels, loss: loss.view_mut(), dlogits: dlogits.view_mut() }
            .run(self.backend)?;
        self.gradients.add_to_value(self.backend, logits, dlogits)?;
        Ok(loss)
    }

    /// Gives a value a gradient from outside: that of a loss computed elsewhere. Errors: [`Error::Shape`].
    pub fn seed(&mut self, var: Var, gradient: Tensor<B>) -> Result<()> {
        let (got, want) = (gradient.shape(), self.value(var)?.shape());
        if got != want {
            return Err(Error::Shape { verb: "seed", name: "gradient", got, want });
        }
        self.gradients.add_to_value(self.backend, var, gradient)
    }

    /// The gradients of the sum of all losses, for every trainable parameter. One that was used several times, such as a tied weight,
    /// gets the sum: a matrix in `f32`, where a weight that was used once has its gradient as two factors.
    ///
    /// Errors: [`Error::Value`] without a loss and without a [`seed`](Self::seed); those of the verbs and of custom operations.
    pub fn backward(self) -> Result<Gradients<B>> {
        let Tape { id, backend, nodes, customs, mut gradients } = self;
        let begins = gradients.arrived.iter().any(Option::is_some);
        Error::unless(begins, "backward", "loss", "missing", "a cross_entropy or a seed on the tape")?;
        for (index, node) in nodes.iter().enumerate().rev() {
            if let (true, Some(dy)) = (node.wanted, gradients.arrived[index].take()) {
                backward::through(backend, (&nodes, &customs), Var { tape: id, index }, dy, &mut gradients)?;
            }
        }
        gradients.arrived.clear();
        gradients.nodes = emptied(nodes);
        Ok(gradients)
    }

    fn push(&mut self, op: Op<'m, B>, wanted: bool, value: Tensor<B>) -> Var {
        self.nodes.push(Node { op, wanted });
        self.gradients.values.push(value);
        self.gradients.arrived.push(None);
        Var { tape: self.id, index: self.gradients.values.len() - 1 }
    }
}

/// A list of the same memory for what borrows another model: the standard library keeps an allocation that fits.
fn emptied<'n, B: Backend>(nodes: Vec<Node<'_, B>>) -> Vec<Node<'n, B>> {
    nodes.into_iter().map_while(|_| None).collect()
}

/// `bias + scale·lora_bias`, if there is a bias of the update; the sum of products that it is, with one row and a depth of one.
fn bias_sum<B: Backend>(
    backend: &B,
    bias: Option<&Param<B>>,
    lora_bias: Option<&Param<B>>,
    scale: f32,
) -> Result<Option<Tensor<B>>> {
    let Some(Param { tensor: a, .. }) = lora_bias else { return Ok(None) };
    let mut w = match bias {
        Some(bias) => signed(backend, &bias.tensor, false)?,
        None => Tensor::zeros(backend, a.shape())?,
    };
    let b = &Tensor::from_slice(backend, (1, 1), &[B::Elem::from_f32(1.0)])?;
    LoraMerge { a: a.into(), b: b.into(), scale, rounding: Rounding::Nearest, w: w.view_mut() }.run(backend)?;
    Ok(Some(w))
}

/// A copy of a value, or of its negative.
fn signed<B: Backend>(backend: &B, x: &Tensor<B>, minus: bool) -> Result<Tensor<B>> {
    let mut y = Tensor::zeros(backend, x.shape())?;
    if !minus {
        Add { x: x.view(), y: y.view_mut() }.run(backend)?;
        return Ok(y);
    }
    let row = (1, x.cols());
    let magnitude = &Tensor::from_slice(backend, row, &vec![B::Elem::from_f32(-1.0); x.cols()])?;
    let norm = &Tensor::from_slice(backend, row, &vec![1.0; x.cols()])?;
    Magnitude { z: x.view(), magnitude: magnitude.view(), norm: norm.view(), bias: None, y: y.view_mut() }.run(backend)?;
    Ok(y)
}
