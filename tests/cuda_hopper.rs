//! The shipped kernels for Hopper on the emulated device: every edge of their tiles, and seeded bugs that must be detected.
#![cfg(feature = "cuda")]

mod support;

use std::collections::BTreeSet;

use lowrank::op::{Dropout, LinearBackward, LinearForward, LoraBackward, LoraForward};
use lowrank::{Backend, Cuda, Error, Float, Tensor, bf16, cuda, f16};
use support::bounds::{assert_exact, assert_within};
use support::data::{Dims, down, mask, random, unwritten, up, whole};
use support::emulator::{Emulator, open};
use support::oracle::Lora;

/// Both sides of the edges of tiles of 128 rows and of 128 or 256 columns, of stages 64 deep and of rings of them, of chunks of
/// 16 ranks; more chunks than steps; more tiles than multiprocessors; more rows than a band. The last four have wide tiles in one
/// of the passes, the last but one with a block of a cluster that lies outside.
const SHAPES: [Dims; 11] = [
    Dims { m: 65, k: 8, n: 8, r: 1 },
    Dims { m: 127, k: 56, n: 136, r: 17 },
    Dims { m: 128, k: 64, n: 128, r: 16 },
    Dims { m: 129, k: 72, n: 120, r: 15 },
    Dims { m: 257, k: 136, n: 8, r: 33 },
    Dims { m: 65, k: 392, n: 24, r: 3 },
    Dims { m: 66, k: 128, n: 1032, r: 2 },
    Dims { m: 250, k: 136, n: 776, r: 5 },
    Dims { m: 250, k: 776, n: 136, r: 20 },
    Dims { m: 390, k: 72, n: 504, r: 3 },
    Dims { m: 2100, k: 8, n: 512, r: 1 },
];

/// `y` of a layer.
fn forward<B: Backend>(backend: &B, layer: &Lora) -> Result<Vec<B::Elem>, Error> {
    let [x, w, a, b] = [&layer.x, &layer.w, &layer.a, &layer.b].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (mut h, mut y) = (unwritten(backend, x.rows(), a.rows()), unwritten(backend, x.rows(), w.rows()));
    let (x, w, bias, a, b, scale) = (&x, Some(&w), bias.as_ref(), &a, &b, layer.scale as f32);
    LoraForward {
        x: x.view(),
        w: w.map(Into::into),
        bias: bias.map(Tensor::view),
        a: a.into(),
        b: b.into(),
        scale,
        dropout: None,
        h: h.view_mut(),
        y: (&mut y).into(),
    }
    .run(backend)?;
    Ok(down(backend, &y))
}

/// `dx` of a layer.
fn backward<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Result<Vec<B::Elem>, Error> {
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let h: Tensor<B, f32> = unwritten(backend, x.rows(), a.rows());
    let (mut da, mut db) = (unwritten(backend, a.rows(), x.cols()), unwritten(backend, w.rows(), a.rows()));
    let mut dx = unwritten(backend, x.rows(), x.cols());
    let (x, w, a, b, h, dy, scale) = (&x, Some(&w), &a, &b, &h, &dy, layer.scale as f32);
    LoraBackward {
        x: x.view(),
        w: w.map(Into::into),
        a: a.into(),
        b: b.into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: None,
        dx: Some((&mut dx).into()),
    }
    .run(backend)?;
    Ok(down(backend, &dx))
}

/// `y` of the base layer.
fn base_forward<B: Backend>(backend: &B, layer: &Lora) -> Result<Vec<B::Elem>, Error> {
    let [x, w] = [&layer.x, &layer.w].map(|mat| up(backend, mat));
    let mut y = unwritten(backend, x.rows(), w.rows());
    LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(backend)?;
    Ok(down(backend, &y))
}

/// `dx` of the base layer.
fn base_backward<B: Backend>(backend: &B, layer: &Lora) -> Result<Vec<B::Elem>, Error> {
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up(backend, mat));
    let mut dx = unwritten(backend, x.rows(), x.cols());
    LinearBackward { x: Some(x.view()), w: Some((&w).into()), dy: dy.view(), dx: Some((&mut dx).into()), dw: None, dbias: None }
        .run(backend)?;
    Ok(down(backend, &dx))
}

