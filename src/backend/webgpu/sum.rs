//! Sums of products, `init + scale·lhs·rhs + base_lhs·base_rhs`: planned, cut into pieces, and launched.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::WebGpu;
use super::dispatch::{Binding, Launch};
use super::memory::Buffer;
use super::plan::{Algorithm, Axis, Matrices, Operand, Piece, Skinny, Tile, pieces};
use super::shader::{self, Factor, Kernel};
use crate::element::{DType, Element, Float};
use crate::error::Result;
use crate::op::{self, AdamRate};
use crate::view::MatRef;

/// A strided matrix in memory. Transposing, and repeating a row, change only strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    buffer: &'a wgpu::Buffer,
    dtype: DType,
    /// Offset of the first element.
    offset: usize,
    rows: usize,
    cols: usize,
    /// Row and column stride, in elements.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// A row-major matrix of `rows × cols`.
    pub(super) fn new<T: Float>(buffer: &'a Buffer<T>, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(buffer.len(), rows * cols);
        Self { buffer: buffer.raw(), dtype: T::DTYPE, offset: 0, rows, cols, strides: [cols, 1] }
    }

    /// A view as a matrix of elements of type `dtype`, of the same size.
    pub(super) fn viewed<E: Float, T: Element>(view: MatRef<'a, WebGpu<E>, T>, dtype: DType) -> Self {
        let (memory, [rows, cols]) = (view.memory(), [view.rows(), view.cols()]);
        let offset = memory.first() + view.offset();
        Self { buffer: memory.raw(), dtype, offset, rows, cols, strides: [view.row_stride(), 1] }
    }

    /// A matrix with the same number everywhere.
    pub(super) fn splat(number: &'a Buffer<f32>, rows: usize, cols: usize) -> Self {
        Self { buffer: number.raw(), dtype: DType::F32, offset: 0, rows, cols, strides: [0, 0] }
    }

    /// Numbers of rows and columns.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The transpose, without a copy.
    pub(super) fn t(self) -> Self {
        let [row, col] = self.strides;
        Self { rows: self.cols, cols: self.rows, strides: [col, row], ..self }
    }

    /// A matrix of `rows` rows that all are this row.
    pub(super) fn repeated(self, rows: usize) -> Self {
        Self { rows, strides: [0, self.strides[1]], ..self }
    }

    /// A range of rows.
    pub(super) fn band(self, rows: Range<usize>) -> Self {
        Self { offset: self.offset + rows.start * self.strides[0], rows: rows.len(), ..self }
    }

    /// True if the matrix, as a factor with these axes, is K-major. A single column counts as K-major for any row stride, so that
    /// a view is summed in the same order as a copy of it.
    fn is_k_major(&self, axes: [Axis; 2]) -> bool {
        let [side_stride, depth_stride] = if axes[0] == Axis::Rows { self.strides } else { [self.strides[1], self.strides[0]] };
        let len = if axes[0] == Axis::Rows { self.rows } else { self.cols };
        depth_stride == 1 || (side_stride == 1 && len == 1)
    }

    pub(super) fn over(&self, axes: [Axis; 2]) -> Operand {
        Operand { axes, strides: self.strides, size: self.dtype.size() }
    }
}

/// A view as a matrix.
pub(super) fn matrix<E: Float, T: Float>(view: MatRef<'_, WebGpu<E>, T>) -> Matrix<'_> {
    Matrix::viewed(view, T::DTYPE)
}

/// A factor of an update as a matrix.
pub(super) fn factor<E: Float>(factor: op::Factor<'_, WebGpu<E>>) -> Matrix<'_> {
    match factor {
        op::Factor::Elem(view) => matrix(view),
        op::Factor::F32(view) => matrix(view),
    }
}

/// `lhs·rhs`
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) lhs: Matrix<'a>,
    pub(super) rhs: Matrix<'a>,
}

