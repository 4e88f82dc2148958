//! Overlapping launches of a verb (from Hopper on): a kernel must wait before it accesses memory that the previous launch may be using.
#![cfg(feature = "cuda")]

mod support;

use lowrank::cuda::ptx;
use lowrank::op::Dropout;
use lowrank::{Cuda, DType, Float, bf16, f16};
use support::data::Dims;
use support::emulator::Emulator;
use support::mutants::{Pass, Verdict, belated, mutant, verdict};

/// One and two launches for y; few and many rows; ranks of one and of several chunks; with and without tensor cores; with and without a
/// launch that sums parts of dB.
const SHAPES: [Dims; 5] = [
    Dims { m: 5, k: 64, n: 40, r: 9 },
    Dims { m: 17, k: 72, n: 272, r: 17 },
    Dims { m: 43, k: 41, n: 40, r: 5 },
    Dims { m: 129, k: 136, n: 104, r: 18 },
    Dims { m: 70, k: 36, n: 33, r: 3 },
];

fn overlapping_launches_are_exact_on_whole_numbers<E: Float>() {
    let backend = Cuda::<E, _>::on(Emulator::younger(E::DTYPE));
    let halves = Dropout::new(0.5, 7).unwrap(); // with one half, whole numbers stay whole
    for dims in SHAPES {
        for (pass, dropout) in [Pass::Forward, Pass::Backward].into_iter().zip([None, Some(halves)]) {
            assert_eq!(verdict(&backend, pass, dims, dropout), Verdict::Survives, "{dims:?}");
        }
    }
}

#[test]
fn overlapping_launches_are_exact_on_whole_numbers_f32() {
    overlapping_launches_are_exact_on_whole_numbers::<f32>();
}

#[test]
fn overlapping_launches_are_exact_on_whole_numbers_f16() {
    overlapping_launches_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn overlapping_launches_are_exact_on_whole_numbers_bf16() {
    overlapping_launches_are_exact_on_whole_numbers::<bf16>();
}

/// A kernel that waits, and a layer in which it is not the first launch.
const WAITS: [(DType, &str, Pass, Dims); 11] = [
    (DType::F32, "lora_forward_y", Pass::Forward, SHAPES[2]),
    (DType::F32, "lora_forward_y_skinny", Pass::Forward, SHAPES[0]),
    (DType::F32, "lora_forward_y_wide", Pass::Forward, SHAPES[3]),
    (DType::BF16, "lora_forward_y_wide", Pass::Forward, SHAPES[3]),
    (DType::F32, "lora_backward_sum", Pass::Backward, SHAPES[1]),
    (DType::F32, "lora_backward_da", Pass::Backward, SHAPES[1]),
    (DType::F32, "lora_backward_dx", Pass::Backward, SHAPES[2]),
    (DType::F32, "lora_backward_dx_skinny", Pass::Backward, SHAPES[0]),
    (DType::BF16, "lora_backward_dx_skinny", Pass::Backward, SHAPES[1]),
    (DType::F32, "lora_backward_dx_wide", Pass::Backward, SHAPES[3]),
    (DType::BF16, "lora_backward_dx_wide", Pass::Backward, SHAPES[3]),
];
const WAIT: &str = "//@ griddepcontrol.wait;";

#[test]
fn every_wait_is_needed_and_missed() {
    for (dtype, kernel, pass, dims) in WAITS {
        let removed = mutant(dtype, kernel, WAIT, "", 0).unwrap_or_else(|| panic!("{kernel} does not wait"));
        for ptx in [removed, belated(dtype, kernel, WAIT)] {
            let emulator = Emulator::younger_with_ptx(dtype, &ptx);
            let verdict = match dtype {
                DType::F32 => verdict(&Cuda::<f32, _>::on(emulator), pass, dims, None),
                _ => verdict(&Cuda::<bf16, _>::on(emulator), pass, dims, None),
            };
            let named = |fault: &str| fault.contains(kernel) && fault.contains("too early");
            assert!(matches!(&verdict, Verdict::Fault(fault) if named(fault)), "{kernel}: {verdict:?}");
        }
    }
}

/// Every kernel that is followed by another of its verb allows it to begin, and every kernel that waits is tested above.
#[test]
fn kernels_let_the_next_begin_and_wait_once() {
    for dtype in [DType::F32, DType::BF16] {
        for entry in ptx(dtype).split(".entry ").skip(1) {
            let kernel = entry.split(&format!("_{dtype}(")).next().unwrap();
            let first = ["lora_forward_h", "lora_forward_h_skinny", "lora_backward_dy"].contains(&kernel);
            let between = ["lora_backward_sum", "lora_backward_da"].contains(&kernel);
            let count = |text| entry.matches(text).count();
            assert_eq!(count("//@ griddepcontrol.launch_dependents;"), usize::from(first || between), "{kernel}");
            let waits = WAITS.iter().any(|(_, name, ..)| *name == kernel);
            assert_eq!(count(WAIT), usize::from(waits), "{kernel}");
        }
    }
}
