//! Compiles the kernels to PTX. Used by build.rs, and by the test that keeps the shipped PTX up to date.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

/// A PTX module: kernels for one element type.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// The name of the PTX file, without `.ptx`.
    pub(crate) name: &'static str,
    /// The element type, as in the names of kernels.
    pub(crate) element: &'static str,
    /// The element type in CUDA C++.
    ctype: &'static str,
    /// True if there are tensor core kernels for the type.
    tensor: bool,
    pub(crate) target: Target,
}

/// The GPUs that can run a module.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Every GPU from Ampere (`sm_80`) on.
    Every,
    /// Hopper only: PTX for `sm_90a` runs on no other GPU.
    Hopper,
}

/// The modules that the crate embeds.
pub(crate) const MODULES: [Module; 5] = [
    Module { name: "f32", element: "f32", ctype: "float", tensor: false, target: Target::Every },
    Module { name: "bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Every },
    Module { name: "f16", element: "f16", ctype: "__half", tensor: true, target: Target::Every },
    Module { name: "hopper-bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Hopper },
    Module { name: "hopper-f16", element: "f16", ctype: "__half", tensor: true, target: Target::Hopper },
];

impl Target {
    /// The source, the architecture, and the lowest PTX version with all instructions of the kernels.
    fn parts(self) -> [&'static str; 3] {
        match self {
            Self::Every => ["lowrank.cu", "compute_80", "7.1"],
            Self::Hopper => ["hopper.cu", "compute_90a", "8.0"],
        }
    }
}

impl Module {
    /// True if the PTX is a file; f16's is derived from bf16's.
    pub(crate) fn ships(self) -> bool {
        self.element != "f16"
    }
}

/// The shipped PTX of a module.
pub(crate) fn shipped(kernels: &Path, module: Module) -> Result<String, String> {
    let of = |name: &str| read(&kernels.join("ptx").join(format!("{name}.ptx")));
    if module.ships() { of(module.name) } else { Ok(f16_of(&of(&module.name.replace("f16", "bf16"))?)) }
}

/// The words in which the PTX of f16 and bf16 differs: names, conversions, products, and constants of stochastic rounding.
const BF16_TO_F16: [(&str, &str); 6] = [
    ("_bf16", "_f16"),
    ("cvt.rn.bf16.f32", "cvt.rn.f16.f32"),
    (".f32.bf16.bf16", ".f32.f16.f16"),
    (", 0xffff;", ", 0x1fff;"),
    (", 0x7f7f0000;", ", 0x477fe000;"),
    (", 0x0;", ", 0x38800000;"),
];

/// Derives the PTX of f16 from that of bf16; a test compares it with the compiler's.
pub(crate) fn f16_of(bf16: &str) -> String {
    let line = |line: &str| {
        let line = BF16_TO_F16.iter().fold(line.to_owned(), |line, (from, to)| line.replace(from, to));
        // A bf16 is the upper half of an f32: `mov.b32 %f1, {0, %rs1};`
        let widens = line.contains("{0, %rs");
        if widens { line.replace("mov.b32", "cvt.f32.f16").replace("{0, ", "").replace('}', "") + "\n" } else { line + "\n" }
    };
    bf16.lines().map(line).collect()
}

/// The first line of PTX made from the sources as they are.
pub(crate) fn stamp(kernels: &Path) -> Result<String, String> {
    let entries = std::fs::read_dir(kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| matches!(path.extension().and_then(OsStr::to_str), Some("cu" | "cuh")));
    paths.sort();
    let texts = paths.iter().map(|path| read(path)).collect::<Result<String, _>>()?;
    let hash = fnv1a(texts.bytes());
    Ok(format!("// Made by scripts/build-ptx from kernels/*.cu and *.cuh with hash {hash:016x}; do not edit."))
}

/// FNV-1a, independent of line ends.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    let fold = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.filter(|&byte| byte != b'\r').fold(0xcbf2_9ce4_8422_2325, fold)
}

/// Compiles a module. Comments, which contain paths and builds of the compiler, are removed.
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

/// Removes comments and blank lines, and shortens names so that they do not depend on other code: labels are `$L3` instead of
/// `$L__BB12_3`, which counts entries, and an entry's shared memory is not named by its parameter types. Sets the lowest PTX
/// version, so that drivers older than the compiler load it; ptxas refuses instructions above that version. Lines that begin with
/// `//@` stay: they are instructions for Hopper and later (kernels/common.cuh).
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
