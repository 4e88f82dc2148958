//! The suite of all backends. A backend is complete when `suite!(name, make)` compiles and passes.

use lowrank::op::*;
use lowrank::random::Rng;
use lowrank::{Backend, Float, Passes, Tensor};

mod adam;
mod chance;
mod dora;
mod views;

pub use adam::*;
pub use chance::*;
pub use dora::*;
pub use views::*;

use super::bounds::{assert_exact, assert_within};
use super::data::{Dims, down, mask, random, shapes, unwritten, up, whole};
use super::oracle::{self, Lora, LoraOut, Mat};

/// Makes a test of every check, in the module `$name`, on the backend that `$make` opens.
#[macro_export]
macro_rules! suite {
    ($name:ident, $make:expr) => {
        $crate::suite!($name, $make;
            lora_is_exact_on_whole_numbers lora_rounds_within_bounds lora_drops_what_the_mask_says
            lora_without_bias_or_dx_computes_the_rest linear_is_exact_on_whole_numbers linear_rounds_within_bounds
            merged_equals_unmerged unmerging_restores_the_weights scale_zero_is_the_base_layer forward_is_linear_in_x
            relu_and_its_derivative_are_exact add_is_exact cross_entropy_rounds_within_bounds
            cross_entropy_survives_huge_logits adam_follows_the_oracle_for_ten_steps adam_is_exact_on_whole_numbers
            a_master_gives_way_to_the_weight steps_too_small_for_the_element_type_add_up factored_gradients_equal_dense_ones
            update_alone_is_exact_on_whole_numbers
            row_norms_round_within_bounds row_norms_of_an_undone_weight_are_zero magnitude_is_exact_on_whole_numbers
            magnitude_rounds_within_bounds a_norm_of_zero_has_no_direction accumulate_is_exact_on_whole_numbers
            dropout_drops_what_the_mask_says stochastic_merging_takes_the_neighbour_that_the_word_says
            stochastic_merging_keeps_the_mean
            the_same_request_gives_the_same_bits memory_comes_back_as_it_went
            parts_of_wider_matrices_are_operands outputs_are_added_to added_sums_round_within_bounds
            parts_of_wider_weights_are_merged_into f32_factors_are_exact_on_whole_numbers copies_keep_every_bit
            rows_without_a_label_do_not_count a_linear_backward_takes_what_it_needs a_lent_weight_may_be_packed
        );
    };
    ($name:ident, $make:expr; $($check:ident)*) => {
        mod $name {
            $(
                #[test]
                fn $check() {
                    $crate::support::suite::$check(&$make);
                }
            )*
        }
    };
}

/// The outputs of a layer on the device.
#[derive(PartialEq)]
pub struct Got<E> {
    pub h: Vec<f32>,
    pub y: Vec<E>,
    pub da: Vec<f32>,
    pub db: Vec<f32>,
    pub dbias: Vec<f32>,
    pub dx: Vec<E>,
}

impl<E: Float> Got<E> {
    /// The bits of all outputs: -0 differs from 0, and all NaN are equal.
    pub fn bits(&self) -> Vec<u32> {
        let wide = [&self.h, &self.da, &self.db, &self.dbias].into_iter().flatten().map(|x| x.to_bits());
        wide.chain(self.y.iter().chain(&self.dx).map(|x| x.to_f32().to_bits())).collect()
    }
}

/// Runs the forward and the backward pass of a layer.
pub fn run_lora<B: Backend>(backend: &B, layer: &Lora, dropout: Option<Dropout>) -> Got<B::Elem> {
    run_layer(backend, layer, dropout, true, None)
}

/// Runs both passes without dropout and with a prepacked weight.
pub fn run_packed_lora<B: Backend>(backend: &B, layer: &Lora, passes: Passes) -> Got<B::Elem> {
    run_layer(backend, layer, None, true, Some(passes))
}

