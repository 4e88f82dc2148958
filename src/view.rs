//! Views: a matrix in memory that somebody else owns, with a distance between its rows.
//!
//! A request does not ask who owns an operand. It takes views: of a [`Tensor`](crate::Tensor), of a range of its columns or rows, or of memory that
//! another library allocated and lends for as long as the view lives.
//!
//! ```
//! use lowrank::{Cpu, MatMut, MatRef, Tensor, op::LinearForward};
//!
//! let cpu = Cpu::<f32>::new()?;
//! let x = [1.0, 2.0]; // 1×2, in memory of yours
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
    /// Errors: [`Error::Value`] if rows would overlap, or reach beyond `len` elements.
    fn new(shape: Shape, offset: usize, row_stride: usize, len: usize) -> Result<Self> {
        shape.elements()?;
        Error::unless(
            shape.rows <= 1 || row_stride >= shape.cols,
            "view",
            "row_stride",
            row_stride,
            "at least the number of columns",
        )?;
        // Where there is no next row, any distance to it will do: one that no arithmetic can trip over.
        let row_stride = if shape.rows > 1 && shape.cols > 0 { row_stride } else { shape.cols };
        let layout = Self { shape, offset, row_stride };
        let end = layout.span().and_then(|span| span.checked_add(offset));
        if end.is_some_and(|end| end <= len) {
            return Ok(layout);
        }
        let want = format!("at least {}, for {shape} at offset {offset} with row stride {row_stride}", end.unwrap_or(usize::MAX));
        Err(Error::Value { verb: "view", name: "memory", got: format!("{len} elements"), want: want.into() })
    }

    /// Elements from the first to behind the last; `None` if they cannot be counted.
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

    /// The part of this shape that begins at an element; one of nothing begins where the whole does.
    fn part(self, shape: Shape, [row, col]: [usize; 2]) -> Self {
        if shape.rows == 0 || shape.cols == 0 {
            return Self { shape, row_stride: shape.cols, ..self };
        }
        Self { shape, offset: self.offset + row * self.row_stride + col, ..self }
    }
}

/// Errors: [`Error::Value`] unless the range lies within `0..len`.
fn within(name: &'static str, range: &Range<usize>, len: usize) -> Result<()> {
    let fine = range.start <= range.end && range.end <= len;
    if fine {
        return Ok(());
    }
    Err(Error::Value { verb: "view", name, got: format!("{range:?}"), want: format!("within 0..{len}").into() })
}

/// A matrix that is read. Elements of a row lie side by side; rows may lie apart.
///
/// The memory is a backend's [`Slice`](Backend::Slice): `[T]` on the CPU; memory of a tensor, or lent memory, on a GPU.
pub struct MatRef<'a, B: Backend, T: Element = <B as Backend>::Elem> {
    memory: &'a B::Slice<T>,
    layout: Layout,
}

/// A matrix that is written. It cannot be copied: only one request at a time can have it.
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
    /// All of `memory`, row after row. Errors: [`Error::Value`] if it does not hold exactly as many elements.
    pub fn new(memory: &'a B::Slice<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        exactly(B::slice_len(memory), shape)?;
        Ok(Self::all(memory, shape))
    }

    /// All of `memory`, whose length is known to be that of the shape.
    pub(crate) fn all(memory: &'a B::Slice<T>, shape: Shape) -> Self {
        Self { memory, layout: Layout { shape, offset: 0, row_stride: shape.cols } }
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of `memory`.
    ///
    /// Errors: [`Error::Value`] if `row_stride` is less than the number of columns, or the matrix reaches beyond the memory.
    pub fn strided(memory: &'a B::Slice<T>, shape: impl Into<Shape>, offset: usize, row_stride: usize) -> Result<Self> {
        Ok(Self { memory, layout: Layout::new(shape.into(), offset, row_stride, B::slice_len(memory))? })
    }

    /// These rows of it. Errors: [`Error::Value`] if it does not have them.
    pub fn row_range(self, rows: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.row_range(rows)?, ..self })
    }

    /// These columns of it, as a head of an attention, or one layer's part of a fused projection. Errors: [`Error::Value`] if it
    /// does not have them.
    pub fn column_range(self, cols: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.column_range(cols)?, ..self })
    }

    /// The memory that the view looks at, of which the matrix may be a part.
    pub fn memory(&self) -> &'a B::Slice<T> {
        self.memory
    }
}

