//! Tests of the driver that need a GPU: freeing on other threads, streams of the caller, graph capture. Not run without a GPU.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "cudarc's events are turned off: nobody but the caller knows that one stream is all")]

mod support;

use std::sync::Arc;

use lowrank::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use lowrank::op::{Add, LoraBackward, LoraForward};
use lowrank::{Backend, Cuda, Error, Tensor, bf16};
use support::bounds::assert_exact;
use support::data::{Dims, down, unwritten, up, whole};
use support::emulator::open;
use support::oracle::Lora;

/// Memory can be freed on any thread, also on one without a CUDA context, where the driver alone would fail and leak it.
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

/// Operands of another stream are refused: they might be read before they are written, or freed too early.
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

/// The per-thread default stream is another one on each thread, so the backend works only on its own; memory may be dropped on any.
#[test]
fn gpu_the_per_thread_stream_is_that_of_one_thread() {
    if open::<bf16>().is_none() {
        return;
    }
    let context = CudaContext::new(0).unwrap();
    let gpu = Cuda::<bf16>::from_stream(context.per_thread_stream()).unwrap();
    let (x, mut y) = (ones(&gpu), ones(&gpu));
    Add { x: x.view(), y: y.view_mut() }.run(&gpu).unwrap();
    assert_eq!(y.to_vec(&gpu).unwrap(), [bf16::from_f32(2.0); 4]);
    let elsewhere = || {
        let errors = [
            x.to_vec(&gpu).unwrap_err(),
            Tensor::<_, bf16>::zeros(&gpu, (2, 2)).unwrap_err(),
            gpu.synchronize().unwrap_err(),
            x.try_clone(&gpu).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(&error, Error::Device { reason, .. } if reason.contains("another thread")), "{error}");
        }
        drop(y);
    };
    std::thread::scope(|scope| scope.spawn(elsewhere).join()).unwrap();
    context.check_err().expect("what a drop cannot return is kept here");
    assert_eq!(x.to_vec(&gpu).unwrap(), [bf16::ONE; 4]);
}

/// Lent memory of cudarc is read and written in place, and stays valid afterwards.
#[test]
fn gpu_lent_memory_is_written_in_place() {
    if open::<f32>().is_none() {
        return;
    }
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let gpu = Cuda::<f32>::from_stream(stream.clone()).unwrap();
    let x = stream.clone_htod(&[0.0f32, 1.0, 2.0, 3.0]).unwrap();
    let mut y = stream.clone_htod(&[10.0f32; 6]).unwrap();
    {
        let (x, mut y) = (x.slice(1..), y.as_view_mut());
        let (x, mut y) = (gpu.lend(&x).unwrap(), gpu.lend_mut(&mut y).unwrap());
        // 1×3 from an odd offset to the second row of 2×3
        let row = y.view_mut((2, 3)).unwrap().row_range(1..2).unwrap();
        Add { x: x.view((1, 3)).unwrap(), y: row }.run(&gpu).unwrap();
        assert!(x.view::<f32>((1, 4)).is_err() && y.view_strided_mut::<f32>((2, 3), 1, 3).is_err(), "beyond the memory");
    }
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [10.0, 10.0, 10.0, 11.0, 12.0, 13.0]);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [0.0, 1.0, 2.0, 3.0]);
}

/// A tensor adopts a slice and gives it back, at the same address.
#[test]
fn gpu_a_slice_is_adopted_and_handed_back() {
    if open::<f32>().is_none() {
        return;
    }
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let gpu = Cuda::<f32>::from_stream(stream.clone()).unwrap();
    let slice = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
    let address = |slice: &CudaSlice<f32>| slice.device_ptr(&stream).0;
    let at = address(&slice);
    let mut tensor = Tensor::<_, f32>::from_cuda_slice(&gpu, (2, 2), slice).unwrap();
    let clone = tensor.try_clone(&gpu).unwrap();
    Add { x: clone.view(), y: tensor.view_mut() }.run(&gpu).unwrap();
    let slice = tensor.into_cuda_slice().unwrap();
    assert_eq!((address(&slice), slice.len()), (at, 4));
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), [2.0, 4.0, 6.0, 8.0]);
    let short = stream.alloc_zeros::<f32>(3).unwrap();
    assert!(Tensor::<_, f32>::from_cuda_slice(&gpu, (2, 2), short).is_err(), "shorter than the shape");
}

#[test]
fn gpu_memory_of_another_stream_is_not_borrowed() {
    let Some(gpu) = open::<f32>() else { return };
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let mut slice = stream.alloc_zeros::<f32>(4).unwrap();
    let refused = |error: Error| assert!(matches!(&error, Error::Value { verb: "lend", name: "view", .. }), "{error}");
    refused(gpu.lend(&slice.as_view()).err().expect("refused"));
    refused(gpu.lend_mut(&mut slice.as_view_mut()).err().expect("refused"));
}

/// A stream that can be captured: one of its own, in a context whose events cudarc does not track.
fn capturable() -> Arc<CudaStream> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: the test uses this context only on this one stream.
    unsafe { context.disable_event_tracking() };
    context.new_stream().unwrap()
}

const THREAD_LOCAL: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const AUTO_FREE: sys::CUgraphInstantiate_flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;

/// A captured copy would access the host's memory at each launch, so it is refused; what was captured before stays valid.
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

/// Both passes of a layer, captured once, run on two inputs: the tensor gets new contents between the launches.
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