fn run_layer<B: Backend>(
    backend: &B,
    layer: &Lora,
    dropout: Option<Dropout>,
    with_w: bool,
    packed: Option<Passes>,
) -> Got<B::Elem> {
    let (m, k, n, r) = (layer.x.rows, layer.x.cols, layer.w.rows, layer.a.rows);
    let [x, mut w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    if let Some(passes) = packed {
        backend.keep_packed(&mut w, passes).unwrap();
    }
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let (scale, w) = (layer.scale as f32, with_w.then_some(&w));
    let (mut h, mut y) = (unwritten(backend, m, r), unwritten(backend, m, n));
    let forward = LoraForward {
        x: x.view(),
        w: w.map(Into::into),
        bias: bias.as_ref().map(Tensor::view),
        a: (&a).into(),
        b: (&b).into(),
        scale,
        dropout,
        h: h.view_mut(),
        y: (&mut y).into(),
    };
    forward.run(backend).unwrap();
    let (mut da, mut db) = (unwritten(backend, r, k), unwritten(backend, n, r));
    let (mut dbias, mut dx) = (unwritten(backend, 1, n), unwritten(backend, m, k));
    let (da_, db_, dbias_, dx_) = (&mut da, &mut db, Some(&mut dbias), Some(&mut dx));
    let (x, a, b, dy) = (&x, &a, &b, &dy);
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
        dbias: dbias_.map(Tensor::view_mut),
        dx: dx_.map(Into::into),
    }
    .run(backend)
    .unwrap();
    Got {
        h: down(backend, &h),
        y: down(backend, &y),
        da: down(backend, &da),
        db: down(backend, &db),
        dbias: down(backend, &dbias),
        dx: down(backend, &dx),
    }
}

/// Compares every output with the oracle, with the number of roundings for each.
fn assert_lora_within<E: Float>(dims: Dims, got: &Got<E>, layer: &Lora) {
    let Dims { m, k, n, r } = dims;
    let (want, size): (LoraOut, LoraOut) = (layer.run(), layer.magnitudes().run());
    assert_within(&format!("{dims:?} h"), &got.h, &want.h, &size.h, k + 1);
    assert_within(&format!("{dims:?} y"), &got.y, &want.y, &size.y, k + r + 4);
    assert_within(&format!("{dims:?} da"), &got.da, &want.da, &size.da, m + n + 3);
    assert_within(&format!("{dims:?} db"), &got.db, &want.db, &size.db, m + k + 3);
    assert_within(&format!("{dims:?} dbias"), &got.dbias, &want.dbias, &size.dbias, m);
    assert_within(&format!("{dims:?} dx"), &got.dx, &want.dx, &size.dx, n + r + 5);
}

pub fn lora_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        lora_is_exact_at(backend, dims, seed as u64);
    }
}

/// Checks both passes and merging at one shape.
pub fn lora_is_exact_at<B: Backend>(backend: &B, dims: Dims, seed: u64) {
    let layer = whole(dims, seed);
    let (got, want) = (run_lora(backend, &layer, None), layer.run());
    assert_exact(&format!("{dims:?} h"), &got.h, &want.h);
    assert_exact(&format!("{dims:?} y"), &got.y, &want.y);
    assert_exact(&format!("{dims:?} da"), &got.da, &want.da);
    assert_exact(&format!("{dims:?} db"), &got.db, &want.db);
    assert_exact(&format!("{dims:?} dbias"), &got.dbias, &want.dbias);
    assert_exact(&format!("{dims:?} dx"), &got.dx, &want.dx);

    let (a, b, mut w) = (up(backend, &layer.a), up(backend, &layer.b), up(backend, &layer.w));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: layer.scale as f32, rounding: Rounding::Nearest, w: w.view_mut() }
        .run(backend)
        .unwrap();
    assert_exact(&format!("{dims:?} merged w"), &down(backend, &w), &layer.merged());
}

pub fn lora_rounds_within_bounds<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = random::<B::Elem>(dims, 1.7, seed as u64);
        assert_lora_within(dims, &run_lora(backend, &layer, None), &layer);
    }
}

pub fn lora_drops_what_the_mask_says<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let dropout = Dropout::new(0.25, 0xdead_beef_0000 + seed as u64).unwrap();
        let layer = random::<B::Elem>(dims, 0.5, seed as u64);
        let layer = Lora { mask: mask(dropout, dims.m, dims.k), ..layer };
        assert_lora_within(dims, &run_lora(backend, &layer, Some(dropout)), &layer);
    }
}

pub fn lora_without_bias_or_dx_computes_the_rest<B: Backend>(backend: &B) {
    let dims = Dims { m: 9, k: 21, n: 18, r: 3 };
    let layer = Lora { bias: None, ..whole(dims, 1) };
    let (got, want) = (run_lora(backend, &layer, None), layer.run());
    assert_exact("y", &got.y, &want.y);
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up(backend, mat));
    let h = up(backend, &want.h);
    let (mut da, mut db) = (unwritten(backend, 3, 21), unwritten(backend, 18, 3));
    let (x, w, a, b, h, dy, scale) = (&x, Some(&w), &a, &b, &h, &dy, layer.scale as f32);
    let (da_, db_) = (&mut da, &mut db);
    LoraBackward {
        x: x.view(),
        w: w.map(Into::into),
        a: a.into(),
        b: b.into(),
        h: h.view(),
        dy: dy.view(),
        scale,
        dropout: None,
        da: da_.view_mut(),
        db: db_.view_mut(),
        dbias: None,
        dx: None,
    }
    .run(backend)
    .unwrap();
    assert_exact("da", &down(backend, &da), &want.da);
    assert_exact("db", &down(backend, &db), &want.db);
}

