//! Sources → PTX. Used by build.rs, and by the test that keeps what ships up to date.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

/// An element type that the kernels are compiled for.
#[derive(Clone, Copy)]
pub(crate) struct Element {
    /// As in the names of kernels.
    pub(crate) name: &'static str,
    /// As CUDA calls it.
    ctype: &'static str,
    /// Whether there are kernels for tensor cores besides.
    tensor: bool,
}

/// A module each.
pub(crate) const ELEMENTS: [Element; 3] = [
    Element { name: "f32", ctype: "float", tensor: false },
    Element { name: "f16", ctype: "__half", tensor: true },
    Element { name: "bf16", ctype: "__nv_bfloat16", tensor: true },
];

/// The PTX that ships.
pub(crate) fn shipped(kernels: &Path, element: Element) -> Result<String, String> {
    read(&kernels.join("ptx").join(format!("{}.ptx", element.name)))
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

/// Compiles every kernel for one element type. Comments, which name the compiler's paths and builds, are left out.
pub(crate) fn compile(nvcc: &Path, kernels: &Path, element: Element, scratch: &Path) -> Result<String, String> {
    let out = scratch.join(format!("nvcc-{}.ptx", element.name));
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-std=c++17", "-arch=compute_80", "-Werror", "all-warnings"]);
    command.arg(format!("-DE={}", element.ctype)).arg(format!("-DELEMENT={}", element.name));
    command.args(element.tensor.then_some("-DTENSOR"));
    command.arg(kernels.join("lowrank.cu")).arg("-o").arg(&out);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !output.status.success() {
        return Err(format!("{}: {}", nvcc.display(), String::from_utf8_lossy(&output.stderr)));
    }
    Ok(format!("{}\n{}", stamp(kernels)?, tidy(&read(&out)?)))
}

/// Without comments and blank lines, and with the version of PTX in which sm_80 and all that the kernels use were there: so
/// drivers older than the compiler load it too. ptxas refuses what is newer than the version says.
fn tidy(ptx: &str) -> String {
    let lines = ptx.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
    let lines = lines.map(|line| if line.starts_with(".version") { ".version 7.1" } else { line });
    lines.filter(|line| !line.is_empty() && !line.starts_with(".file")).map(|line| format!("{line}\n")).collect()
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
