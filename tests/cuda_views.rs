//! Operands as views on the emulated device: which kernels take them, what they cost, and seeded bugs in their strides.
#![cfg(feature = "cuda")]

mod support;

use lowrank::op::*;
use lowrank::{Backend, Cuda, DType, Error, Float, MatMut, MatRef, Tensor, bf16, f16};
use support::bounds::assert_exact;
use support::counting::{Asked, Counting};
use support::data::{Dims, down, unwritten, up, whole};
use support::emulator::Emulator;
use support::mutants::replaced;
use support::oracle::{Lora, Mat};

/// Extra columns on the left and on the right of an operand in a wider matrix.
type Around = [usize; 2];
/// Rows are aligned to 16 bytes if those of a contiguous operand would be.
const ALIGNED: Around = [8, 16];
/// Rows are not aligned.
const ASKEW: Around = [3, 2];

/// An operand in a wider matrix, which is filled with NaN outside the operand, and must stay so.
struct Part<B: Backend> {
    wide: Tensor<B>,
    around: Around,
    cols: usize,
}

impl<B: Backend> Part<B> {
    fn new(backend: &B, mat: &Mat, around: Around) -> Self {
        let ([left, right], cols) = (around, mat.cols);
        let inside = left..left + cols;
        let number = |i, j| if inside.contains(&j) { mat.at(i, j - left) } else { f64::NAN };
        Self { wide: up(backend, &Mat::new(mat.rows, left + cols + right, number)), around, cols }
    }

    fn view(&self) -> MatRef<'_, B> {
        self.wide.view().column_range(self.around[0]..self.around[0] + self.cols).unwrap()
    }

    fn view_mut(&mut self) -> MatMut<'_, B> {
        self.wide.view_mut().column_range(self.around[0]..self.around[0] + self.cols).unwrap()
    }

    /// True if it has these elements, and nothing outside was written.
    fn is(&self, backend: &B, want: &Mat) -> bool {
        let ([left, _], width) = (self.around, self.wide.cols());
        let right = |(e, number): (usize, &B::Elem)| match (e % width).checked_sub(left).filter(|&j| j < self.cols) {
            Some(j) => *number == B::Elem::from_f32(want.at(e / width, j) as f32),
            None => number.to_f32().is_nan(),
        };
        down(backend, &self.wide).iter().enumerate().all(right)
    }
}

fn is<T: Float>(got: &[T], want: &Mat) -> bool {
    got.iter().zip(&want.data).all(|(got, want)| *got == T::from_f32(*want as f32))
}