impl<'a> std::ops::Mul for Matrix<'a> {
    type Output = Product<'a>;
    fn mul(self, rhs: Self) -> Product<'a> {
        debug_assert_eq!(self.cols, rhs.rows);
        Product { lhs: self, rhs }
    }
}

/// The initial value of a sum.
#[derive(Clone, Copy)]
pub(super) enum Init<'a> {
    Zero,
    Matrix(Matrix<'a>),
    /// The output's value.
    Output,
    /// The output's value plus a matrix.
    OutputAnd(Matrix<'a>),
}

impl<'a> Init<'a> {
    /// The initial matrix, if there is one.
    fn matrix(self) -> Option<Matrix<'a>> {
        match self {
            Init::Matrix(matrix) | Init::OutputAnd(matrix) => Some(matrix),
            Init::Zero | Init::Output => None,
        }
    }

    /// True if the output is accumulated into.
    fn accumulate(self) -> bool {
        matches!(self, Init::Output | Init::OutputAnd(_))
    }

    /// Initial value from a matrix, if there is one, and from the output, if `accumulate`.
    pub(super) fn new(matrix: Option<Matrix<'a>>, accumulate: bool) -> Self {
        match (matrix, accumulate) {
            (None, false) => Init::Zero,
            (None, true) => Init::Output,
            (Some(matrix), false) => Init::Matrix(matrix),
            (Some(matrix), true) => Init::OutputAnd(matrix),
        }
    }
}

/// What is done with a sum.
#[derive(Clone, Copy)]
pub(super) enum Epilogue<'a> {
    /// Rounded once, and stored.
    Store(Matrix<'a>),
    /// Rounded once, stochastically, and stored as f16.
    StoreStochastic { out: Matrix<'a>, key: [u32; 2] },
    /// Used as a gradient by Adam.
    Adam { rate: AdamRate, m: Matrix<'a>, v: Matrix<'a>, master: Option<Matrix<'a>>, w: Matrix<'a> },
}

impl<'a> Epilogue<'a> {
    /// The matrices that are written.
    fn outputs(self) -> Vec<Matrix<'a>> {
        match self {
            Epilogue::Store(out) | Epilogue::StoreStochastic { out, .. } => vec![out],
            Epilogue::Adam { m, v, master, w, .. } => [m, v].into_iter().chain(master).chain([w]).collect(),
        }
    }

    /// True if the output can hold partial sums.
    fn holds_partial_sums(self) -> bool {
        matches!(self, Epilogue::Store(out) if out.dtype == DType::F32)
    }
}

/// `init + scale·update + base`
#[derive(Clone, Copy)]
pub(super) struct Sum<'a> {
    pub(super) epilogue: Epilogue<'a>,
    pub(super) init: Init<'a>,
    pub(super) scale: f32,
    pub(super) update: Option<Product<'a>>,
    pub(super) base: Option<Product<'a>>,
}

impl<'a> Sum<'a> {
    /// `out = base_lhs·base_rhs`; other fields are set with `..`.
    pub(super) fn base(out: Matrix<'a>, product: Product<'a>) -> Self {
        Self { update: None, base: Some(product), ..Self::new(out, product) }
    }

    /// `out = lhs·rhs`; other fields are set with `..`.
    pub(super) fn new(out: Matrix<'a>, product: Product<'a>) -> Self {
        Self { epilogue: Epilogue::Store(out), init: Init::Zero, scale: 1.0, update: Some(product), base: None }
    }

    fn shape(&self) -> (usize, usize) {
        let out = self.epilogue.outputs()[0];
        (out.rows, out.cols)
    }

    /// `lhs`, `rhs`, `base_lhs`, `base_rhs`, if present.
    fn factors(&self) -> [Option<Matrix<'a>>; 4] {
        let [lhs, rhs] = sides(self.update);
        let [base_lhs, base_rhs] = sides(self.base);
        [lhs, rhs, base_lhs, base_rhs]
    }

