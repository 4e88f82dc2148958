//! The text of every shader: constants, `common.wgsl`, and the files of the kernel. WGSL has no generics, but it concatenates.

use std::fmt::Write;

use super::plan::{Algorithm, Matrices, Skinny, Tile};
use crate::element::DType;

/// The files of a kernel, joined.
macro_rules! files {
    ($($stem:literal)*) => {
        concat!($(include_str!(concat!("../../../shaders/", $stem, ".wgsl")), "\n"),*)
    };
}

/// Everything that makes one compiled shader differ from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Sum(Sum),
    Relu,
    ReluBackward,
    Add,
    Accumulate,
    /// Of numbers that are stored so, to numbers that are stored so.
    Dropout(DType, DType),
    LoraRowNorm,
    /// Of a left side and a right side that are stored so.
    Rows(RowsKernel, DType, DType),
    Magnitude,
    MagnitudeBackward,
    CrossEntropy,
    Mean,
    /// Of numbers of 16 bits, two to a word, or of 32.
    Copy {
        half: bool,
    },
}

/// Products in which each row has a right side of its own; see `shaders/rows.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RowsKernel {
    Narrow,
    Products,
    Outer,
}

/// A sum of products, as `shaders/engine.wgsl` or `shaders/skinny.wgsl` computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sum {
    pub(super) way: Algorithm,
    /// `lhs`, `rhs`, `base_lhs`, `more_rhs`.
    pub(super) factors: [Factor; 4],
    /// Whether there is a second product.
    pub(super) more: bool,
    /// How the matrix is stored that the sum begins with.
    pub(super) init: Option<DType>,
    /// Whether four neighbours in a row of what it begins with, and of the outputs, may be read and written at once.
    pub(super) quads: bool,
    pub(super) finish: Finish,
}

/// How a factor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Factor {
    pub(super) dtype: DType,
    /// Whether neighbours in memory are neighbours along the depth.
    pub(super) deep: bool,
    /// Whether four neighbours may be read at once.
    pub(super) quads: bool,
}

/// What becomes of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Finish {
    Store { out: DType, add: bool },
    StoreByChance { add: bool },
    Adam { master: bool },
}

impl Kernel {
    /// How many bindings are read and how many are written; the uniforms come before, at binding 0.
    pub(super) fn bindings(self) -> (u32, u32) {
        match self {
            Kernel::Sum(sum) => (sum.reads(), sum.writes()),
            Kernel::Magnitude | Kernel::Rows(RowsKernel::Narrow | RowsKernel::Outer, ..) => (4, 1),
            Kernel::Rows(RowsKernel::Products, ..) => (5, 1),
            Kernel::MagnitudeBackward => (3, 1),
            Kernel::ReluBackward => (2, 1),
            Kernel::CrossEntropy => (2, 2),
            Kernel::Relu | Kernel::Add | Kernel::Accumulate | Kernel::Dropout(..) => (1, 1),
            Kernel::LoraRowNorm | Kernel::Mean | Kernel::Copy { .. } => (1, 1),
        }
    }