/// Shapes that have wide tiles on a GPU with 132 multiprocessors, in one of the passes.
const LARGE_SHAPES: [Dims; 2] = [Dims { m: 2048, k: 136, n: 4096, r: 16 }, Dims { m: 2048, k: 4096, n: 136, r: 20 }];

fn products_are_exact_on_whole_numbers<B: Backend>(backend: &B, shapes: &[Dims]) {
    for (seed, &dims) in shapes.iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let want = layer.run();
        assert_exact(&format!("{dims:?} y"), &forward(backend, &layer).unwrap(), &want.y);
        assert_exact(&format!("{dims:?} dx"), &backward(backend, &layer, None).unwrap(), &want.dx);
    }
}

/// The base layer has the same kernels at rank 0: one shape with narrow tiles, and one with wide ones in each pass.
fn base_products_are_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for dims in [SHAPES[1], SHAPES[7], SHAPES[8]] {
        let layer = whole(dims, 1);
        let (y, dx) = (base_forward(backend, &layer).unwrap(), base_backward(backend, &layer).unwrap());
        assert_exact(&format!("{dims:?} base y"), &y, &(&layer.x * &layer.w.t()));
        assert_exact(&format!("{dims:?} base dx"), &dx, &(&layer.dy * &layer.w));
    }
}

#[test]
fn products_are_exact_on_whole_numbers_f16() {
    products_are_exact_on_whole_numbers(&Emulator::hopper_backend::<f16>(), &SHAPES);
    base_products_are_exact_on_whole_numbers(&Emulator::hopper_backend::<f16>());
}

#[test]
fn products_are_exact_on_whole_numbers_bf16() {
    products_are_exact_on_whole_numbers(&Emulator::hopper_backend::<bf16>(), &SHAPES);
    base_products_are_exact_on_whole_numbers(&Emulator::hopper_backend::<bf16>());
}

/// Also if `h` overflows f16, because the tensor cores get it as two parts in tf32.
fn products_round_within_bounds_and_drop_what_the_mask_says<B: Backend>(backend: &B) {
    for (seed, dims) in [1, 3, 7, 8].map(|shape| (shape, SHAPES[shape])) {
        for (scale, dropout) in [(0.7, Some(Dropout::new(0.3, seed as u64).unwrap())), (3e-5, None)] {
            let layer = random::<B::Elem>(dims, scale, seed as u64);
            let ones = layer.mask.clone();
            let mut layer = Lora { mask: dropout.map_or(ones, |dropout| mask(dropout, dims.m, dims.k)), ..layer };
            if dropout.is_none() {
                layer.a.data.iter_mut().for_each(|a| *a *= 8192.0);
            }
            let (want, size) = (layer.run(), layer.magnitudes().run());
            let dx = backward(backend, &layer, dropout).unwrap();
            assert_within(&format!("{dims:?} dx"), &dx, &want.dx, &size.dx, dims.n + dims.r + 5);
            if dropout.is_none() {
                let y = forward(backend, &layer).unwrap();
                assert_within(&format!("{dims:?} y"), &y, &want.y, &size.y, dims.k + dims.r + 4);
            }
        }
    }
}

#[test]
fn products_round_within_bounds_and_drop_what_the_mask_says_f16() {
    products_round_within_bounds_and_drop_what_the_mask_says(&Emulator::hopper_backend::<f16>());
}

#[test]
fn products_round_within_bounds_and_drop_what_the_mask_says_bf16() {
    products_round_within_bounds_and_drop_what_the_mask_says(&Emulator::hopper_backend::<bf16>());
}

/// The same check on a GPU, if there is one; these kernels are used only on Hopper.
fn gpu_products_are_right<E: Float>() {
    let Some(gpu) = open::<E>() else { return };
    products_are_exact_on_whole_numbers(&gpu, &[&SHAPES[..], &LARGE_SHAPES].concat());
    base_products_are_exact_on_whole_numbers(&gpu);
    products_round_within_bounds_and_drop_what_the_mask_says(&gpu);
}

#[test]
fn gpu_products_are_right_f16() {
    gpu_products_are_right::<f16>();
}

#[test]
fn gpu_products_are_right_bf16() {
    gpu_products_are_right::<bf16>();
}

/// Without W, or if rows are not multiples of 16 bytes, other kernels are used.
#[test]
fn unsupported_shapes_use_other_kernels() {
    support::suite::update_alone_is_exact_on_whole_numbers(&Emulator::hopper_backend::<bf16>());
}

