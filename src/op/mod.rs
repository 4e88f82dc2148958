//! Requests: one struct per verb, with the operands by name. `check` is the only place where shapes are compared.
//!
//! ```
//! use lowrank::{Cpu, Tensor, op::LinearForward};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let x = Tensor::from_slice(&cpu, (1, 2), &[1.0, 2.0])?;
//! let w = Tensor::from_slice(&cpu, (3, 2), &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0])?;
//! let mut y = Tensor::zeros(&cpu, (1, 3))?;
//! LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&cpu)?;
//! assert_eq!(y.to_vec(&cpu)?, [1.0, 2.0, 3.0]);
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! Letters, everywhere: `m` rows of a batch, `k` inputs, `n` outputs, `r` the rank. Weights are `out × in`, row-major, as
//! PyTorch and safetensors store them: `W n×k`, `A r×k`, `B n×r`. What a request borrows mutably is what its verb writes.

mod accumulate;
mod adam;
mod add;
mod cross_entropy;
mod dropout;
mod linear;
mod lora_backward;
mod lora_forward;
mod lora_merge;
mod lora_row_norm;
mod magnitude;
mod operands;
mod relu;
mod rounding;

pub use accumulate::Accumulate;
pub use adam::{Adam, AdamRate, WeightGrad};
pub use add::Add;
pub(crate) use cross_entropy::IGNORED;
pub use cross_entropy::{CrossEntropy, Labels};
pub use dropout::{Dropout, DropoutForward};
pub use linear::{LinearBackward, LinearForward};
pub use lora_backward::LoraBackward;
pub use lora_forward::LoraForward;
pub use lora_merge::LoraMerge;
pub use lora_row_norm::LoraRowNorm;
pub use magnitude::{Magnitude, MagnitudeBackward};
pub(crate) use operands::WeightForm;
pub use operands::{Factor, Output, Packed, Weight};
pub use relu::{Relu, ReluBackward};
pub use rounding::Rounding;
pub(crate) use rounding::{round_stochastic, rounding_words};

use crate::error::{Error, Result};
use crate::tensor::Shape;

/// A request whose shapes fit and whose scalars are finite. Only `check` makes one, so whoever holds it need not look again.
pub struct Checked<Request>(Request);

impl<Request> Checked<Request> {
    /// The operands.
    pub fn into_inner(self) -> Request {
        self.0
    }
}

impl<Request> std::ops::Deref for Checked<Request> {
    type Target = Request;
    fn deref(&self) -> &Request {
        &self.0
    }
}

/// `Err` naming the operand, unless it has the shape that the others ask for.
fn fits(verb: &'static str, name: &'static str, want: impl Into<Shape>, got: Shape) -> Result<()> {
    let want = want.into();
    if want == got { Ok(()) } else { Err(Error::Shape { verb, name, got, want }) }
}

/// `Err` naming the operand, unless its rows follow one another: for verbs that pass over elements without asking for rows.
fn contiguous(verb: &'static str, name: &'static str, is_contiguous: bool) -> Result<()> {
    Error::unless(is_contiguous, verb, name, "a view whose rows lie apart", "one whose rows follow one another")
}

fn finite(verb: &'static str, name: &'static str, value: f32) -> Result<()> {
    Error::unless(value.is_finite(), verb, name, value, "a finite number")
}

/// How many inputs a layer has, as two of the three operands have it, so that the odd one out is the one that is named.
fn inputs_of(x: Shape, w: Option<Shape>, a: Shape) -> usize {
    w.filter(|w| w.cols != a.cols).map_or(a.cols, |_| x.cols)
}

fn rank_of(verb: &'static str, a: Shape) -> Result<usize> {
    Error::unless(a.rows > 0, verb, "rank", a.rows, "at least 1")?;
    Ok(a.rows)
}
