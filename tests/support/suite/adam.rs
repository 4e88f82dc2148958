//! Adam and AdamW, with a master copy of the weight and without.

use lowrank::op::{Adam, AdamRate, WeightGrad};
use lowrank::random::Rng;
use lowrank::{Backend, DType, Float, Tensor};

use super::super::bounds::{assert_exact, assert_within};
use super::super::data::{Dims, down, up, whole};
use super::super::oracle::{self, Mat};
use super::want_linear;

/// All combinations of a weight decay and the presence of a master.
const WAYS: [(f32, bool); 4] = [(0.0, false), (0.0, true), (0.25, false), (0.25, true)];

fn widened<T: Float>(stored: &[T], rows: usize, cols: usize) -> Mat {
    Mat::from_vec(rows, cols, stored.iter().map(|x| f64::from(x.to_f32())).collect())
}

pub fn adam_follows_the_oracle_for_ten_steps<B: Backend>(backend: &B) {
    for (weight_decay, with_master) in WAYS {
        let (n, k) = (13, 37);
        let mut rng = Rng::new(3);
        let mut mat = || Mat::from_vec(n, k, (0..n * k).map(|_| f64::from(rng.gaussian() as f32)).collect());
        let w_start = mat().map(|x| f64::from(B::Elem::from_f32(x as f32).to_f32()));
        let zeros = || Tensor::zeros(backend, (n, k)).unwrap();
        let (mut w, mut m, mut v, mut master) = (up(backend, &w_start), zeros(), zeros(), with_master.then(zeros));
        let zeros = Mat::new(n, k, |_, _| 0.0);
        let (mut want_w, mut want_m, mut want_v) = (w_start, zeros.clone(), zeros);
        let step_limit = 2.0; // |m̂ / √v̂| of ten Gaussian gradients
        for t in 1..=10 {
            let (g, before) = (mat(), want_w.clone());
            let rate = AdamRate::adamw(1e-2, 0.9, 0.999, 1e-8, weight_decay, t).unwrap();
            let grad = WeightGrad::Dense(&up(backend, &g));
            Adam { grad, rate, m: &mut m, v: &mut v, master: master.as_mut(), w: &mut w }.run(backend).unwrap();
            let rate = [0.01f32, 0.9, 0.999, 1e-8, weight_decay].map(f64::from);
            (want_m, want_v, want_w) = oracle::adam(&g, &want_m, &want_v, &want_w, rate, t as i32);
            // The weight, or its master, is rounded at every step; the oracle continues from the rounded value.
            let (stored, dtype) = match &master {
                Some(master) => (down(backend, master), DType::F32),
                None => (down(backend, &w).iter().map(|w| w.to_f32()).collect(), B::Elem::DTYPE),
            };
            for ((got, want), before) in stored.iter().zip(&want_w.data).zip(&before.data) {
                // Both the factor of the weight decay and the product with it are rounded.
                let decayed = if weight_decay > 0.0 { 2.0 * 2f64.powi(-24) * before.abs() } else { 0.0 };
                let bound = 0.01 * step_limit * 40.0 * 2f64.powi(-24) + decayed;
                let bound = bound + dtype.unit_roundoff() * (want.abs() + 1e-2) * 1.01;
                let off = (f64::from(*got) - want).abs();
                assert!(off <= bound, "{weight_decay}, {with_master}, step {t}: w is {got:?}, want {want} ± {bound:e}");
            }
            want_w = widened(&stored, n, k);
            assert_exact(&format!("step {t} w"), &down(backend, &w), &want_w);
            assert_within(&format!("step {t} m"), &down(backend, &m), &want_m, &want_m.map(|_| 4.0), 4 * t as usize);
            assert_within(&format!("step {t} v"), &down(backend, &v), &want_v, &want_v.map(|_| 1.0), 4 * t as usize);
        }
    }
}

pub fn adam_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (seed, (m, k, n)) in [(10, 37, 19), (70, 5, 66), (3, 4, 260), (0, 5, 6), (4, 0, 3)].into_iter().enumerate() {
        adam_is_exact_at(backend, Dims { m, k, n, r: 1 }, seed as u64);
    }
}

