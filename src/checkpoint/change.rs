//! The change of one tensor of a checkpoint, for any kind of layer.
//!
//! ```text
//! W' = gain ∘ (source + Σ scale·B·A + scale·plus), with some rows replaced
//! ```
//!
//! | tensor | rows × columns | added |
//! |---|---|---|
//! | linear | `n×k` | `B·A` |
//! | linear stored `k×n` (Conv1D), embedding | `k×n` | `Aᵀ·Bᵀ`; gains are those of columns |
//! | convolution | `n × channels·kernel` | `B·A` |
//! | stacked experts | `E·n × k` | `Bₑ·Aₑ` to the rows of expert e, or its transpose |
//! | bias | `n×1` | a vector |

use std::borrow::Cow;

use super::names::Place;
#[cfg(feature = "svd")]
use crate::adapter::in_module;
use crate::adapter::{Factors, HostMatrix, Principal};
use crate::error::Result;

/// The change of a tensor.
pub(super) struct Change<'r> {
    pub(super) source: Source<'r>,
    /// The shape of the changed tensor.
    pub(super) shape: Vec<usize>,
    /// Columns of the tensor, viewed as a matrix.
    pub(super) cols: usize,
    pub(super) pieces: Vec<Piece<'r>>,
    /// A scale and a vector: `scale·vector` is added to the elements.
    pub(super) plus: Option<(f32, &'r [f32])>,
    /// The indices of rows that are replaced, and the new rows.
    pub(super) rows: Option<(&'r [usize], &'r [f32])>,
    pub(super) magnitude: Option<Magnitude<'r>>,
}

/// The values of a tensor before updates are added.
#[derive(Clone, Copy)]
pub(super) enum Source<'r> {
    /// The stored tensor.
    Stored,
    /// A tensor of the adapter.
    Replacement(&'r [f32]),
    /// Another tensor of the checkpoint.
    Other(Place<'r>),
}

/// An update `scaling·B·A` of a range of rows.
#[derive(Clone)]
pub(super) struct Piece<'r> {
    pub(super) first_row: usize,
    /// `A` r×k and `B` n×r, in the layout of the layer.
    pub(super) factors: Cow<'r, Factors>,
    /// True if the rows of the stored tensor are the inputs of the layer.
    pub(super) transposed: bool,
    /// The part of the weight that the factors were initialised with, if any.
    pub(super) principal: Option<Principal>,
}

/// The norms of the rows or columns of the changed tensor (DoRA).
#[derive(Clone, Copy)]
pub(super) struct Magnitude<'r> {
    pub(super) of_columns: bool,
    pub(super) values: &'r [f32],
}

/// A changed block of a tensor.
pub(super) struct Changed {
    /// The index of its first element.
    pub(super) first: usize,
    pub(super) new: Vec<u8>,
    pub(super) finite: bool,
    /// The size of the block before the change.
    pub(super) bytes: usize,
    /// The block before the change, and the block that unmerging would give; only if a residue is written.
    pub(super) kept: Option<[Vec<u8>; 2]>,
    /// The factors that its rows were multiplied by.
    pub(super) gains: Vec<f32>,
}

impl<'r> Change<'r> {
    /// A change that leaves a tensor of this shape as it is.
    pub(super) fn of(shape: &[usize]) -> Self {
        let cols = shape.get(1..).unwrap_or_default().iter().product();
        let (source, shape) = (Source::Stored, shape.to_vec());
        Self { source, shape, cols, pieces: Vec::new(), plus: None, rows: None, magnitude: None }
    }

    /// A copy, for another tensor.
    pub(super) fn copied(&self) -> Self {
        let (shape, pieces) = (self.shape.clone(), self.pieces.clone());
        Self { shape, pieces, ..*self }
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The number of gains of its rows or columns; `None` without magnitudes.
    pub(super) fn gains(&self) -> Option<usize> {
        let count = |magnitude: Magnitude<'_>| if magnitude.of_columns { self.cols } else { self.elements() / self.cols.max(1) };
        self.magnitude.map(count)
    }

    /// The reason why the change cannot be undone from the merged tensor alone; `None` if it can.
    pub(super) fn irreversible(&self) -> Option<&'static str> {
        if self.magnitude.is_some() {
            Some("its rows or columns were scaled to other norms")
        } else if self.rows.is_some() {
            Some("the adapter replaced some of its rows")
        } else if !matches!(self.source, Source::Stored) {
            Some("the adapter replaced it")
        } else {
            None
        }
    }
}

impl Piece<'_> {
    /// The range of rows that it changes: the first, and the one after the last.
    pub(super) fn rows(&self) -> [usize; 2] {
        let rows = if self.transposed { self.factors.a.cols() } else { self.factors.b.rows() };
        [self.first_row, self.first_row + rows]
    }

    /// `A` and `B` in the layout of the stored tensor. For the initialisations `pissa` and `olora` they are those of the
    /// equivalent plain update of twice the rank, for which the tensor is read.
    pub(super) fn stored(&self, place: Place<'_>) -> Result<[HostMatrix; 2]> {
        let [a, b] = match self.principal {
            Some(part) => self.plain(place, part)?,
            None => [self.factors.a.clone(), self.factors.b.clone()],
        };
        Ok(if self.transposed { [b.transposed(), a.transposed()] } else { [a, b] })
    }

    #[cfg(feature = "svd")]
    fn plain(&self, (shard, entry): Place<'_>, part: Principal) -> Result<[HostMatrix; 2]> {
        let Factors { a, b, scaling, .. } = self.factors.as_ref().clone();
        let values = shard.widened(entry)?;
        let (n, k) = (b.rows(), a.cols());
        let w = if self.transposed { HostMatrix::new((k, n), values)?.transposed() } else { HostMatrix::new((n, k), values)? };
        part.plain(&w, [a, b], scaling).map_err(|error| in_module(&entry.name, error))
    }

    #[cfg(not(feature = "svd"))]
    fn plain(&self, _: Place<'_>, part: Principal) -> Result<[HostMatrix; 2]> {
        Err(part.needs_svd())
    }
}

impl Source<'_> {
    /// Reads the elements from `first` on into `values`.
    pub(super) fn read(&self, stored: Place<'_>, first: usize, values: &mut [f32]) -> Result<()> {
        let (shard, entry) = match self {
            Source::Replacement(instead) => {
                values.copy_from_slice(&instead[first..][..values.len()]);
                return Ok(());
            }
            Source::Other(place) => *place,
            Source::Stored => stored,
        };
        shard.widen(entry, first, values)
    }
}
