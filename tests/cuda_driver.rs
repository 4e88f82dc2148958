//! What only a GPU can tell of the driver: whose thread frees, whose stream it is, what a graph holds. Not run where there is none.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "cudarc's events are turned off: nobody but the caller knows that one stream is all")]

mod support;

use std::sync::Arc;

use lowrank::cuda::cudarc::driver::{CudaContext, CudaStream, sys};
use lowrank::op::{Add, LoraBackward, LoraForward};
use lowrank::{Cuda, Error, Tensor, bf16};
use support::bounds::assert_exact;
use support::data::{Dims, down, unwritten, up, whole};
use support::emulator::open;
use support::oracle::Lora;

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
        Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap_err(),
        Add { x: x.view(), y: y.view_mut() }.run(&other).unwrap_err(),
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

/// A stream that can be captured: one of its own, in a context whose events cudarc does not track.
fn capturable() -> Arc<CudaStream> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: all that a test does with this context is on this one stream.
    unsafe { context.disable_event_tracking() };
    context.new_stream().unwrap()
}

const THREAD_LOCAL: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const AUTO_FREE: sys::CUgraphInstantiate_flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;

/// The graph would read or write the host's memory at each launch. What was captured before the refusal still is.
#[test]
fn gpu_copies_are_refused_while_a_graph_is_captured() {
    if open::<bf16>().is_none() {
        return;
    }
    let stream = capturable();
    let gpu = Cuda::<bf16>::from_stream(stream.clone()).unwrap();
    let (x, mut y) = (ones(&gpu), ones(&gpu));
    stream.begin_capture(THREAD_LOCAL).unwrap();
    let errors = [y.copy_from_slice(&gpu, &[bf16::ONE; 4]).unwrap_err(), x.to_vec(&gpu).unwrap_err()];
    Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap();
    let graph = stream.end_capture(AUTO_FREE).unwrap().expect("an addition");
    for error in errors {
        assert!(matches!(&error, Error::Device { reason, .. } if reason.contains("captured")), "{error}");
    }
    graph.launch().unwrap();
    assert_eq!(y.to_vec(&gpu).unwrap(), [bf16::from_f32(2.0); 4]);
}

/// A layer's passes, captured once, on two inputs: with new contents in the same tensor, as a caller of graphs does it.
#[test]
fn gpu_a_captured_layer_runs_again_on_new_contents() {
    if open::<bf16>().is_none() {
        return;
    }
    let (stream, dims) = (capturable(), Dims { m: 80, k: 64, n: 264, r: 8 });
    let gpu = &Cuda::<bf16>::from_stream(stream.clone()).unwrap();
    let first = whole(dims, 1);
    let second = Lora { x: whole(dims, 2).x, ..first.clone() };
    let [mut x, w, a, b, dy] = [&first.x, &first.w, &first.a, &first.b, &first.dy].map(|mat| up(gpu, mat));
    let (scale, dropout, Dims { m, k, n, r }) = (first.scale as f32, None, dims);
    let (mut h, mut y, mut dx) = (unwritten(gpu, m, r), unwritten(gpu, m, n), unwritten(gpu, m, k));
    let (mut da, mut db) = (unwritten(gpu, r, k), unwritten(gpu, n, r));

    stream.begin_capture(THREAD_LOCAL).unwrap();
    let (w, a, b) = (Some(&w), &a, &b);
    LoraForward {
        x: x.view(),
        w: w.map(Into::into),
        bias: None,
        a: a.into(),
        b: b.into(),
        scale,
        dropout,
        h: h.view_mut(),
        y: (&mut y).into(),
    }
    .run(gpu)
    .unwrap();
    let (da_, db_, dx_) = (&mut da, &mut db, Some(&mut dx));
    LoraBackward {
        x: x.view(),
        w: w.map(Into::into),
        a: a.into(),
        b: b.into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da_.view_mut(),
        db: db_.view_mut(),
        dbias: None,
        dx: dx_.map(Into::into),
    }
    .run(gpu)
    .unwrap();
    let graph = stream.end_capture(AUTO_FREE).unwrap().expect("launches");

    for layer in [first, second] {
        let layer = Lora { bias: None, ..layer };
        let contents: Vec<_> = layer.x.data.iter().map(|&x| bf16::from_f32(x as f32)).collect();
        x.copy_from_slice(gpu, &contents).unwrap();
        graph.launch().unwrap();
        let want = layer.run();
        assert_exact("y", &down(gpu, &y), &want.y);
        assert_exact("dx", &down(gpu, &dx), &want.dx);
        assert_exact("dA", &down(gpu, &da), &want.da);
        assert_exact("dB", &down(gpu, &db), &want.db);
    }
}

fn ones(gpu: &Cuda<bf16>) -> Tensor<Cuda<bf16>> {
    Tensor::from_slice(gpu, (2, 2), &[bf16::ONE; 4]).unwrap()
}
