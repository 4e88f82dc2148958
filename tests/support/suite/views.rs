//! Operands as views: parts of wider matrices, outputs that are added to, factors in `f32`, copies on the device.

use lowrank::op::*;
use lowrank::random::Rng;
use lowrank::{Backend, Element, Float, MatMut, MatRef, Tensor};

use super::{Got, LinearGot};
use crate::support::bounds::{assert_exact, assert_within};
use crate::support::data::{Dims, down, mask, random, shapes, unwritten, up, whole};
use crate::support::oracle::{Lora, Mat};

/// A matrix inside a larger one: rows and columns around it are NaN, and must stay so.
struct Inside<B: Backend, T: Element = <B as Backend>::Elem> {
    whole: Tensor<B, T>,
    rows: usize,
    cols: usize,
}

/// Rows above and below the matrix, columns on its left and on its right.
const AROUND: [usize; 4] = [1, 2, 3, 2];

impl<B: Backend, T: Float> Inside<B, T> {
    fn new(backend: &B, mat: &Mat) -> Self {
        let ([above, below, left, right], &Mat { rows, cols, .. }) = (AROUND, mat);
        let whole = Mat::new(above + rows + below, left + cols + right, |i, j| {
            let inside = (above..above + rows).contains(&i) && (left..left + cols).contains(&j);
            if inside { mat.at(i - above, j - left) } else { f64::NAN }
        });
        Self { whole: up(backend, &whole), rows, cols }
    }

    /// Full of NaN.
    fn unwritten(backend: &B, rows: usize, cols: usize) -> Self {
        Self::new(backend, &Mat::new(rows, cols, |_, _| f64::NAN))
    }

    fn view(&self) -> MatRef<'_, B, T> {
        let [above, _, left, _] = AROUND;
        let rows = self.whole.view().row_range(above..above + self.rows).unwrap();
        rows.column_range(left..left + self.cols).unwrap()
    }

    fn view_mut(&mut self) -> MatMut<'_, B, T> {
        let [above, _, left, _] = AROUND;
        let rows = self.whole.view_mut().row_range(above..above + self.rows).unwrap();
        rows.column_range(left..left + self.cols).unwrap()
    }

    /// The matrix; nothing around it was written.
    #[track_caller]
    fn down(&self, backend: &B) -> Vec<T> {
        let ([above, _, left, right], all) = (AROUND, down(backend, &self.whole));
        let (width, mut inside) = (left + self.cols + right, Vec::new());
        for (e, number) in all.into_iter().enumerate() {
            let (i, j) = (e / width, e % width);
            if (above..above + self.rows).contains(&i) && (left..left + self.cols).contains(&j) {
                inside.push(number);
            } else {
                assert!(number.to_f32().is_nan(), "row {i}, column {j} of what is around a view was written");
            }
        }
        inside
    }
}

/// The content of outputs before a verb adds to them.
#[derive(Clone, Copy)]
pub struct Before<'a> {
    pub y: &'a Mat,
    pub dx: &'a Mat,
}

/// Runs the forward and the backward pass of a layer. Every operand that may be strided is part of a larger matrix; if there is an initial
/// content, `y` and `dx` are added to it.
pub fn run_strided_lora<B: Backend>(
    backend: &B,
    layer: &Lora,
    dropout: Option<Dropout>,
    with_w: bool,
    before: Option<Before<'_>>,
) -> Got<B::Elem> {
    let (m, k, n, r) = (layer.x.rows, layer.x.cols, layer.w.rows, layer.a.rows);
    let inside = |mat: &Mat| Inside::<B>::new(backend, mat);
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(inside);
    let bias = layer.bias.as_ref().map(inside);
    let (scale, mut h) = (layer.scale as f32, unwritten(backend, m, r));
    let [mut y, mut dx] = match before {
        Some(Before { y, dx }) => [inside(y), inside(dx)],
        None => [(m, n), (m, k)].map(|(rows, cols)| Inside::unwritten(backend, rows, cols)),
    };
    let adds = before.is_some();
    LoraForward {
        x: x.view(),
        w: with_w.then(|| w.view().into()),
        bias: bias.as_ref().map(Inside::view),
        a: a.view().into(),
        b: b.view().into(),
        scale,
        dropout,
        h: h.view_mut(),
        y: output(y.view_mut(), adds),
    }
    .run(backend)
    .unwrap();
    let (mut da, mut db, mut dbias) = (unwritten(backend, r, k), unwritten(backend, n, r), unwritten(backend, 1, n));
    LoraBackward {
        x: x.view(),
        w: with_w.then(|| w.view().into()),
        a: a.view().into(),
        b: b.view().into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: Some(dbias.view_mut()),
        dx: Some(output(dx.view_mut(), adds)),
    }
    .run(backend)
    .unwrap();
    Got {
        h: down(backend, &h),
        y: y.down(backend),
        da: down(backend, &da),
        db: down(backend, &db),
        dbias: down(backend, &dbias),
        dx: dx.down(backend),
    }
}