/// Without a weight the outputs are those with a weight of zeros.
pub fn update_alone_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    let halves = Dropout::new(0.5, 3).unwrap(); // keeps whole numbers whole
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = Lora { w: Mat::new(dims.n, dims.k, |_, _| 0.0), ..whole(dims, seed as u64) };
        for dropout in [None, Some(halves)] {
            let ones = layer.mask.clone();
            let layer = Lora { mask: dropout.map_or(ones, |dropout| mask(dropout, dims.m, dims.k)), ..layer.clone() };
            let (got, want) = (run_layer(backend, &layer, dropout, false, None), layer.run());
            assert_exact(&format!("{dims:?} h"), &got.h, &want.h);
            assert_exact(&format!("{dims:?} y"), &got.y, &want.y);
            assert_exact(&format!("{dims:?} da"), &got.da, &want.da);
            assert_exact(&format!("{dims:?} db"), &got.db, &want.db);
            assert_exact(&format!("{dims:?} dx"), &got.dx, &want.dx);
        }
    }
}

/// `y`, `dx`, `dW`, `dbias`
pub type LinearGot<E> = (Vec<E>, Vec<E>, Vec<f32>, Vec<f32>);

/// The base layer on the device.
pub fn run_linear<B: Backend>(backend: &B, layer: &Lora) -> LinearGot<B::Elem> {
    let (m, k, n) = (layer.x.rows, layer.x.cols, layer.w.rows);
    let [x, w, dy] = [&layer.x, &layer.w, &layer.dy].map(|mat| up(backend, mat));
    let bias = layer.bias.as_ref().map(|mat| up(backend, mat));
    let mut y = unwritten(backend, m, n);
    LinearForward { x: x.view(), w: (&w).into(), bias: bias.as_ref().map(Tensor::view), y: (&mut y).into() }
        .run(backend)
        .unwrap();
    let (mut dx, mut dw, mut dbias) = (unwritten(backend, m, k), unwritten(backend, n, k), unwritten(backend, 1, n));
    let backward = LinearBackward {
        x: Some(x.view()),
        w: Some((&w).into()),
        dy: dy.view(),
        dx: Some((&mut dx).into()),
        dw: Some(dw.view_mut()),
        dbias: Some(dbias.view_mut()),
    };
    backward.run(backend).unwrap();
    (down(backend, &y), down(backend, &dx), down(backend, &dw), down(backend, &dbias))
}

/// The base layer in f64.
fn want_linear(layer: &Lora) -> (Mat, Mat, Mat, Mat) {
    let y = &layer.x * &layer.w.t();
    let y = layer.bias.as_ref().map_or(y.clone(), |bias| y.plus_row(bias));
    (y, &layer.dy * &layer.w, &layer.dy.t() * &layer.x, layer.dy.column_sums())
}

pub fn linear_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = whole(dims, seed as u64);
        let (got, want) = (run_linear(backend, &layer), want_linear(&layer));
        assert_exact(&format!("{dims:?} y"), &got.0, &want.0);
        assert_exact(&format!("{dims:?} dx"), &got.1, &want.1);
        assert_exact(&format!("{dims:?} dw"), &got.2, &want.2);
        assert_exact(&format!("{dims:?} dbias"), &got.3, &want.3);
    }
}

pub fn linear_rounds_within_bounds<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        let layer = random::<B::Elem>(dims, 1.0, seed as u64);
        let (got, want, size) = (run_linear(backend, &layer), want_linear(&layer), want_linear(&layer.magnitudes()));
        assert_within(&format!("{dims:?} y"), &got.0, &want.0, &size.0, dims.k + 1);
        assert_within(&format!("{dims:?} dx"), &got.1, &want.1, &size.1, dims.n);
        assert_within(&format!("{dims:?} dw"), &got.2, &want.2, &size.2, dims.m);
        assert_within(&format!("{dims:?} dbias"), &got.3, &want.3, &size.3, dims.m);
    }
}