    /// The function to launch.
    pub(super) fn entry(self) -> &'static str {
        match self {
            Kernel::Sum(_) => "sum_of_products",
            Kernel::Relu => "relu",
            Kernel::ReluBackward => "relu_backward",
            Kernel::Add => "add",
            Kernel::Accumulate => "accumulate",
            Kernel::Dropout(..) => "dropout",
            Kernel::LoraRowNorm => "lora_row_norm",
            Kernel::Rows(RowsKernel::Narrow, ..) => "rows_narrow",
            Kernel::Rows(RowsKernel::Products, ..) => "rows_products",
            Kernel::Rows(RowsKernel::Outer, ..) => "rows_outer",
            Kernel::Magnitude => "magnitude",
            Kernel::MagnitudeBackward => "magnitude_backward",
            Kernel::CrossEntropy => "cross_entropy",
            Kernel::Mean => "mean",
            Kernel::Copy { .. } => "copy",
        }
    }

    /// The whole text, for weights and activations stored as `elem`, in workgroups of `threads` (a sum has its own number).
    pub(super) fn source(self, elem: DType, threads: u32) -> String {
        let mut text = String::new();
        if elem == DType::F16 {
            text += "enable f16;\n";
        }
        if matches!(self, Kernel::Sum(Sum { way: Algorithm::Matrices(_), .. })) {
            text += "enable wgpu_cooperative_matrix;\n";
        }
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "alias Elem = {elem};\nconst HALF = {};", elem == DType::F16);
        let _ = match self {
            Kernel::Sum(sum) => sum.write_header(&mut text, elem),
            Kernel::Dropout(from, to) => {
                let to_half = to == DType::F16;
                writeln!(text, "alias From = {from};\nalias To = {to};\nconst TO_HALF = {to_half};\nconst THREADS = {threads}u;")
            }
            Kernel::Rows(_, left, right) => {
                writeln!(text, "alias Left = {left};\nalias Right = {right};\nconst THREADS = {threads}u;")
            }
            Kernel::Copy { half } => {
                writeln!(text, "const PER_WORD = {}u;\nconst THREADS = {threads}u;", 1 + u32::from(half))
            }
            _ => writeln!(text, "const THREADS = {threads}u;"),
        };
        text + &self.files()
    }

    /// A name for the text, by what makes it differ from others: `relu-f16-256.wgsl`.
    pub(super) fn file_name(self, elem: DType, threads: u32) -> String {
        let rest = match self {
            Kernel::Sum(sum) => sum.name(),
            Kernel::Dropout(from, to) => format!("{from}-to-{to}-{threads}"),
            Kernel::Rows(_, left, right) => format!("{left}-{right}-{threads}"),
            Kernel::Copy { half } => format!("{}-bits-{threads}", if half { 16 } else { 32 }),
            _ => threads.to_string(),
        };
        format!("{}-{elem}-{rest}.wgsl", self.entry())
    }

    fn files(self) -> String {
        let files = match self {
            Kernel::Sum(sum) => return sum.files(),
            Kernel::Relu => files!("common" "relu"),
            Kernel::ReluBackward => files!("common" "relu_backward"),
            Kernel::Add => files!("common" "add"),
            Kernel::Accumulate => files!("accumulate"),
            Kernel::Dropout(..) => files!("common" "philox" "dropout"),
            Kernel::LoraRowNorm => files!("lora_row_norm"),
            Kernel::Rows(RowsKernel::Narrow, ..) => files!("rows" "rows_narrow"),
            Kernel::Rows(RowsKernel::Products, ..) => files!("rows" "rows_products"),
            Kernel::Rows(RowsKernel::Outer, ..) => files!("rows" "rows_outer"),
            Kernel::Magnitude => files!("common" "magnitude"),
            Kernel::MagnitudeBackward => files!("magnitude_backward"),
            Kernel::CrossEntropy => files!("common" "cross_entropy"),
            Kernel::Mean => files!("common" "mean"),
            Kernel::Copy { .. } => files!("copy"),
        };
        files.to_owned()
    }
}

impl Sum {
    /// The factors that there are, and what it begins with. A second product has no bindings where it is missing: Adam would not be
    /// left enough of the eight that every adapter has.
    fn reads(self) -> u32 {
        if self.more { 5 } else { 3 }
    }

    fn writes(self) -> u32 {
        if let Finish::Adam { master } = self.finish { 3 + u32::from(master) } else { 1 }
    }

    /// How the sum is made, how each factor is read (`deep` along the depth, `x4` four at once), and how it begins and ends.
    fn name(self) -> String {
        let flag = |name: &'static str, there: bool| if there { name } else { "" };
        let way = match self.way {
            Algorithm::Tiles(Tile { rows, cols, depth, slices, .. }) => format!("tile-{rows}x{cols}x{depth}-slices-{slices}"),
            Algorithm::Matrices(Matrices { size, each }) => format!("matrices-{size}x{size}-each-{each}"),
            Algorithm::Skinny(Skinny { rows, lanes, slices, by_depth, subgroups }) => {
                let (by, gather) = (if by_depth { "depth" } else { "columns" }, flag("-subgroups", subgroups));
                format!("skinny-{rows}-lanes-{lanes}-slices-{slices}-by-{by}{gather}")
            }
        };
        let factor = |Factor { dtype, deep, quads }| format!("-{dtype}{}{}", flag("deep", deep), flag("x4", quads));
        let factors: String = self.factors[..if self.more { 4 } else { 2 }].iter().copied().map(factor).collect();
        let init = self.init.map_or(String::new(), |dtype| format!("-from-{dtype}"));
        let end = match self.finish {
            Finish::Store { out, add } => format!("to-{out}{}", flag("-added", add)),
            Finish::StoreByChance { add } => format!("by-chance{}", flag("-added", add)),
            Finish::Adam { master } => format!("adam{}", flag("-master", master)),
        };
        format!("{way}{factors}{init}-{end}{}", flag("-x4", self.quads))
    }

