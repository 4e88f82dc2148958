//! Sums and exponentials that the compiler turns into vector instructions, and rows handed out to threads.
//!
//! Loops over elements keep sixteen sums of their own whatever the CPU, so the bits are the same on all.

use lowrank::Float;
use rayon::prelude::*;

const LANES: usize = 16;

/// Runs loops compiled for the widest vectors of this CPU. What they call must be inlined to profit.
macro_rules! vectorised {
    ($work:expr) => {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorised;

/// `Σ each(x)`, in sixteen sums of their own.
#[inline(always)]
fn sum_of<E: Float>(x: &[E], each: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, rest) = x.as_chunks::<LANES>();
    for x in xs {
        for lane in 0..LANES {
            sums[lane] += each(x[lane].to_f32());
        }
    }
    let mut last = 0.0;
    for x in rest {
        last += each(x.to_f32());
    }
    sums.iter().sum::<f32>() + last
}

/// `Σ x`
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    sum_of(
        x,
        #[inline(always)]
        |x| x,
    )
}

/// `Σ eˣ⁻ᵐ`
#[inline(always)]
pub(crate) fn sum_of_exp<E: Float>(x: &[E], m: f32) -> f32 {
    sum_of(
        x,
        #[inline(always)]
        |x| exp(x - m),
    )
}

/// `Σ x·y`, in sixteen sums of their own.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in xs.iter().zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let mut last = 0.0;
    for (x, y) in x_rest.iter().zip(y_rest) {
        last += x * y;
    }
    sums.iter().sum::<f32>() + last
}

/// The largest element; -∞ for none.
#[inline(always)]
pub(crate) fn max<E: Float>(x: &[E]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (xs, rest) = x.as_chunks::<LANES>();
    for x in xs {
        for lane in 0..LANES {
            let x = x[lane].to_f32();
            most[lane] = if x > most[lane] { x } else { most[lane] };
        }
    }
    let rest = rest.iter().fold(f32::NEG_INFINITY, |most, x| most.max(x.to_f32()));
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
#[inline(always)]
pub(crate) fn widened<E: Float>(x: &[E]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// The elements rounded to nearest.
pub(crate) fn narrowed<E: Float>(x: &[f32]) -> Vec<E> {
    x.iter().map(|&x| E::from_f32(x)).collect()
}

/// `to += x`
pub(crate) fn add<E: Float>(to: &mut [E], x: &[E]) {
    vectorised!({
        for (to, x) in to.iter_mut().zip(x) {
            *to = E::from_f32(to.to_f32() + x.to_f32());
        }
    });
}

/// Elements below which one thread does the work.
const FEW: usize = 1 << 14;

/// Makes an output of rows of `cols` elements, the last of which may be shorter, each by `row(index, elements)`; on rayon's threads where
/// there is work for them. `row` should be inlined.
pub(crate) fn make_rows<E: Float>(len: usize, cols: usize, row: impl Fn(usize, &mut [E]) + Sync) -> Vec<E> {
    let mut out = vec![E::default(); len];
    if cols == 0 {
        return out;
    }
    let rows_from = |first: usize, out: &mut [E]| {
        vectorised!({
            for (i, out) in out.chunks_mut(cols).enumerate() {
                row(first + i, out);
            }
        });
    };
    if len < FEW {
        rows_from(0, &mut out);
    } else {
        let rows = FEW.div_ceil(4 * cols);
        out.par_chunks_mut(rows * cols).enumerate().for_each(|(at, out)| rows_from(at * rows, out));
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
            assert_eq!(sum_of_exp(&x[..len.min(1)], 0.0), len.min(1) as f32);
            assert_eq!(max(&x), x.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
        for len in [3 * 10_000, 3 * 10_000 + 1, 5] {
            let rows = make_rows::<f32>(len, 3, |i, row| row.iter_mut().enumerate().for_each(|(j, x)| *x = (i * 3 + j) as f32));
            assert!(rows.iter().enumerate().all(|(i, x)| *x == i as f32) && rows.len() == len);
        }
    }
}
