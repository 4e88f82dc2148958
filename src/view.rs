//! Views: borrowed matrices with an offset and a row stride.
//!
//! Operands of requests are views: of a [`Tensor`](crate::Tensor), of a range of its rows or columns, or of memory that another
//! library allocated and lends while the view exists.
//!
//! ```
//! use lowrank::{Cpu, MatMut, MatRef, Tensor, op::LinearForward};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let x = [1.0, 2.0]; // 1×2, in the caller's memory
//! let qkv = Tensor::from_slice(&cpu, (3, 2), &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0])?; // three layers in one weight
//! let mut y = [0.0; 3]; // 1×3
//! for row in 0..3 {
//!     let w = qkv.view().row_range(row..row + 1)?;
//!     let out = MatMut::from_slice(&mut y, (1, 3))?.column_range(row..row + 1)?;
//!     LinearForward { x: MatRef::from_slice(&x, (1, 2))?, w: w.into(), bias: None, y: out.into() }.run(&cpu)?;
//! }
//! assert_eq!(y, [1.0, 2.0, 3.0]);
//! # Ok::<(), lowrank::Error>(())
//! ```

use std::fmt;
use std::ops::Range;

use crate::backend::Backend;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Shape;

/// Where the elements of a matrix lie: element `(i, j)` at `offset + i·row_stride + j`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    shape: Shape,
    offset: usize,
    row_stride: usize,
}

impl Layout {
    /// `Err` if rows overlap or the matrix reaches beyond `len` elements.
    fn new(shape: Shape, offset: usize, row_stride: usize, len: usize) -> Result<Self> {
        shape.elements()?;
        Error::unless(
            shape.rows <= 1 || row_stride >= shape.cols,
            "view",
            "row_stride",
            row_stride,
            "at least the number of columns",
        )?;
        // Without a second row the stride means nothing; this value cannot overflow.
        let row_stride = if shape.rows > 1 && shape.cols > 0 { row_stride } else { shape.cols };
        let layout = Self { shape, offset, row_stride };
        let end = layout.span().and_then(|span| span.checked_add(offset));
        if end.is_some_and(|end| end <= len) {
            return Ok(layout);
        }
        let want = format!("at least {}, for {shape} at offset {offset} with row stride {row_stride}", end.unwrap_or(usize::MAX));
        Err(Error::Value { verb: "view", name: "memory", got: format!("{len} elements"), want: want.into() })
    }

    /// The number of elements from the first to the last, both included; `None` if it overflows.
    fn span(&self) -> Option<usize> {
        match self.shape {
            Shape { rows: 0, .. } | Shape { cols: 0, .. } => Some(0),
            Shape { rows, cols } => (rows - 1).checked_mul(self.row_stride)?.checked_add(cols),
        }
    }

    fn is_contiguous(&self) -> bool {
        self.shape.rows <= 1 || self.row_stride == self.shape.cols
    }

    fn row_range(self, rows: Range<usize>) -> Result<Self> {
        within("rows", &rows, self.shape.rows)?;
        Ok(self.part(Shape { rows: rows.len(), ..self.shape }, [rows.start, 0]))
    }

    fn column_range(self, cols: Range<usize>) -> Result<Self> {
        within("columns", &cols, self.shape.cols)?;
        Ok(self.part(Shape { cols: cols.len(), ..self.shape }, [0, cols.start]))
    }

    /// The part of this shape whose first element is `(row, col)`. An empty part keeps the offset of the whole, which is within
    /// the memory.
    fn part(self, shape: Shape, [row, col]: [usize; 2]) -> Self {
        if shape.rows == 0 || shape.cols == 0 {
            return Self { shape, row_stride: shape.cols, ..self };
        }
        Self { shape, offset: self.offset + row * self.row_stride + col, ..self }
    }
}

/// `Err` unless the range lies within `0..len`.
fn within(name: &'static str, range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::Value { verb: "view", name, got: format!("{range:?}"), want: format!("within 0..{len}").into() })
}

/// A matrix for reading: element `(i, j)` is element `offset + i·row_stride + j` of borrowed memory.
///
/// The memory is a [`Slice`](Backend::Slice) of the backend: `[T]` on the CPU; a part of a buffer on a GPU. No element is ever
/// copied to make a view.
pub struct MatRef<'a, B: Backend, T: Element = <B as Backend>::Elem> {
    memory: &'a B::Slice<T>,
    layout: Layout,
}

