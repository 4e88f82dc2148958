//! The engine's host side: `sum = init + scale·lhs·rhs + base_lhs·more_rhs`, planned, cut into pieces, launched.

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

/// A matrix in memory. Transposes, and rows repeated, are no more than strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    buffer: &'a wgpu::Buffer,
    dtype: DType,
    /// Elements before the first.
    offset: usize,
    rows: usize,
    cols: usize,
    /// Elements from a row to the next, and from a column to the next.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// `rows × cols`, row-major.
    pub(super) fn new<T: Float>(buffer: &'a Buffer<T>, rows: usize, cols: usize) -> Self {
        debug_assert_eq!(buffer.len(), rows * cols);
        Self { buffer: buffer.raw(), dtype: T::DTYPE, offset: 0, rows, cols, strides: [cols, 1] }
    }

    /// A view of elements that are stored so, or of as many bytes each.
    pub(super) fn viewed<E: Float, T: Element>(view: MatRef<'a, WebGpu<E>, T>, dtype: DType) -> Self {
        let (memory, [rows, cols]) = (view.memory(), [view.rows(), view.cols()]);
        let offset = memory.first() + view.offset();
        Self { buffer: memory.raw(), dtype, offset, rows, cols, strides: [view.row_stride(), 1] }
    }

    /// A number everywhere.
    pub(super) fn splat(number: &'a Buffer<f32>, rows: usize, cols: usize) -> Self {
        Self { buffer: number.raw(), dtype: DType::F32, offset: 0, rows, cols, strides: [0, 0] }
    }

    /// Rows and columns.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        let [row, col] = self.strides;
        Self { rows: self.cols, cols: self.rows, strides: [col, row], ..self }
    }

    /// One row, as every row of `rows`.
    pub(super) fn repeated(self, rows: usize) -> Self {
        Self { rows, strides: [0, self.strides[1]], ..self }
    }

    /// Some of the rows.
    pub(super) fn band(self, rows: Range<usize>) -> Self {
        Self { offset: self.offset + rows.start * self.strides[0], rows: rows.len(), ..self }
    }

    /// As a factor over these axes, whether neighbours in memory are neighbours along the depth. A single column is, wherever its rows
    /// lie: so a view of it is summed in the order in which a copy would be.
    fn is_deep(&self, axes: [Axis; 2]) -> bool {
        let [along, down] = if axes[0] == Axis::Rows { self.strides } else { [self.strides[1], self.strides[0]] };
        let len = if axes[0] == Axis::Rows { self.rows } else { self.cols };
        down == 1 || (along == 1 && len == 1)
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
pub(super) fn factor<E: Float>(view: op::Factor<'_, WebGpu<E>>) -> Matrix<'_> {
    match view {
        op::Factor::Elem(view) => matrix(view),
        op::Factor::F32(view) => matrix(view),
        op::Factor::PerRow(all) => factor(all.stacked()),
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

/// What a sum begins with.
#[derive(Clone, Copy)]
pub(super) enum Init<'a> {
    Zero,
    Matrix(Matrix<'a>),
    /// What the output holds.
    Output,
    /// What the output holds, and a matrix.
    OutputAnd(Matrix<'a>),
}

impl<'a> Init<'a> {
    /// The matrix that a sum begins with, beside the output.
    fn matrix(self) -> Option<Matrix<'a>> {
        match self {
            Init::Matrix(matrix) | Init::OutputAnd(matrix) => Some(matrix),
            Init::Zero | Init::Output => None,
        }
    }

    /// Whether the sum is added to what the output holds.
    fn adds(self) -> bool {
        matches!(self, Init::Output | Init::OutputAnd(_))
    }

    /// A matrix, if there is one, and what the output holds, if it is added to.
    pub(super) fn new(matrix: Option<Matrix<'a>>, adds: bool) -> Self {
        match (matrix, adds) {
            (None, false) => Init::Zero,
            (None, true) => Init::Output,
            (Some(matrix), false) => Init::Matrix(matrix),
            (Some(matrix), true) => Init::OutputAnd(matrix),
        }
    }
}

/// What becomes of a sum.
#[derive(Clone, Copy)]
pub(super) enum Finish<'a> {
    /// It is rounded, once, and stored.
    Store(Matrix<'a>),
    /// It is rounded, once, to one of its two neighbours, and stored as f16.
    StoreByChance { out: Matrix<'a>, key: [u32; 2] },
    /// It is a gradient.
    Adam { rate: AdamRate, m: Matrix<'a>, v: Matrix<'a>, master: Option<Matrix<'a>>, w: Matrix<'a> },
}

impl<'a> Finish<'a> {
    /// The matrices written.
    fn outputs(self) -> Vec<Matrix<'a>> {
        match self {
            Finish::Store(out) | Finish::StoreByChance { out, .. } => vec![out],
            Finish::Adam { m, v, master, w, .. } => [m, v].into_iter().chain(master).chain([w]).collect(),
        }
    }

    /// Whether the output can hold a sum of which a part is still to come.
    fn holds_partial_sums(self) -> bool {
        matches!(self, Finish::Store(out) if out.dtype == DType::F32)
    }
}

/// `init + scale·update + base`
#[derive(Clone, Copy)]
pub(super) struct Sum<'a> {
    pub(super) finish: Finish<'a>,
    pub(super) init: Init<'a>,
    pub(super) scale: f32,
    pub(super) update: Option<Product<'a>>,
    pub(super) base: Option<Product<'a>>,
}

impl<'a> Sum<'a> {
    /// `out = lhs·rhs` of the layer without its update, to be changed with `..`.
    pub(super) fn base(out: Matrix<'a>, product: Product<'a>) -> Self {
        Self { update: None, base: Some(product), ..Self::new(out, product) }
    }

    /// `out = lhs·rhs`, to be changed with `..`.
    pub(super) fn new(out: Matrix<'a>, product: Product<'a>) -> Self {
        Self { finish: Finish::Store(out), init: Init::Zero, scale: 1.0, update: Some(product), base: None }
    }

    fn shape(&self) -> (usize, usize) {
        let out = self.finish.outputs()[0];
        (out.rows, out.cols)
    }

    /// `lhs rhs base_lhs more_rhs`, where they are.
    fn factors(&self) -> [Option<Matrix<'a>>; 4] {
        let [lhs, rhs] = sides(self.update);
        let [base_lhs, more_rhs] = sides(self.base);
        [lhs, rhs, base_lhs, more_rhs]
    }

    /// Every matrix with the axes it lies over.
    fn operands(&self) -> Vec<Operand> {
        let factors = self.factors().into_iter().zip(FACTORS).filter_map(|(matrix, axes)| Some(matrix?.over(axes)));
        let whole = self.init.matrix().into_iter().chain(self.finish.outputs());
        factors.chain(whole.map(|matrix| matrix.over(OUTPUT))).collect()
    }

    /// The sum, or its transpose, if it has few rows.
    fn skinny(self) -> Option<Self> {
        let (rows, cols) = self.shape();
        if rows <= Skinny::MOST_ROWS { Some(self) } else { self.t().filter(|_| cols <= Skinny::MOST_ROWS) }
    }

    /// The transpose of what is stored: nothing moves.
    fn t(self) -> Option<Self> {
        let Finish::Store(out) = self.finish else { return None };
        let product = |Product { lhs, rhs }: Product<'a>| rhs.t() * lhs.t();
        let init = Init::new(self.init.matrix().map(Matrix::t), self.init.adds());
        let (update, base) = (self.update.map(product), self.base.map(product));
        Some(Self { finish: Finish::Store(out.t()), init, update, base, ..self })
    }

    /// Whether neighbours in the memory of the larger right side are neighbours along the depth.
    fn reads_right_sides_by_depth(&self) -> bool {
        self.base.or(self.update).is_some_and(|product| product.rhs.is_deep([Axis::Depth, Axis::Cols]))
    }

    fn rate(&self) -> [f32; 6] {
        let Finish::Adam { rate, .. } = self.finish else { return [0.0; 6] };
        let AdamRate { beta1, beta2, step_size, root_scale, eps, decay } = rate;
        [beta1, beta2, step_size, root_scale, eps, decay]
    }

    /// The key of its roundings, and the place in the output of the element that a binding begins with.
    fn chance(&self, binding: Option<&Binding<'_>>) -> ([u32; 2], u32) {
        match (self.finish, binding) {
            (Finish::StoreByChance { out, key }, Some(binding)) => {
                // The binding may begin before the matrix: the place is then below 0, and the shader's sums wrap back.
                let first = (binding.bytes.start / out.dtype.size() as u64) as u32;
                (key, first.wrapping_sub(out.offset as u32))
            }
            _ => ([0; 2], 0),
        }
    }
}

/// The axes of an output.
pub(super) const OUTPUT: [Axis; 2] = [Axis::Rows, Axis::Cols];
/// The axes of `lhs rhs base_lhs more_rhs`, as they are stored.
const FACTORS: [[Axis; 2]; 4] =
    [[Axis::Rows, Axis::Depth], [Axis::Depth, Axis::Cols], [Axis::Rows, Axis::MoreDepth], [Axis::MoreDepth, Axis::Cols]];

fn sides(product: Option<Product<'_>>) -> [Option<Matrix<'_>>; 2] {
    product.map_or([None, None], |Product { lhs, rhs }| [Some(lhs), Some(rhs)])
}

/// `struct Place` of sum.wgsl: the element `i, j` of a piece is at `offset + i·row + j·col` of a binding.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Place {
    pub(super) offset: u32,
    pub(super) row: u32,
    col: u32,
    unused: u32,
}

impl Place {
    /// Whether every row begins with a whole four, and neighbours are neighbours.
    fn in_quads(&self) -> bool {
        self.col == 1 && [self.offset, self.row].iter().all(|count| count % 4 == 0)
    }
}

/// `struct Factor` of sum.wgsl: the number `i` along the side and `p` along the depth is at `offset + i·along + p·down`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct FactorPlace {
    offset: u32,
    along: u32,
    down: u32,
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
    factors: [FactorPlace; 4],
    init: Place,
    out: Place,
    moments: Place,
    scale: f32,
    first: u32,
    key: [u32; 2],
    rate: [f32; 6],
    unused: [u32; 2],
}

impl<E: Float> WebGpu<E> {
    /// Computes a sum. Any of its sizes may be zero.
    pub(super) fn sum(&self, sum: Sum<'_>) -> Result<()> {
        let skinny = sum.skinny();
        let sum = skinny.unwrap_or(sum);
        let (rows, cols) = sum.shape();
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let depth = |product: Option<Product<'_>>| product.map_or(0, |product| product.lhs.cols);
        let depths = [depth(sum.update), depth(sum.base)];
        let way = match skinny {
            Some(_) => Algorithm::Skinny(Skinny::new(rows, cols, sum.reads_right_sides_by_depth(), self.limits)),
            None => self.tiles(&sum, rows, cols, depths),
        };
        let most = way.block().map(|side| self.limits.groups as usize * side as usize);
        // A binding begins where the adapter allows it, which may be a little before the piece.
        let bytes = self.limits.binding_bytes - self.alignment();
        let pieces = pieces(Piece::whole(rows, cols, depths[0], depths[1]), &sum.operands(), most, bytes);
        if pieces.iter().all(Piece::begins) || sum.finish.holds_partial_sums() {
            return pieces.into_iter().try_for_each(|piece| self.piece(&sum, way, piece));
        }
        self.sum_apart(sum, rows, cols)
    }

    fn tiles(&self, sum: &Sum<'_>, rows: usize, cols: usize, [depth, more_depth]: [usize; 2]) -> Algorithm {
        let of_halves = sum.base.is_some_and(|product| [product.lhs, product.rhs].iter().all(|side| side.dtype == DType::F16));
        match Matrices::new(rows, cols, self.limits).filter(|_| of_halves) {
            Some(matrices) => Algorithm::Matrices(matrices),
            None => Algorithm::Tiles(Tile::new(rows, cols, depth.max(more_depth), self.limits)),
        }
    }

    /// Where a depth is cut and the output cannot hold the sum so far, `f32` memory does.
    fn sum_apart(&self, sum: Sum<'_>, rows: usize, cols: usize) -> Result<()> {
        let whole = Buffer::<f32>::unwritten(&self.gpu, rows * cols)?;
        let whole = Matrix::new(&whole, rows, cols);
        self.sum(Sum { finish: Finish::Store(whole), init: Init::new(sum.init.matrix(), false), ..sum })?;
        self.sum(Sum { init: Init::new(Some(whole), sum.init.adds()), update: None, base: None, ..sum })
    }

    /// Launches a piece.
    fn piece(&self, sum: &Sum<'_>, way: Algorithm, piece: Piece) -> Result<()> {
        let sum = if piece.begins() { *sum } else { Sum { init: Init::Output, ..*sum } };
        let mut operands = Vec::with_capacity(8);
        let mut factors = [(FactorPlace::default(), Factor::ABSENT); 4];
        let present = if sum.base.is_some() { 4 } else { 2 };
        for (side, (factor, matrix)) in factors.iter_mut().zip(sum.factors()).enumerate().take(present) {
            let place = self.bind(&mut operands, matrix, FACTORS[side], &piece);
            if let Some(matrix) = matrix {
                *factor = read_as(matrix, FACTORS[side], place, &piece);
            }
        }
        // Both sides of a product are read in fours, or neither: fewer shaders to compile.
        for [(_, lhs), (_, rhs)] in factors.as_chunks_mut().0 {
            lhs.quads &= rhs.quads;
            rhs.quads = lhs.quads;
        }
        let init = self.bind(&mut operands, sum.init.matrix(), OUTPUT, &piece);
        let outputs = sum.finish.outputs().into_iter();
        let outputs: Vec<Place> = outputs.map(|out| self.bind(&mut operands, Some(out), OUTPUT, &piece)).collect();
        let add = sum.init.adds();
        let quads = piece.len(Axis::Cols).is_multiple_of(4)
            && outputs.iter().chain(sum.init.matrix().map(|_| &init)).all(Place::in_quads);
        let finish = match sum.finish {
            Finish::Store(out) => shader::Finish::Store { out: out.dtype, add },
            Finish::StoreByChance { .. } => shader::Finish::StoreByChance { add },
            Finish::Adam { master, .. } => shader::Finish::Adam { master: master.is_some() },
        };
        let kernel = Kernel::Sum(shader::Sum {
            way,
            factors: factors.map(|(_, factor)| factor),
            more: sum.base.is_some(),
            init: sum.init.matrix().map(|init| init.dtype),
            quads,
            finish,
        });
        let (key, first) = sum.chance(operands.last());
        let sizes = piece.0.map(|range| range.len() as u32);
        let uniforms = Uniforms {
            sizes,
            factors: factors.map(|(place, _)| place),
            init,
            out: outputs[outputs.len() - 1],
            moments: outputs[0], // Adam writes m, v and the master, which lie alike, before w; what is stored is the only output
            scale: sum.scale,
            first,
            key,
            rate: sum.rate(),
            ..Zeroable::zeroed()
        };
        let grid = way.grid(sizes[0] as usize, sizes[1] as usize);
        let work = sizes[0] as u64 * sizes[1] as u64 * (sizes[2] as u64 + sizes[3] as u64 + 1);
        self.launch(Launch { kernel, uniforms: bytemuck::bytes_of(&uniforms), operands: &operands, grid, work })
    }

    /// Adds the part of a matrix that a piece touches to the operands of a launch, and says where in it its elements lie.
    fn bind<'a>(&'a self, operands: &mut Vec<Binding<'a>>, matrix: Option<Matrix<'a>>, axes: [Axis; 2], piece: &Piece) -> Place {
        let (binding, place) = matrix.map_or_else(|| (self.unread(), Place::default()), |matrix| self.part(matrix, axes, piece));
        operands.push(binding);
        place
    }

    /// The bytes of a matrix that a piece touches, and where in them its elements lie.
    pub(super) fn part<'a>(&'a self, matrix: Matrix<'a>, axes: [Axis; 2], piece: &Piece) -> (Binding<'a>, Place) {
        let [row, col] = matrix.strides;
        let [first_row, first_col] = axes.map(|axis| piece.range(axis).start);
        let size = matrix.dtype.size() as u64;
        let start = (matrix.offset + first_row * row + first_col * col) as u64 * size;
        let (binding, offset) = self.window(matrix.buffer, start..start + matrix.over(axes).span(piece), size);
        (binding, Place { offset, row: row as u32, col: col as u32, unused: 0 })
    }
}

/// Where a factor lies, seen from its side and its depth, and how it is read: four numbers at once where every line begins and
/// ends with a whole four.
fn read_as(matrix: Matrix<'_>, axes: [Axis; 2], place: Place, piece: &Piece) -> (FactorPlace, Factor) {
    let on_the_left = axes[0] == Axis::Rows;
    let Place { offset, row, col, .. } = place;
    let [rows, cols] = axes.map(|axis| piece.len(axis) as u32);
    let (along, down, len, depth) = if on_the_left { (row, col, rows, cols) } else { (col, row, cols, rows) };
    let deep = matrix.is_deep(axes);
    let (line, step) = if deep { (depth, along) } else { (len, down) };
    let quads =
        len > 0 && depth > 0 && (if deep { down } else { along }) == 1 && [offset, line, step].iter().all(|count| count % 4 == 0);
    (FactorPlace { offset, along, down, len, depth, ..Zeroable::zeroed() }, Factor { dtype: matrix.dtype, deep, quads })
}