/// Runs every verb that takes strided operands, with each operand in a wider matrix; true if all results are right. With `adds`, `y` and
/// `dx` are added to.
fn verbs_are_right<B: Backend>(backend: &B, dims: Dims, around: Around, adds: bool) -> Result<bool, Error> {
    let (layer, Dims { m, k, n, r }) = (whole(dims, 1), dims);
    let (want, scale) = (layer.run(), layer.scale as f32);
    let part = |mat: &Mat| Part::new(backend, mat, around);
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(part);
    let bias = layer.bias.as_ref().map(part);
    let before = |rows, cols| Mat::new(rows, cols, |i, j| if adds { (i * 3 + j) as f64 % 7.0 - 3.0 } else { f64::NAN });
    let [y_before, dx_before] = [before(m, n), before(m, k)];
    let after = |want: &Mat, before: &Mat| if adds { want + before } else { want.clone() };
    let (mut y, mut dx, mut h) = (part(&y_before), part(&dx_before), unwritten(backend, m, r));
    let output = |matrix| if adds { Output::AddTo(matrix) } else { Output::Overwrite(matrix) };
    LoraForward {
        x: x.view(),
        w: Some(w.view().into()),
        bias: bias.as_ref().map(Part::view),
        a: a.view().into(),
        b: b.view().into(),
        scale,
        dropout: None,
        h: h.view_mut(),
        y: output(y.view_mut()),
    }
    .run(backend)?;
    let (mut da, mut db, mut dbias) = (unwritten(backend, r, k), unwritten(backend, n, r), unwritten(backend, 1, n));
    LoraBackward {
        x: x.view(),
        w: Some(w.view().into()),
        a: a.view().into(),
        b: b.view().into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout: None,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: Some(dbias.view_mut()),
        dx: Some(output(dx.view_mut())),
    }
    .run(backend)?;
    let (mut dw, mut dbias_alone) = (unwritten(backend, n, k), unwritten(backend, 1, n));
    LinearBackward {
        x: Some(x.view()),
        w: None,
        dy: dy.view(),
        dx: None,
        dw: Some(dw.view_mut()),
        dbias: Some(dbias_alone.view_mut()),
    }
    .run(backend)?;
    let mut norm = unwritten(backend, 1, n);
    LoraRowNorm { w: w.view().into(), a: a.view().into(), b: b.view().into(), scale, norm: norm.view_mut() }.run(backend)?;
    let mut merged = part(&layer.w);
    let rounding = Rounding::Nearest;
    LoraMerge { a: a.view().into(), b: b.view().into(), scale, rounding, w: merged.view_mut() }.run(backend)?;
    let near = |(got, want): (&f32, &f64)| (f64::from(*got) - want).abs() <= 1e-5 * want;
    let f32s = |tensor: &Tensor<B, f32>| down(backend, tensor);
    Ok(is(&f32s(&h), &want.h)
        && y.is(backend, &after(&want.y, &y_before))
        && is(&f32s(&da), &want.da)
        && is(&f32s(&db), &want.db)
        && is(&f32s(&dbias), &want.dbias)
        && is(&f32s(&dbias_alone), &want.dbias)
        && dx.is(backend, &after(&want.dx, &dx_before))
        && is(&f32s(&dw), &(&layer.dy.t() * &layer.x))
        && f32s(&norm).iter().zip(&layer.row_norms().data).all(near)
        && merged.is(backend, &layer.merged()))
}

/// Few rows with a rank for which the kernel of `y` also computes `h`, and with a larger one; many rows.
const SKINNY: [Dims; 2] = [Dims { m: 5, k: 64, n: 40, r: 8 }, Dims { m: 18, k: 72, n: 40, r: 24 }];
const WIDE: Dims = Dims { m: 70, k: 40, n: 72, r: 8 };
const SMALL: Dims = Dims { m: 19, k: 21, n: 18, r: 3 };

fn strided_operands_are_exact<E: Float>() {
    let small = || Cuda::<E, _>::on(Emulator::with_one_multiprocessor(E::DTYPE));
    for dims in [SKINNY[0], SKINNY[1], WIDE, SMALL] {
        for (around, adds) in [(ALIGNED, false), (ALIGNED, true), (ASKEW, false), (ASKEW, true), ([0, 8], false)] {
            assert!(verbs_are_right(&small(), dims, around, adds).unwrap(), "{dims:?}, {around:?} around, adds: {adds}");
        }
    }
    if E::DTYPE != DType::F32 {
        let hopper = Emulator::hopper_backend::<E>();
        for dims in [WIDE, Dims { m: 130, k: 136, n: 264, r: 17 }] {
            for (around, adds) in [(ALIGNED, false), (ALIGNED, true), (ASKEW, false)] {
                assert!(verbs_are_right(&hopper, dims, around, adds).unwrap(), "{dims:?}, {around:?} around, adds: {adds}");
            }
        }
    }
}

#[test]
fn strided_operands_are_exact_f32() {
    strided_operands_are_exact::<f32>();
}

#[test]
fn strided_operands_are_exact_f16() {
    strided_operands_are_exact::<f16>();
}

#[test]
fn strided_operands_are_exact_bf16() {
    strided_operands_are_exact::<bf16>();
}