/// A matrix for writing: element `(i, j)` is element `offset + i·row_stride + j` of mutably borrowed memory.
///
/// It is not `Copy`, so only one request at a time can write the matrix; see [`reborrow`](Self::reborrow).
pub struct MatMut<'a, B: Backend, T: Element = <B as Backend>::Elem> {
    memory: &'a mut B::Slice<T>,
    layout: Layout,
}

impl<B: Backend, T: Element> Clone for MatRef<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend, T: Element> Copy for MatRef<'_, B, T> {}

impl<'a, B: Backend, T: Element> MatRef<'a, B, T> {
    /// A contiguous matrix of all elements of `memory`. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn new(memory: &'a B::Slice<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        exactly(B::slice_len(memory), shape)?;
        Ok(Self::all(memory, shape))
    }

    /// A contiguous matrix of all elements of `memory`, whose length is known to be `rows · cols`.
    pub(crate) fn all(memory: &'a B::Slice<T>, shape: Shape) -> Self {
        Self { memory, layout: Layout { shape, offset: 0, row_stride: shape.cols } }
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of `memory`.
    ///
    /// Errors: [`Error::Value`] if `row_stride` is less than the number of columns, or the matrix reaches beyond the memory.
    pub fn strided(memory: &'a B::Slice<T>, shape: impl Into<Shape>, offset: usize, row_stride: usize) -> Result<Self> {
        Ok(Self { memory, layout: Layout::new(shape.into(), offset, row_stride, B::slice_len(memory))? })
    }

    /// A range of rows. Errors: [`Error::Value`] if the matrix does not have them.
    pub fn row_range(self, rows: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.row_range(rows)?, ..self })
    }

    /// A range of columns, such as one attention head, or one layer of a fused projection. Errors: [`Error::Value`] if the
    /// matrix does not have them.
    pub fn column_range(self, cols: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.column_range(cols)?, ..self })
    }

    /// The borrowed memory, of which the matrix may be a part.
    pub fn memory(&self) -> &'a B::Slice<T> {
        self.memory
    }
}

impl<'a, B: Backend, T: Element> MatMut<'a, B, T> {
    /// A contiguous matrix of all elements of `memory`. Errors: [`Error::Value`] if its length is not `rows · cols`.
    pub fn new(memory: &'a mut B::Slice<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        exactly(B::slice_len(memory), shape)?;
        Ok(Self::all(memory, shape))
    }

    /// A contiguous matrix of all elements of `memory`, whose length is known to be `rows · cols`.
    pub(crate) fn all(memory: &'a mut B::Slice<T>, shape: Shape) -> Self {
        Self { memory, layout: Layout { shape, offset: 0, row_stride: shape.cols } }
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of `memory`. Elements between the rows are not
    /// written.
    ///
    /// Errors: [`Error::Value`] if `row_stride` is less than the number of columns, or the matrix reaches beyond the memory.
    pub fn strided(memory: &'a mut B::Slice<T>, shape: impl Into<Shape>, offset: usize, row_stride: usize) -> Result<Self> {
        let layout = Layout::new(shape.into(), offset, row_stride, B::slice_len(memory))?;
        Ok(Self { memory, layout })
    }

    /// A range of rows. Errors: [`Error::Value`] if the matrix does not have them.
    pub fn row_range(self, rows: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.row_range(rows)?, ..self })
    }

    /// A range of columns. Errors: [`Error::Value`] if the matrix does not have them.
    pub fn column_range(self, cols: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.column_range(cols)?, ..self })
    }

    /// The matrix for writing, borrowed from this view.
    pub fn reborrow(&mut self) -> MatMut<'_, B, T> {
        MatMut { memory: self.memory, layout: self.layout }
    }

    /// The matrix for reading, borrowed from this view.
    pub fn as_ref(&self) -> MatRef<'_, B, T> {
        MatRef { memory: self.memory, layout: self.layout }
    }

    /// The matrix for reading, in place of this view.
    pub fn into_ref(self) -> MatRef<'a, B, T> {
        MatRef { memory: self.memory, layout: self.layout }
    }

    /// Overwrites the matrix with the elements of another one, on the device.
    ///
    /// Errors: [`Error::Shape`] if the shapes differ; those of the device.
    pub fn copy_from(self, backend: &B, from: MatRef<'_, B, T>) -> Result<()> {
        if from.shape() != self.shape() {
            return Err(Error::Shape { verb: "copy", name: "from", got: from.shape(), want: self.shape() });
        }
        backend.copy(from, self)
    }

    /// The borrowed memory, of which the matrix may be a part. Crate-private, because a caller could swap the memory of two
    /// views.
    pub(crate) fn into_memory(self) -> &'a mut B::Slice<T> {
        self.memory
    }
}

