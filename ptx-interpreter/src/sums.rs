//! Rounding of tensor core sums, which differs from f32 addition.
//!
//! `sum + Σ lᵢ·rᵢ` over a block: products are exact; each product, and the sum so far, is truncated at a bit this many places
//! below the largest exponent among them (for a product: the sum of its factors' exponents); the rest is added exactly, and the
//! result is truncated to f32. The numbers were measured on GPUs by Xie, Wang, Yang and Yang ("MMA-Sim: Bit-Accurate Reference
//! Model of Tensor Cores and Matrix Cores", arXiv 2511.10909); NVIDIA does not document them.
//!
//! The error of a block is at most `block·2⁻ᵇⁱᵗˢ·largest + 2u·|sum|`, u = 2⁻²⁴, as the largest is not truncated: over a depth of
//! d, `5/8·d·u` of the magnitudes for wgmma (`3/4` in tf32, whose blocks are eight deep), and `5/4·d·u` for mma; f32 addition has
//! `d·u`. Subnormal numbers are treated like others here.

/// The summation of an instruction.
#[derive(Clone, Copy)]
pub(crate) struct Adder {
    /// Products in a block.
    block: usize,
    /// Bits kept below the largest exponent.
    bits: i32,
}

/// `mma.sync` on Ampere; later GPUs keep more bits.
pub(crate) const MMA: Adder = Adder { block: 8, bits: 24 };
/// `wgmma` on Hopper: a block is one instruction.
pub(crate) const WGMMA: Adder = Adder { block: 16, bits: 25 };

/// Columns computed at a time.
const WIDTH: usize = 8;

impl Adder {
    /// `sums += lhs·rhs`: `lhs[row][d]`, `rhs[d][col]`, `sums[row][col]`, for a multiple of eight columns
    pub(crate) fn multiply<L: AsRef<[f32]>, R: AsRef<[f32]>>(self, lhs: &[L], rhs: &[R], sums: &mut [impl AsMut<[f32]>]) {
        for (left, sums) in lhs.iter().zip(sums) {
            for (left, right) in left.as_ref().chunks(self.block).zip(rhs.chunks(self.block)) {
                for (i, sums) in sums.as_mut().as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                    let columns = right.iter().map(|right| &right.as_ref().as_chunks::<WIDTH>().0[i]);
                    *sums = self.add(sums, left.iter().map(|&left| f64::from(left)).zip(columns));
                }
            }
        }
    }

    fn add<'r>(self, sums: &[f32; WIDTH], block: impl Iterator<Item = (f64, &'r [f32; WIDTH])> + Clone) -> [f32; WIDTH] {
        let mut largest = sums.map(|sum| power(f64::from(sum)));
        for (left, right) in block.clone() {
            let left = power(left);
            for (largest, &right) in largest.iter_mut().zip(right) {
                let power = left * power(f64::from(right));
                *largest = if power > *largest { power } else { *largest };
            }
        }
        if !largest.iter().all(|largest| largest.is_finite()) {
            let plain = |i: usize| block.clone().fold(f64::from(sums[i]), |sum, (left, right)| sum + left * f64::from(right[i]));
            return std::array::from_fn(|i| plain(i) as f32);
        }
        let step = largest.map(|largest| largest * 2f64.powi(-self.bits));
        let mut total: [f64; WIDTH] = std::array::from_fn(|i| cut(f64::from(sums[i]), step[i]));
        for (left, right) in block {
            (0..WIDTH).for_each(|i| total[i] += cut(left * f64::from(right[i]), step[i]));
        }
        total.map(cut_to_f32)
    }
}

/// The power of two of a number's exponent: 5 → 4, 0 → 0; ∞ and NaN → ∞.
fn power(value: f64) -> f64 {
    f64::from_bits(value.to_bits() & f64::INFINITY.to_bits())
}

/// Truncates to a multiple of `step`, if the quotient is below 2⁵¹.
fn cut(value: f64, step: f64) -> f64 {
    let (magnitude, large) = (value.abs(), step * 2f64.powi(52));
    let nearest = (magnitude + large) - large;
    let cut = if nearest > magnitude { nearest - step } else { nearest };
    cut.copysign(value)
}

