//! Views as kernel arguments: address, sizes, stride and alignment.

use super::device::{Arg, Device, Tiles};
use super::kernel::{self, Kernel};
use super::plan::{self, MAX_SIZE, pointwise, size};
use super::{Buffer, Cuda};
use crate::backend::Backend;
use crate::element::{DType, Element, Float};
use crate::error::{Error, Result};
use crate::op::Factor;
use crate::tensor::Shape;
use crate::view::{MatMut, MatRef};

/// A matrix that kernels read.
pub(super) struct Matrix<'a, M> {
    memory: &'a M,
    /// Offset in the memory, in bytes.
    offset: usize,
    pub(super) rows: u32,
    pub(super) cols: u32,
    /// Elements between the starts of consecutive rows.
    pub(super) stride: u32,
    /// True if each row starts at a multiple of 16 bytes.
    pub(super) aligned: bool,
}

impl<M> Clone for Matrix<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Matrix<'_, M> {}

impl<'a, M> Matrix<'a, M> {
    /// Errors: [`Error::TooLarge`] for a size that kernels cannot count to, [`Error::Value`] naming the operand for such a row
    /// stride.
    pub(super) fn new<E: Float, D: Device<Memory = M>, T: Element>(
        verb: &'static str,
        name: &'static str,
        view: MatRef<'a, Cuda<E, D>, T>,
    ) -> Result<Self> {
        let (memory, bytes) = (&view.memory().memory, size_of::<T>());
        let (rows, cols, stride) = (size(view.rows())?, size(view.cols())?, stride(verb, name, view.row_stride())?);
        let aligned = is_aligned(address(view), view.row_stride(), bytes);
        Ok(Self { memory, offset: view.offset() * bytes, rows, cols, stride, aligned })
    }

    /// The matrix as a pointer.
    pub(super) fn read(self) -> Arg<'a, M> {
        Arg::Read(self.memory, self.offset)
    }

    /// The matrix as a tensor map with boxes of `tile`; for 16-bit elements.
    pub(super) fn boxes(self, tile: [u32; 2]) -> Arg<'a, M> {
        let Self { memory, offset, rows, cols, stride, .. } = self;
        Arg::ReadTiles(memory, Tiles { offset, stride, rows, cols, tile })
    }
}

/// A matrix that kernels write.
pub(super) struct MatrixMut<'a, M> {
    memory: &'a mut M,
    offset: usize,
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) stride: u32,
    pub(super) aligned: bool,
}

impl<'a, M> MatrixMut<'a, M> {
    /// Errors: those of [`Matrix::new`].
    pub(super) fn new<E: Float, D: Device<Memory = M>, T: Element>(
        verb: &'static str,
        name: &'static str,
        view: MatMut<'a, Cuda<E, D>, T>,
    ) -> Result<Self> {
        let Matrix { offset, rows, cols, stride, aligned, .. } = Matrix::new(verb, name, view.as_ref())?;
        Ok(Self { memory: &mut view.into_memory().memory, offset, rows, cols, stride, aligned })
    }

    /// The matrix as a pointer.
    pub(super) fn write(self) -> Arg<'a, M> {
        Arg::Write(self.memory, self.offset)
    }

    /// The matrix as a tensor map with boxes of `tile`; for 16-bit elements.
    pub(super) fn boxes(self, tile: [u32; 2]) -> Arg<'a, M> {
        let Self { memory, offset, rows, cols, stride, .. } = self;
        Arg::WriteTiles(memory, Tiles { offset, stride, rows, cols, tile })
    }
}

/// A contiguous operand that a kernel reads.
pub(super) fn read<'a, E: Float, D: Device, T: Element>(view: MatRef<'a, Cuda<E, D>, T>) -> Arg<'a, D::Memory> {
    debug_assert!(view.is_contiguous());
    Arg::Read(&view.memory().memory, view.offset() * size_of::<T>())
}

/// An optional contiguous operand that a kernel reads.
pub(super) fn read_if<'a, E: Float, D: Device>(view: Option<MatRef<'a, Cuda<E, D>>>) -> Arg<'a, D::Memory> {
    view.map_or(Arg::Null, read)
}

/// A contiguous operand that a kernel writes.
pub(super) fn write<'a, E: Float, D: Device, T: Element>(view: MatMut<'a, Cuda<E, D>, T>) -> Arg<'a, D::Memory> {
    debug_assert!(view.is_contiguous());
    write_rows(view)
}

/// An operand that a kernel writes, with any row stride.
fn write_rows<'a, E: Float, D: Device, T: Element>(view: MatMut<'a, Cuda<E, D>, T>) -> Arg<'a, D::Memory> {
    let offset = view.offset() * size_of::<T>();
    Arg::Write(&mut view.into_memory().memory, offset)
}

/// True if two consecutive 16-bit elements of a bias, from an even index on, can be read at once.
pub(super) fn has_aligned_pairs<E: Float, D: Device>(view: MatRef<'_, Cuda<E, D>>) -> bool {
    address(view).is_multiple_of(4)
}

/// Scratch memory for an `f32` factor rounded to `E`; it lives as long as its verb.
pub(super) type Rounded<M, E> = Option<Buffer<M, E>>;