fn merge<B: Backend>(backend: &B, layer: &Lora, scale: f64, w: &mut Tensor<B>) {
    let (a, b) = (up(backend, &layer.a), up(backend, &layer.b));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: scale as f32, rounding: Rounding::Nearest, w: w.view_mut() }
        .run(backend)
        .unwrap();
}

pub fn merged_equals_unmerged<B: Backend>(backend: &B) {
    for dims in [Dims { m: 5, k: 40, n: 33, r: 3 }, Dims { m: 40, k: 70, n: 65, r: 16 }] {
        let layer = random::<B::Elem>(dims, 2.5, 3);
        let mut w = up(backend, &layer.w);
        merge(backend, &layer, layer.scale, &mut w);
        let (x, bias) = (up(backend, &layer.x), layer.bias.as_ref().map(|mat| up(backend, mat)));
        let mut y = unwritten(backend, dims.m, dims.n);
        LinearForward { x: x.view(), w: (&w).into(), bias: bias.as_ref().map(Tensor::view), y: (&mut y).into() }
            .run(backend)
            .unwrap();
        // The merged weights are rounded to the element type, once.
        let rounded = (B::Elem::DTYPE.unit_roundoff() * 2f64.powi(24)) as usize;
        let (want, size) = (layer.run().y, layer.magnitudes().run().y);
        assert_within(&format!("{dims:?} y"), &down(backend, &y), &want, &size, dims.k + dims.r + 4 + rounded);
    }
}

pub fn unmerging_restores_the_weights<B: Backend>(backend: &B) {
    let dims = Dims { m: 1, k: 50, n: 35, r: 4 };
    let layer = random::<B::Elem>(dims, 0.75, 5);
    let mut w = up(backend, &layer.w);
    merge(backend, &layer, layer.scale, &mut w);
    merge(backend, &layer, -layer.scale, &mut w);
    let rounded = (B::Elem::DTYPE.unit_roundoff() * 2f64.powi(25)) as usize;
    let size = layer.magnitudes().merged();
    assert_within("unmerged w", &down(backend, &w), &layer.w, &size, 2 * dims.r + 4 + rounded);
}

pub fn scale_zero_is_the_base_layer<B: Backend>(backend: &B) {
    let layer = Lora { scale: 0.0, ..whole(Dims { m: 18, k: 33, n: 47, r: 4 }, 11) };
    let got = run_lora(backend, &layer, None);
    assert_exact("y", &got.y, &want_linear(&layer).0);
    assert!(got.da.iter().chain(&got.db).all(|&g| g == 0.0));
    let mut w = up(backend, &layer.w);
    merge(backend, &layer, 0.0, &mut w);
    assert_exact("w", &down(backend, &w), &layer.w);
}

pub fn forward_is_linear_in_x<B: Backend>(backend: &B) {
    let dims = Dims { m: 6, k: 19, n: 21, r: 2 };
    let (one, two) = (Lora { bias: None, ..whole(dims, 1) }, whole(dims, 2));
    let sum = Lora { x: &one.x + &two.x, ..one.clone() };
    let two = Lora { x: two.x, ..one.clone() };
    let y = |layer: &Lora| run_lora(backend, layer, None).h;
    let added: Vec<f32> = y(&one).iter().zip(y(&two)).map(|(a, b)| a + b).collect();
    assert_eq!(y(&sum), added);
}

pub fn relu_and_its_derivative_are_exact<B: Backend>(backend: &B) {
    for (rows, cols) in [(0, 3), (1, 1), (3, 17), (64, 65), (10, 2000)] {
        let mut rng = Rng::new(9);
        let mut number = |_, _| f64::from(B::Elem::from_f32(rng.gaussian() as f32).to_f32());
        let mut mat = || Mat::from_vec(rows, cols, (0..rows * cols).map(|_| number(0, 0)).collect());
        let (x, dy) = (mat(), mat());
        let (mut y, mut dx) = (unwritten(backend, rows, cols), unwritten(backend, rows, cols));
        Relu { x: (up(backend, &x)).view(), y: y.view_mut() }.run(backend).unwrap();
        ReluBackward { y: y.view(), dy: (up(backend, &dy)).view(), dx: dx.view_mut() }.run(backend).unwrap();
        assert_exact("y", &down(backend, &y), &x.map(|x| x.max(0.0)));
        assert_exact("dx", &down(backend, &dx), &dy.times(&x.map(|x| if x > 0.0 { 1.0 } else { 0.0 })));
    }
    let nan = Tensor::from_slice(backend, (1, 1), &[B::Elem::from_f32(f32::NAN)]).unwrap();
    let mut y = Tensor::zeros(backend, (1, 1)).unwrap();
    Relu { x: nan.view(), y: y.view_mut() }.run(backend).unwrap();
    assert!(down(backend, &y)[0].to_f32().is_nan(), "relu hides a NaN");
}