/// Truncates to f32.
fn cut_to_f32(value: f64) -> f32 {
    let nearest = value as f32;
    let away = nearest.is_finite() && f64::from(nearest).abs() > value.abs();
    if away { f32::from_bits(nearest.to_bits() - 1) } else { nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sum + Σ left·right` in the first of eight columns.
    fn sum(adder: Adder, sum: f32, left: &[f32], right: &[f32]) -> f32 {
        let rhs: Vec<[f32; WIDTH]> = right.iter().map(|&right| [right; WIDTH]).collect();
        let mut sums = [[sum; WIDTH]];
        adder.multiply(&[left], &rhs, &mut sums);
        assert!(sums[0].iter().all(|other| other.to_bits() == sums[0][0].to_bits()));
        sums[0][0]
    }

    #[test]
    fn whole_numbers_are_added_exactly() {
        let numbers: Vec<f32> = (0..16).map(|i| ((i * 37 + 5) % 23) as f32 - 11.0).collect();
        let want = 12345.0 + numbers.iter().map(|x| x * x).sum::<f32>();
        assert_eq!([MMA, WGMMA].map(|adder| sum(adder, 12345.0, &numbers, &numbers)), [want; 2]);
    }

    #[test]
    fn what_is_too_far_below_the_largest_is_lost() {
        let lots = |power| [2f32.powi(power); 16];
        let next = |power| 1.0 + 2f32.powi(power);
        assert_eq!(sum(WGMMA, 1.0, &lots(-25), &[1.0; 16]), next(-21));
        assert_eq!(sum(WGMMA, 1.0, &lots(-26), &[1.0; 16]), 1.0);
        assert_eq!(sum(MMA, 1.0, &lots(-24), &[1.0; 16]), next(-20));
        assert_eq!(sum(MMA, 1.0, &lots(-25), &[1.0; 16]), 1.0);
        // The sum is cut if a product is the largest, and the exponent of 1.5·1.5 is that of its factors.
        assert_eq!(sum(WGMMA, 2f32.powi(-26), &[1.0, -1.0], &[1.0, 1.0]), 0.0);
        assert_eq!(sum(WGMMA, 2f32.powi(-25), &[1.5, -1.5], &[1.5, 1.5]), 2f32.powi(-25));
    }

    /// Checks the bound above on numbers of eight bits and many magnitudes; the last factor allows for terms in u².
    #[test]
    fn long_sums_stay_within_the_bound() {
        let mut state = 7u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(state & 0x83ff_0000 | 0x3c00_0000)
        };
        for (adder, rate) in [(MMA, 1.25), (WGMMA, 0.625)] {
            for depth in [256, 1024] {
                let (left, right): (Vec<_>, Vec<_>) = (0..depth).map(|_| (number(), number())).unzip();
                let products = || left.iter().zip(&right).map(|(&left, &right)| f64::from(left) * f64::from(right));
                let (want, magnitude) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let error = (f64::from(sum(adder, 0.0, &left, &right)) - want).abs();
                let bound = rate * f64::from(depth) * 2f64.powi(-24) * magnitude * 1.001;
                assert!(error > 0.0 && error <= bound, "depth {depth}: {error:e} > {bound:e}");
            }
        }
    }

    #[test]
    fn results_are_cut_not_rounded() {
        let more = 1.75 * 2f32.powi(-24);
        assert_eq!(sum(WGMMA, 1.0, &[more], &[1.0]), 1.0);
        assert_eq!(sum(WGMMA, -1.0, &[-more], &[1.0]), -1.0);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        assert!(sum(MMA, f32::NAN, &[1.0], &[1.0]).is_nan());
        assert!(sum(MMA, 1.0, &[f32::INFINITY], &[0.0]).is_nan());
        assert_eq!(sum(MMA, 1.0, &[f32::INFINITY], &[1.0]), f32::INFINITY);
        assert_eq!(sum(WGMMA, f32::NEG_INFINITY, &[1.0], &[1.0]), f32::NEG_INFINITY);
        assert_eq!(sum(WGMMA, f32::MAX, &[f32::MAX], &[1.0]), f32::INFINITY);
        assert_eq!(sum(WGMMA, 0.0, &[0.0], &[1.0]), 0.0);
    }
}
