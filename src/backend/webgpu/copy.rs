//! Copies of matrices on the device.

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::aliasing::{check_aliasing, read, written};
use super::dispatch::Launch;
use super::plan::{Piece, pieces};
use super::shader::Kernel;
use super::sum::{Matrix, OUTPUT};
use crate::element::{DType, Element, Float};
use crate::error::Result;
use crate::view::MatRef;

/// `struct Copy` of copy.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CopyUniforms {
    rows: u32,
    cols: u32,
    from: u32,
    from_row: u32,
    to: u32,
    to_row: u32,
    /// Words of the destination, from the first that is written to the last.
    first_word: u32,
    words: u32,
}

impl<E: Float> WebGpu<E> {
    /// `to = from`: by a buffer copy if both are contiguous whole words; else by a shader.
    pub(super) fn copy_matrix<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatRef<'_, Self, T>) -> Result<()> {
        check_aliasing("copy", [read("from", from), written("to", to)].into_iter())?;
        let bytes = |view: MatRef<'_, Self, T>| {
            let (first, span) = (view.memory().first(), view.span());
            [first + span.start, first + span.end].map(|element| (element * size_of::<T>()) as u64)
        };
        let (from_raw, to_raw) = (from.memory().raw(), to.memory().raw());
        let ([start, end], [offset, to_end]) = (bytes(from), bytes(to));
        let in_words = [start, end, offset, to_end].iter().all(|byte| byte % 4 == 0);
        let in_a_row = from.is_contiguous() && to.is_contiguous();
        let lets_copy =
            from_raw.usage().contains(wgpu::BufferUsages::COPY_SRC) && to_raw.usage().contains(wgpu::BufferUsages::COPY_DST);
        match () {
            () if start == end => Ok(()),
            () if in_a_row && in_words && lets_copy => self.gpu.copy(from_raw, start..end, to_raw, offset),
            () => self.copy_by_shader(from, to),
        }
    }

    /// An invocation owns whole words of the destination, and leaves the half of a word outside the matrix as it is.
    fn copy_by_shader<T: Element>(&self, from: MatRef<'_, Self, T>, to: MatRef<'_, Self, T>) -> Result<()> {
        let half = size_of::<T>() == 2;
        let dtype = if half { DType::F16 } else { DType::F32 }; // stands for any type of that size
        let (from, to) = (Matrix::viewed(from, dtype), Matrix::viewed(to, dtype));
        let [rows, cols] = to.shape();
        let most = [usize::MAX; 2]; // if the grid is too small, invocations take several words
        let bytes = self.limits.binding_bytes - self.alignment();
        let operands = [from.over(OUTPUT), to.over(OUTPUT)];
        pieces(Piece::whole(rows, cols, 0, 0), &operands, most, bytes).into_iter().try_for_each(|piece| {
            let (read, from) = self.part(from, OUTPUT, &piece);
            let (written, place) = self.part(to, OUTPUT, &piece);
            let (end, each) = (place.offset + (to.over(OUTPUT).span(&piece) / dtype.size() as u64) as u32, 1 + u32::from(half));
            let (first_word, last_word) = (place.offset / each, (end - 1) / each);
            let [rows, cols] = OUTPUT.map(|axis| piece.len(axis) as u32);
            let uniforms = CopyUniforms {
                rows,
                cols,
                from: from.offset,
                from_row: from.row,
                to: place.offset,
                to_row: if rows > 1 { place.row } else { cols },
                first_word,
                words: last_word - first_word + 1,
            };
            let (grid, work) = ([self.groups(uniforms.words as usize), 1], u64::from(uniforms.words));
            let (kernel, uniforms) = (Kernel::Copy { half }, bytemuck::bytes_of(&uniforms));
            self.launch(Launch { kernel, uniforms, operands: &[read, written], grid, work })
        })
    }
}