impl<'a, B: Backend, T: Element> MatMut<'a, B, T> {
    /// All of `memory`, row after row. Errors: [`Error::Value`] if it does not hold exactly as many elements.
    pub fn new(memory: &'a mut B::Slice<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        exactly(B::slice_len(memory), shape)?;
        Ok(Self::all(memory, shape))
    }

    /// All of `memory`, whose length is known to be that of the shape.
    pub(crate) fn all(memory: &'a mut B::Slice<T>, shape: Shape) -> Self {
        Self { memory, layout: Layout { shape, offset: 0, row_stride: shape.cols } }
    }

    /// The matrix whose element `(i, j)` is element `offset + i·row_stride + j` of `memory`. What lies between the rows is not
    /// written.
    ///
    /// Errors: [`Error::Value`] if `row_stride` is less than the number of columns, or the matrix reaches beyond the memory.
    pub fn strided(memory: &'a mut B::Slice<T>, shape: impl Into<Shape>, offset: usize, row_stride: usize) -> Result<Self> {
        let layout = Layout::new(shape.into(), offset, row_stride, B::slice_len(memory))?;
        Ok(Self { memory, layout })
    }

    /// These rows of it. Errors: [`Error::Value`] if it does not have them.
    pub fn row_range(self, rows: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.row_range(rows)?, ..self })
    }

    /// These columns of it. Errors: [`Error::Value`] if it does not have them.
    pub fn column_range(self, cols: Range<usize>) -> Result<Self> {
        Ok(Self { layout: self.layout.column_range(cols)?, ..self })
    }

    /// The matrix again, borrowed from this view for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_, B, T> {
        MatMut { memory: self.memory, layout: self.layout }
    }

    /// The matrix, to be read for as long as this view is borrowed.
    pub fn as_ref(&self) -> MatRef<'_, B, T> {
        MatRef { memory: self.memory, layout: self.layout }
    }

    /// The matrix, to be read from now on.
    pub fn into_ref(self) -> MatRef<'a, B, T> {
        MatRef { memory: self.memory, layout: self.layout }
    }

    /// Overwrites it with the elements of another matrix of the same device; they do not go through the host.
    ///
    /// Errors: [`Error::Shape`] for another shape; those of the device.
    pub fn copy_from(self, backend: &B, from: MatRef<'_, B, T>) -> Result<()> {
        if from.shape() != self.shape() {
            return Err(Error::Shape { verb: "copy", name: "from", got: from.shape(), want: self.shape() });
        }
        backend.copy(from, self)
    }

    /// The memory that the view looks at, of which the matrix may be a part. Crate-private: a caller could swap the memory of two views.
    pub(crate) fn into_memory(self) -> &'a mut B::Slice<T> {
        self.memory
    }
}

/// What both kinds of views say of themselves.
macro_rules! layout_of {
    ($view:ident) => {
        impl<B: Backend, T: Element> $view<'_, B, T> {
            /// Rows × columns.
            pub fn shape(&self) -> Shape {
                self.layout.shape
            }

            /// How many rows.
            pub fn rows(&self) -> usize {
                self.layout.shape.rows
            }

            /// How many columns.
            pub fn cols(&self) -> usize {
                self.layout.shape.cols
            }

            /// Elements of the memory before the first of the matrix.
            pub fn offset(&self) -> usize {
                self.layout.offset
            }

            /// Elements from the beginning of a row to that of the next.
            pub fn row_stride(&self) -> usize {
                self.layout.row_stride
            }

            /// Whether each row begins where the one before it ends.
            pub fn is_contiguous(&self) -> bool {
                self.layout.is_contiguous()
            }

            /// The elements of the memory from the first of the matrix to its last; what lies between its rows is among them.
            pub fn span(&self) -> Range<usize> {
                // A layout exists only within memory, so the sum cannot wrap.
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

/// Errors: [`Error::Value`] unless there are as many elements as the shape has.
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
