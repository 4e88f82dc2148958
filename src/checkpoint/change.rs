//! What becomes of a tensor of a checkpoint, whatever kind of layer it belongs to.
//!
//! ```text
//! W' = gain ∘ (source + Σ scale·B·A + scale·plus), with some rows replaced
//! ```
//!
//! | update | rows × columns | what is added |
//! |---|---|---|
//! | linear | `n×k` | `B·A` |
//! | linear stored `k×n` (Conv1D), embedding | `k×n` | `Aᵀ·Bᵀ`, and gains belong to columns |
//! | convolution | `n × channels·kernel` | `B·A` |
//! | stacked experts | `E·n × k` | `Bₑ·Aₑ` to the rows of each, or its transpose |
//! | bias | `n×1` | a vector |

use std::borrow::Cow;

use memmap2::Mmap;

use super::names::Place;
use super::{convert_elements, refused};
#[cfg(feature = "svd")]
use crate::adapter::inside;
use crate::adapter::{Factors, HostMatrix, Principal};
use crate::element::DType;
use crate::error::Result;

/// What becomes of a tensor.
pub(super) struct Change<'r> {
    pub(super) source: Source<'r>,
    /// The shape it has in the end.
    pub(super) shape: Vec<usize>,
    /// How long a row is, of the matrix that the updates see.
    pub(super) cols: usize,
    pub(super) pieces: Vec<Piece<'r>>,
    /// A scale, and what is added to the elements.
    pub(super) plus: Option<(f32, &'r [f32])>,
    /// Which rows are replaced, and by what.
    pub(super) rows: Option<(&'r [usize], &'r [f32])>,
    pub(super) magnitude: Option<Magnitude<'r>>,
}

/// What a tensor is before anything is added to it.
#[derive(Clone, Copy)]
pub(super) enum Source<'r> {
    /// What is stored.
    Stored,
    /// What the adapter brings.
    Instead(&'r [f32]),
    /// Another tensor of the checkpoint.
    Other(Place<'r>),
}

/// `scaling·B·A`, added to some rows.
#[derive(Clone)]
pub(super) struct Piece<'r> {
    pub(super) first_row: usize,
    /// As the layer has them: `A` r×k, `B` n×r.
    pub(super) factors: Cow<'r, Factors>,
    /// Whether the rows are the layer's inputs.
    pub(super) transposed: bool,
    /// What the factors began with.
    pub(super) began_with: Option<Principal>,
}

/// How long the rows, or the columns, are in the end.
#[derive(Clone, Copy)]
pub(super) struct Magnitude<'r> {
    pub(super) of_columns: bool,
    pub(super) values: &'r [f32],
}

/// A block of a tensor, changed.
pub(super) struct Changed {
    /// Its first element.
    pub(super) first: usize,
    pub(super) new: Vec<u8>,
    pub(super) finite: bool,
    /// How many bytes it had.
    pub(super) bytes: usize,
    /// What it was, and what undoing the change gives.
    pub(super) kept: Option<(Mmap, Vec<u8>)>,
    /// What its rows were multiplied with.
    pub(super) gains: Vec<f32>,
}

impl<'r> Change<'r> {
    /// One that leaves a tensor of this shape as it is.
    pub(super) fn of(shape: &[usize]) -> Self {
        let cols = shape.get(1..).unwrap_or_default().iter().product();
        let (source, shape) = (Source::Stored, shape.to_vec());
        Self { source, shape, cols, pieces: Vec::new(), plus: None, rows: None, magnitude: None }
    }

    /// The same change, for another tensor.
    pub(super) fn copied(&self) -> Self {
        let (shape, pieces) = (self.shape.clone(), self.pieces.clone());
        Self { shape, pieces, ..*self }
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many gains its rows or columns have.
    pub(super) fn gains(&self) -> Option<usize> {
        let count = |magnitude: Magnitude<'_>| if magnitude.of_columns { self.cols } else { self.elements() / self.cols.max(1) };
        self.magnitude.map(count)
    }

    /// Why it cannot be undone by what the merged tensor tells, if so.
    pub(super) fn hides(&self) -> Option<&'static str> {
        if self.magnitude.is_some() {
            Some("its rows or columns were given other lengths")
        } else if self.rows.is_some() {
            Some("the adapter has other rows in place of some")
        } else if !matches!(self.source, Source::Stored) {
            Some("the adapter has another in its place")
        } else {
            None
        }
    }
}

impl Piece<'_> {
    /// The rows it changes: the first, and the one after the last.
    pub(super) fn rows(&self) -> [usize; 2] {
        let rows = if self.transposed { self.factors.a.cols() } else { self.factors.b.rows() };
        [self.first_row, self.first_row + rows]
    }

    /// `A` and `B` for the tensor as it is stored. One that began with a part of the weight comes as the plain update of twice the
    /// rank; the tensor is read for that.
    pub(super) fn stored(&self, place: Place<'_>, from: DType) -> Result<[HostMatrix; 2]> {
        let [a, b] = match self.began_with {
            Some(part) => self.plain(place, from, part)?,
            None => [self.factors.a.clone(), self.factors.b.clone()],
        };
        Ok(if self.transposed { [b.transposed(), a.transposed()] } else { [a, b] })
    }

    #[cfg(feature = "svd")]
    fn plain(&self, (shard, entry): Place<'_>, from: DType, part: Principal) -> Result<[HostMatrix; 2]> {
        let Factors { a, b, scaling, .. } = self.factors.as_ref().clone();
        let mut values = vec![0.0; entry.elements()];
        convert_elements::widen(from, &shard.read(entry, 0, entry.bytes)?, &mut values);
        let (n, k) = (b.rows(), a.cols());
        let w = if self.transposed { HostMatrix::new((k, n), values)?.transposed() } else { HostMatrix::new((n, k), values)? };
        part.plain(&w, [a, b], scaling).map_err(|error| inside(&entry.name, error))
    }

    #[cfg(not(feature = "svd"))]
    fn plain(&self, _: Place<'_>, _: DType, part: Principal) -> Result<[HostMatrix; 2]> {
        Err(part.needs_svd())
    }
}

impl Source<'_> {
    /// `len` of its elements from `first` on.
    pub(super) fn read(&self, stored: Place<'_>, first: usize, values: &mut [f32]) -> Result<()> {
        let (shard, entry) = match self {
            Source::Instead(instead) => {
                values.copy_from_slice(&instead[first..][..values.len()]);
                return Ok(());
            }
            Source::Other(place) => *place,
            Source::Stored => stored,
        };
        let dtype = entry.float().ok_or_else(|| refused(&shard.path, format!("`{}` holds {:?}", entry.name, entry.dtype)))?;
        let old = shard.read(entry, first * dtype.size(), values.len() * dtype.size())?;
        convert_elements::widen(dtype, &old, values);
        Ok(())
    }
}
