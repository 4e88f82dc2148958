//! Assembles the text of shaders: constants, `common.wgsl`, and the kernel's files. WGSL has no generics; concatenation replaces
//! them.

use std::fmt::Write;

use super::plan::{Algorithm, Matrices, Skinny, Tile};
use crate::element::DType;

/// Concatenates the files of a kernel.
macro_rules! files {
    ($($stem:literal)*) => {
        concat!($(include_str!(concat!("../../../shaders/", $stem, ".wgsl")), "\n"),*)
    };
}

/// A kernel: all that distinguishes one compiled shader from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Sum(Sum),
    Relu,
    ReluBackward,
    Add,
    Accumulate,
    /// Element types of input and output.
    Dropout(DType, DType),
    LoraRowNorm,
    /// Of a left side and a right side that are stored so.
    Rows(RowsKernel, DType, DType),
    Magnitude,
    MagnitudeBackward,
    CrossEntropy,
    Mean,
    /// `half`: 16-bit elements, two to a word; else 32-bit ones.
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

/// A sum of products; see `shaders/engine.wgsl` and `shaders/skinny.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sum {
    pub(super) algorithm: Algorithm,
    /// `lhs`, `rhs`, `base_lhs`, `base_rhs`.
    pub(super) factors: [Factor; 4],
    /// True if there is a base product.
    pub(super) has_base: bool,
    /// Element type of the initial matrix, if there is one.
    pub(super) init: Option<DType>,
    /// True if the initial matrix and the outputs can be accessed by `vec4`.
    pub(super) vec4: bool,
    pub(super) epilogue: Epilogue,
}

/// How a factor of a product is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Factor {
    pub(super) dtype: DType,
    /// True if consecutive elements are consecutive along the depth (K-major).
    pub(super) k_major: bool,
    /// True if it can be read by `vec4`.
    pub(super) vec4: bool,
}

/// What is done with a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    Store { out: DType, add: bool },
    StoreStochastic { add: bool },
    Adam { master: bool },
}

impl Kernel {
    /// Numbers of bindings that are read, and written. Binding 0 is the uniforms.
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

    /// The name of the entry point.
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

