//! The shipped kernels on the emulated device: the edges of their tiles, and the launches and copies of each verb.
#![cfg(feature = "cuda")]

mod support;

use lowrank::op::{Dropout, LinearBackward, LinearForward, LoraBackward, LoraForward, LoraMerge, Rounding};
use lowrank::{Cuda, DType, Float, Tensor, bf16, f16};
use support::bounds::{assert_exact, assert_within};
use support::counting::{Asked, Counting};
use support::data::{Dims, down, mask, random, unwritten, up, whole};
use support::emulator::Emulator;
use support::oracle::Lora;
use support::passes::{backward, forward};
use support::suite::lora_is_exact_at;

/// Both sides of every edge of the 128×128 tile, of its depth of 32 or 16 and of its pipeline stages; more rows than the skinny regime has.
fn wide_shapes() -> Vec<Dims> {
    let shapes = [(127, 8, 128, 3), (128, 40, 136, 16), (129, 64, 8, 17), (65, 104, 120, 1), (80, 32, 264, 5), (97, 96, 16, 8)];
    shapes.into_iter().map(|(m, k, n, r)| Dims { m, k, n, r }).collect()
}

fn wide_products_are_exact_on_whole_numbers<E: Float>() {
    let backend = Cuda::<E, _>::on(Emulator::with_one_multiprocessor(E::DTYPE));
    for (seed, dims) in wide_shapes().into_iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let want = layer.run();
        assert_exact(&format!("{dims:?} y"), &forward(&backend, &layer, None).unwrap().1, &want.y);
        assert_exact(&format!("{dims:?} dx"), &backward(&backend, &layer, None).unwrap().3, &want.dx);
    }
    // dW has both operands transposed, and its depth is the batch.
    for (seed, dims) in [(1, 136, 8, 1), (31, 128, 128, 1), (33, 8, 136, 1), (100, 16, 24, 1)].into_iter().enumerate() {
        let (m, k, n, _) = dims;
        let layer = whole(Dims { m, k, n, r: 1 }, seed as u64);
        let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up(&backend, mat));
        let (mut y, mut dw, mut dx) = (unwritten(&backend, m, n), unwritten(&backend, n, k), unwritten(&backend, m, k));
        LinearForward { x: x.view(), w: (&w).into(), bias: None, y: (&mut y).into() }.run(&backend).unwrap();
        let backward = LinearBackward {
            x: Some(x.view()),
            w: Some((&w).into()),
            dy: dy.view(),
            dx: Some((&mut dx).into()),
            dw: Some(dw.view_mut()),
            dbias: None,
        };
        backward.run(&backend).unwrap();
        assert_exact(&format!("{dims:?} y"), &down(&backend, &y), &(&layer.x * &layer.w.t()));
        assert_exact(&format!("{dims:?} dx"), &down(&backend, &dx), &(&layer.dy * &layer.w));
        assert_exact(&format!("{dims:?} dw"), &down(&backend, &dw), &(&layer.dy.t() * &layer.x));
    }
}

/// The results do not depend on which of the kernels a GPU uses.
#[test]
fn tiles_of_64_and_of_128_give_the_same_bits_in_f32() {
    let (wide, small) = (Emulator::with_one_multiprocessor(DType::F32), Emulator::new(DType::F32));
    let [wide, small] = [wide, small].map(Cuda::<f32, _>::on);
    for dims in [Dims { m: 70, k: 68, n: 96, r: 18 }, Dims { m: 127, k: 12, n: 60, r: 3 }] {
        let layer = random::<f32>(dims, 0.7, 3);
        assert_eq!(forward(&wide, &layer, None).unwrap(), forward(&small, &layer, None).unwrap(), "{dims:?}");
        assert_eq!(backward(&wide, &layer, None).unwrap(), backward(&small, &layer, None).unwrap(), "{dims:?}");
    }
}

