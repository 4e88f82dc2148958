//! The output of a sum, cut into blocks that tasks write in parallel.
#![allow(unsafe_code, reason = "a block of a matrix is not a slice: parts of other blocks lie between its rows")]

use std::marker::PhantomData;
use std::ops::Range;

use super::super::Engine;
use super::super::small_work::is_small_product;
use super::Matrix;
use crate::element::{DType, Float};
use crate::error::Result;

/// A matrix to be written.
pub(in super::super) struct Output<'a, O> {
    /// Starts with the first element.
    data: &'a mut [O],
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    stride: usize,
}

impl<'a, O> Output<'a, O> {
    /// `rows × cols`, row-major.
    pub(in super::super) fn new(data: &'a mut [O], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `rows × cols`, row-major, with `stride` elements from the start of a row to that of the next. Elements between the rows
    /// are not written.
    pub(in super::super) fn strided(data: &'a mut [O], rows: usize, cols: usize, stride: usize) -> Self {
        let span = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(span <= data.len() && (rows <= 1 || cols <= stride)); // what the unsafe code below relies on
        Self { data, rows, cols, stride }
    }

    pub(in super::super) fn rows(&self) -> usize {
        self.rows
    }

    pub(in super::super) fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// All elements, row by row, of a contiguous output.
    pub(super) fn data(&mut self) -> &mut [O] {
        assert!(self.rows <= 1 || self.stride == self.cols);
        &mut self.data[..self.rows * self.cols]
    }

    /// The same matrix, if its numbers are `f32`.
    pub(in super::super) fn as_f32(&mut self) -> Option<Output<'_, f32>>
    where
        O: Float,
    {
        let Self { rows, cols, stride, .. } = *self;
        (O::DTYPE == DType::F32).then(|| Output { data: bytemuck::cast_slice_mut(self.data), rows, cols, stride })
    }

    /// The matrix, to be read.
    pub(in super::super) fn as_matrix(&self) -> Matrix<'_, O> {
        Matrix::strided(self.data, self.rows, self.cols, self.stride)
    }

    /// The matrix, borrowed from this one.
    pub(in super::super) fn reborrow(&mut self) -> Output<'_, O> {
        Output { data: self.data, rows: self.rows, cols: self.cols, stride: self.stride }
    }

    /// A range of its rows.
    pub(in super::super) fn rows_of(&mut self, rows: Range<usize>) -> Output<'_, O> {
        assert!(rows.end <= self.rows);
        let first = if rows.is_empty() || self.cols == 0 { 0 } else { rows.start * self.stride };
        Output::strided(&mut self.data[first..], rows.len(), self.cols, self.stride)
    }
}

impl<O: Send> Output<'_, O> {
    /// Calls `task` once for each block, a part of the rows (`down`) by a part of the columns (`across`). Blocks run in
    /// parallel, unless a product of this size and depth is [small work](is_small_product).
    pub(super) fn for_each_block(
        self,
        engine: &Engine,
        down: Parts,
        across: Parts,
        depth: usize,
        task: impl Fn(Block<'_, O>) -> Result<()> + Sync,
    ) -> Result<()> {
        assert!(down.len == self.rows && across.len == self.cols);
        let (corner, stride) = (Corner(self.data.as_mut_ptr()), self.stride);
        engine.sequential_if(is_small_product(self.rows, self.cols, depth)).try_each_index(down.parts * across.parts, &|i| {
            let (rows, cols) = (down.part(i / across.parts), across.part(i % across.parts));
            if rows.is_empty() || cols.is_empty() {
                return Ok(());
            }
            // SAFETY: both ranges lie within the matrix, whose elements `self.data` lends us until this function returns. Each
            // `i` is seen once, and no two parts of a side share an index, so no two blocks share an element.
            task(unsafe { Block::new(&corner, stride, rows, cols) })
        })
    }
}

/// The first element of a matrix.
struct Corner<O>(*mut O);

// SAFETY: tasks only make blocks of it, which do not overlap; an element is sent to the task that owns its block.
unsafe impl<O: Send> Sync for Corner<O> {}

/// A rectangle of the output, which one task owns.
pub(super) struct Block<'a, O> {
    first: *mut O,
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    lent: PhantomData<&'a mut O>,
}

impl<'a, O> Block<'a, O> {
    /// A block in memory of its own, of `rows × cols` elements.
    pub(super) fn over(data: &'a mut [O], rows: Range<usize>, cols: Range<usize>) -> Self {
        assert_eq!(data.len(), rows.len() * cols.len());
        Self { first: data.as_mut_ptr(), stride: cols.len(), rows, cols, lent: PhantomData }
    }

