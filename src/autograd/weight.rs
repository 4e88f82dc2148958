//! The weight of a layer on a tape.

use super::Param;
use crate::backend::Backend;
use crate::op::Weight;
use crate::quant::Quantised;

/// The weight of a layer: a parameter, or a quantised one, which is never trained.
#[derive(Debug)]
pub enum LayerWeight<'m, B: Backend> {
    /// Dense, and trained if it is [trainable](Param::trainable).
    Param(&'m Param<B>),
    /// Frozen.
    Quantised(&'m Quantised<B>),
}

impl<B: Backend> Clone for LayerWeight<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for LayerWeight<'_, B> {}

impl<'m, B: Backend> LayerWeight<'m, B> {
    /// As requests take it.
    pub(crate) fn operand(self) -> Weight<'m, B> {
        match self {
            Self::Param(param) => (&param.tensor).into(),
            Self::Quantised(quantised) => quantised.into(),
        }
    }

    /// The parameter, if it is trained.
    pub(super) fn trained(self) -> Option<&'m Param<B>> {
        match self {
            Self::Param(param) => Some(param).filter(|param| param.trainable),
            Self::Quantised(_) => None,
        }
    }
}

impl<'m, B: Backend> From<&'m Param<B>> for LayerWeight<'m, B> {
    fn from(param: &'m Param<B>) -> Self {
        Self::Param(param)
    }
}

impl<'m, B: Backend> From<&'m Quantised<B>> for LayerWeight<'m, B> {
    fn from(quantised: &'m Quantised<B>) -> Self {
        Self::Quantised(quantised)
    }
}