/// Both sides of every edge of the skinny kernels (16 rows, 32 or 16 columns of y and dx, 16 of h, 256 or 128 of the depth, for dx
/// 128), of where it ends (64 rows, rank 16), of bands (256 columns, 16 rows, rank 16) and of merging (128 rows, 32 to 256 columns, rank 16).
fn skinny_shapes() -> Vec<Dims> {
    let few_rows = [(1, 8, 1, 1), (15, 256, 31, 16), (16, 264, 32, 15), (17, 248, 33, 17), (64, 40, 32, 16), (65, 40, 33, 16)];
    let back = [(1, 24, 120, 16), (15, 32, 128, 3), (17, 40, 136, 17), (64, 8, 264, 1), (65, 40, 8, 16)];
    let bands = [(17, 257, 255, 17), (33, 255, 257, 16), (16, 256, 256, 33), (2, 520, 65, 8), (3, 8, 0, 2), (0, 8, 3, 2)];
    let merges = [(1, 264, 127, 16), (1, 32, 129, 17), (1, 31, 128, 33), (1, 33, 129, 1)];
    let all = [&few_rows[..], &back, &bands, &merges].concat();
    all.into_iter().map(|(m, k, n, r)| Dims { m, k, n, r }).collect()
}

fn skinny_products_are_exact_on_whole_numbers<E: Float>() {
    let backend = Emulator::backend::<E>();
    let halves = Dropout::new(0.5, 7).unwrap(); // keeps whole numbers whole
    for (seed, dims) in skinny_shapes().into_iter().enumerate() {
        lora_is_exact_at(&backend, dims, seed as u64);
        let layer = Lora { mask: mask(halves, dims.m, dims.k), ..whole(dims, seed as u64) };
        let ((h, y), want) = (forward(&backend, &layer, Some(halves)).unwrap(), layer.run());
        assert_exact(&format!("{dims:?} h with dropout"), &h, &want.h);
        assert_exact(&format!("{dims:?} y with dropout"), &y, &want.y);
        let (.., dx) = backward(&backend, &layer, Some(halves)).unwrap();
        assert_exact(&format!("{dims:?} dx with dropout"), &dx, &want.dx);
    }
}

#[test]
fn skinny_products_are_exact_on_whole_numbers_f32() {
    skinny_products_are_exact_on_whole_numbers::<f32>();
}