pub fn add_is_exact<B: Backend>(backend: &B) {
    for (rows, cols) in [(0, 3), (3, 17), (65, 64), (10, 2000)] {
        let x = Mat::new(rows, cols, |i, j| (i * 7 + j) as f64 % 60.0);
        let mut y = up(backend, &x.map(|x| 100.0 - x));
        Add { x: (up(backend, &x)).view(), y: y.view_mut() }.run(backend).unwrap();
        assert_exact("y", &down(backend, &y), &x.map(|_| 100.0));
    }
}

fn run_cross_entropy<B: Backend>(backend: &B, logits: &Mat, labels: &[u32]) -> (f32, Vec<B::Elem>) {
    let on_device = Labels::new(backend, logits.cols, labels).unwrap();
    let (mut loss, mut dlogits) = (unwritten(backend, 1, 1), unwritten(backend, logits.rows, logits.cols));
    let logits = up(backend, logits);
    CrossEntropy { logits: logits.view(), labels: &on_device, loss: loss.view_mut(), dlogits: dlogits.view_mut() }
        .run(backend)
        .unwrap();
    (down(backend, &loss)[0], down(backend, &dlogits))
}

pub fn cross_entropy_rounds_within_bounds<B: Backend>(backend: &B) {
    for (m, n) in [(1, 1), (1, 10), (10, 10), (33, 17), (100, 3), (7, 300)] {
        let mut rng = Rng::new((m * n) as u64);
        let number = |x: f64| f64::from(B::Elem::from_f32(x as f32).to_f32());
        let logits = Mat::from_vec(m, n, (0..m * n).map(|_| number(2.0 * rng.gaussian())).collect());
        let labels: Vec<u32> = (0..m).map(|_| rng.below(n) as u32).collect();
        let (loss, dlogits) = run_cross_entropy(backend, &logits, &labels);
        let (want_loss, want) = oracle::cross_entropy(&logits, &labels);
        // Sums of n exponentials of bounded arguments; exp and ln of a device are accurate to a few units in the last place.
        let size = Mat::new(1, 1, |_, _| want_loss + 10.0);
        assert_within(&format!("{m}×{n} loss"), &[loss], &Mat::new(1, 1, |_, _| want_loss), &size, m + n + 16);
        assert_within(&format!("{m}×{n} dlogits"), &dlogits, &want, &want.map(|_| 2.0 / m as f64), n + 64);
    }
    assert_eq!(run_cross_entropy(backend, &Mat::new(0, 10, |_, _| 0.0), &[]).0, 0.0, "no rows");
}

pub fn cross_entropy_survives_huge_logits<B: Backend>(backend: &B) {
    let (loss, dlogits) = run_cross_entropy(backend, &Mat::new(1, 3, |_, j| [60000.0, -60000.0, 0.0][j]), &[0]);
    assert_eq!(loss, 0.0);
    assert!(dlogits.iter().all(|d| d.to_f32() == 0.0));
}

pub fn the_same_request_gives_the_same_bits<B: Backend>(backend: &B) {
    for dims in [Dims { m: 10, k: 500, n: 130, r: 4 }, Dims { m: 70, k: 450, n: 90, r: 8 }] {
        let layer = random::<B::Elem>(dims, 1.3, 8);
        let (one, two) = (run_lora(backend, &layer, None), run_lora(backend, &layer, None));
        assert!(one == two, "{dims:?}");
    }
}

pub fn memory_comes_back_as_it_went<B: Backend>(backend: &B) {
    for len in [0, 1, 3, 1000, 70_001] {
        let host: Vec<B::Elem> = (0..len).map(|i| B::Elem::from_f32((i % 251) as f32)).collect();
        let mut tensor = Tensor::from_slice(backend, (1, len), &host).unwrap();
        assert_eq!(down(backend, &tensor), host);
        tensor.copy_from_slice(backend, &host.iter().rev().copied().collect::<Vec<_>>()).unwrap();
        assert!(down(backend, &tensor).iter().eq(host.iter().rev()));
        assert_eq!(down(backend, &Tensor::<B, u32>::zeros(backend, (len, 1)).unwrap()), vec![0; len]);
    }
    backend.synchronize().unwrap();
    assert!(!backend.device().is_empty());
}