/// Sums are exact: the scalars are powers of two, or one minus a power of two, and eps is so large that the square root does not matter.
pub fn adam_is_exact_at<B: Backend>(backend: &B, dims: Dims, seed: u64) {
    let (lr, eps, decay, t) = (2f32.powi(37), 2f32.powi(40), 2f32.powi(-40), 1000); // 1 - lr·decay is 7/8
    let (Dims { k, n, .. }, layer) = (dims, whole(dims, seed));
    let (g, dy, x) = (want_linear(&layer).2, up(backend, &layer.dy), up(backend, &layer.x));
    let (first, second, w) = (layer.w.map(|w| w / 8.0), layer.w.abs(), &layer.w);
    // A master that rounds to the weight, except for a few elements.
    let near = Mat::new(n, k, |i, j| {
        let part = if (i + j) % 2 == 0 { 2f64.powi(-13) } else { -2f64.powi(-13) };
        w.at(i, j) * (1.0 + part) + if (i + j) % 5 == 3 { 1.0 } else { 0.0 }
    });
    let masters = [None, Some(Mat::new(n, k, |_, _| 0.0)), Some(near)];
    for (master, weight_decay) in masters.iter().flat_map(|master| [(master, 0.0), (master, decay)]) {
        let before = master.as_ref().map_or(w.clone(), |master| oracle::master_or_weight::<B::Elem>(master, w));
        let want_m = (&first + &g).map(|x| x / 2.0);
        let want_v = (&second + &g.times(&g)).map(|x| x / 2.0);
        let factor = if weight_decay > 0.0 { 0.875 } else { 1.0 };
        let want_w = Mat::new(n, k, |i, j| factor * before.at(i, j) - want_m.at(i, j) / 8.0);
        let dense = up(backend, &g);
        for grad in [WeightGrad::Dense(&dense), WeightGrad::Factored { dy: &dy, x: &x }] {
            let (mut m, mut v, mut w) = (up(backend, &first), up(backend, &second), up(backend, w));
            let mut stored = master.as_ref().map(|master| up(backend, master));
            let rate = AdamRate::adamw(lr, 0.5, 0.5, eps, weight_decay, t).unwrap();
            Adam { grad, rate, m: &mut m, v: &mut v, master: stored.as_mut(), w: &mut w }.run(backend).unwrap();
            assert_exact("m", &down(backend, &m), &want_m);
            assert_exact("v", &down(backend, &v), &want_v);
            assert_exact("w", &down(backend, &w), &want_w);
            if let Some(master) = stored {
                assert_exact("master", &down(backend, &master), &want_w);
            }
        }
    }
}

/// Where the weight is not the rounded master, the step starts from the weight, element by element, also for NaN and infinities.
pub fn a_master_gives_way_to_the_weight<B: Backend>(backend: &B) {
    let host = |numbers: &[f32]| -> Vec<B::Elem> { numbers.iter().map(|&x| B::Elem::from_f32(x)).collect() };
    let tensor = |numbers: &[f32]| Tensor::from_slice(backend, (1, 5), numbers).unwrap();
    let (g, mut m, mut v) = (tensor(&[0.0; 5]), tensor(&[0.0; 5]), tensor(&[0.0; 5]));
    let (dy, x) = (Tensor::zeros(backend, (0, 1)).unwrap(), Tensor::zeros(backend, (0, 5)).unwrap());
    let (mut w, mut master) = (Tensor::zeros(backend, (1, 5)).unwrap(), tensor(&[0.0; 5]));
    let rate = AdamRate::new(0.5, 0.5, 0.5, 1.0, 1).unwrap();
    let nan = f32::NAN;
    for written in [[1.0, 2.0, 0.0, -3.0, 8.0], [5.0, 2.0, -1.0, nan, 0.0], [f32::INFINITY, 2.5, 4.0, 1.0, nan]] {
        for grad in [WeightGrad::Dense(&g), WeightGrad::Factored { dy: &dy, x: &x }] {
            master.copy_from_slice(backend, &[5.0, -2.0, 0.5, 1.0, 8.0]).unwrap();
            w.copy_from_slice(backend, &host(&written)).unwrap();
            Adam { grad, rate, m: &mut m, v: &mut v, master: Some(&mut master), w: &mut w }.run(backend).unwrap();
            for got in [down(backend, &w).iter().map(|x| x.to_f32()).collect(), down(backend, &master)] {
                let same = got.iter().zip(&written).all(|(got, want)| got == want || got.is_nan() && want.is_nan());
                assert!(same, "{got:?}, want {written:?}");
            }
        }
    }
}