    /// What reads the factors, makes the sums and finishes them; see `write_header` for what is written once an operand.
    fn files(self) -> String {
        let how = match self.way {
            Algorithm::Tiles(_) => files!("fold" "engine" "blocks").to_owned(),
            Algorithm::Matrices(matrices) => files!("fold" "engine").to_owned() + &matrices.file(),
            Algorithm::Skinny(Skinny { subgroups: true, .. }) => files!("skinny" "gather_by_subgroup").to_owned(),
            Algorithm::Skinny(_) => files!("fold" "skinny" "gather_by_fold").to_owned(),
        };
        let finish = match self.finish {
            Finish::Store { .. } => files!("store"),
            Finish::StoreByChance { .. } => files!("philox" "store_stochastic"),
            Finish::Adam { master: false } => files!("adam_weight" "adam"),
            Finish::Adam { master: true } => files!("adam_master" "adam"),
        };
        [files!("common" "sum"), &how, finish].concat()
    }

    /// The constants of the files, and those that are written once a factor, a product or an output.
    fn write_header(self, text: &mut String, elem: DType) -> std::fmt::Result {
        let reads = self.reads();
        for (operand, (factor, binding)) in OPERANDS.into_iter().zip(self.factors.into_iter().zip(1..)) {
            factor.write(text, operand, (binding < reads).then_some(binding))?;
        }
        match self.way {
            Algorithm::Tiles(tile) => tile.write(text, ["lhs", "rhs", "lhs", "rhs"])?,
            Algorithm::Matrices(_) => Matrices::TILE.write(text, ["lhs", "rhs", "half_lhs", "half_rhs"])?,
            Algorithm::Skinny(skinny) => {
                let Skinny { rows, lanes, slices, by_depth, .. } = skinny;
                writeln!(text, "const ROWS = {rows}u;\nconst LANES = {lanes}u;\nconst SLICES = {slices}u;")?;
                writeln!(text, "const THREADS = {}u;\nconst FOLDED = {}u;", skinny.threads(), skinny.folded())?;
                writeln!(text, "const BY_DEPTH = {by_depth};")?;
                for [lhs, rhs] in OPERANDS.as_chunks::<2>().0 {
                    let file = include_str!("../../../shaders/skinny_product.wgsl");
                    writeln!(text, "{}", file.replace("LHS", lhs).replace("RHS", rhs))?;
                }
            }
        }
        let init = self.init.unwrap_or(DType::F32);
        writeln!(text, "const HAS_MORE = {};\nconst HAS_INIT = {};", self.more, self.init.is_some())?;
        writeln!(text, "alias Init = {init};\nalias init_unit = {};\nconst QUADS = {};", self.unit(init), self.quads)?;
        writeln!(text, "const init_BINDING = {reads};")?;
        let first = reads + 1;
        match self.finish {
            Finish::Adam { master } => {
                let master = master.then_some(("master", DType::F32));
                let outputs = [("m", DType::F32), ("v", DType::F32)].into_iter().chain(master).chain([("w", elem)]).zip(first..);
                outputs.into_iter().try_for_each(|((name, dtype), binding)| self.write_output(text, name, dtype, binding))
            }
            Finish::Store { out, add } => {
                writeln!(text, "const OUT_HALF = {};\nconst ADD_TO_OUT = {add};", out == DType::F16)?;
                self.write_output(text, "out", out, first)
            }
            Finish::StoreByChance { add } => {
                writeln!(text, "const ADD_TO_OUT = {add};")?;
                self.write_output(text, "out", DType::F16, first)
            }
        }
    }

