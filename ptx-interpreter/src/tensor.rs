//! Tensor maps of TMA, and the layout of their boxes.

use crate::semantics::Semantics;

/// A tensor map (`cuTensorMapEncodeTiled`): a tensor of up to five axes, and the box that one copy moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u64,
    /// The axes, innermost first.
    pub axes: Vec<Axis>,
    /// Offset of the first element in the memory, in bytes: a multiple of 16.
    pub offset: u64,
    /// Swizzle: bytes of the lines within which 16-byte chunks are permuted, 128, 64 or 32; 16: no swizzle.
    pub swizzle: u64,
}

/// An axis of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Elements of the tensor.
    pub len: u64,
    /// Stride in bytes: for the innermost axis the size of an element, for others a multiple of 16.
    pub stride: u64,
    /// Elements of the box, up to 256.
    pub tile: u32,
}

impl TensorMap {
    /// A row-major matrix of 16-bit elements, and a box of `rows` and `cols`, in lines of 128 bytes
    /// (`CU_TENSOR_MAP_SWIZZLE_128B`).
    pub fn matrix(rows: u64, cols: u64, tile: [u32; 2]) -> Self {
        let [down, across] = tile;
        let axes = vec![Axis { len: cols, stride: 2, tile: across }, Axis { len: rows, stride: 2 * cols, tile: down }];
        Self { element: 2, axes, offset: 0, swizzle: 128 }
    }

    /// A part of the memory as the matrix: `offset` bytes lie before it, and its rows are `stride` elements apart.
    pub fn strided(mut self, offset: u64, stride: u64) -> Self {
        self.axes[1].stride = stride * self.element;
        Self { offset, ..self }
    }

    /// Placeholder bytes of the tensor map, if a driver would accept it for memory of this many bytes.
    pub(crate) fn encode(&self, bytes: usize) -> Result<Vec<u8>, String> {
        let Self { element, axes, offset, swizzle } = self;
        let inside = || self.end().is_some_and(|end| end <= bytes as u64);
        let axis = |axis: &Axis| (1..=1 << 32).contains(&axis.len) && (1..=256).contains(&axis.tile);
        let good = [1, 2, 4, 8].contains(element)
            && (1..=5).contains(&axes.len())
            && axes.iter().all(axis)
            && axes[0].stride == *element
            && offset.is_multiple_of(16)
            && axes[1..].iter().all(|axis| axis.stride % 16 == 0 && axis.stride < 1 << 40)
            && self.row_bytes().is_multiple_of(16)
            && (*swizzle == 16 || [32, 64, 128].contains(swizzle) && self.row_bytes() <= *swizzle);
        if good && inside() { Ok(vec![0; 128]) } else { Err(format!("no tensor map of {self:?} in {bytes} bytes")) }
    }

    /// The end of the last element.
    fn end(&self) -> Option<u64> {
        self.axes.iter().try_fold(self.element.checked_add(self.offset)?, |end, axis| {
            axis.len.checked_sub(1)?.checked_mul(axis.stride)?.checked_add(end)
        })
    }

    /// Bytes of the box along the innermost axis.
    fn row_bytes(&self) -> u64 {
        u64::from(self.axes[0].tile) * self.element
    }

    /// Chunks of 16 bytes of a box.
    pub(crate) fn chunks(&self) -> u64 {
        self.row_bytes() / 16 * self.axes[1..].iter().map(|axis| u64::from(axis.tile)).product::<u64>()
    }

    /// The address in shared memory of a chunk of a box that starts at `start`.
    pub(crate) fn place(&self, semantics: &Semantics, start: u64, chunk: u64) -> u64 {
        (semantics.box_byte)(start + chunk * 16, self.swizzle)
    }

    /// The parts of a chunk inside the tensor: offset in the chunk, offset in the tensor, and bytes. A chunk that is aligned and
    /// completely inside is one part; otherwise each element is a part.
    pub(crate) fn parts(&self, semantics: &Semantics, corner: &[i64], chunk: u64) -> Vec<(usize, u64, usize)> {
        let rank = self.axes.len();
        let (mut rest, across) = (chunk / (self.row_bytes() / 16), chunk % (self.row_bytes() / 16));
        let mut outer = 0;
        for (i, axis) in self.axes.iter().enumerate().skip(1) {
            let x = corner[(semantics.coordinate)(i, rank)] + (rest % u64::from(axis.tile)) as i64;
            rest /= u64::from(axis.tile);
            if !(0..axis.len as i64).contains(&x) {
                return Vec::new();
            }
            outer += x as u64 * axis.stride;
        }
        let (count, element) = ((16 / self.element) as i64, self.element);
        let first = corner[(semantics.coordinate)(0, rank)] + across as i64 * count;
        let inside = 0..self.axes[0].len as i64;
        let at = |x: i64| self.offset + outer + x as u64 * element;
        if inside.contains(&first) && inside.contains(&(first + count - 1)) && at(first).is_multiple_of(16) {
            return vec![(0, at(first), 16)];
        }
        let each = (0..count).filter(|i| inside.contains(&(first + i)));
        each.map(|i| (i as usize * element as usize, at(first + i), element as usize)).collect()
    }
}
