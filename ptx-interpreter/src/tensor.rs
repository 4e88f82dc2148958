//! Maps of tensors, of which TMA moves boxes, and where the elements of a box lie.

use crate::semantics::Semantics;

/// What a tensor map says (`cuTensorMapEncodeTiled`): a tensor of up to five axes, and the box that one copy moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u64,
    /// The axes, innermost first.
    pub axes: Vec<Axis>,
    /// Bytes of the lines of a box whose chunks of 16 bytes are exchanged: 128, 64 or 32; 16: none are.
    pub swizzle: u64,
}

/// One axis of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Elements of the tensor.
    pub len: u64,
    /// Bytes from one to the next. The innermost axis has those of an element, others multiples of 16.
    pub stride: u64,
    /// Elements of the box, up to 256.
    pub tile: u32,
}

impl TensorMap {
    /// A matrix of 16-bit elements, row after row, and a box of so many rows and columns, in lines of 128 bytes
    /// (`CU_TENSOR_MAP_SWIZZLE_128B`).
    pub fn matrix(rows: u64, cols: u64, tile: [u32; 2]) -> Self {
        let [down, across] = tile;
        let axes = vec![Axis { len: cols, stride: 2, tile: across }, Axis { len: rows, stride: 2 * cols, tile: down }];
        Self { element: 2, axes, swizzle: 128 }
    }

    /// The bytes of a tensor map, which mean nothing here, if a driver would make one of memory of so many bytes.
    pub(crate) fn encode(&self, bytes: usize) -> Result<Vec<u8>, String> {
        let Self { element, axes, swizzle } = self;
        let whole = || self.end().is_some_and(|end| (end..=end + self.padding()).contains(&(bytes as u64)));
        let axis = |axis: &Axis| (1..=1 << 32).contains(&axis.len) && (1..=256).contains(&axis.tile);
        let good = [1, 2, 4, 8].contains(element)
            && (1..=5).contains(&axes.len())
            && axes.iter().all(axis)
            && axes[0].stride == *element
            && axes[1..].iter().all(|axis| axis.stride % 16 == 0 && axis.stride < 1 << 40)
            && self.row_bytes().is_multiple_of(16)
            && (*swizzle == 16 || [32, 64, 128].contains(swizzle) && self.row_bytes() <= *swizzle);
        if good && whole() { Ok(vec![0; 128]) } else { Err(format!("no tensor map of {self:?} in {bytes} bytes")) }
    }

    /// Where the last element ends.
    fn end(&self) -> Option<u64> {
        self.axes.iter().try_fold(self.element, |end, axis| axis.len.checked_sub(1)?.checked_mul(axis.stride)?.checked_add(end))
    }

    /// Bytes that may lie between the last element and the end of the outermost stride.
    fn padding(&self) -> u64 {
        let (outer, inner) = self.axes.split_last().expect("there is an axis");
        let used: u64 = inner.iter().map(|axis| (axis.len - 1) * axis.stride).sum::<u64>() + self.element;
        outer.stride.saturating_sub(used)
    }

    /// Bytes of the box along the innermost axis.
    fn row_bytes(&self) -> u64 {
        u64::from(self.axes[0].tile) * self.element
    }

    /// Chunks of 16 bytes of a box.
    pub(crate) fn chunks(&self) -> u64 {
        self.row_bytes() / 16 * self.axes[1..].iter().map(|axis| u64::from(axis.tile)).product::<u64>()
    }

    /// Where a chunk of a box that starts at `start` lies in shared memory.
    pub(crate) fn place(&self, semantics: &Semantics, start: u64, chunk: u64) -> u64 {
        (semantics.box_byte)(start + chunk * 16, self.swizzle)
    }

    /// The parts of a chunk that lie inside the tensor: their offset in the chunk, their place in the tensor, and their bytes.
    /// A chunk that lies inside as a whole, and at a multiple of 16 bytes, is one part; others go element by element.
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
        let at = |x: i64| outer + x as u64 * element;
        if inside.contains(&first) && inside.contains(&(first + count - 1)) && at(first).is_multiple_of(16) {
            return vec![(0, at(first), 16)];
        }
        let each = (0..count).filter(|i| inside.contains(&(first + i)));
        each.map(|i| (i as usize * element as usize, at(first + i), element as usize)).collect()
    }
}