    /// memory.wgsl, for one of the outputs.
    fn write_output(self, text: &mut String, name: &str, dtype: DType, binding: u32) -> std::fmt::Result {
        writeln!(
            text,
            "alias {name}_elem = {dtype};\nalias {name}_unit = {};\nconst {name}_BINDING = {binding};",
            self.unit(dtype)
        )?;
        let narrowed = if self.quads { format!("vec4<{dtype}>(line)") } else { format!("{dtype}(line.x)") };
        let file = include_str!("../../../shaders/memory.wgsl");
        writeln!(text, "{}", file.replace("MEMORY_NARROWED", &narrowed).replace("MEMORY", name))
    }

    /// What an output, or what a sum begins with, is an array of.
    fn unit(self, dtype: DType) -> String {
        if self.quads { format!("vec4<{dtype}>") } else { dtype.to_string() }
    }
}

impl Tile {
    /// The constants of engine.wgsl, and fill.wgsl for each factor and the side that it fills.
    fn write(self, text: &mut String, sides: [&str; 4]) -> std::fmt::Result {
        let Self { rows, cols, depth, slices, wide } = self;
        writeln!(text, "const TILE_ROWS = {rows}u;\nconst TILE_COLS = {cols}u;\nconst TILE_DEPTH = {depth}u;")?;
        writeln!(text, "const SLICES = {slices}u;\nconst WIDE = {wide};\nconst FOLDED = {}u;", self.folded())?;
        for (operand, side) in OPERANDS.into_iter().zip(sides) {
            let file = include_str!("../../../shaders/fill.wgsl").replace("OPERAND", operand);
            let tile = side.to_uppercase() + "_TILE";
            writeln!(text, "{}", file.replace("SIDE_TILE", &tile).replace("SIDE", side))?;
        }
        Ok(())
    }
}

impl Matrices {
    /// matrices.wgsl, with the lines that are there once for each matrix of a subgroup.
    fn file(self) -> String {
        let file = include_str!("../../../shaders/matrices.wgsl").replace("EACHES", &format!("{}u", self.each));
        let lines = file.lines().flat_map(|line| match line.trim_start().strip_prefix("EACH ") {
            Some(each) => (0..self.each).map(|q| each.replace('Q', &q.to_string())).collect(),
            None => vec![line.to_owned()],
        });
        let sized = |line: String| {
            line.replace("matSIZExSIZE", &format!("mat{0}x{0}", self.size)).replace("SIZE", &format!("{}u", self.size))
        };
        lines.map(|line| sized(line) + "\n").collect()
    }
}

/// The factors, by name.
const OPERANDS: [&str; 4] = ["lhs", "rhs", "base_lhs", "more_rhs"];

impl Factor {
    /// Of a product that there is not.
    pub(super) const ABSENT: Self = Self { dtype: DType::F32, deep: true, quads: false };

