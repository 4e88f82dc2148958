//! Shaders translated for Vulkan, Metal and DX12, without a device: tests.
//!
//! naga translates them with the settings that wgpu uses. SPIR-V is also given to `spirv-val`, where it is installed. Metal's and
//! DX12's compilers run on their systems alone, so what is tested of these is that naga has a translation.

use std::io::Write;
use std::process::{Command, Stdio};

use wgpu::naga::back::{hlsl, msl, spv};
use wgpu::naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use wgpu::naga::valid::ModuleInfo;
use wgpu::naga::{Module, ShaderStage};

use super::plan::{Algorithm, Limits, Matrices, Skinny, Tile};
use super::shader::tests::assert_valid;
use super::shader::{Epilogue, Factor, Kernel, Sum};
use crate::element::DType;

/// Asserts that a shader has a translation to SPIR-V that is valid, and to Metal's language and HLSL.
pub(super) fn check(kernel: Kernel, module: &Module, info: &ModuleInfo) {
    let matrices = matches!(kernel, Kernel::Sum(Sum { algorithm: Algorithm::Matrices(_), .. }));
    let spirv = to_spirv(kernel, module, info);
    // Debian's spirv-val is older than cooperative matrices.
    if !matrices {
        validate(kernel, &spirv);
    }
    let metal = to_metal(kernel, module, info).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
    assert!(metal.contains(&format!("kernel void {}", kernel.entry())), "{kernel:?}: {metal}");
    match to_hlsl(kernel, module, info) {
        Ok(hlsl) => assert!(!matrices && hlsl.contains(&format!("void {}(", kernel.entry())), "{kernel:?}: {hlsl}"),
        Err(error) => assert!(matrices, "{kernel:?}: {error}"), // HLSL has no cooperative matrices
    }
}

fn to_spirv(kernel: Kernel, module: &Module, info: &ModuleInfo) -> Vec<u32> {
    let options = spv::Options {
        lang_version: (1, 3), // of Vulkan 1.1
        bounds_check_policies: RESTRICTED,
        ..spv::Options::default()
    };
    let entry = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: kernel.entry().into() };
    spv::write_vec(module, info, &options, Some(&entry)).unwrap_or_else(|error| panic!("{kernel:?}: {error}"))
}

fn to_metal(kernel: Kernel, module: &Module, info: &ModuleInfo) -> Result<String, msl::Error> {
    let options = msl::Options { lang_version: (2, 4), bounds_check_policies: RESTRICTED, ..msl::Options::default() };
    let entry = msl::PipelineOptions { entry_point: Some((ShaderStage::Compute, kernel.entry().into())), ..Default::default() };
    msl::write_string(module, info, &options, &entry).map(|(text, _)| text)
}

fn to_hlsl(kernel: Kernel, module: &Module, info: &ModuleInfo) -> Result<String, hlsl::Error> {
    let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..hlsl::Options::default() };
    let entry = hlsl::PipelineOptions { entry_point: Some((ShaderStage::Compute, kernel.entry().into())) };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &entry).write(module, info, None).map(|_| text)
}

const RESTRICTED: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Restrict,
    buffer: BoundsCheckPolicy::Restrict,
    image_load: BoundsCheckPolicy::Restrict,
    binding_array: BoundsCheckPolicy::Unchecked,
};

/// Asserts that `spirv-val` accepts it, where that is installed.
fn validate(kernel: Kernel, spirv: &[u32]) {
    let mut command = Command::new("spirv-val");
    command.args(["--target-env", "vulkan1.1", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else { return };
    child.stdin.take().unwrap().write_all(bytemuck::cast_slice(spirv)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{kernel:?}: {}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
}

/// Every way of making a sum that the plan has for some sizes and for some adapter.
fn algorithms() -> Vec<Algorithm> {
    const SIZES: [usize; 9] = [1, 3, 5, 8, 16, 17, 64, 512, 1000];
    let mut found = Vec::new();
    for (invocations, workgroup_bytes) in [(256, 16 << 10), (1024, 32 << 10), (1024, 64 << 10), (128, 16 << 10), (64, 4 << 10)] {
        for (subgroup, matrix) in [(0, 0), (4, 8), (32, 8), (32, 16), (64, 16)] {
            let limits = Limits { invocations, workgroup_bytes, groups: 65_535, binding_bytes: 1 << 27, subgroup, matrix };
            for (rows, cols) in SIZES.into_iter().flat_map(|rows| SIZES.map(|cols| (rows, cols))) {
                found.extend([4, 16, 64].map(|depth| Algorithm::Tiles(Tile::new(rows, cols, depth, limits))));
                found.extend(Matrices::new(rows, cols, limits).map(Algorithm::Matrices));
                let skinny = [true, false].map(|by_depth| Algorithm::Skinny(Skinny::new(rows, cols, by_depth, limits)));
                found.extend(skinny.into_iter().filter(|_| rows <= Skinny::MAX_ROWS));
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    found.retain(|algorithm| seen.insert(*algorithm));
    found
}

#[test]
fn every_way_of_making_a_sum_has_translations() {
    let algorithms = algorithms();
    println!("{} ways of making a sum", algorithms.len());
    if Command::new("spirv-val").arg("--version").output().is_err() {
        println!("there is no spirv-val: SPIR-V is not validated");
    }
    for algorithm in algorithms {
        for (elem, k_major) in [(DType::F32, true), (DType::F16, false)] {
            if elem == DType::F32 && matches!(algorithm, Algorithm::Matrices(_)) {
                continue; // of f16
            }
            let factor = |dtype| Factor { dtype, k_major, vec4: k_major };
            let epilogue = Epilogue::Store { out: elem, add: !k_major };
            let factors = [DType::F32, elem, elem, elem].map(factor);
            let sum = Sum { algorithm, factors, has_base: true, init: Some(elem), vec4: k_major, epilogue };
            assert_valid(Kernel::Sum(sum), elem);
        }
    }
}