    /// The text of the shader, for elements of type `elem` and workgroups of `threads` invocations (sums have their own number).
    pub(super) fn source(self, elem: DType, threads: u32) -> String {
        let mut text = String::new();
        if elem == DType::F16 {
            text += "enable f16;\n";
        }
        if matches!(self, Kernel::Sum(Sum { algorithm: Algorithm::Matrices(_), .. })) {
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

    /// A file name for the text, from all that distinguishes it: `relu-f16-256.wgsl`.
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
    /// Factors and initial matrix. Without a base product its factors have no bindings: Adam needs more than the rest of the
    /// eight that every adapter has.
    fn reads(self) -> u32 {
        if self.has_base { 5 } else { 3 }
    }

    fn writes(self) -> u32 {
        if let Epilogue::Adam { master } = self.epilogue { 3 + u32::from(master) } else { 1 }
    }

    /// Describes the algorithm, each factor (`k-major`, `x4` for vec4 loads), the initial matrix and the epilogue.
    fn name(self) -> String {
        let flag = |name: &'static str, there: bool| if there { name } else { "" };
        let algorithm = match self.algorithm {
            Algorithm::Tiles(Tile { rows, cols, depth, slices, .. }) => format!("tile-{rows}x{cols}x{depth}-slices-{slices}"),
            Algorithm::Matrices(Matrices { size, each }) => format!("matrices-{size}x{size}-each-{each}"),
            Algorithm::Skinny(Skinny { rows, lanes, slices, by_depth, subgroups }) => {
                let (by, gather) = (if by_depth { "depth" } else { "columns" }, flag("-subgroups", subgroups));
                format!("skinny-{rows}-lanes-{lanes}-slices-{slices}-by-{by}{gather}")
            }
        };
        let factor = |Factor { dtype, k_major, vec4 }| format!("-{dtype}{}{}", flag("-k-major", k_major), flag("-x4", vec4));
        let factors: String = self.factors[..if self.has_base { 4 } else { 2 }].iter().copied().map(factor).collect();
        let init = self.init.map_or(String::new(), |dtype| format!("-from-{dtype}"));
        let end = match self.epilogue {
            Epilogue::Store { out, add } => format!("to-{out}{}", flag("-added", add)),
            Epilogue::StoreStochastic { add } => format!("stochastic{}", flag("-added", add)),
            Epilogue::Adam { master } => format!("adam{}", flag("-master", master)),
        };
        format!("{algorithm}{factors}{init}-{end}{}", flag("-x4", self.vec4))
    }

    /// The files of the algorithm and the epilogue; `write_header` adds those that exist once per operand.
    fn files(self) -> String {
        let how = match self.algorithm {
            Algorithm::Tiles(_) => files!("reduce_slices" "engine" "blocks").to_owned(),
            Algorithm::Matrices(matrices) => files!("reduce_slices" "engine").to_owned() + &matrices.file(),
            Algorithm::Skinny(Skinny { subgroups: true, .. }) => files!("skinny" "reduce_in_subgroup").to_owned(),
            Algorithm::Skinny(_) => files!("reduce_slices" "skinny" "reduce_in_workgroup").to_owned(),
        };
        let epilogue = match self.epilogue {
            Epilogue::Store { .. } => files!("store"),
            Epilogue::StoreStochastic { .. } => files!("philox" "store_stochastic"),
            Epilogue::Adam { master: false } => files!("adam_weight" "adam"),
            Epilogue::Adam { master: true } => files!("adam_master" "adam"),
        };
        [files!("common" "sum"), &how, epilogue].concat()
    }

    /// Writes the constants, and the files that exist once per factor, product or output.
    fn write_header(self, text: &mut String, elem: DType) -> std::fmt::Result {
        let reads = self.reads();
        for (operand, (factor, binding)) in OPERANDS.into_iter().zip(self.factors.into_iter().zip(1..)) {
            factor.write(text, operand, (binding < reads).then_some(binding))?;
        }
        match self.algorithm {
            Algorithm::Tiles(tile) => tile.write(text, ["lhs", "rhs", "lhs", "rhs"])?,
            Algorithm::Matrices(_) => Matrices::TILE.write(text, ["lhs", "rhs", "half_lhs", "half_rhs"])?,
            Algorithm::Skinny(skinny) => {
                let Skinny { rows, lanes, slices, by_depth, .. } = skinny;
                writeln!(text, "const ROWS = {rows}u;\nconst LANES = {lanes}u;\nconst SLICES = {slices}u;")?;
                writeln!(
                    text,
                    "const THREADS = {}u;\nconst REDUCTION_BLOCKS = {}u;",
                    skinny.threads(),
                    skinny.reduction_blocks()
                )?;
                writeln!(text, "const BY_DEPTH = {by_depth};")?;
                for [lhs, rhs] in OPERANDS.as_chunks::<2>().0 {
                    let file = include_str!("../../../shaders/skinny_product.wgsl");
                    writeln!(text, "{}", file.replace("LHS", lhs).replace("RHS", rhs))?;
                }
            }
        }
        let init = self.init.unwrap_or(DType::F32);
        writeln!(text, "const HAS_BASE = {};\nconst HAS_INIT = {};", self.has_base, self.init.is_some())?;
        writeln!(text, "alias Init = {init};\nalias init_unit = {};\nconst VEC4 = {};", self.unit(init), self.vec4)?;
        writeln!(text, "const init_BINDING = {reads};")?;
        let first = reads + 1;
        match self.epilogue {
            Epilogue::Adam { master } => {
                let master = master.then_some(("master", DType::F32));
                let outputs = [("m", DType::F32), ("v", DType::F32)].into_iter().chain(master).chain([("w", elem)]).zip(first..);
                outputs.into_iter().try_for_each(|((name, dtype), binding)| self.write_output(text, name, dtype, binding))
            }
            Epilogue::Store { out, add } => {
                writeln!(text, "const OUT_HALF = {};\nconst ADD_TO_OUT = {add};", out == DType::F16)?;
                self.write_output(text, "out", out, first)
            }
            Epilogue::StoreStochastic { add } => {
                writeln!(text, "const ADD_TO_OUT = {add};")?;
                self.write_output(text, "out", DType::F16, first)
            }
        }
    }

    /// Writes memory.wgsl for an output.
    fn write_output(self, text: &mut String, name: &str, dtype: DType, binding: u32) -> std::fmt::Result {
        writeln!(
            text,
            "alias {name}_elem = {dtype};\nalias {name}_unit = {};\nconst {name}_BINDING = {binding};",
            self.unit(dtype)
        )?;
        let converted = if self.vec4 { format!("vec4<{dtype}>(line)") } else { format!("{dtype}(line.x)") };
        let file = include_str!("../../../shaders/memory.wgsl");
        writeln!(text, "{}", file.replace("MEMORY_CONVERTED", &converted).replace("MEMORY", name))
    }

    /// The array element type of an output or initial matrix.
    fn unit(self, dtype: DType) -> String {
        if self.vec4 { format!("vec4<{dtype}>") } else { dtype.to_string() }
    }
}

impl Tile {
    /// Writes the constants of engine.wgsl, and fill.wgsl for each factor and its tile.
    fn write(self, text: &mut String, sides: [&str; 4]) -> std::fmt::Result {
        let Self { rows, cols, depth, slices, four_blocks } = self;
        writeln!(text, "const TILE_ROWS = {rows}u;\nconst TILE_COLS = {cols}u;\nconst TILE_DEPTH = {depth}u;")?;
        writeln!(
            text,
            "const SLICES = {slices}u;\nconst FOUR_BLOCKS = {four_blocks};\nconst REDUCTION_BLOCKS = {}u;",
            self.reduction_blocks()
        )?;
        for (operand, side) in OPERANDS.into_iter().zip(sides) {
            let file = include_str!("../../../shaders/fill.wgsl").replace("OPERAND", operand);
            let tile = side.to_uppercase() + "_TILE";
            writeln!(text, "{}", file.replace("SIDE_TILE", &tile).replace("SIDE", side))?;
        }
        Ok(())
    }
}

impl Matrices {
    /// matrices.wgsl, with the EACH lines repeated for each matrix of a subgroup.
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

/// Names of the factors.
const OPERANDS: [&str; 4] = ["lhs", "rhs", "base_lhs", "base_rhs"];

impl Factor {
    /// The factor of a missing product.
    pub(super) const ABSENT: Self = Self { dtype: DType::F32, k_major: true, vec4: false };

    /// Writes operand.wgsl for a factor; without a binding if it is missing.
    fn write(self, text: &mut String, operand: &str, binding: Option<u32>) -> std::fmt::Result {
        let Self { dtype, k_major, vec4 } = self;
        let unit = if vec4 { format!("vec4<{dtype}>") } else { dtype.to_string() };
        writeln!(text, "alias {operand}_elem = {dtype};\nalias {operand}_unit = {unit};")?;
        writeln!(text, "const {operand}_K_MAJOR = {k_major};\nconst {operand}_VEC4 = {vec4};")?;
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
pub(super) mod tests {
    use super::super::translations;
    use super::*;
    use wgpu::naga::front::wgsl;
    use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

    const CAPABILITIES: Capabilities =
        Capabilities::SHADER_FLOAT16.union(Capabilities::SUBGROUP).union(Capabilities::COOPERATIVE_MATRIX);

    /// Asserts that a shader is valid and has [translations](translations::check).
    pub(in super::super) fn assert_valid(kernel: Kernel, elem: DType) {
        let name = kernel.file_name(elem, 64);
        assert!(name.len() < 200 && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)), "{name}");
        let source = kernel.source(elem, 64);
        let module = wgsl::parse_str(&source);
        let module = module.unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&source)));
        let mut validator = Validator::new(ValidationFlags::all(), CAPABILITIES);
        let valid = validator.validate(&module);
        let info = valid.unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&source)));
        translations::check(kernel, &module, &info);
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
        let tile = |rows, cols, slices, four_blocks| Algorithm::Tiles(Tile { rows, cols, depth: 16, slices, four_blocks });
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
            let stochastic = [true, false].map(|add| Epilogue::StoreStochastic { add });
            let finishes = [
                Epilogue::Store { out: elem, add: false },
                Epilogue::Store { out: DType::F32, add: true },
                Epilogue::Store { out: elem, add: true },
                Epilogue::Adam { master: false },
                Epilogue::Adam { master: true },
            ];
            let finishes = finishes.into_iter().chain(stochastic.into_iter().filter(|_| elem == DType::F16));
            let finishes: Vec<_> = finishes.collect();
            for (algorithm, &epilogue) in
                ways.into_iter().flat_map(|algorithm| finishes.iter().map(move |epilogue| (algorithm, epilogue)))
            {
                for (has_base, k_major, vec4) in
                    [(false, false, true), (true, true, true), (true, false, false), (true, true, false)]
                {
                    let factor = |dtype| Factor { dtype, k_major, vec4 };
                    let vec4 = vec4 == has_base; // either, with either
                    let factors = [factor(DType::F32), factor(elem), factor(elem), factor(elem)];
                    let init = has_base.then_some(elem);
                    if elem == DType::F32 && matches!(algorithm, Algorithm::Matrices(_)) {
                        continue; // of f16
                    }
                    let kernel = Kernel::Sum(Sum { algorithm, factors, has_base, init, vec4, epilogue });
                    assert_valid(kernel, elem);
                    // A gradient is one product.
                    let (reads, writes) = kernel.bindings();
                    let most = wgpu::Limits::default().max_storage_buffers_per_shader_stage;
                    assert!(reads + writes <= most || has_base && matches!(epilogue, Epilogue::Adam { .. }), "{kernel:?}");
                    let source = kernel.source(elem, 64);
                    assert_eq!(names.entry(kernel.file_name(elem, 64)).or_insert(source.clone()), &source);
                }
            }
        }
    }

    /// Three shaders as they run, for reading: a layer of many rows, one of few, and a step of Adam on a factored gradient.
    /// `LOWRANK_WRITE_SHADERS=1` writes them anew.
    #[test]
    fn the_shaders_in_generated_are_those_that_run() {
        let elem = DType::F32;
        let factors = [true, true, true, true].map(|k_major| Factor { dtype: elem, k_major, vec4: true });
        let store = Epilogue::Store { out: elem, add: false };
        let layer = |algorithm| Sum { algorithm, factors, has_base: true, init: Some(elem), vec4: true, epilogue: store };
        let tiles = Algorithm::Tiles(Tile { rows: 64, cols: 64, depth: 16, slices: 1, four_blocks: false });
        let skinny = Algorithm::Skinny(Skinny { rows: 4, lanes: 8, slices: 16, by_depth: true, subgroups: false });
        let gradient = factors.map(|factor| Factor { k_major: false, ..factor });
        let adam =
            Sum { has_base: false, init: None, factors: gradient, epilogue: Epilogue::Adam { master: false }, ..layer(tiles) };
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders/generated");
        for (name, sum) in [("lora_forward_tiles", layer(tiles)), ("lora_forward_skinny", layer(skinny)), ("adam_factored", adam)]
        {
            let header =
                "// Generated by a test from the files in shaders/, as it runs on a device: read it, and change those.\n\n";
            let (path, source) =
                (folder.join(name).with_extension("wgsl"), header.to_owned() + &Kernel::Sum(sum).source(elem, 64));
            assert_valid(Kernel::Sum(sum), elem);
            if std::env::var_os("LOWRANK_WRITE_SHADERS").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &source).unwrap();
            }
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(there == source, "{} is out of date: run this test with LOWRANK_WRITE_SHADERS=1", path.display());
        }
    }
}
