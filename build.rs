//! Puts the PTX of the CUDA kernels where the crate embeds it from: what ships, or what `LOWRANK_NVCC` makes of the sources.

#[path = "kernels/ptx.rs"]
mod ptx;

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LOWRANK_NVCC");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    let nvcc = std::env::var_os("LOWRANK_NVCC").map(PathBuf::from);
    for module in ptx::MODULES {
        let text = match &nvcc {
            Some(nvcc) => ptx::compile(nvcc, Path::new("kernels"), module, &out),
            None => ptx::shipped(Path::new("kernels"), module),
        };
        let text = text.unwrap_or_else(|reason| panic!("{reason}"));
        let path = out.join(format!("{}.ptx", module.name));
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
