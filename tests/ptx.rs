//! The shipped PTX is complete and belongs to the current sources. See `registers.rs` for the results of ptxas.
#![cfg(feature = "cuda")]

#[path = "../kernels/ptx.rs"]
mod compiler;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use compiler::{MODULES, Target};
use lowrank::DType;
use lowrank::cuda::Kernel;
use ptx_interpreter::Module;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// The symbols that the backend looks up.
fn entries(module: compiler::Module) -> Vec<String> {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let dtype = dtypes.into_iter().find(|dtype| dtype.to_string() == module.element).unwrap();
    let kernels = Kernel::ALL.iter().filter(|kernel| kernel.is_for_hopper() == (module.target == Target::Hopper));
    kernels.map(|kernel| format!("{kernel}_{dtype}")).collect()
}

fn nvcc() -> Option<PathBuf> {
    std::env::var_os("LOWRANK_NVCC").map(PathBuf::from)
}

/// With `LOWRANK_NVCC` the PTX is compiled again and compared; without, the hash of the sources in its first line must match.
/// `scripts/build-ptx` also sets `LOWRANK_WRITE_PTX`, with which the PTX is written.
#[test]
fn shipped_ptx_is_what_the_sources_make() {
    let scratch = tempfile::tempdir().unwrap();
    let write = std::env::var_os("LOWRANK_WRITE_PTX").is_some();
    for module in MODULES {
        let made = nvcc().map(|nvcc| compiler::compile(&nvcc, &kernels(), module, scratch.path()).unwrap());
        if write && module.ships() {
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
        let comments = ptx.lines().filter(|line| line.contains("//") && !line.contains("//@ griddepcontrol")).count();
        assert!(comments == 1 && !ptx.contains(".file"), "{}", module.name);
    }
}
