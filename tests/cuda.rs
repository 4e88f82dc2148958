//! The CUDA backend: the suite on the emulated device, and on a GPU if there is one.
#![cfg(feature = "cuda")]

mod support;

use lowrank::{Backend, Cuda, Error};
use support::emulator::{Emulator, open};

suite!(emulated_f32, crate::support::emulator::Emulator::backend::<f32>());
suite!(emulated_f16, crate::support::emulator::Emulator::backend::<lowrank::f16>());
suite!(emulated_bf16, crate::support::emulator::Emulator::backend::<lowrank::bf16>());

suite!(gpu_f32, if let Some(gpu) = crate::open::<f32>() { gpu } else { return });
suite!(gpu_f16, if let Some(gpu) = crate::open::<lowrank::f16>() { gpu } else { return });
suite!(gpu_bf16, if let Some(gpu) = crate::open::<lowrank::bf16>() { gpu } else { return });

/// Opening a GPU that does not exist is an error on every machine, not a panic.
#[test]
fn a_missing_gpu_is_a_typed_error_with_the_reason() {
    let Err(error) = Cuda::<f32>::new(1 << 20) else { panic!("a million GPUs") };
    assert!(matches!(&error, Error::Unavailable { backend: "cuda", reason } if !reason.is_empty()), "{error}");
}

/// Also when the backend is called directly, without the checks of tensors.
#[test]
fn more_than_can_be_addressed_is_a_typed_error() {
    for len in [usize::MAX, usize::MAX / 4 + 2, isize::MAX as usize / 4 + 1] {
        let Err(error) = Emulator::backend::<f32>().zeros::<f32>(len) else { panic!("{len} elements") };
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
}