fn output<B: Backend>(matrix: MatMut<'_, B>, adds: bool) -> Output<'_, B> {
    if adds { Output::AddTo(matrix) } else { Output::Overwrite(matrix) }
}

/// Runs both passes of the base layer with strided operands.
pub fn run_strided_linear<B: Backend>(backend: &B, layer: &Lora, before: Option<Before<'_>>) -> LinearGot<B::Elem> {
    let (m, k, n) = (layer.x.rows, layer.x.cols, layer.w.rows);
    let inside = |mat: &Mat| Inside::<B>::new(backend, mat);
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(inside);
    let bias = layer.bias.as_ref().map(inside);
    let [mut y, mut dx] = match before {
        Some(Before { y, dx }) => [inside(y), inside(dx)],
        None => [(m, n), (m, k)].map(|(rows, cols)| Inside::unwritten(backend, rows, cols)),
    };
    let adds = before.is_some();
    let forward =
        LinearForward { x: x.view(), w: w.view().into(), bias: bias.as_ref().map(Inside::view), y: output(y.view_mut(), adds) };
    forward.run(backend).unwrap();
    let (mut dw, mut dbias) = (unwritten(backend, n, k), unwritten(backend, 1, n));
    LinearBackward {
        x: Some(x.view()),
        w: Some(w.view().into()),
        dy: dy.view(),
        dx: Some(output(dx.view_mut(), adds)),
        dw: Some(dw.view_mut()),
        dbias: Some(dbias.view_mut()),
    }
    .run(backend)
    .unwrap();
    (y.down(backend), dx.down(backend), down(backend, &dw), down(backend, &dbias))
}

#[track_caller]
fn assert_lora_exact<E: Float>(dims: Dims, got: &Got<E>, layer: &Lora, before: Option<Before<'_>>) {
    let want = layer.run();
    let [y, dx] = match before {
        Some(before) => [&want.y + before.y, &want.dx + before.dx],
        None => [want.y, want.dx],
    };
    assert_exact(&format!("{dims:?} h"), &got.h, &want.h);
    assert_exact(&format!("{dims:?} y"), &got.y, &y);
    assert_exact(&format!("{dims:?} da"), &got.da, &want.da);
    assert_exact(&format!("{dims:?} db"), &got.db, &want.db);
    assert_exact(&format!("{dims:?} dbias"), &got.dbias, &want.dbias);
    assert_exact(&format!("{dims:?} dx"), &got.dx, &dx);
}

/// Whole numbers that 16 bits hold, as initial content of outputs.
fn before(dims: Dims, seed: u64) -> [Mat; 2] {
    let mut rng = Rng::new(seed ^ 0xbef0);
    [(dims.m, dims.n), (dims.m, dims.k)]
        .map(|(rows, cols)| Mat::from_vec(rows, cols, (0..rows * cols).map(|_| rng.below(9) as f64 - 4.0).collect()))
}

/// Shapes, each with a dropout: none, or one half, with which whole numbers stay whole.
fn with_and_without_dropout(seed: u64, dims: Dims) -> [(Lora, Option<Dropout>); 2] {
    let (plain, halves) = (whole(dims, seed), Dropout::new(0.5, seed).unwrap());
    let dropped = Lora { mask: mask(halves, dims.m, dims.k), ..plain.clone() };
    [(plain, None), (dropped, Some(halves))]
}

pub fn parts_of_wider_matrices_are_operands<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        for (layer, dropout) in with_and_without_dropout(seed as u64, dims) {
            assert_lora_exact(dims, &run_strided_lora(backend, &layer, dropout, true, None), &layer, None);
        }
        let layer = whole(dims, seed as u64);
        let (y, dx, dw, dbias) = run_strided_linear(backend, &layer, None);
        let bias = layer.bias.as_ref().unwrap();
        assert_exact(&format!("{dims:?} linear y"), &y, &(&layer.x * &layer.w.t()).plus_row(bias));
        assert_exact(&format!("{dims:?} linear dx"), &dx, &(&layer.dy * &layer.w));
        assert_exact(&format!("{dims:?} linear dw"), &dw, &(&layer.dy.t() * &layer.x));
        assert_exact(&format!("{dims:?} linear dbias"), &dbias, &layer.dy.column_sums());
    }
}

