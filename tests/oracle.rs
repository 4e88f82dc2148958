//! Checks the oracle itself: its derivatives against finite differences.

mod support;

use support::data::{Dims, random};
use support::oracle::{Decomposed, Lora, Mat, cross_entropy};

/// Half the width of the difference; in f64 about ten digits remain.
const STEP: f64 = 1e-5;

/// `∂f/∂mat[e]` by a central difference.
fn difference(mat: &Mat, e: usize, f: impl Fn(&Mat) -> f64) -> f64 {
    let moved = |by: f64| {
        let mut moved = mat.clone();
        moved.data[e] += by;
        f(&moved)
    };
    (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
}

#[track_caller]
fn assert_gradient(what: &str, mat: &Mat, gradient: &Mat, f: impl Fn(&Mat) -> f64) {
    for e in 0..mat.data.len() {
        let want = difference(mat, e, &f);
        assert!((gradient.data[e] - want).abs() < 1e-7 * (1.0 + want.abs()), "{what}[{e}] is {}, want {want}", gradient.data[e]);
    }
}

#[test]
fn the_gradients_of_a_low_rank_layer_are_those_of_its_formula() {
    let dims = Dims { m: 3, k: 5, n: 4, r: 2 };
    let mask = Mat::new(3, 5, |i, j| if (i + j) % 3 == 0 { 0.0 } else { 1.5 });
    let layer = Lora { mask, ..random::<f32>(dims, 1.7, 1) };
    // A loss whose gradient with respect to y is dy.
    let loss = |layer: &Lora| layer.forward().1.times(&layer.dy).sum();
    let out = layer.run();
    assert_gradient("dx", &layer.x, &out.dx, |x| loss(&Lora { x: x.clone(), ..layer.clone() }));
    assert_gradient("da", &layer.a, &out.da, |a| loss(&Lora { a: a.clone(), ..layer.clone() }));
    assert_gradient("db", &layer.b, &out.db, |b| loss(&Lora { b: b.clone(), ..layer.clone() }));
    let bias = layer.bias.clone().unwrap();
    assert_gradient("dbias", &bias, &out.dbias, |bias| loss(&Lora { bias: Some(bias.clone()), ..layer.clone() }));
}

#[test]
fn the_gradients_of_a_decomposed_layer_are_those_of_its_formula() {
    let layer = random::<f32>(Dims { m: 4, k: 5, n: 5, r: 1 }, 1.0, 4);
    let Lora { x: z, dy, bias, .. } = layer;
    let dy = Mat::new(4, 5, |i, j| dy.at(i, j));
    let (magnitude, norm) = (Mat::new(1, 5, |_, j| 0.5 + j as f64), Mat::new(1, 5, |_, j| 3.0 / (1.0 + j as f64)));
    let layer = Decomposed { z, magnitude, norm, bias, dy };
    let loss = |layer: &Decomposed| layer.forward().times(&layer.dy).sum();
    let (dz, dmagnitude, dbias) = layer.backward();
    assert_gradient("dz", &layer.z, &dz, |z| loss(&Decomposed { z: z.clone(), ..layer.clone() }));
    let moved = |magnitude: &Mat| Decomposed { magnitude: magnitude.clone(), ..layer.clone() };
    assert_gradient("dmagnitude", &layer.magnitude, &dmagnitude, |magnitude| loss(&moved(magnitude)));
    let moved = |bias: &Mat| Decomposed { bias: Some(bias.clone()), ..layer.clone() };
    assert_gradient("dbias", layer.bias.as_ref().unwrap(), &dbias, |bias| loss(&moved(bias)));
}

/// The norm in expanded form: `‖W‖² + 2s·B·(A·Wᵀ) + s²·B·(A·Aᵀ)·Bᵀ`.
#[test]
fn the_row_norm_is_that_of_its_expansion() {
    let Lora { w, a, b, scale, .. } = &random::<f32>(Dims { m: 1, k: 7, n: 4, r: 3 }, -0.7, 5);
    let (cross, gram) = (&(b * &(a * &w.t())), &(&(b * &(a * &a.t())) * &b.t()));
    let want = Mat::new(1, 4, |_, i| {
        let square: f64 = (0..7).map(|j| w.at(i, j).powi(2)).sum();
        (square + 2.0 * scale * cross.at(i, i) + scale * scale * gram.at(i, i)).sqrt()
    });
    let got = random::<f32>(Dims { m: 1, k: 7, n: 4, r: 3 }, -0.7, 5).row_norms();
    assert!(got.data.iter().zip(&want.data).all(|(got, want)| (got - want).abs() < 1e-12));
}

#[test]
fn the_gradient_of_cross_entropy_is_that_of_its_formula() {
    let logits = random::<f32>(Dims { m: 4, k: 6, n: 1, r: 1 }, 1.0, 2).x;
    let labels = [0, 5, 2, 2];
    assert_gradient("dlogits", &logits, &cross_entropy(&logits, &labels).1, |logits| cross_entropy(logits, &labels).0);
}

/// A merged adapter gives the same outputs as one that is not merged.
#[test]
fn merging_is_the_same_function() {
    let layer = random::<f32>(Dims { m: 3, k: 5, n: 4, r: 2 }, -0.7, 3);
    let merged = &layer.x * &layer.merged().t();
    let want = Lora { bias: None, ..layer }.forward().1;
    assert!(merged.data.iter().zip(&want.data).all(|(got, want)| (got - want).abs() < 1e-12));
}
