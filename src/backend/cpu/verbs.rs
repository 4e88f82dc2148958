//! A table of the verbs for each element type.
//!
//! Generic functions are compiled in the crate that calls them. The table calls them here, so that other crates do not compile
//! the kernels of four vector units and three element types again.

use std::any::Any;

use super::gemm::PackedWeight;
use super::{Cpu, Engine, adam, dora, linear, lora, pointwise};
use crate::element::{Float, bf16, f16};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge,
    LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::view::MatRef;

/// A function for each verb.
pub(super) struct Verbs<E: Float> {
    pub(super) pack: fn(&Engine, MatRef<'_, Cpu<E>>, bool) -> Result<PackedWeight>,
    pub(super) lora_forward: fn(&Engine, LoraForward<'_, Cpu<E>>) -> Result<()>,
    pub(super) lora_backward: fn(&Engine, LoraBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) lora_merge: fn(&Engine, LoraMerge<'_, Cpu<E>>) -> Result<()>,
    pub(super) lora_row_norm: fn(&Engine, LoraRowNorm<'_, Cpu<E>>) -> Result<()>,
    pub(super) magnitude: fn(&Engine, Magnitude<'_, Cpu<E>>) -> Result<()>,
    pub(super) magnitude_backward: fn(&Engine, MagnitudeBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) linear_forward: fn(&Engine, LinearForward<'_, Cpu<E>>) -> Result<()>,
    pub(super) linear_backward: fn(&Engine, LinearBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) relu: fn(&Engine, Relu<'_, Cpu<E>>) -> Result<()>,
    pub(super) relu_backward: fn(&Engine, ReluBackward<'_, Cpu<E>>) -> Result<()>,
    pub(super) dropout_forward: fn(&Engine, DropoutForward<'_, Cpu<E>>) -> Result<()>,
    pub(super) add: fn(&Engine, Add<'_, Cpu<E>>) -> Result<()>,
    pub(super) accumulate: fn(&Engine, Accumulate<'_, Cpu<E>>) -> Result<()>,
    pub(super) cross_entropy: fn(&Engine, CrossEntropy<'_, Cpu<E>>) -> Result<()>,
    pub(super) adam: fn(&Engine, Adam<'_, Cpu<E>>) -> Result<()>,
}

static F32: Verbs<f32> = Verbs::new();
static F16: Verbs<f16> = Verbs::new();
static BF16: Verbs<bf16> = Verbs::new();

impl<E: Float> Verbs<E> {
    const fn new() -> Self {
        Self {
            pack: linear::pack,
            lora_forward: lora::forward,
            lora_backward: lora::backward,
            lora_merge: lora::merge,
            lora_row_norm: dora::row_norm,
            magnitude: dora::magnitude,
            magnitude_backward: dora::magnitude_backward,
            linear_forward: linear::forward,
            linear_backward: linear::backward,
            relu: pointwise::relu,
            relu_backward: pointwise::relu_backward,
            dropout_forward: pointwise::dropout_forward,
            add: pointwise::add,
            accumulate: pointwise::accumulate,
            cross_entropy: pointwise::cross_entropy,
            adam: adam::adam,
        }
    }

    /// The table of the element type `E`.
    pub(super) fn of() -> Result<&'static Self> {
        let tables: [&'static dyn Any; 3] = [&F32, &F16, &BF16];
        let found = tables.into_iter().find_map(|table| table.downcast_ref());
        found.ok_or_else(|| Error::Unavailable { backend: "cpu", reason: format!("it has no kernels for {}", E::DTYPE) })
    }
}