#[test]
fn skinny_products_are_exact_on_whole_numbers_f16() {
    skinny_products_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn skinny_products_are_exact_on_whole_numbers_bf16() {
    skinny_products_are_exact_on_whole_numbers::<bf16>();
}

/// Enough rows that a block needs several steps for its band.
#[test]
fn many_rows_are_exact_on_whole_numbers() {
    lora_is_exact_at(&Emulator::backend::<bf16>(), Dims { m: 4300, k: 8, n: 8, r: 2 }, 1);
}

/// An update of zeros does not change a bit, because the kernel of `y` adds it last.
#[test]
fn a_fresh_adapter_gives_the_bits_of_the_base_layer() {
    let backend = Emulator::backend::<bf16>();
    for dims in [Dims { m: 3, k: 520, n: 33, r: 16 }, Dims { m: 70, k: 64, n: 33, r: 4 }] {
        let layer = random::<bf16>(dims, 1.0, 2);
        let fresh = Lora { b: layer.b.map(|_| 0.0), ..layer.clone() };
        let [x, w] = [&layer.x, &layer.w].map(|mat| up(&backend, mat));
        let (bias, mut y) = (layer.bias.as_ref().map(|mat| up(&backend, mat)), unwritten(&backend, dims.m, dims.n));
        LinearForward { x: x.view(), w: (&w).into(), bias: bias.as_ref().map(Tensor::view), y: (&mut y).into() }
            .run(&backend)
            .unwrap();
        assert_eq!(down(&backend, &y), forward(&backend, &fresh, None).unwrap().1, "{dims:?}");
    }
}

#[test]
fn wide_products_are_exact_on_whole_numbers_f32() {
    wide_products_are_exact_on_whole_numbers::<f32>();
}

#[test]
fn wide_products_are_exact_on_whole_numbers_f16() {
    wide_products_are_exact_on_whole_numbers::<f16>();
}

#[test]
fn wide_products_are_exact_on_whole_numbers_bf16() {
    wide_products_are_exact_on_whole_numbers::<bf16>();
}

fn products_round_within_bounds_and_drop_what_the_mask_says<E: Float>(shapes: &[Dims]) {
    let backend = Cuda::<E, _>::on(Emulator::with_one_multiprocessor(E::DTYPE));
    for (seed, &dims) in shapes.iter().enumerate() {
        let dropout = Dropout::new(0.3, seed as u64).unwrap();
        let layer = Lora { mask: mask(dropout, dims.m, dims.k), ..random::<E>(dims, 0.7, seed as u64) };
        let (_, y) = forward(&backend, &layer, Some(dropout)).unwrap();
        let (.., dx) = backward(&backend, &layer, Some(dropout)).unwrap();
        let (want, size) = (layer.run(), layer.magnitudes().run());
        assert_within(&format!("{dims:?} y"), &y, &want.y, &size.y, dims.k + dims.r + 4);
        assert_within(&format!("{dims:?} dx"), &dx, &want.dx, &size.dx, dims.n + dims.r + 5);
    }
}

#[test]
fn wide_products_round_within_bounds_and_drop_what_the_mask_says() {
    products_round_within_bounds_and_drop_what_the_mask_says::<f32>(&wide_shapes());
    products_round_within_bounds_and_drop_what_the_mask_says::<bf16>(&wide_shapes());
}

#[test]
fn skinny_products_round_within_bounds_and_drop_what_the_mask_says() {
    let shapes = [Dims { m: 3, k: 264, n: 200, r: 16 }, Dims { m: 33, k: 40, n: 264, r: 17 }];
    products_round_within_bounds_and_drop_what_the_mask_says::<f32>(&shapes);
    products_round_within_bounds_and_drop_what_the_mask_says::<bf16>(&shapes);
}

/// A forward pass is one launch for few rows, else two; merging is one; backward five at most; each but the first may overlap. None of them copies anything, none
/// but backward takes memory: for such shapes less than half of the weight's (parts of `dh` take m·r/(128·k) of it).
#[test]
fn verbs_launch_little_copy_nothing_and_need_no_memory_like_the_weights() {
    for (m, r, dropout, forward_launches) in [(1, 16, false, 1), (16, 17, false, 2), (16, 4, true, 2), (80, 8, false, 2)] {
        let layer = whole(Dims { m, k: 512, n: 520, r }, 1);
        let backend = Cuda::<bf16, _>::on(Counting::new(Emulator::new(DType::BF16)));
        let [x, mut w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(&backend, mat));
        let (mut h, mut y) = (unwritten(&backend, m, r), unwritten(&backend, m, 520));
        let (mut da, mut db): (Tensor<_, f32>, Tensor<_, f32>) = (unwritten(&backend, r, 512), unwritten(&backend, 520, r));
        let (mut dbias, mut dx) = (unwritten(&backend, 1, 520), unwritten(&backend, m, 512));
        let dropout = dropout.then(|| Dropout::new(0.5, 1).unwrap());
        let asked = || backend.on_device().asked();

        asked();
        let (scale, rounding) = (0.5, Rounding::Stochastic { seed: 1 });
        LoraForward {
            x: x.view(),
            w: Some((&w).into()),
            bias: None,
            a: (&a).into(),
            b: (&b).into(),
            scale,
            dropout,
            h: h.view_mut(),
            y: (&mut y).into(),
        }
        .run(&backend)
        .unwrap();
        let Asked { launches, overlapping, copies, scratch, .. } = asked();
        assert_eq!((launches, copies, scratch), (forward_launches, 0, 0), "forward, {m} rows, rank {r}");
        assert_eq!(overlapping, launches - 1, "all but the first");

        let (w_, da_, db_, dbias_, dx_) = (Some(&w), &mut da, &mut db, Some(&mut dbias), Some(&mut dx));
        let (x, a, b, h, dy) = (&x, &a, &b, &h, &dy);
        LoraBackward {
            x: x.view(),
            w: w_.map(Into::into),
            a: a.into(),
            b: b.into(),
            h: h.view(),
            dy: dy.view(),
            scale,
            dropout,
            da: da_.view_mut(),
            db: db_.view_mut(),
            dbias: dbias_.map(Tensor::view_mut),
            dx: dx_.map(Into::into),
        }
        .run(&backend)
        .unwrap();
        let Asked { launches, overlapping, copies, scratch, .. } = asked();
        assert_eq!(overlapping, launches - 1, "all but the first");
        assert!(launches <= 5 && copies == 0, "backward, {m} rows: {launches} launches, {copies} copies");
        assert!(scratch <= 2 * 512 * 520 / 2, "backward, {m} rows, rank {r}: {scratch} bytes");

        LoraMerge { a: a.into(), b: b.into(), scale, rounding, w: w.view_mut() }.run(&backend).unwrap();
        let Asked { launches, overlapping, copies, scratch, .. } = asked();
        assert_eq!((launches, overlapping, copies, scratch), (1, 0, 0, 0), "merge");
    }
}
