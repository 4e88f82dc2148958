//! The suite's checks of DoRA: row norms, and scaling by magnitudes.

use lowrank::Backend;
use lowrank::op::*;
use lowrank::random::Rng;

use super::super::bounds::{assert_exact, assert_within};
use super::super::data::{Dims, down, random, shapes, unwritten, up, whole};
use super::super::oracle::{Decomposed, Lora, Mat};

fn row_norms<B: Backend>(backend: &B, layer: &Lora) -> Vec<f32> {
    let [w, a, b] = [&layer.w, &layer.a, &layer.b].map(|mat| up(backend, mat));
    let mut norm = unwritten(backend, 1, layer.w.rows);
    LoraRowNorm { w: (&w).into(), a: (&a).into(), b: (&b).into(), scale: layer.scale as f32, norm: norm.view_mut() }
        .run(backend)
        .unwrap();
    down(backend, &norm)
}

/// Each element has an error of at most `(r + 3)·u` of its magnitude, which changes the norm by at most the norm of these errors; the sum of
/// k squares and the root add `(k/2 + 3)·u`.
pub fn row_norms_round_within_bounds<B: Backend>(backend: &B) {
    for (seed, dims) in shapes().into_iter().enumerate() {
        for layer in [random::<B::Elem>(dims, 1.7, seed as u64), whole(dims, seed as u64)] {
            let (want, size) = (layer.row_norms(), layer.magnitudes().row_norms());
            assert_within(&format!("{dims:?} norm"), &row_norms(backend, &layer), &want, &size, dims.r + dims.k / 2 + 4);
        }
    }
}

/// `W = -scale·B·A`: the merged weight is exactly zero, without cancellation errors.
pub fn row_norms_of_an_undone_weight_are_zero<B: Backend>(backend: &B) {
    for dims in [Dims { m: 1, k: 70, n: 37, r: 5 }, Dims { m: 1, k: 33, n: 65, r: 16 }] {
        let layer = whole(dims, 1);
        let signs = |mat: &Mat| mat.map(|x| if x == 0.0 { 0.0 } else { x.signum() });
        let layer = Lora { a: signs(&layer.a), b: signs(&layer.b), ..layer };
        let undone = Lora { w: Mat::new(dims.n, dims.k, |_, _| 0.0), ..layer.clone() }.merged().map(|x| -x);
        assert_eq!(row_norms(backend, &Lora { w: undone, ..layer }), vec![0.0; dims.n], "{dims:?}");
    }
}

/// Shapes of `z` for the edges of a vector, a tile, a workgroup, and a task.
const EDGES: [(usize, usize); 9] = [(0, 3), (3, 0), (1, 1), (3, 17), (64, 65), (65, 64), (10, 2000), (300, 33), (1, 1025)];

/// `y`, `dz`, `dmagnitude`, `dbias`
type DecomposedGot<E> = (Vec<E>, Vec<E>, Vec<f32>, Vec<f32>);

fn run<B: Backend>(backend: &B, layer: &Decomposed) -> DecomposedGot<B::Elem> {
    let (m, n) = (layer.z.rows, layer.z.cols);
    let [z, magnitude, dy] = [&layer.z, &layer.magnitude, &layer.dy].map(|mat| up(backend, mat));
    let (norm, bias) = (up(backend, &layer.norm), layer.bias.as_ref().map(|mat| up(backend, mat)));
    let (z, magnitude, norm, dy) = (&z, &magnitude, &norm, &dy);
    let (mut y, mut dz) = (unwritten(backend, m, n), unwritten(backend, m, n));
    let (mut dmagnitude, mut dbias) = (unwritten(backend, 1, n), unwritten(backend, 1, n));
    Magnitude {
        z: z.view(),
        magnitude: magnitude.view(),
        norm: norm.view(),
        bias: bias.as_ref().map(Into::into),
        y: y.view_mut(),
    }
    .run(backend)
    .unwrap();
    let outputs = (Some(&mut dz), Some(&mut dmagnitude), Some(&mut dbias));
    MagnitudeBackward {
        z: z.view(),
        magnitude: magnitude.view(),
        norm: norm.view(),
        dy: dy.view(),
        dz: outputs.0.map(Into::into),
        dmagnitude: outputs.1.map(Into::into),
        dbias: outputs.2.map(Into::into),
    }
    .run(backend)
    .unwrap();
    (down(backend, &y), down(backend, &dz), down(backend, &dmagnitude), down(backend, &dbias))
}