pub fn outputs_are_added_to<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let [y, dx] = before(dims, seed as u64);
        let there = Before { y: &y, dx: &dx };
        for (layer, dropout) in with_and_without_dropout(seed as u64, dims) {
            for with_w in [true, false] {
                let zeros = Mat::new(dims.n, dims.k, |_, _| 0.0);
                let layer = Lora { w: if with_w { layer.w.clone() } else { zeros }, ..layer.clone() };
                let got = run_strided_lora(backend, &layer, dropout, with_w, Some(there));
                assert_lora_exact(dims, &got, &layer, Some(there));
            }
        }
        for bias in [None, whole(dims, seed as u64).bias] {
            let layer = Lora { bias, ..whole(dims, seed as u64) };
            let product = &layer.x * &layer.w.t();
            let with_bias = layer.bias.as_ref().map_or(product.clone(), |bias| product.plus_row(bias));
            let got = run_strided_linear(backend, &layer, Some(there));
            assert_exact(&format!("{dims:?} linear y"), &got.0, &(&with_bias + &y));
            assert_exact(&format!("{dims:?} linear dx"), &got.1, &(&(&layer.dy * &layer.w) + &dx));
        }
    }
}

/// An output that is added to is rounded once, so its error has the bound of one that is overwritten.
pub fn added_sums_round_within_bounds<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = random::<B::Elem>(dims, 0.7, seed as u64);
        let other = random::<B::Elem>(dims, 1.0, seed as u64 + 100);
        let there = Before { y: &other.dy, dx: &other.x };
        let got = run_strided_lora(backend, &layer, None, true, Some(there));
        let (want, size) = (layer.run(), layer.magnitudes().run());
        let depth = dims.k + dims.r + 5;
        assert_within(&format!("{dims:?} y"), &got.y, &(&want.y + there.y), &(&size.y + &there.y.abs()), depth);
        let depth = dims.n + dims.r + 6;
        assert_within(&format!("{dims:?} dx"), &got.dx, &(&want.dx + there.dx), &(&size.dx + &there.dx.abs()), depth);
    }
}

/// Merging into a part of a wider weight does not change the rest.
pub fn parts_of_wider_weights_are_merged_into<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let [a, b] = [&layer.a, &layer.b].map(|mat| Inside::<B>::new(backend, mat));
        let mut w = Inside::<B>::new(backend, &layer.w);
        let (scale, rounding) = (layer.scale as f32, Rounding::Nearest);
        LoraMerge { a: a.view().into(), b: b.view().into(), scale, rounding, w: w.view_mut() }.run(backend).unwrap();
        assert_exact(&format!("{dims:?} merged"), &w.down(backend), &layer.merged());

        let (w, mut norm) = (Inside::<B>::new(backend, &layer.w), unwritten(backend, 1, dims.n));
        let norms = LoraRowNorm { w: w.view().into(), a: a.view().into(), b: b.view().into(), scale, norm: norm.view_mut() };
        norms.run(backend).unwrap();
        let (want, size) = (layer.row_norms(), layer.magnitudes().row_norms());
        assert_within(&format!("{dims:?} norms"), &down(backend, &norm), &want, &size, dims.k + 2 * dims.r + 6);
    }
}

/// Runs the layer with `A` and `B` in `f32`, for any element type of the weights, and merges it.
fn run_f32_factors<B: Backend>(backend: &B, layer: &Lora) -> (Got<B::Elem>, Vec<B::Elem>) {
    let (m, k, n, r) = (layer.x.rows, layer.x.cols, layer.w.rows, layer.a.rows);
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up::<B, B::Elem>(backend, mat));
    let [a, b] = [&layer.a, &layer.b].map(|mat| up::<B, f32>(backend, mat));
    let (a, b) = (Factor::F32(a.view()), Factor::F32(b.view()));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (scale, mut h, mut y) = (layer.scale as f32, unwritten(backend, m, r), unwritten(backend, m, n));
    let (bias, dropout) = (bias.as_ref().map(Tensor::view), None);
    LoraForward { x: x.view(), w: Some((&w).into()), bias, a, b, scale, dropout, h: h.view_mut(), y: (&mut y).into() }
        .run(backend)
        .unwrap();
    let (mut da, mut db) = (unwritten(backend, r, k), unwritten(backend, n, r));
    let (mut dbias, mut dx) = (unwritten(backend, 1, n), unwritten(backend, m, k));
    LoraBackward {
        x: x.view(),
        w: Some((&w).into()),
        a,
        b,
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout,
        da: da.view_mut(),
        db: db.view_mut(),
        dbias: Some(dbias.view_mut()),
        dx: Some((&mut dx).into()),
    }
    .run(backend)
    .unwrap();
    let mut merged = up(backend, &layer.w);
    LoraMerge { a, b, scale, rounding: Rounding::Nearest, w: merged.view_mut() }.run(backend).unwrap();
    let got = Got {
        h: down(backend, &h),
        y: down(backend, &y),
        da: down(backend, &da),
        db: down(backend, &db),
        dbias: down(backend, &dbias),
        dx: down(backend, &dx),
    };
    (got, down(backend, &merged))
}

