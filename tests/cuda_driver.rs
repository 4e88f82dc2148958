//! What only a GPU can tell of the driver: whose thread frees, whose stream it is, what a graph holds. Not run where there is none.
#![cfg(feature = "cuda")]

mod support;

use lowrank::{Tensor, bf16};
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