/// Norms are powers of two, so the factors and all results are exact.
pub fn magnitude_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (seed, (m, n)) in EDGES.into_iter().enumerate() {
        let layer = whole(Dims { m, k: n, n, r: 1 }, seed as u64);
        let norm = Mat::new(1, n, |_, j| [0.5, 1.0, 2.0, 4.0][j % 4]);
        let magnitude = Mat::new(1, n, |_, j| (j % 9) as f64 - 4.0);
        for bias in [None, layer.bias] {
            let layer =
                Decomposed { z: layer.x.clone(), magnitude: magnitude.clone(), norm: norm.clone(), bias, dy: layer.dy.clone() };
            let (got, want) = (run(backend, &layer), layer.backward());
            assert_exact(&format!("{m}×{n} y"), &got.0, &layer.forward());
            assert_exact(&format!("{m}×{n} dz"), &got.1, &want.0);
            assert_exact(&format!("{m}×{n} dmagnitude"), &got.2, &want.1);
            assert_exact(&format!("{m}×{n} dbias"), &got.3, &want.2);
        }
    }
}

/// A division in WGSL is accurate to 2.5 units in the last place, that is, five roundings; a product and a sum are one each.
pub fn magnitude_rounds_within_bounds<B: Backend>(backend: &B) {
    for (seed, (m, n)) in EDGES.into_iter().enumerate() {
        let mut rng = Rng::new(seed as u64);
        let mut norm = || f64::from((0.1 + rng.unit()) as f32);
        let norm = Mat::from_vec(1, n, (0..n).map(|_| norm()).collect());
        let layer = random::<B::Elem>(Dims { m, k: n, n, r: 1 }, 1.0, seed as u64);
        let magnitude = Mat::new(1, n, |_, j| layer.w.at(0, j));
        let layer = Decomposed { z: layer.x, magnitude, norm, bias: layer.bias, dy: layer.dy };
        let (got, size) = (run(backend, &layer), layer.magnitudes());
        let (want, size_back) = (layer.backward(), size.backward());
        assert_within(&format!("{m}×{n} y"), &got.0, &layer.forward(), &size.forward(), 5);
        assert_within(&format!("{m}×{n} dz"), &got.1, &want.0, &size_back.0, 4);
        assert_within(&format!("{m}×{n} dmagnitude"), &got.2, &want.1, &size_back.1, m + 4);
        assert_within(&format!("{m}×{n} dbias"), &got.3, &want.2, &size_back.2, m);
    }
}

pub fn a_norm_of_zero_has_no_direction<B: Backend>(backend: &B) {
    let row = |number: f64| Mat::new(1, 3, |_, j| if j == 1 { 0.0 } else { number });
    let ones = Mat::new(2, 3, |_, _| 1.0);
    let bias = Some(Mat::new(1, 3, |_, j| j as f64));
    let layer = Decomposed { z: ones.clone(), magnitude: row(3.0).map(|x| x + 1.0), norm: row(2.0), bias, dy: ones };
    let (y, dz, dmagnitude, dbias) = run(backend, &layer);
    assert_exact("y", &y, &Mat::from_vec(2, 3, vec![2.0, 1.0, 4.0, 2.0, 1.0, 4.0]));
    assert_exact("dz", &dz, &Mat::from_vec(2, 3, vec![2.0, 0.0, 2.0, 2.0, 0.0, 2.0]));
    assert_eq!((dmagnitude, dbias), (vec![1.0, 0.0, 1.0], vec![2.0; 3]));
}

pub fn accumulate_is_exact_on_whole_numbers<B: Backend>(backend: &B) {
    for (rows, cols) in [(0, 3), (3, 17), (65, 64), (10, 2000)] {
        for scale in [1.0, -0.25, 0.0] {
            let x = Mat::new(rows, cols, |i, j| (i * 7 + j) as f64 % 60.0);
            let y = Mat::new(rows, cols, |i, j| (i + 3 * j) as f64 % 100.0);
            let mut sum = up::<_, f32>(backend, &y);
            Accumulate { x: (up(backend, &x)).view(), scale: scale as f32, y: sum.view_mut() }.run(backend).unwrap();
            assert_exact("y", &down(backend, &sum), &(&y + &(&x * scale)));
        }
    }
}