/// The counts of `verbs_are_right` on a device.
fn asked<E: Float>(emulator: Emulator, dims: Dims, around: Around, adds: bool) -> Asked {
    let backend = Cuda::<E, _>::on(Counting::new(emulator));
    assert!(verbs_are_right(&backend, dims, around, adds).unwrap());
    backend.on_device().asked()
}

/// Strided operands with rows aligned to 16 bytes use the same kernels as contiguous ones; others use the kernels for any shape.
#[test]
fn aligned_parts_are_taken_by_the_same_kernels_and_others_by_those_for_any_shape() {
    let small: fn() -> Emulator = || Emulator::with_one_multiprocessor(DType::BF16);
    let hopper: fn() -> Emulator = || Emulator::hopper(DType::BF16);
    for (emulator, dims) in [(small, SKINNY[0]), (small, SKINNY[1]), (small, WIDE), (hopper, WIDE)] {
        let kernels = |around, adds| asked::<bf16>(emulator(), dims, around, adds).kernels;
        let alone = kernels([0, 0], false);
        assert!(alone.iter().any(|kernel| kernel.contains("hopper") || kernel.contains("wide")), "{alone:?}");
        assert_eq!(kernels(ALIGNED, false), alone, "{dims:?}");
        let special = |kernel: &&str| ["hopper", "wide", "skinny"].iter().any(|name| kernel.contains(name));
        let askew = kernels(ASKEW, false);
        assert!(!askew.iter().any(special), "{askew:?}");
        // TMA stores cannot accumulate, so another kernel is used.
        let adds = kernels(ALIGNED, true);
        assert!(!adds.iter().any(|kernel| kernel.contains("hopper")), "{adds:?}");
    }
    let kernels = asked::<f32>(Emulator::with_one_multiprocessor(DType::F32), SKINNY[0], ALIGNED, false).kernels;
    assert!(kernels.contains(&"lora_forward_h_skinny") && kernels.contains(&"lora_merge_wide"), "{kernels:?}");
}

/// Operands are read and outputs written in place: nothing else is allocated or copied.
#[test]
fn views_of_memory_that_is_lent_cost_no_copy_and_no_memory() {
    let backend = Cuda::<bf16, _>::on(Counting::new(Emulator::new(DType::BF16)));
    let asked = || backend.on_device().asked();
    let layer = Lora { bias: None, ..whole(Dims { m: 3, k: 64, n: 40, r: 8 }, 3) };
    let host = |mat: &Mat| mat.data.iter().map(|&x| bf16::from_f32(x as f32)).collect::<Vec<_>>();
    // Memory of another owner; x begins at an odd element, and y is the middle of a wider row.
    let mine = backend.upload(&[vec![bf16::ZERO], host(&layer.x)].concat()).unwrap();
    let mut out = backend.upload(&[bf16::NAN; 3 * 60]).unwrap();
    let w = up(&backend, &layer.w);
    let x = || MatRef::<Cuda<bf16, Counting>>::strided(&mine, (3, 64), 1, 64).unwrap();
    asked();
    let y = MatMut::strided(&mut out, (3, 40), 10, 60).unwrap();
    LinearForward { x: x(), w: (&w).into(), bias: None, y: y.into() }.run(&backend).unwrap();
    let Asked { kernels, copies, scratch, .. } = asked();
    assert_eq!((kernels, copies, scratch), (vec!["lora_forward_y"], 0, 0));

    let want = &layer.x * &layer.w.t();
    let mut host = vec![bf16::ZERO; 3 * 60];
    backend.download(&out, &mut host).unwrap();
    for (e, got) in host.iter().enumerate() {
        let (i, j) = (e / 60, e % 60);
        match j.checked_sub(10).filter(|&j| j < 40) {
            Some(j) => assert_eq!(*got, bf16::from_f32(want.at(i, j) as f32), "row {i}, column {j}"),
            None => assert!(got.is_nan(), "row {i}, beside y"),
        }
    }
}