/// Methods of both kinds of views.
macro_rules! layout_of {
    ($view:ident) => {
        impl<B: Backend, T: Element> $view<'_, B, T> {
            /// The shape.
            pub fn shape(&self) -> Shape {
                self.layout.shape
            }

            /// Number of rows.
            pub fn rows(&self) -> usize {
                self.layout.shape.rows
            }

            /// Number of columns.
            pub fn cols(&self) -> usize {
                self.layout.shape.cols
            }

            /// Elements of the memory before the first element of the matrix.
            pub fn offset(&self) -> usize {
                self.layout.offset
            }

            /// Elements from the start of a row to the start of the next.
            pub fn row_stride(&self) -> usize {
                self.layout.row_stride
            }

            /// True if there is no space between rows.
            pub fn is_contiguous(&self) -> bool {
                self.layout.is_contiguous()
            }

            /// The range of the memory from the first element of the matrix to its last, with the space between rows.
            pub fn span(&self) -> Range<usize> {
                // A layout is always within its memory, so the sum cannot overflow.
                self.layout.offset..self.layout.offset + self.layout.span().unwrap_or(0)
            }
        }

        impl<B: Backend, T: Element> fmt::Debug for $view<'_, B, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Layout { shape, offset, row_stride } = self.layout;
                let name = stringify!($view);
                write!(f, "{name}<{}>({shape}, offset {offset}, row stride {row_stride})", std::any::type_name::<T>())
            }
        }
    };
}

layout_of!(MatRef);
layout_of!(MatMut);

/// `Err` unless `len` is the number of elements of the shape.
fn exactly(len: usize, shape: Shape) -> Result<()> {
    let want = shape.elements()?;
    if len == want {
        return Ok(());
    }
    Err(Error::Value {
        verb: "view",
        name: "memory",
        got: format!("{len} elements"),
        want: format!("{want}, for {shape}").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    type Rows<'a> = MatRef<'a, Cpu<f32>>;

    #[test]
    fn views_stay_within_their_memory() {
        let memory = [0f32; 10];
        assert!(Rows::new(&memory, (2, 5)).is_ok() && Rows::new(&memory, (3, 3)).is_err());
        for (shape, offset, stride, fits) in [
            ((2, 5), 0, 5, true),
            ((2, 4), 2, 4, true),
            ((2, 4), 3, 4, false),
            ((2, 4), 0, 6, true),
            ((2, 4), 0, 7, false),
            ((2, 4), 0, 3, false), // rows overlap
            ((1, 4), 6, 0, true),  // there is no next row
            ((0, 4), 10, 4, true),
            ((0, 4), 11, 4, false),
            ((4, 0), 10, 100, true),
            ((2, 1), usize::MAX, 1, false),
            ((3, 1), 0, usize::MAX, false),
        ] {
            assert_eq!(Rows::strided(&memory, shape, offset, stride).is_ok(), fits, "{shape:?} {offset} {stride}");
        }
    }

    #[test]
    fn ranges_of_rows_and_columns_are_views_of_the_same_memory() {
        let memory: Vec<f32> = (0..20).map(|i| i as f32).collect();
        let whole = Rows::new(&memory, (4, 5)).unwrap();
        let part = whole.row_range(1..3).unwrap().column_range(2..4).unwrap();
        assert_eq!((part.shape(), part.offset(), part.row_stride(), part.span()), ((2, 2).into(), 7, 5, 7..14));
        assert!(whole.is_contiguous() && whole.row_range(1..3).unwrap().is_contiguous() && !part.is_contiguous());
        assert!(whole.row_range(3..5).is_err() && whole.column_range(0..6).is_err());
        #[allow(clippy::reversed_empty_ranges, reason = "a caller may pass one")]
        let reversed = 3..2;
        assert!(whole.row_range(reversed).is_err());
        for empty in [whole.row_range(4..4).unwrap(), whole.column_range(5..5).unwrap()] {
            assert!(empty.span().is_empty() && empty.span().end <= 20);
        }
    }
}
