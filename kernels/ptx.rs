//! Sources → PTX. Used by build.rs, and by the test that keeps what ships up to date.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

/// Kernels for an element type.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// Of the file, where it is one, without `.ptx`.
    pub(crate) name: &'static str,
    /// The element type, as in the names of kernels.
    pub(crate) element: &'static str,
    /// As CUDA calls it.
    ctype: &'static str,
    /// Whether there are kernels for tensor cores besides.
    tensor: bool,
    pub(crate) target: Target,
}

/// What the PTX is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Every GPU from Ampere (`sm_80`) on.
    Every,
    /// Hopper alone: `sm_90a` runs nowhere else.
    Hopper,
}

/// What the crate embeds.
pub(crate) const MODULES: [Module; 5] = [
    Module { name: "f32", element: "f32", ctype: "float", tensor: false, target: Target::Every },
    Module { name: "bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Every },
    Module { name: "f16", element: "f16", ctype: "__half", tensor: true, target: Target::Every },
    Module { name: "hopper-bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Hopper },
    Module { name: "hopper-f16", element: "f16", ctype: "__half", tensor: true, target: Target::Hopper },
];

impl Target {
    /// The source, the architecture, and the version of PTX in which all that the kernels use was there.
    fn parts(self) -> [&'static str; 3] {
        match self {
            Self::Every => ["lowrank.cu", "compute_80", "7.1"],
            Self::Hopper => ["hopper.cu", "compute_90a", "8.0"],
        }
    }
}

impl Module {
    /// Whether its PTX is a file; that of f16 is made of bf16's.
    pub(crate) fn ships(self) -> bool {
        self.element != "f16"
    }
}

/// The PTX that ships.
pub(crate) fn shipped(kernels: &Path, module: Module) -> Result<String, String> {
    let of = |name: &str| read(&kernels.join("ptx").join(format!("{name}.ptx")));
    if module.ships() { of(module.name) } else { Ok(f16_of(&of(&module.name.replace("f16", "bf16"))?)) }
}

/// The words in which the 16-bit types differ: names, conversions, products, and the constants of rounding by chance.
const BF16_TO_F16: [(&str, &str); 6] = [
    ("_bf16", "_f16"),
    ("cvt.rn.bf16.f32", "cvt.rn.f16.f32"),
    (".f32.bf16.bf16", ".f32.f16.f16"),
    (", 0xffff;", ", 0x1fff;"),
    (", 0x7f7f0000;", ", 0x477fe000;"),
    (", 0x0;", ", 0x38800000;"),
];

/// The PTX of f16, made of that of bf16; a test compares it with what the compiler makes.
pub(crate) fn f16_of(bf16: &str) -> String {
    let line = |line: &str| {
        let line = BF16_TO_F16.iter().fold(line.to_owned(), |line, (from, to)| line.replace(from, to));
        // The upper half of a float is a bf16: `mov.b32 %f1, {0, %rs1};`
        let widens = line.contains("{0, %rs");
        if widens { line.replace("mov.b32", "cvt.f32.f16").replace("{0, ", "").replace('}', "") + "\n" } else { line + "\n" }
    };
    bf16.lines().map(line).collect()
}

/// What the first line of PTX says that was made of the sources as they are.
pub(crate) fn stamp(kernels: &Path) -> Result<String, String> {
    let entries = std::fs::read_dir(kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| matches!(path.extension().and_then(OsStr::to_str), Some("cu" | "cuh")));
    paths.sort();
    let texts = paths.iter().map(|path| read(path)).collect::<Result<String, _>>()?;
    let hash = fnv1a(texts.bytes());
    Ok(format!("// Made by scripts/build-ptx from kernels/*.cu and *.cuh with hash {hash:016x}; do not edit."))
}

/// FNV-1a, whatever the line ends.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    let fold = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.filter(|&byte| byte != b'\r').fold(0xcbf2_9ce4_8422_2325, fold)
}

/// Compiles the kernels of a module. Comments, which name the compiler's paths and builds, are left out.
pub(crate) fn compile(nvcc: &Path, kernels: &Path, module: Module, scratch: &Path) -> Result<String, String> {
    let out = scratch.join(format!("nvcc-{}.ptx", module.name));
    let [source, arch, version] = module.target.parts();
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-std=c++17", "-arch", arch, "-Werror", "all-warnings"]);
    command.arg(format!("-DE={}", module.ctype)).arg(format!("-DELEMENT={}", module.element));
    command.args(module.tensor.then_some("-DTENSOR"));
    command.arg(kernels.join(source)).arg("-o").arg(&out);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !output.status.success() {
        return Err(format!("{}: {}", nvcc.display(), String::from_utf8_lossy(&output.stderr)));
    }
    Ok(format!("{}\n{}", stamp(kernels)?, tidy(&read(&out)?, version)))
}

/// Without comments and blank lines, and with names that do not change when something else does: labels are `$L3` and not
/// `$L__BB12_3`, which counts the entries before, and shared memory of an entry is not named by its parameters. The version of PTX
/// is the oldest that will do: so drivers older than the compiler load it too. ptxas refuses what is newer than the version says.
/// What begins with `//@` stays: instructions that GPUs from Hopper on know (kernels/common.cuh).
fn tidy(ptx: &str, version: &str) -> String {
    let mut entry = String::new();
    let mut tidy_line = |line: &str| {
        let comment = if line.trim_start().starts_with("//@") { None } else { line.find("//") };
        let line = line[..comment.unwrap_or(line.len())].trim_end();
        if let Some((_, name)) = line.split_once(".entry ") {
            entry = name.trim_end_matches('(').to_owned();
        }
        match line {
            _ if line.starts_with(".version") => format!(".version {version}"),
            _ if line.starts_with(".file") => String::new(),
            _ => short_names(line, &entry),
        }
    };
    ptx.lines().map(&mut tidy_line).filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
}

/// `$L__BB12_3` → `$L3`; `_ZZ21lora_backward_da_bf16PK13__nv_bfloat16PKfE4band` → `lora_backward_da_bf16_band`.
fn short_names(line: &str, entry: &str) -> String {
    let mut line = line.to_owned();
    while let Some(at) = line.find("$L__BB") {
        let Some(len) = line[at + 6..].find('_') else { break };
        line.replace_range(at + 2..at + 6 + len + 1, "");
    }
    let mangled = format!("_ZZ{}{entry}", entry.len());
    if let Some(at) = line.find(&mangled) {
        let end = line[at..].find(|c: char| !c.is_alphanumeric() && c != '_').map_or(line.len(), |len| at + len);
        let name = line[at..end].rsplit('E').next().unwrap_or_default().trim_start_matches(|c: char| c.is_ascii_digit());
        let name = format!("{entry}_{name}");
        line.replace_range(at..end, &name);
    }
    line
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