/// A factor in the type that products take, `E`. An `f32` factor beside 16-bit weights is first rounded to the nearest, into
/// `rounded`; the factor itself does not change.
pub(super) fn factor<'a, E: Float, D: Device>(
    cuda: &Cuda<E, D>,
    verb: &'static str,
    name: &'static str,
    factor: Factor<'a, Cuda<E, D>>,
    rounded: &'a mut Rounded<D::Memory, E>,
) -> Result<Matrix<'a, D::Memory>> {
    let view = match factor {
        Factor::Elem(view) => return Matrix::new(verb, name, view),
        Factor::F32(view) if E::DTYPE == DType::F32 => return Matrix::new(verb, name, view),
        Factor::F32(view) => view,
    };
    let (shape, from) = (view.shape(), Matrix::new(verb, name, view)?);
    let to = rounded.insert(cuda.unwritten(shape.elements()?)?);
    let [len, cols, from_stride] = [shape.elements()?, shape.cols, view.row_stride()].map(|n| n as u64);
    let params = kernel::RoundFactor { from: from.read(), to: Arg::Write(&mut to.memory, 0), len, cols, from_stride };
    cuda.launch(pointwise(Kernel::RoundFactor, shape)?, params)?;
    Matrix::new::<E, D, E>(verb, name, MatRef::all(to, shape))
}

/// A factor as stored, and true if that is `f32` beside 16-bit weights.
pub(super) fn stored_factor<'a, E: Float, D: Device>(
    verb: &'static str,
    name: &'static str,
    factor: Factor<'a, Cuda<E, D>>,
) -> Result<(Matrix<'a, D::Memory>, bool)> {
    match factor {
        Factor::Elem(view) => Ok((Matrix::new(verb, name, view)?, false)),
        Factor::F32(view) => Ok((Matrix::new(verb, name, view)?, E::DTYPE != DType::F32)),
    }
}

/// `to = from`, by one launch.
pub(super) fn copy<E: Float, D: Device, T: Element>(
    cuda: &Cuda<E, D>,
    from: MatRef<'_, Cuda<E, D>, T>,
    to: MatMut<'_, Cuda<E, D>, T>,
) -> Result<()> {
    let (bytes, Shape { rows, cols }) = (size_of::<T>(), from.shape());
    // Contiguous rows are copied as one row, whose stride does not matter.
    let is_row = from.is_contiguous() && to.is_contiguous();
    let cols = if is_row { rows * cols } else { cols };
    let strides = if is_row { [0; 2] } else { [from.row_stride(), to.row_stride()] };
    let aligned = is_aligned(address(from), strides[0], bytes) && is_aligned(address(to.as_ref()), strides[1], bytes);
    let len = from.shape().elements()?;
    let (plan, word) = plan::copy(len, cols, bytes, aligned)?;
    let words = [len, cols, strides[0], strides[1]].map(|n| (n * bytes / word) as u64);
    let [len, cols, from_stride, to_stride] = words;
    let from = Arg::Read(&from.memory().memory, from.offset() * bytes);
    cuda.launch(plan, kernel::Copy { from, to: write_rows(to), len, cols, from_stride, to_stride })
}

/// A row stride as a kernel argument.
fn stride(verb: &'static str, name: &'static str, stride: usize) -> Result<u32> {
    let small = u32::try_from(stride).ok().filter(|&stride| stride <= MAX_SIZE);
    let got = || format!("a view whose rows begin {stride} elements apart");
    small
        .ok_or_else(|| Error::Value { verb, name, got: got(), want: "rows that begin at most 2³¹ - 256 elements apart".into() })
}

/// The address of a matrix.
fn address<E: Float, D: Device, T: Element>(view: MatRef<'_, Cuda<E, D>, T>) -> u64 {
    D::address(&view.memory().memory) + (view.offset() * size_of::<T>()) as u64
}

/// True if rows start at multiples of 16 bytes: the first at `address`, the next `stride` elements of `bytes` bytes later, and so
/// on.
fn is_aligned(address: u64, stride: usize, bytes: usize) -> bool {
    address.is_multiple_of(16) && (stride as u64 * bytes as u64).is_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_too_far_apart_are_refused_by_name() {
        assert_eq!(stride("add", "x", MAX_SIZE as usize).unwrap(), MAX_SIZE);
        for far in [MAX_SIZE as usize + 1, u32::MAX as usize + 1, usize::MAX] {
            let error = stride("lora_merge", "w", far).unwrap_err();
            assert!(matches!(error, Error::Value { verb: "lora_merge", name: "w", .. }), "{error}");
        }
    }

    #[test]
    fn rows_are_aligned_where_they_begin_at_multiples_of_16_bytes() {
        for (address, stride, bytes, aligned) in
            [(0, 8, 2, true), (48, 24, 2, true), (8, 8, 2, false), (2, 8, 2, false), (16, 12, 2, false), (16, 12, 4, true)]
        {
            assert_eq!(is_aligned(address, stride, bytes), aligned, "{address} {stride} {bytes}");
        }
    }
}
