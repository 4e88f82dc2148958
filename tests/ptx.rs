//! The PTX that ships: made of the sources as they are, complete, and good for ptxas.
#![cfg(feature = "cuda")]

#[path = "../kernels/ptx.rs"]
mod compiler;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use compiler::{MODULES, Target};
use lowrank::DType;
use lowrank::cuda::{hopper, plan};
use ptx_interpreter::Module;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// The symbols that the backend looks up.
fn entries(module: compiler::Module) -> Vec<String> {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let dtype = dtypes.into_iter().find(|dtype| dtype.to_string() == module.element).unwrap();
    let stems: Vec<_> = match module.target {
        Target::Every => plan::kernels(dtype).collect(),
        Target::Hopper => hopper::kernels().collect(),
    };
    stems.into_iter().map(|stem| format!("{stem}_{dtype}")).collect()
}

fn nvcc() -> Option<PathBuf> {
    std::env::var_os("LOWRANK_NVCC").map(PathBuf::from)
}

/// With `LOWRANK_NVCC` the compiler makes it again; without, the hash of the sources in its first line must fit.
/// `scripts/build-ptx` sets `LOWRANK_WRITE_PTX` too: then it is written.
#[test]
fn shipped_ptx_is_what_the_sources_make() {
    let scratch = tempfile::tempdir().unwrap();
    let write = std::env::var_os("LOWRANK_WRITE_PTX").is_some();
    for module in MODULES {
        let made = nvcc().map(|nvcc| compiler::compile(&nvcc, &kernels(), module, scratch.path()).unwrap());
        if write {
            let path = kernels().join("ptx").join(format!("{}.ptx", module.name));
            std::fs::write(path, made.expect("scripts/build-ptx sets LOWRANK_NVCC")).unwrap();
            continue;
        }
        let shipped = compiler::shipped(&kernels(), module).unwrap();
        let stamp = compiler::stamp(&kernels()).unwrap();
        assert_eq!(shipped.lines().next(), Some(&*stamp), "{}.ptx is stale: run scripts/build-ptx", module.name);
        if let Some(made) = made {
            assert!(shipped == made, "{}.ptx is not what nvcc makes: run scripts/build-ptx", module.name);
        }
    }
}

#[test]
fn every_kernel_ships_for_every_element_type() {
    for module in MODULES {
        let parsed = Module::parse(&compiler::shipped(&kernels(), module).unwrap()).unwrap();
        let got: BTreeSet<_> = parsed.names().map(str::to_owned).collect();
        assert_eq!(got, entries(module).into_iter().collect());
    }
}

#[test]
fn ptx_names_no_machine() {
    for module in MODULES {
        let ptx = compiler::shipped(&kernels(), module).unwrap();
        let comments = ptx.lines().filter(|line| line.contains("//")).count();
        assert!(comments == 1 && !ptx.contains(".file"), "{}", module.name);
    }
}

/// Registers that spill to memory cost more than anything a kernel can gain. Needs ptxas: next to `LOWRANK_NVCC`, or on PATH.
#[test]
fn ptxas_assembles_every_kernel_without_spills() {
    let ptxas = nvcc().map_or("ptxas".into(), |nvcc| nvcc.with_file_name("ptxas"));
    if Command::new(&ptxas).arg("--version").output().is_err() {
        println!("not run: there is no ptxas");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let archs = |module: compiler::Module| match module.target {
        Target::Every => &["sm_80", "sm_90", "sm_100", "sm_120"][..],
        Target::Hopper => &["sm_90a"],
    };
    for (module, arch) in MODULES.into_iter().flat_map(|module| archs(module).iter().map(move |arch| (module, arch))) {
        let ptx = kernels().join("ptx").join(format!("{}.ptx", module.name));
        let cubin = scratch.path().join("out.cubin");
        let output = Command::new(&ptxas).args(["-v", "-arch", arch]).arg(ptx).arg("-o").arg(cubin).output().unwrap();
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{report}");
        let spills: Vec<_> =
            report.lines().filter(|line| line.contains("spill") && !line.contains("0 bytes spill stores, 0 ")).collect();
        assert!(spills.is_empty(), "{} on {arch}: {spills:?}", module.name);
        let assembled = report.lines().filter(|line| line.contains("Compiling entry")).count();
        assert_eq!(assembled, entries(module).len(), "{report}");
        assert!(!report.contains("Potential Performance Loss"), "{report}"); // products that were made to wait for each other
    }
}
