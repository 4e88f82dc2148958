//! Sources → PTX. Used by build.rs, and by the test that keeps what ships up to date.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

/// One file of PTX: kernels for an element type.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// The file is this and `.ptx`.
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

/// What ships.
pub(crate) const MODULES: [Module; 5] = [
    Module { name: "f32", element: "f32", ctype: "float", tensor: false, target: Target::Every },
    Module { name: "f16", element: "f16", ctype: "__half", tensor: true, target: Target::Every },
    Module { name: "bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Every },
    Module { name: "hopper-f16", element: "f16", ctype: "__half", tensor: true, target: Target::Hopper },
    Module { name: "hopper-bf16", element: "bf16", ctype: "__nv_bfloat16", tensor: true, target: Target::Hopper },
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

/// The PTX that ships.
pub(crate) fn shipped(kernels: &Path, module: Module) -> Result<String, String> {
    read(&kernels.join("ptx").join(format!("{}.ptx", module.name)))
}

/// What the first line of PTX says that was made of the sources as they are.
pub(crate) fn stamp(kernels: &Path) -> Result<String, String> {
    let entries = std::fs::read_dir(kernels).map_err(|error| format!("{}: {error}", kernels.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| matches!(path.extension().and_then(OsStr::to_str), Some("cu" | "cuh")));
    paths.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64; // FNV-1a
    for path in paths {
        let line_ends = |byte: &u8| *byte != b'\r';
        for byte in read(&path)?.bytes().filter(line_ends) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    Ok(format!("// Made by scripts/build-ptx from kernels/*.cu and *.cuh with hash {hash:016x}; do not edit."))
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

/// Without comments and blank lines, and with the oldest version of PTX that will do: so drivers older than the compiler load it
/// too. ptxas refuses what is newer than the version says.
fn tidy(ptx: &str, version: &str) -> String {
    let lines = ptx.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    let version = format!(".version {version}");
    let lines = lines.map(|line| if line.starts_with(".version") { &version } else { line });
    lines.filter(|line| !line.is_empty() && !line.starts_with(".file")).map(|line| format!("{line}\n")).collect()
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