/// A relative step of 2⁻¹³ is lost in f16 and bf16; on the master, thirty-two of them sum to 2⁻⁸.
pub fn steps_too_small_for_the_element_type_add_up<B: Backend>(backend: &B) {
    let (n, k) = (3, 7);
    let ones = |x: f64| Mat::new(n, k, |_, _| x);
    let rate = AdamRate::new(2f32.powi(27), 0.0, 0.0, 2f32.powi(40), 1).unwrap(); // eps is so large that the square root does not matter
    let (g, mut m, mut v, mut w) =
        (up(backend, &ones(1.0)), up(backend, &ones(0.0)), up(backend, &ones(0.0)), up(backend, &ones(1.0)));
    let mut master = up(backend, &ones(0.0));
    for step in 1..=32 {
        let grad = WeightGrad::Dense(&g);
        Adam { grad, rate, m: &mut m, v: &mut v, master: Some(&mut master), w: &mut w }.run(backend).unwrap();
        let want = ones(1.0 - f64::from(step) * 2f64.powi(-13));
        assert_exact("master", &down(backend, &master), &want);
        assert_exact("w", &down(backend, &w), &want);
    }
    let mut alone: Tensor<B> = up(backend, &ones(1.0));
    for _ in 0..32 {
        Adam { grad: WeightGrad::Dense(&g), rate, m: &mut m, v: &mut v, master: None, w: &mut alone }.run(backend).unwrap();
    }
    let lost = down(backend, &alone).iter().all(|&x| x.to_f32() == 1.0);
    assert_eq!(lost, B::Elem::DTYPE != DType::F32, "so this shows something");
}

pub fn factored_gradients_equal_dense_ones<B: Backend>(backend: &B) {
    for (dims, (weight_decay, with_master)) in [
        Dims { m: 10, k: 37, n: 19, r: 1 },
        Dims { m: 1, k: 64, n: 3, r: 1 },
        Dims { m: 70, k: 5, n: 66, r: 1 },
        Dims { m: 0, k: 5, n: 6, r: 1 },
    ]
    .into_iter()
    .flat_map(|dims| WAYS.map(|way| (dims, way)))
    {
        let layer = whole(dims, 4);
        let Dims { k, n, .. } = dims;
        let (dense, dy, x) = (up(backend, &want_linear(&layer).2), up(backend, &layer.dy), up(backend, &layer.x));
        let run = |grad: WeightGrad<'_, B>| {
            let (mut m, mut v) = (up(backend, &layer.w.map(|w| w / 8.0)), up(backend, &layer.w.abs()));
            let (mut w, mut master) = (up(backend, &layer.w), with_master.then(|| up(backend, &layer.w)));
            let rate = AdamRate::adamw(0.125, 0.5, 0.5, 1e-3, weight_decay, 3).unwrap();
            Adam { grad, rate, m: &mut m, v: &mut v, master: master.as_mut(), w: &mut w }.run(backend).unwrap();
            assert_eq!((w.rows(), w.cols()), (n, k));
            (down(backend, &m), down(backend, &v), master.map(|master| down(backend, &master)), down(backend, &w))
        };
        assert_eq!(run(WeightGrad::Dense(&dense)), run(WeightGrad::Factored { dy: &dy, x: &x }), "{dims:?}");
    }
}