    /// # Safety
    /// `rows × cols` of the matrix lie in memory, and are nobody else's for `'a`; both ranges have a first index.
    unsafe fn new(corner: &Corner<O>, stride: usize, rows: Range<usize>, cols: Range<usize>) -> Self {
        // SAFETY: the first element of the rectangle lies in memory.
        let first = unsafe { corner.0.add(rows.start * stride + cols.start) };
        Self { first, stride, rows, cols, lent: PhantomData }
    }

    /// The rows of the output that it covers.
    #[inline(always)]
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The columns of the output that it covers.
    #[inline(always)]
    pub(super) fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// The block's part of a row; `row` is counted from the first row of the block.
    #[inline(always)]
    pub(super) fn line(&mut self, row: usize) -> &mut [O] {
        assert!(row < self.rows.len());
        // SAFETY: the row is one of the block's, whose elements are ours for as long as `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols.len()) }
    }
}

impl<O> Block<'_, O> {
    /// The block's parts of N rows, from `row` on.
    #[inline(always)]
    pub(super) fn lines<const N: usize>(&mut self, row: usize) -> [&mut [O]; N] {
        assert!(row + N <= self.rows.len() && self.cols.len() <= self.stride);
        std::array::from_fn(|i| {
            // SAFETY: the rows are the block's, ours for as long as `self` is borrowed; a row ends before the next begins.
            unsafe { std::slice::from_raw_parts_mut(self.first.add((row + i) * self.stride), self.cols.len()) }
        })
    }
}

/// A range of indices cut into about equal parts. Each part but the last is a multiple of `unit` long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    len: usize,
    unit: usize,
    parts: usize,
}

impl Parts {
    /// The fewest parts of at most `max_len` indices (at least a unit) each, their number rounded up to a multiple of
    /// `multiple_of`.
    pub(super) fn new(len: usize, unit: usize, max_len: usize, multiple_of: usize) -> Self {
        let units = len.div_ceil(unit);
        let parts = units.div_ceil((max_len / unit).max(1));
        Self { len, unit, parts: parts.next_multiple_of(multiple_of).clamp(1, units.max(1)) }
    }

    /// Number of parts.
    pub(super) fn count(self) -> usize {
        self.parts
    }

    /// The length of the longest part, rounded up to a multiple of `unit`.
    pub(super) fn longest(self) -> usize {
        self.len.div_ceil(self.unit).div_ceil(self.parts) * self.unit
    }

    /// Part `i`.
    pub(super) fn part(self, i: usize) -> Range<usize> {
        let units = self.len.div_ceil(self.unit);
        let (each, more) = (units / self.parts, units % self.parts); // the first parts have one more
        let cut = |i: usize| ((each * i + more.min(i)) * self.unit).min(self.len);
        cut(i)..cut(i + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Cpu;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_follow_one_another_and_keep_their_bounds(
            len in 0usize..500, unit in 1usize..40, most in 1usize..200, times in 1usize..5,
        ) {
            let parts = Parts::new(len, unit, most, times);
            let mut end = 0;
            for i in 0..parts.count() {
                let part = parts.part(i);
                prop_assert_eq!(part.start, end);
                prop_assert!(part.start.is_multiple_of(unit) && part.len() <= parts.longest());
                prop_assert!(part.len() <= most.max(unit));
                end = part.end;
            }
            prop_assert_eq!(end, len);
        }

        #[test]
        fn blocks_cover_the_output_once(
            rows in 0usize..30, cols in 0usize..30, height in 1usize..9, width in 1usize..9, sequential in any::<bool>(),
        ) {
            let cpu = Cpu::<f32>::new().unwrap();
            let mut data = vec![0u32; rows * cols];
            let (down, across) = (Parts::new(rows, 2, height, 1), Parts::new(cols, 3, width, 2));
            Output::new(&mut data, rows, cols).for_each_block(&cpu.engine(sequential), down, across, rows, |mut block| {
                for i in 0..block.rows().len() {
                    let (row, first) = (block.rows().start + i, block.cols().start);
                    for (j, to) in block.line(i).iter_mut().enumerate() {
                        *to += (row * cols + first + j + 1) as u32;
                    }
                }
                Ok(())
            }).unwrap();
            prop_assert!(data.iter().enumerate().all(|(i, &seen)| seen == i as u32 + 1));
        }
    }
}