    /// operand.wgsl, for one of the factors, which has no binding if it is missing.
    fn write(self, text: &mut String, operand: &str, binding: Option<u32>) -> std::fmt::Result {
        let Self { dtype, deep, quads } = self;
        let unit = if quads { format!("vec4<{dtype}>") } else { dtype.to_string() };
        writeln!(text, "alias {operand}_elem = {dtype};\nalias {operand}_unit = {unit};")?;
        writeln!(text, "const {operand}_DEEP = {deep};\nconst {operand}_QUADS = {quads};")?;
        match binding {
            Some(binding) => {
                writeln!(text, "@group(0) @binding({binding}) var<storage, read> {operand}: array<{operand}_unit>;")?
            }
            None => writeln!(text, "var<private> {operand}: array<{operand}_unit, 1>;")?,
        }
        writeln!(text, "{}", include_str!("../../../shaders/operand.wgsl").replace("OPERAND", operand))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::naga::front::wgsl;
    use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

    const CAPABILITIES: Capabilities =
        Capabilities::SHADER_FLOAT16.union(Capabilities::SUBGROUP).union(Capabilities::COOPERATIVE_MATRIX);

    fn assert_valid(kernel: Kernel, elem: DType) {
        let name = kernel.file_name(elem, 64);
        assert!(name.len() < 200 && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)), "{name}");
        let source = kernel.source(elem, 64);
        let module = wgsl::parse_str(&source);
        let module = module.unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&source)));
        let mut validator = Validator::new(ValidationFlags::all(), CAPABILITIES);
        let valid = validator.validate(&module);
        valid.unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&source)));
        assert!(module.entry_points.iter().any(|point| point.name == kernel.entry()), "{kernel:?}");
    }

    #[test]
    fn every_pointwise_shader_is_valid() {
        for elem in [DType::F32, DType::F16] {
            let kernels = [
                Kernel::Relu,
                Kernel::ReluBackward,
                Kernel::Add,
                Kernel::Accumulate,
                Kernel::Dropout(elem, elem),
                Kernel::Dropout(elem, DType::F32),
                Kernel::Dropout(DType::F32, DType::F32),
                Kernel::LoraRowNorm,
                Kernel::Rows(RowsKernel::Narrow, elem, elem),
                Kernel::Rows(RowsKernel::Narrow, DType::F32, elem),
                Kernel::Rows(RowsKernel::Products, DType::F32, elem),
                Kernel::Rows(RowsKernel::Outer, DType::F32, elem),
                Kernel::Magnitude,
                Kernel::MagnitudeBackward,
                Kernel::CrossEntropy,
                Kernel::Mean,
                Kernel::Copy { half: false },
                Kernel::Copy { half: true },
            ];
            kernels.into_iter().for_each(|kernel| assert_valid(kernel, elem));
        }
    }

    #[test]
    fn every_sum_is_valid() {
        let mut names = std::collections::HashMap::new();
        let tile = |rows, cols, slices, wide| Algorithm::Tiles(Tile { rows, cols, depth: 16, slices, wide });
        let skinny = |rows, by_depth, subgroups| Algorithm::Skinny(Skinny { rows, lanes: 8, slices: 16, by_depth, subgroups });
        let ways = [
            tile(64, 64, 1, false),
            tile(4, 16, 8, false),
            tile(128, 128, 1, true),
            skinny(1, true, false),
            skinny(8, false, false),
            skinny(4, true, true),
            Algorithm::Matrices(Matrices { size: 8, each: 2 }),
            Algorithm::Matrices(Matrices { size: 16, each: 4 }),
        ];
        for elem in [DType::F32, DType::F16] {
            let stochastic = [true, false].map(|add| Finish::StoreByChance { add });
            let finishes = [
                Finish::Store { out: elem, add: false },
                Finish::Store { out: DType::F32, add: true },
                Finish::Store { out: elem, add: true },
                Finish::Adam { master: false },
                Finish::Adam { master: true },
            ];
            let finishes = finishes.into_iter().chain(stochastic.into_iter().filter(|_| elem == DType::F16));
            let finishes: Vec<_> = finishes.collect();
            for (way, &finish) in ways.into_iter().flat_map(|way| finishes.iter().map(move |finish| (way, finish))) {
                for (more, deep, quads) in [(false, false, true), (true, true, true), (true, false, false), (true, true, false)] {
                    let factor = |dtype| Factor { dtype, deep, quads };
                    let quads = quads == more; // either, with either
                    let factors = [factor(DType::F32), factor(elem), factor(elem), factor(elem)];
                    let init = more.then_some(elem);
                    if elem == DType::F32 && matches!(way, Algorithm::Matrices(_)) {
                        continue; // of f16
                    }
                    let kernel = Kernel::Sum(Sum { way, factors, more, init, quads, finish });
                    assert_valid(kernel, elem);
                    // A gradient is one product.
                    let (reads, writes) = kernel.bindings();
                    let most = wgpu::Limits::default().max_storage_buffers_per_shader_stage;
                    assert!(reads + writes <= most || more && matches!(finish, Finish::Adam { .. }), "{kernel:?}");
                    let source = kernel.source(elem, 64);
                    assert_eq!(names.entry(kernel.file_name(elem, 64)).or_insert(source.clone()), &source);
                }
            }
        }
    }
}
