//! Requests: one struct for each verb of a backend, with the operands as named fields. `run` checks a request and computes it.
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
//! In the whole crate, `m` is the number of rows of a batch, `k` the inputs and `n` the outputs of a layer, `r` the rank of an
//! update. Matrices are row-major. Weights are `outputs × inputs`, as in PyTorch and safetensors: `W n×k`, `A r×k`, `B n×r`. A
//! verb writes only the operands that its request borrows mutably.
//!
//! "Contiguous" means that there is no space between the rows of a view
//! ([`MatRef::is_contiguous`](crate::MatRef::is_contiguous)).

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
pub use operands::{Factor, Output, Packed, Weight};
pub use relu::{Relu, ReluBackward};
pub use rounding::Rounding;
pub(crate) use rounding::{round_stochastic, rounding_words};

use crate::error::{Error, Result};
use crate::tensor::Shape;

/// A request that has passed its `check`: shapes fit and scalars are finite. Only `check` makes one, so backends need not check
/// again.
pub struct Checked<Request>(Request);

impl<Request> Checked<Request> {
    /// The request.
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

/// `Err` naming the operand, unless it has the shape `want`.
fn fits(verb: &'static str, name: &'static str, want: impl Into<Shape>, got: Shape) -> Result<()> {
    let want = want.into();
    if want == got { Ok(()) } else { Err(Error::Shape { verb, name, got, want }) }
}

/// `Err` naming the operand, unless it is contiguous: for verbs that treat a matrix as one run of elements.
fn contiguous(verb: &'static str, name: &'static str, is_contiguous: bool) -> Result<()> {
    Error::unless(is_contiguous, verb, name, "a view with space between its rows", "a contiguous view")
}

fn finite(verb: &'static str, name: &'static str, value: f32) -> Result<()> {
    Error::unless(value.is_finite(), verb, name, value, "a finite number")
}

/// `k`, the inputs of a layer, by majority of `x`, `w` and `a`, so that the error names the operand that disagrees.
fn inputs_of(x: Shape, w: Option<Shape>, a: Shape) -> usize {
    w.filter(|w| w.cols != a.cols).map_or(a.cols, |_| x.cols)
}

fn rank_of(verb: &'static str, a: Shape) -> Result<usize> {
    Error::unless(a.rows > 0, verb, "rank", a.rows, "at least 1")?;
    Ok(a.rows)
}