/// The text of the kernel in the shipped PTX, and the text before all kernels.
fn kernel(name: &str) -> [&'static str; 2] {
    let ptx = cuda::hopper_ptx(lowrank::DType::BF16).unwrap();
    let start = ptx.find(&format!(".visible .entry {name}_bf16(")).unwrap();
    let end = start + ptx[start..].find("\n}\n").unwrap() + 3;
    [&ptx[..ptx.find(".visible").unwrap()], &ptx[start..end]]
}

/// One mutant of the kernel for each statement that starts with `opcode`.
fn mutants(name: &str, opcode: &str, change: impl Fn(&str) -> String) -> Vec<String> {
    let [head, text] = kernel(name);
    let places: Vec<_> = text.match_indices(opcode).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "{name} has no `{opcode}`");
    let mutant = |at: usize| {
        let end = at + text[at..].find(';').unwrap() + 1;
        [head, &text[..at], &change(&text[at..end]), &text[end..]].concat()
    };
    places.into_iter().map(mutant).collect()
}

/// The product that a kernel computes.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    Base,
}

/// The outcome of a mutant of that kernel: `None` if it was not detected.
fn verdict(ptx: &str, pass: Pass, name: &str) -> Option<String> {
    // Two tiles in sequence for the only cluster, with one step more than there are stages and more than one chunk. A single multiprocessor
    // gets narrow tiles, which have two more stages.
    let (cols, depth, multiprocessors) = if name.ends_with("_128") { (136, 264, 1) } else { (504, 136, 2) };
    let (k, n) = if pass == Pass::Backward { (cols, depth) } else { (depth, cols) };
    let dims = Dims { m: if multiprocessors == 1 { 100 } else { 130 }, k, n, r: 17 };
    let backend = Cuda::<bf16, _>::on(Emulator::with_hopper_ptx(lowrank::DType::BF16, ptx, multiprocessors));
    let layer = whole(dims, 1);
    let (got, want) = match pass {
        Pass::Forward => (forward(&backend, &layer), layer.run().y),
        Pass::Backward => (backward(&backend, &layer, None), layer.run().dx),
        Pass::Base => (base_forward(&backend, &layer), &layer.x * &layer.w.t()),
    };
    match got {
        Ok(got) if got.iter().zip(&want.data).all(|(got, want)| *got == bf16::from_f32(*want as f32)) => None,
        Ok(_) => Some("wrong result".into()),
        Err(Error::Device { reason, .. }) => Some(reason),
        Err(error) => panic!("{error}"),
    }
}

const FORWARD: (Pass, &str) = (Pass::Forward, "lora_forward_y_hopper_256");
const BACKWARD: (Pass, &str) = (Pass::Backward, "lora_backward_dx_hopper_256");
const FORWARD_128: (Pass, &str) = (Pass::Forward, "lora_forward_y_hopper_128");
const BACKWARD_128: (Pass, &str) = (Pass::Backward, "lora_backward_dx_hopper_128");
/// The kernels whose statements are mutated.
const KERNELS: [(Pass, &str); 4] = [FORWARD, BACKWARD, FORWARD_128, BACKWARD_128];

/// Waits for products. A missing last one is detected only at rank 0, because with an update the wait for its last chunk is enough. So
/// only these mutants also run without an update.
const WAIT_FOR_PRODUCTS: &str = "wgmma.wait_group";

/// Asserts that every mutant of both passes and both widths is detected, for one of these `reasons`.
fn assert_caught(opcode: &str, reasons: &[&str], change: impl Fn(&str) -> String) {
    for (pass, name) in KERNELS {
        if opcode.contains("cluster") && !kernel(name)[1].contains(opcode) {
            continue; // narrow tiles do not use clusters
        }
        for (nth, mutant) in mutants(name, opcode, &change).iter().enumerate() {
            let also_at_rank_0 = opcode == WAIT_FOR_PRODUCTS && pass == Pass::Forward;
            let at_rank_0 = || also_at_rank_0.then(|| verdict(mutant, Pass::Base, name)).flatten();
            let verdict = verdict(mutant, pass, name).or_else(at_rank_0);
            let named = verdict.as_ref().is_some_and(|verdict| reasons.iter().any(|reason| verdict.contains(reason)));
            assert!(named, "{name}: `{opcode}` {nth} changed: {verdict:?}");
        }
    }
}