#[test]
fn copies_stay_on_the_device() {
    let backend = Cuda::<f16, _>::on(Counting::new(Emulator::new(DType::F16)));
    let mat = Mat::new(5, 24, |i, j| (i * 24 + j) as f64);
    let tensor: Tensor<_, f16> = up(&backend, &mat);
    let asked = || backend.on_device().asked();
    asked();
    let clone = tensor.try_clone(&backend).unwrap();
    let Asked { kernels, copies, scratch, .. } = asked();
    assert_eq!((kernels, copies, scratch), (vec!["copy_wide"], 0, 2 * 5 * 24));
    assert_exact("clone", &down(&backend, &clone), &mat);
    for (around, kernel) in [(ALIGNED, "copy_wide"), (ASKEW, "copy")] {
        let mut to = Part::new(&backend, &mat.map(|_| f64::NAN), around);
        asked();
        to.view_mut().copy_from(&backend, tensor.view()).unwrap();
        let Asked { kernels, copies, scratch, .. } = asked();
        assert_eq!((kernels, copies, scratch), (vec![kernel], 0, 0));
        assert!(to.is(&backend, &mat), "{around:?}");
    }
}

/// With 16-bit weights, a factor in f32 is rounded for products, into scratch memory of its size; merging uses it without rounding.
#[test]
fn factors_in_f32_are_rounded_for_products_and_merged_as_they_are() {
    let backend = Cuda::<bf16, _>::on(Counting::new(Emulator::new(DType::BF16)));
    let (dims, asked) = (Dims { m: 3, k: 64, n: 40, r: 8 }, || backend.on_device().asked());
    let layer = whole(dims, 5);
    let third = |mat: &Mat| mat.map(|x| f64::from(x as f32 / 3.0));
    let layer = Lora { a: third(&layer.a), b: third(&layer.b), ..layer };
    let rounded = |mat: &Mat| mat.map(|x| f64::from(bf16::from_f32(x as f32).to_f32()));
    let [a, b] = [&layer.a, &layer.b].map(|mat| up::<_, f32>(&backend, mat));
    let [a16, b16] = [&layer.a, &layer.b].map(|mat| up::<_, bf16>(&backend, &rounded(mat)));
    let [x, w] = [&layer.x, &layer.w].map(|mat| up::<_, bf16>(&backend, mat));
    let forward = |a: Factor<'_, Cuda<bf16, Counting>>, b: Factor<'_, Cuda<bf16, Counting>>| {
        let (mut h, mut y) = (unwritten(&backend, 3, 8), unwritten::<_, bf16>(&backend, 3, 40));
        asked();
        let (w, scale, dropout) = (Some((&w).into()), 0.5, None);
        LoraForward { x: x.view(), w, bias: None, a, b, scale, dropout, h: h.view_mut(), y: (&mut y).into() }
            .run(&backend)
            .unwrap();
        (asked(), down(&backend, &h), down(&backend, &y))
    };
    let (Asked { kernels, copies, scratch, .. }, h, y) = forward(Factor::F32(a.view()), Factor::F32(b.view()));
    assert_eq!(kernels, ["round_factor", "round_factor", "lora_forward_y_skinny"]);
    assert_eq!((copies, scratch), (0, 2 * (8 * 64 + 40 * 8)));
    let (_, want_h, want_y) = forward((&a16).into(), (&b16).into());
    assert_eq!((h, y), (want_h, want_y), "the bits of factors that were rounded before");

    let mut merged = up::<_, bf16>(&backend, &layer.w.map(|_| 0.0));
    asked();
    let rounding = Rounding::Nearest;
    LoraMerge { a: Factor::F32(a.view()), b: Factor::F32(b.view()), scale: 1.0, rounding, w: merged.view_mut() }
        .run(&backend)
        .unwrap();
    let Asked { kernels, scratch, .. } = asked();
    assert_eq!((kernels, scratch), (vec!["lora_merge"], 0));
    let (product, size) = (&layer.b * &layer.a, &layer.b.abs() * &layer.a.abs());
    support::bounds::assert_within("merged", &down(&backend, &merged), &product, &size, dims.r + 2);
}

