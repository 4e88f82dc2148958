//! A table of the verbs for each element type.
//!
//! Generic functions are compiled in the crate that calls them. The table calls them here, so that other crates do not compile
//! the kernels of four vector units and three element types again.

use std::any::Any;

use super::super::verbs::for_each_verb;
use super::gemm::PackedWeight;
use super::{Cpu, Engine, adam, dora, linear, lora, pointwise};
use crate::element::{Float, bf16, f16};
use crate::error::{Error, Result};
use crate::op::{
    Accumulate, Adam, Add, CrossEntropy, DropoutForward, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge,
    LoraRowNorm, Magnitude, MagnitudeBackward, Relu, ReluBackward,
};
use crate::view::MatRef;

macro_rules! table {
    ($($verb:ident: $Request:ident,)*) => {
        /// A function for each verb.
        pub(super) struct Verbs<E: Float> {
            pub(super) pack: fn(&Engine, MatRef<'_, Cpu<E>>, bool) -> Result<PackedWeight>,
            $(pub(super) $verb: fn(&Engine, $Request<'_, Cpu<E>>) -> Result<()>,)*
        }
    };
}

for_each_verb!(table);

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