    /// All matrices, with their axes.
    fn operands(&self) -> Vec<Operand> {
        let factors = self.factors().into_iter().zip(FACTORS).filter_map(|(matrix, axes)| Some(matrix?.over(axes)));
        let whole = self.init.matrix().into_iter().chain(self.epilogue.outputs());
        factors.chain(whole.map(|matrix| matrix.over(OUTPUT))).collect()
    }

    /// The sum or its transpose, if one of them is skinny.
    fn skinny(self) -> Option<Self> {
        let (rows, cols) = self.shape();
        if rows <= Skinny::MAX_ROWS { Some(self) } else { self.t().filter(|_| cols <= Skinny::MAX_ROWS) }
    }

    /// The transposed sum, without copies.
    fn t(self) -> Option<Self> {
        let Epilogue::Store(out) = self.epilogue else { return None };
        let product = |Product { lhs, rhs }: Product<'a>| rhs.t() * lhs.t();
        let init = Init::new(self.init.matrix().map(Matrix::t), self.init.accumulate());
        let (update, base) = (self.update.map(product), self.base.map(product));
        Some(Self { epilogue: Epilogue::Store(out.t()), init, update, base, ..self })
    }

    /// True if the larger right side is K-major.
    fn rhs_is_k_major(&self) -> bool {
        self.base.or(self.update).is_some_and(|product| product.rhs.is_k_major([Axis::Depth, Axis::Cols]))
    }

    fn rate(&self) -> [f32; 6] {
        let Epilogue::Adam { rate, .. } = self.epilogue else { return [0.0; 6] };
        let AdamRate { beta1, beta2, step_size, root_scale, eps, decay } = rate;
        [beta1, beta2, step_size, root_scale, eps, decay]
    }

    /// The key of stochastic rounding, and the index in the output of the first element of the binding.
    fn chance(&self, binding: Option<&Binding<'_>>) -> ([u32; 2], u32) {
        match (self.epilogue, binding) {
            (Epilogue::StoreStochastic { out, key }, Some(binding)) => {
                // The binding may start before the matrix: the index is then negative, and sums in the shader wrap around.
                let first = (binding.bytes.start / out.dtype.size() as u64) as u32;
                (key, first.wrapping_sub(out.offset as u32))
            }
            _ => ([0; 2], 0),
        }
    }
}

/// The axes of an output.
pub(super) const OUTPUT: [Axis; 2] = [Axis::Rows, Axis::Cols];
/// The axes of `lhs`, `rhs`, `base_lhs` and `base_rhs`, as stored.
const FACTORS: [[Axis; 2]; 4] =
    [[Axis::Rows, Axis::Depth], [Axis::Depth, Axis::Cols], [Axis::Rows, Axis::BaseDepth], [Axis::BaseDepth, Axis::Cols]];

fn sides(product: Option<Product<'_>>) -> [Option<Matrix<'_>>; 2] {
    product.map_or([None, None], |Product { lhs, rhs }| [Some(lhs), Some(rhs)])
}

/// `struct Layout` of sum.wgsl: element `(i, j)` of a piece is at `offset + i·row + j·col` of a binding.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Layout {
    pub(super) offset: u32,
    pub(super) row: u32,
    col: u32,
    unused: u32,
}

impl Layout {
    /// True if rows start at multiples of four elements and are contiguous.
    fn is_vec4_aligned(&self) -> bool {
        self.col == 1 && [self.offset, self.row].iter().all(|count| count % 4 == 0)
    }
}

/// `struct Factor` of sum.wgsl: element `i` along the side, `p` along the depth is at `offset + i·side_stride + p·depth_stride`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct FactorLayout {
    offset: u32,
    side_stride: u32,
    depth_stride: u32,
    unused: u32,
    len: u32,
    depth: u32,
    unused_too: [u32; 2],
}

/// `struct Sum` of sum.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Uniforms {
    sizes: [u32; 4],
    factors: [FactorLayout; 4],
    init: Layout,
    out: Layout,
    moments: Layout,
    scale: f32,
    first: u32,
    key: [u32; 2],
    rate: [f32; 6],
    unused: [u32; 2],
}

