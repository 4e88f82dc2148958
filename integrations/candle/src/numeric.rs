//! Sums and exponentials that the compiler can turn into vector instructions, and rows handed out to threads.

use lowrank::Float;
use rayon::prelude::*;

const LANES: usize = 16;

/// `Σ x·y`, in sixteen sums of their own.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `Σ x`, in sixteen sums of their own.
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let xs = x.chunks_exact(LANES);
    let rest: f32 = xs.remainder().iter().sum();
    for x in xs {
        for lane in 0..LANES {
            sums[lane] += x[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The largest element; -∞ for none.
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let xs = x.chunks_exact(LANES);
    let rest = xs.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in xs {
        for lane in 0..LANES {
            most[lane] = if x[lane] > most[lane] { x[lane] } else { most[lane] };
        }
    }
    most.iter().copied().fold(rest, f32::max)
}

/// `eˣ` to 2 units in the last place, for `x` between -87 and 88; beyond, that of the nearer end.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to whole numbers
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4; // ln 2 in two parts
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    p * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// The elements in `f32`.
pub(crate) fn widened<E: Float>(x: &[E]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// The elements rounded to nearest.
pub(crate) fn narrowed<E: Float>(x: &[f32]) -> Vec<E> {
    x.iter().map(|&x| E::from_f32(x)).collect()
}

/// Elements below which one thread does the work.
const FEW: usize = 1 << 14;

/// Makes an output of rows of `cols` elements, each by `row(index, elements)`, on rayon's threads where there is work for them.
pub(crate) fn make_rows<E: Float>(len: usize, cols: usize, row: impl Fn(usize, &mut [E]) + Sync) -> Vec<E> {
    let mut out = vec![E::default(); len];
    if cols == 0 {
        return out;
    }
    if len < FEW {
        out.chunks_exact_mut(cols).enumerate().for_each(|(i, out)| row(i, out));
    } else {
        let rows = FEW.div_ceil(4 * cols);
        let each = |(at, out): (usize, &mut [E])| {
            out.chunks_exact_mut(cols).enumerate().for_each(|(i, out)| row(at * rows + i, out));
        };
        out.par_chunks_mut(rows * cols).enumerate().for_each(each);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_close() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2.5e-7, "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan() && exp(1e30) == exp(88.0) && exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn sums_take_every_element_once() {
        for len in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(dot(&x, &x), x.iter().map(|x| x * x).sum::<f32>());
            assert_eq!(max(&x), x.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
        let rows =
            make_rows::<f32>(3 * 10_000, 3, |i, row| row.iter_mut().enumerate().for_each(|(j, x)| *x = (i * 3 + j) as f32));
        assert!(rows.iter().enumerate().all(|(i, x)| *x == i as f32));
    }
}