/// The strides among the parameters of a kernel, each with the width that might be used by mistake.
type Strides = &'static [(u32, u32)];
const STRIDES: [(&str, Strides); 17] = [
    ("linear_backward_dbias", &[(4, 3)]),
    ("linear_backward_dw", &[(6, 4), (7, 5)]),
    ("linear_backward_dw_wide", &[(6, 4), (7, 5)]),
    ("lora_backward_da", &[(11, 8)]),
    ("lora_backward_dx", &[(13, 10), (14, 10), (15, 11), (16, 10)]),
    ("lora_backward_dx_skinny", &[(13, 10), (14, 10), (15, 11), (16, 10)]),
    ("lora_backward_dx_wide", &[(13, 10), (14, 10), (15, 11), (16, 10)]),
    ("lora_backward_dy", &[(11, 9), (12, 8)]),
    ("lora_forward_h", &[(10, 8), (11, 8)]),
    ("lora_forward_h_skinny", &[(10, 8), (11, 8)]),
    ("lora_forward_y", &[(11, 8), (12, 8), (13, 10), (14, 9)]),
    ("lora_forward_y_skinny", &[(12, 9), (13, 9), (15, 11), (16, 10)]),
    ("lora_forward_y_wide", &[(11, 8), (12, 8), (13, 10), (14, 9)]),
    ("lora_merge", &[(10, 8), (11, 9), (12, 8)]),
    ("lora_merge_wide", &[(10, 8), (11, 9), (12, 8)]),
    ("lora_row_norm", &[(8, 6), (9, 6), (10, 7)]),
    // A is read here only if h is computed too, in 16 bits.
    ("lora_forward_y_skinny", &[(14, 9)]),
];

/// True if a mutant of a kernel gives a wrong result, or faults, for one of the shapes of the kernel.
fn is_noticed<E: Float>(kernel: &str, ptx: &str) -> bool {
    let backend = Cuda::<E, _>::on(Emulator::with_ptx(E::DTYPE, ptx));
    let cases = match kernel {
        _ if kernel.ends_with("_skinny") => &[(SKINNY[0], ALIGNED), (SKINNY[1], ALIGNED)][..],
        _ if kernel.ends_with("_wide") => &[(WIDE, ALIGNED)],
        _ => &[(SMALL, ASKEW)],
    };
    cases.iter().any(|&(dims, around)| !matches!(verbs_are_right(&backend, dims, around, false), Ok(true)))
}

fn every_stride_is_needed<E: Float>() {
    for kernel in ["_skinny", "_wide", ""] {
        assert!(!is_noticed::<E>(kernel, lowrank::cuda::ptx(E::DTYPE)), "what ships is right");
    }
    for (kernel, strides) in STRIDES {
        if E::DTYPE == DType::F32 && strides == [(14, 9)] {
            continue;
        }
        for (stride, width) in strides {
            let param = |i: &u32| format!("[{kernel}_{}_param_{i}]", E::DTYPE);
            let mutant = replaced(E::DTYPE, kernel, &param(stride), &param(width));
            let mutant = mutant.unwrap_or_else(|| panic!("{kernel} does not read parameter {stride}"));
            assert!(is_noticed::<E>(kernel, &mutant), "{kernel}: nobody misses the stride that is parameter {stride}");
        }
    }
}

#[test]
fn every_stride_is_needed_and_missed_f32() {
    every_stride_is_needed::<f32>();
}

#[test]
fn every_stride_is_needed_and_missed_bf16() {
    every_stride_is_needed::<bf16>();
}