pub fn f32_factors_are_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let (got, merged) = run_f32_factors(backend, &layer);
        assert_lora_exact(dims, &got, &layer, None);
        assert_exact(&format!("{dims:?} merged"), &merged, &layer.merged());
    }
}

/// Factors in `f32` are used without rounding, on the backends that document it; others round them to 16 bits.
pub fn f32_factors_are_not_rounded<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let (narrow, wide) = (random::<B::Elem>(dims, 1.3, seed as u64), random::<f32>(dims, 1.3, seed as u64 + 1));
        let layer = Lora { a: wide.a, b: wide.b, ..narrow };
        let (got, merged) = run_f32_factors(backend, &layer);
        super::assert_lora_within(dims, &got, &layer);
        let size = layer.magnitudes().merged();
        assert_within(&format!("{dims:?} merged"), &merged, &layer.merged(), &size, dims.r + 3);
    }
}

/// Copies keep every bit, for any element type and stride.
pub fn copies_keep_every_bit<B: Backend>(backend: &B) {
    for (rows, cols) in [(0, 3), (3, 0), (1, 1), (3, 5), (17, 33), (64, 64)] {
        let mut rng = Rng::new((rows * 100 + cols) as u64);
        let mat = Mat::from_vec(rows, cols, (0..rows * cols).map(|_| rng.gaussian()).collect());
        copies_of::<B, B::Elem>(backend, &mat);
        copies_of::<B, f32>(backend, &mat);
        let labels: Vec<u32> = (0..rows * cols).map(|e| (e as u32).wrapping_mul(0x9e37_79b9)).collect();
        let tensor = Tensor::from_slice(backend, (rows, cols), &labels).unwrap();
        assert_eq!(down(backend, &tensor.try_clone(backend).unwrap()), labels);
    }
}

fn copies_of<B: Backend, T: Float>(backend: &B, mat: &Mat) {
    let tensor = up::<B, T>(backend, mat);
    let bits = |numbers: Vec<T>| numbers.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
    let want = bits(down(backend, &tensor));
    assert_eq!(bits(down(backend, &tensor.try_clone(backend).unwrap())), want);
    let (from, mut to) = (Inside::<B, T>::new(backend, mat), Inside::<B, T>::unwritten(backend, mat.rows, mat.cols));
    to.view_mut().copy_from(backend, from.view()).unwrap();
    assert_eq!(bits(to.down(backend)), want, "{} rows of {}", mat.rows, mat.cols);
    let mut alone = unwritten::<B, T>(backend, mat.rows, mat.cols);
    alone.view_mut().copy_from(backend, from.view()).unwrap();
    assert_eq!(bits(down(backend, &alone)), want);
    let wrong = Tensor::zeros(backend, (mat.rows + 1, mat.cols)).unwrap();
    assert!(alone.view_mut().copy_from(backend, wrong.view()).is_err(), "another shape");
}