#[test]
fn the_kernel_that_mutants_are_made_of_is_right() {
    for (pass, name) in KERNELS.into_iter().chain([(Pass::Base, FORWARD.1), (Pass::Base, FORWARD_128.1)]) {
        assert_eq!(verdict(&kernel(name).concat(), pass, name), None, "{name}");
    }
}

#[test]
fn every_arrival_is_needed_and_missed() {
    let removed = |_: &str| String::new();
    assert_caught("mbarrier.arrive.release.cluster", &["waits for ever at the mbarrier"], removed);
    assert_caught("mbarrier.arrive.shared::cta.b64", &["waits for ever at the mbarrier"], removed);
}

#[test]
fn every_wait_is_needed_and_missed() {
    // No wait at all; and a wait for the previous phase.
    let noticed = ["race", "nothing wrote", "asynchronous copy", "more arrivals", "waits for ever", "wrong result", "was read"];
    assert_caught("mbarrier.try_wait", &noticed, |_| "setp.eq.u32 p, 0, 0;".into());
    assert_caught("mbarrier.try_wait", &noticed, |wait| {
        let (head, parity) = wait.trim_end_matches(';').rsplit_once(", ").unwrap();
        format!(".reg .b32 other; xor.b32 other, {parity}, 1; {head}, other;")
    });
}

#[test]
fn every_syncwarp_is_needed_and_missed() {
    assert_caught("bar.sync", &["race", "nothing wrote", "was made by", "was not made"], |_| String::new());
    assert_caught("barrier.cluster.arrive", &["waits for ever"], |_| String::new());
    assert_caught("cp.async.bulk.wait_group", &["race", "wrong result", "returns before"], |_| String::new());
    let early = |wait: &str| wait.replace(" 1;", " 2;").replace(" 0;", " 1;");
    let noticed = ["race", "asynchronous copy", "touched before", "wrong result", "no wgmma.fence"];
    assert_caught(WAIT_FOR_PRODUCTS, &noticed, early);
}

/// Waits for the previous launch, which may still be writing h or dh.
#[test]
fn every_wait_for_a_launch_is_needed_and_missed() {
    assert_caught("griddepcontrol.wait", &["too early"], |_| String::new());
}

#[test]
fn every_fence_is_needed_and_missed() {
    let removed = |_: &str| String::new();
    assert_caught("wgmma.fence", &["no wgmma.fence"], removed);
    assert_caught("fence.proxy.async", &["no proxy fence"], removed);
    assert_caught("fence.mbarrier_init", &["no proxy fence"], removed);
}

/// The constants of descriptors, next to the address.
fn descriptors(text: &str) -> BTreeSet<u64> {
    let constants =
        text.lines().filter(|line| line.contains("or.b64")).filter_map(|line| line.trim_end_matches(';').rsplit_once(", "));
    let bits = constants.filter_map(|(_, constant)| constant.parse::<i64>().ok()).map(|constant| constant as u64);
    bits.filter(|bits| bits >> 62 != 0).collect()
}

#[test]
fn wrong_layouts_give_wrong_results() {
    let noticed = ["wrong result", "race", "nothing wrote", "asynchronous copy", "outside", "no proxy fence"];
    for (pass, name) in KERNELS {
        let [head, text] = kernel(name);
        for right in descriptors(text) {
            let (leap, stride) = (right >> 16 & 0x3fff, right >> 32 & 0x3fff);
            // Half and double strides; a leading offset that is one atom too short, if there is one; the other swizzle.
            let strides = [stride / 2, stride * 2].map(|wrong| right ^ (stride ^ wrong) << 32);
            let leap = (leap > 0).then(|| right ^ (leap ^ (leap - 64)) << 16);
            for wrong in strides.into_iter().chain(leap).chain([right ^ 3 << 62]) {
                let changed = text.replace(&(right as i64).to_string(), &(wrong as i64).to_string());
                let verdict = verdict(&[head, &changed].concat(), pass, name);
                let named = verdict.as_ref().is_some_and(|verdict| noticed.iter().any(|reason| verdict.contains(reason)));
                assert!(named, "{name}: {wrong:#x} for {right:#x}: {verdict:?}");
            }
        }
    }
}
