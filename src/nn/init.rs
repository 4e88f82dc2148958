//! What weights begin with.

use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::random::Rng;
use crate::tensor::{Shape, Tensor};

/// How the first factor `A` of an adapter begins; `B` begins with zeros, so that a new adapter changes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in `±1/√k`: PyTorch's kaiming-uniform with `a = √5`, as PEFT initialises by default.
    KaimingUniform,
    /// Gaussian with mean 0 and this standard deviation. PEFT's `gaussian` has `1/r`.
    Gaussian {
        /// The standard deviation.
        std: f32,
    },
}

impl Init {
    /// Numbers for an `out × in` matrix.
    pub fn tensor<B: Backend>(self, backend: &B, shape: impl Into<Shape>, rng: &mut Rng) -> Result<Tensor<B>> {
        let shape = shape.into();
        let bound = 1.0 / (shape.cols.max(1) as f64).sqrt();
        let mut number = || match self {
            Init::KaimingUniform => rng.uniform(-bound, bound),
            Init::Gaussian { std } => f64::from(std) * rng.gaussian(),
        };
        let (mut host, len) = (Vec::<B::Elem>::new(), shape.elements()?);
        let bytes = len * size_of::<B::Elem>();
        host.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { backend: "host", bytes })?;
        host.extend((0..len).map(|_| B::Elem::from_f32(number() as f32)));
        Tensor::from_slice(backend, shape, &host)
    }
}