/// Rows without a label change neither the loss of the others nor their gradients.
pub fn rows_without_a_label_do_not_count<B: Backend>(backend: &B) {
    for (m, n) in [(1, 4), (7, 10), (33, 17), (65, 3)] {
        let mut rng = Rng::new((m * n) as u64);
        let number = |x: f64| f64::from(B::Elem::from_f32(x as f32).to_f32());
        let logits = Mat::from_vec(m, n, (0..m * n).map(|_| number(2.0 * rng.gaussian())).collect());
        let labels: Vec<Option<u32>> = (0..m).map(|i| (i % 3 != 1).then(|| rng.below(n) as u32)).collect();
        let counted: Vec<usize> = (0..m).filter(|&i| labels[i].is_some()).collect();
        let kept = Mat::new(counted.len(), n, |i, j| logits.at(counted[i], j));
        let of_kept: Vec<u32> = labels.iter().flatten().copied().collect();

        let run = |logits: &Mat, labels: &Labels<B>| {
            let (mut loss, mut dlogits) = (unwritten(backend, 1, 1), unwritten(backend, logits.rows, logits.cols));
            let logits = up(backend, logits);
            CrossEntropy { logits: logits.view(), labels, loss: loss.view_mut(), dlogits: dlogits.view_mut() }
                .run(backend)
                .unwrap();
            (down(backend, &loss)[0], down(backend, &dlogits))
        };
        let (loss, dlogits) = run(&logits, &Labels::with_ignored(backend, n, &labels).unwrap());
        let (want_loss, want) = run(&kept, &Labels::new(backend, n, &of_kept).unwrap());
        let size = Mat::new(1, 1, |_, _| f64::from(want_loss) + 10.0);
        assert_within("loss", &[loss], &Mat::new(1, 1, |_, _| f64::from(want_loss)), &size, m);
        for (i, row) in dlogits.chunks_exact(n).enumerate() {
            match counted.iter().position(|&kept| kept == i) {
                Some(at) => assert_eq!(*row, want[at * n..][..n], "row {i}"),
                None => assert!(row.iter().all(|d| d.to_f32() == 0.0), "row {i} has no label"),
            }
        }
    }
    let none = Labels::with_ignored(backend, 4, &[None, None]).unwrap();
    let (logits, mut loss, mut dlogits) =
        (Tensor::zeros(backend, (2, 4)).unwrap(), unwritten(backend, 1, 1), unwritten(backend, 2, 4));
    CrossEntropy { logits: logits.view(), labels: &none, loss: loss.view_mut(), dlogits: dlogits.view_mut() }
        .run(backend)
        .unwrap();
    assert_eq!(down::<B, f32>(backend, &loss), [0.0], "a mean over no rows");
    assert!(down::<B, B::Elem>(backend, &dlogits).iter().all(|d| d.to_f32() == 0.0));
}

/// In the backward pass of a base layer, `dx` does not need `x`, and `dW` does not need `W`.
pub fn a_linear_backward_takes_what_it_needs<B: Backend>(backend: &B) {
    let (layer, dims) = (whole(Dims { m: 6, k: 21, n: 18, r: 1 }, 2), (6, 21, 18));
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up::<B, B::Elem>(backend, mat));
    let (mut dx, mut dw) = (unwritten(backend, dims.0, dims.1), unwritten(backend, dims.2, dims.1));
    LinearBackward { x: None, w: Some((&w).into()), dy: dy.view(), dx: Some((&mut dx).into()), dw: None, dbias: None }
        .run(backend)
        .unwrap();
    LinearBackward { x: Some(x.view()), w: None, dy: dy.view(), dx: None, dw: Some(dw.view_mut()), dbias: None }
        .run(backend)
        .unwrap();
    assert_exact("dx", &down(backend, &dx), &(&layer.dy * &layer.w));
    assert_exact("dw", &down(backend, &dw), &(&layer.dy.t() * &layer.x));
    let backward = LinearBackward { x: None, w: None, dy: dy.view(), dx: Some((&mut dx).into()), dw: None, dbias: None };
    assert!(backward.run(backend).unwrap_err().to_string().contains("`w` is missing"));
    let backward =
        LinearBackward { x: None, w: Some((&w).into()), dy: dy.view(), dx: None, dw: Some(dw.view_mut()), dbias: None };
    assert!(backward.run(backend).unwrap_err().to_string().contains("`x` is missing"));
}

/// A lent weight gives the same bits with and without [`Packed`].
pub fn a_lent_weight_may_be_packed<B: Backend>(backend: &B) {
    let layer = random::<B::Elem>(Dims { m: 70, k: 300, n: 65, r: 1 }, 1.0, 4);
    let (x, w) = (up::<B, B::Elem>(backend, &layer.x), Inside::<B>::new(backend, &layer.w));
    let packed = Packed::new(backend, w.view(), lowrank::Passes::ForwardAndBackward).unwrap();
    let [plain, packed] = [Weight::from(w.view()), Weight::from(&packed)].map(|w| {
        let mut y = unwritten::<B, B::Elem>(backend, 70, 65);
        LinearForward { x: x.view(), w, bias: None, y: (&mut y).into() }.run(backend).unwrap();
        down(backend, &y)
    });
    assert_eq!(plain, packed);
}
