//! The suite's checks of random operations: dropout and stochastic rounding.

use lowrank::op::*;
use lowrank::random::{Rng, philox};
use lowrank::{Backend, Float};

use super::super::bounds::assert_exact;
use super::super::data::{Dims, down, mask, unwritten, up, whole};
use super::super::oracle::{Lora, Mat, round_stochastic};

/// One product and one rounding: every backend gives the same bits.
pub fn dropout_drops_what_the_mask_says<B: Backend>(backend: &B) {
    for (rows, cols) in [(0, 3), (1, 1), (3, 17), (64, 65), (10, 2000)] {
        let mut rng = Rng::new(9);
        let number = |x: f64| f64::from(B::Elem::from_f32(x as f32).to_f32());
        let x = Mat::from_vec(rows, cols, (0..rows * cols).map(|_| number(rng.gaussian())).collect());
        for (p, seed) in [(0.0, 1), (0.25, 2), (0.9, u64::MAX)] {
            let dropout = Dropout::new(p, seed).unwrap();
            let mut y = unwritten(backend, rows, cols);
            DropoutForward { x: (up(backend, &x)).view(), dropout, y: y.view_mut() }.run(backend).unwrap();
            assert_exact(&format!("{rows}×{cols} {dropout:?}"), &down(backend, &y), &x.times(&mask(dropout, rows, cols)));
        }
    }
}

fn merge<B: Backend>(backend: &B, layer: &Lora, rounding: Rounding) -> Vec<B::Elem> {
    let (a, b, mut w) = (up(backend, &layer.a), up(backend, &layer.b), up(backend, &layer.w));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: layer.scale as f32, rounding, w: w.view_mut() }.run(backend).unwrap();
    down(backend, &w)
}

/// The random word of element `e`.
fn word(seed: u64, e: usize) -> u32 {
    philox([seed as u32, (seed >> 32) as u32], [(e / 4) as u32, 0, 2, 0])[e % 4]
}

/// Sums that `f32` holds exactly, but 16 bits do not: in every binade, subnormal numbers, and beyond the largest number.
pub fn stochastic_merging_takes_the_neighbour_that_the_word_says<B: Backend>(backend: &B) {
    let seed = 0xfeed_0000_beef;
    let shapes = [(1, 1, 1), (3, 5, 2), (33, 63, 3), (64, 65, 1), (18, 100, 12), (37, 264, 17), (0, 4, 1), (4, 0, 1)];
    for (n, k, r) in shapes {
        for (unit, scale) in [(13.0 / 32.0, -14), (1.0, -10), (2f64.powi(-24), -29), (16376.0, 0), (0.0, -5)] {
            let layer = whole(Dims { m: 1, k, n, r }, 3);
            let stored = |x: f64| f64::from(B::Elem::from_f32((x * unit) as f32).to_f32());
            let layer = Lora { w: layer.w.map(stored), scale: 2f64.powi(scale), ..layer };
            let got = merge(backend, &layer, Rounding::Stochastic { seed });
            let sums = layer.merged();
            let want = sums.data.iter().enumerate().map(|(e, &sum)| round_stochastic::<B::Elem>(sum, word(seed, e)));
            assert_exact(&format!("{n}×{k}·{unit:e} by 2^{scale}"), &got, &Mat::from_vec(n, k, want.collect()));
        }
    }
}

/// Updates far below half a unit: rounding to the nearest loses all of them, stochastic rounding keeps the mean.
pub fn stochastic_merging_keeps_the_mean<B: Backend>(backend: &B) {
    let (n, k, step) = (200, 250, 2.0 * B::Elem::DTYPE.unit_roundoff());
    let constant = |rows, cols, number: f64| Mat::new(rows, cols, |_, _| number);
    for part in [1.0 / 8.0, 1.0 / 64.0] {
        let layer = whole(Dims { m: 1, k, n, r: 1 }, 1);
        let (w, a, b) = (constant(n, k, 1.0), constant(1, k, 1.0), constant(n, 1, 1.0));
        let layer = Lora { w, a, b, scale: part * step, ..layer };
        let mean = |rounding| {
            let merged = merge(backend, &layer, rounding);
            merged.iter().map(|w| (f64::from(w.to_f32()) - 1.0) / step).sum::<f64>() / merged.len() as f64
        };
        assert_eq!(mean(Rounding::Nearest), 0.0);
        if step > 1e-6 {
            let (got, deviation) = (mean(Rounding::Stochastic { seed: 5 }), (part * (1.0 - part) / (n * k) as f64).sqrt());
            assert!((got - part).abs() < 5.0 * deviation, "{got} of a step, want {part}");
        }
    }
}
