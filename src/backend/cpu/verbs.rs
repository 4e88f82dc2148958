//! The verbs, compiled here for each element type.
//!
//! Generic code is compiled in the crate that uses it; a table of functions keeps four vector units times three element types
//! of kernels out of every crate that links this one.

use std::any::Any;

use super::{Cpu, Engine, adam, linear, lora, pointwise};
use crate::element::{Float, bf16, f16};
use crate::error::{Error, Result};
use crate::op::{
    Adam, Add, CrossEntropy, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge, Relu, ReluBackward,
};

/// One function a verb.
pub(super) struct Verbs<E: Float> {
    pub(super) lora_forward: fn(&Engine, LoraForward<'_, Cpu<E>>) -> Result<()>,
    pub(super) lora_backward: fn(&Engine, LoraBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) lora_merge: fn(&Engine, LoraMerge<'_, Cpu<E>>) -> Result<()>,
    pub(super) linear_forward: fn(&Engine, LinearForward<'_, Cpu<E>>) -> Result<()>,
    pub(super) linear_backward: fn(&Engine, LinearBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) relu: fn(&Engine, Relu<'_, Cpu<E>>) -> Result<()>,
    pub(super) relu_backward: fn(&Engine, ReluBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) add: fn(&Engine, Add<'_, Cpu<E>>) -> Result<()>,
    pub(super) cross_entropy: fn(&Engine, CrossEntropy<'_, Cpu<E>>) -> Result<()>,
    pub(super) adam: fn(&Engine, Adam<'_, Cpu<E>>) -> Result<()>,
}

static F32: Verbs<f32> = Verbs::new();
static F16: Verbs<f16> = Verbs::new();
static BF16: Verbs<bf16> = Verbs::new();

impl<E: Float> Verbs<E> {
    const fn new() -> Self {
        Self {
            lora_forward: lora::forward,
            lora_backward: lora::backward,
            lora_merge: lora::merge,
            linear_forward: linear::forward,
            linear_backward: linear::backward,
            relu: pointwise::relu,
            relu_backward: pointwise::relu_backward,
            add: pointwise::add,
            cross_entropy: pointwise::cross_entropy,
            adam: adam::adam,
        }
    }

    /// Those of an element type.
    pub(super) fn of() -> Result<&'static Self> {
        let tables: [&'static dyn Any; 3] = [&F32, &F16, &BF16];
        let found = tables.into_iter().find_map(|table| table.downcast_ref());
        found.ok_or_else(|| Error::Unavailable { backend: "cpu", reason: format!("it has no kernels for {}", E::DTYPE) })
    }
}