impl<E: Float> WebGpu<E> {
    /// Computes a sum. Any size may be zero.
    pub(super) fn sum(&self, sum: Sum<'_>) -> Result<()> {
        let skinny = sum.skinny();
        let sum = skinny.unwrap_or(sum);
        let (rows, cols) = sum.shape();
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let depth = |product: Option<Product<'_>>| product.map_or(0, |product| product.lhs.cols);
        let depths = [depth(sum.update), depth(sum.base)];
        let algorithm = match skinny {
            Some(_) => Algorithm::Skinny(Skinny::new(rows, cols, sum.rhs_is_k_major(), self.limits)),
            None => self.tiles(&sum, rows, cols, depths),
        };
        let most = algorithm.block().map(|side| self.limits.groups as usize * side as usize);
        // A binding may have to start a little before the piece, for its alignment.
        let bytes = self.limits.binding_bytes - self.alignment();
        let pieces = pieces(Piece::whole(rows, cols, depths[0], depths[1]), &sum.operands(), most, bytes);
        if pieces.iter().all(Piece::begins) || sum.epilogue.holds_partial_sums() {
            return pieces.into_iter().try_for_each(|piece| self.piece(&sum, algorithm, piece));
        }
        self.sum_through_f32(sum, rows, cols)
    }

    fn tiles(&self, sum: &Sum<'_>, rows: usize, cols: usize, [depth, base_depth]: [usize; 2]) -> Algorithm {
        let of_halves = sum.base.is_some_and(|product| [product.lhs, product.rhs].iter().all(|side| side.dtype == DType::F16));
        match Matrices::new(rows, cols, self.limits).filter(|_| of_halves) {
            Some(matrices) => Algorithm::Matrices(matrices),
            None => Algorithm::Tiles(Tile::new(rows, cols, depth.max(base_depth), self.limits)),
        }
    }

    /// Computes a sum in `f32` scratch memory, if its depth is cut and the output cannot hold partial sums.
    fn sum_through_f32(&self, sum: Sum<'_>, rows: usize, cols: usize) -> Result<()> {
        let whole = Buffer::<f32>::unwritten(&self.gpu, rows * cols)?;
        let whole = Matrix::new(&whole, rows, cols);
        self.sum(Sum { epilogue: Epilogue::Store(whole), init: Init::new(sum.init.matrix(), false), ..sum })?;
        self.sum(Sum { init: Init::new(Some(whole), sum.init.accumulate()), update: None, base: None, ..sum })
    }

