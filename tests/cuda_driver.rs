//! What only a GPU can tell of the driver: whose thread frees, whose stream it is, what a graph holds. Not run where there is none.
#![cfg(feature = "cuda")]

mod support;

use lowrank::cuda::cudarc::driver::CudaContext;
use lowrank::op::Add;
use lowrank::{Cuda, Error, Tensor, bf16};
use support::emulator::open;

/// Memory is freed on any thread, also on one that never called CUDA: the driver would refuse it there, and it would be lost.
#[test]
fn gpu_memory_is_freed_on_the_thread_that_drops_it() {
    let Some(gpu) = open::<bf16>() else { return };
    let context = gpu.on_device().stream().context();
    let tensor = Tensor::<_, bf16>::zeros(&gpu, (1024, 1024)).unwrap();
    std::thread::scope(|scope| scope.spawn(move || drop(tensor)).join()).unwrap();
    context.check_err().expect("what a drop cannot return is kept here");
    // The stream still runs, in order, and so does what follows on this thread.
    let tensor = Tensor::<_, bf16>::from_slice(&gpu, (1, 3), &[1.0, 2.0, 3.0].map(bf16::from_f32)).unwrap();
    assert_eq!(tensor.to_vec(&gpu).unwrap(), [1.0, 2.0, 3.0].map(bf16::from_f32));
}

/// What one stream writes another may read too early, and nobody knows when it may be freed.
#[test]
fn gpu_operands_of_another_stream_are_refused() {
    let Some(gpu) = open::<bf16>() else { return };
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let other = Cuda::<bf16>::from_stream(stream).unwrap();
    let (x, mut y) = (Tensor::zeros(&other, (2, 2)).unwrap(), Tensor::zeros(&gpu, (2, 2)).unwrap());
    let refused = |error: &Error| matches!(error, Error::Device { reason, .. } if reason.contains("another stream of GPU 0"));
    for error in [
        Add { x: &x, y: &mut y }.run(&gpu).unwrap_err(),
        Add { x: &x, y: &mut y }.run(&other).unwrap_err(),
        x.to_vec(&gpu).unwrap_err(),
        y.copy_from_slice(&other, &[bf16::ONE; 4]).unwrap_err(),
    ] {
        assert!(refused(&error), "{error}");
    }
}

#[test]
fn gpu_a_stream_that_each_thread_has_its_own_of_is_refused() {
    if open::<bf16>().is_none() {
        return;
    }
    let Err(error) = Cuda::<bf16>::from_stream(CudaContext::new(0).unwrap().per_thread_stream()) else { panic!("taken") };
    assert!(matches!(error, Error::Value { name: "stream", .. }), "{error}");
}
