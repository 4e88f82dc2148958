//! Hardware semantics that a reader of the PTX ISA could misunderstand: layouts of elements, and counts of mbarriers. Each is a
//! function, so that tests can replace it by a wrong one and see third-party kernels fail (`third_party.rs`).

/// A decoded wgmma descriptor: the layout of a matrix in shared memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) start: u64,
    /// MN-major: from one line of columns to the next ("leading dimension byte offset").
    pub(crate) leap: u64,
    /// From eight lines to the next eight ("stride dimension byte offset").
    pub(crate) stride: u64,
    /// Bytes of a line, within which 16-byte chunks are swizzled.
    pub(crate) line: u64,
}

/// The semantics. `PTX` is that of the PTX ISA.
#[derive(Clone, Copy)]
pub(crate) struct Semantics {
    /// Swizzled address of the byte of a box at address `at`, for lines of this many bytes.
    pub(crate) box_byte: fn(at: u64, line: u64) -> u64,
    /// Swizzled address of a byte of a wgmma operand, from its start, an offset, and the bytes of a line.
    pub(crate) operand_byte: fn(start: u64, offset: u64, line: u64) -> u64,
    /// Offset of a chunk of a row, K-major.
    pub(crate) row_chunk: fn(layout: &Layout, row: u64, chunk: u64) -> u64,
    /// Offset of a chunk of rows at a depth, MN-major.
    pub(crate) depth_chunk: fn(layout: &Layout, chunk: u64, depth: u64) -> u64,
    /// Row and column of a register of a lane's sums of wgmma, and of mma.
    pub(crate) wgmma_sum: fn(lane: usize, register: usize) -> (usize, usize),
    pub(crate) mma_sum: fn(lane: usize, register: usize) -> (usize, usize),
    /// Row and depth of an element in a register of a lane's left side; the register holds this many elements.
    pub(crate) wgmma_lhs: fn(lane: usize, register: usize, part: usize, parts: usize) -> (usize, usize),
    pub(crate) mma_lhs: fn(lane: usize, register: usize, part: usize, parts: usize) -> (usize, usize),
    /// Depth and column of a half of a register of a lane's right side.
    pub(crate) mma_rhs: fn(lane: usize, register: usize, half: usize) -> (usize, usize),
    /// ldmatrix and stmatrix: the line, and its element, for a half of a lane's register.
    pub(crate) loaded: fn(lane: usize, half: usize, transposed: bool) -> (usize, usize),
    pub(crate) stored: fn(lane: usize, half: usize, transposed: bool) -> (usize, usize),
    /// The axis of a tensor for each coordinate of a box, counted from the innermost.
    pub(crate) coordinate: fn(axis: usize, rank: usize) -> usize,
    /// True if the phase with this parity has ended, after this many phases.
    pub(crate) has_ended: fn(ended: u32, parity: u64) -> bool,
    /// The arrivals that an arrival with expected bytes counts as.
    pub(crate) expecting: fn() -> u32,
    /// The count of an mbarrier for bytes that arrived.
    pub(crate) landed: fn(bytes: u64) -> i64,
    /// True if a phase ends with this many arrivals and bytes missing.
    pub(crate) is_complete: fn(arrivals: u32, bytes: i64) -> bool,
}

impl Semantics {
    pub(crate) const PTX: Self = Self {
        box_byte: swizzle,
        operand_byte: |start, offset, line| swizzle(start + offset, line),
        row_chunk: |layout, row, chunk| row / 8 * layout.stride + row % 8 * layout.line + chunk * 16,
        depth_chunk: |layout, chunk, depth| {
            let chunks = layout.line / 16;
            chunk / chunks * layout.leap + chunk % chunks * 16 + depth / 8 * layout.stride + depth % 8 * layout.line
        },
        wgmma_sum: sum,
        mma_sum: sum,
        wgmma_lhs: lhs,
        mma_lhs: lhs,
        mma_rhs: |lane, register, half| (register * 8 + lane % 4 * 2 + half, lane / 4),
        loaded: element,
        stored: element,
        coordinate: |axis, _| axis,
        has_ended: |ended, parity| u64::from(ended & 1) != parity & 1,
        expecting: || 1,
        landed: |bytes| bytes as i64,
        is_complete: |arrivals, bytes| arrivals == 0 && bytes == 0,
    };
}

/// Swizzle: chunks of a line are permuted by the address bits above: three for lines of 128 bytes, two for 64, one for 32, none
/// for 16.
pub(crate) fn swizzle(at: u64, line: u64) -> u64 {
    at ^ (at >> 7 & (line / 16 - 1)) << 4
}

/// Eight columns are four registers: two consecutive elements of a row, and the two eight rows below.
pub(crate) fn sum(lane: usize, register: usize) -> (usize, usize) {
    (lane / 4 + register / 2 % 2 * 8, register / 4 * 8 + lane % 4 * 2 + register % 2)
}

/// Four registers: eight rows, the eight below, and the same to the right.
pub(crate) fn lhs(lane: usize, register: usize, part: usize, parts: usize) -> (usize, usize) {
    (lane / 4 + register % 2 * 8, (register / 2 * 4 + lane % 4) * parts + part)
}

/// A lane has two consecutive elements of an 8×8 matrix of 16-bit elements.
pub(crate) fn element(lane: usize, half: usize, transposed: bool) -> (usize, usize) {
    let (line, element) = (lane / 4, lane % 4 * 2 + half);
    if transposed { (element, line) } else { (line, element) }
}