    /// Launches the kernel for a piece.
    fn piece(&self, sum: &Sum<'_>, algorithm: Algorithm, piece: Piece) -> Result<()> {
        let sum = if piece.begins() { *sum } else { Sum { init: Init::Output, ..*sum } };
        let mut operands = Vec::with_capacity(8);
        let mut factors = [(FactorLayout::default(), Factor::ABSENT); 4];
        let present = if sum.base.is_some() { 4 } else { 2 };
        for (side, (factor, matrix)) in factors.iter_mut().zip(sum.factors()).enumerate().take(present) {
            let layout = self.bind(&mut operands, matrix, FACTORS[side], &piece);
            if let Some(matrix) = matrix {
                *factor = read_as(matrix, FACTORS[side], layout, &piece);
            }
        }
        // Both sides of a product use vec4 loads, or neither: fewer shaders to compile.
        for [(_, lhs), (_, rhs)] in factors.as_chunks_mut().0 {
            lhs.vec4 &= rhs.vec4;
            rhs.vec4 = lhs.vec4;
        }
        let init = self.bind(&mut operands, sum.init.matrix(), OUTPUT, &piece);
        let outputs = sum.epilogue.outputs().into_iter();
        let outputs: Vec<Layout> = outputs.map(|out| self.bind(&mut operands, Some(out), OUTPUT, &piece)).collect();
        let add = sum.init.accumulate();
        let vec4 = piece.len(Axis::Cols).is_multiple_of(4)
            && outputs.iter().chain(sum.init.matrix().map(|_| &init)).all(Layout::is_vec4_aligned);
        let epilogue = match sum.epilogue {
            Epilogue::Store(out) => shader::Epilogue::Store { out: out.dtype, add },
            Epilogue::StoreStochastic { .. } => shader::Epilogue::StoreStochastic { add },
            Epilogue::Adam { master, .. } => shader::Epilogue::Adam { master: master.is_some() },
        };
        let kernel = Kernel::Sum(shader::Sum {
            algorithm,
            factors: factors.map(|(_, factor)| factor),
            has_base: sum.base.is_some(),
            init: sum.init.matrix().map(|init| init.dtype),
            vec4,
            epilogue,
        });
        let (key, first) = sum.chance(operands.last());
        let sizes = piece.0.map(|range| range.len() as u32);
        let uniforms = Uniforms {
            sizes,
            factors: factors.map(|(place, _)| place),
            init,
            out: outputs[outputs.len() - 1],
            moments: outputs[0], // m, v and the master of Adam have one layout; other epilogues have one output
            scale: sum.scale,
            first,
            key,
            rate: sum.rate(),
            ..Zeroable::zeroed()
        };
        let grid = algorithm.grid(sizes[0] as usize, sizes[1] as usize);
        let work = sizes[0] as u64 * sizes[1] as u64 * (sizes[2] as u64 + sizes[3] as u64 + 1);
        self.launch(Launch { kernel, uniforms: bytemuck::bytes_of(&uniforms), operands: &operands, grid, work })
    }

    /// Appends a binding for the part of a matrix in a piece; returns its layout.
    fn bind<'a>(&'a self, operands: &mut Vec<Binding<'a>>, matrix: Option<Matrix<'a>>, axes: [Axis; 2], piece: &Piece) -> Layout {
        let (binding, layout) =
            matrix.map_or_else(|| (self.placeholder(), Layout::default()), |matrix| self.part(matrix, axes, piece));
        operands.push(binding);
        layout
    }

    /// A binding for the part of a matrix in a piece, and its layout.
    pub(super) fn part<'a>(&'a self, matrix: Matrix<'a>, axes: [Axis; 2], piece: &Piece) -> (Binding<'a>, Layout) {
        let [row, col] = matrix.strides;
        let [first_row, first_col] = axes.map(|axis| piece.range(axis).start);
        let size = matrix.dtype.size() as u64;
        let start = (matrix.offset + first_row * row + first_col * col) as u64 * size;
        let (binding, offset) = self.window(matrix.buffer, start..start + matrix.over(axes).span(piece), size);
        (binding, Layout { offset, row: row as u32, col: col as u32, unused: 0 })
    }
}

/// The layout of a factor along its side and its depth, and how it is read: by vec4 if every line starts and ends at multiples of
/// four.
fn read_as(matrix: Matrix<'_>, axes: [Axis; 2], layout: Layout, piece: &Piece) -> (FactorLayout, Factor) {
    let on_the_left = axes[0] == Axis::Rows;
    let Layout { offset, row, col, .. } = layout;
    let [rows, cols] = axes.map(|axis| piece.len(axis) as u32);
    let (side_stride, depth_stride, len, depth) = if on_the_left { (row, col, rows, cols) } else { (col, row, cols, rows) };
    let k_major = matrix.is_k_major(axes);
    let (line, step) = if k_major { (depth, side_stride) } else { (len, depth_stride) };
    let vec4 = len > 0
        && depth > 0
        && (if k_major { depth_stride } else { side_stride }) == 1
        && [offset, line, step].iter().all(|count| count % 4 == 0);
    (
        FactorLayout { offset, side_stride, depth_stride, len, depth, ..Zeroable::zeroed() },
        Factor { dtype: matrix.dtype, k_major, vec4 },
    )
}
