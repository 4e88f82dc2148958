//! Error bounds, derived from the rounding of sums and of the stored type, not guessed.

use lowrank::{DType, Float};

use super::oracle::Mat;

/// Asserts `|got - want| ≤ (depth + 2)·u·magnitude`, plus half a unit in the last place of the type it is stored in.
///
/// `magnitude` is the result of the same formula on magnitudes, `depth` the number of roundings between an input and the result.
#[track_caller]
pub fn assert_within<T: Float>(what: &str, got: &[T], want: &Mat, magnitude: &Mat, depth: usize) {
    assert_eq!(got.len(), want.data.len(), "{what}: length");
    let cols = want.cols;
    let sum = (depth + 2) as f64 * DType::F32.unit_roundoff();
    for (e, ((got, want), magnitude)) in got.iter().zip(&want.data).zip(&magnitude.data).enumerate() {
        let got = f64::from(got.to_f32());
        let stored = T::DTYPE.unit_roundoff() * (want.abs() + sum * magnitude) + smallest_step::<T>();
        let bound = sum * magnitude + stored;
        let error = (got - want).abs();
        assert!(error <= bound, "{what}[{}, {}] is {got}, want {want} ± {bound:e}", e / cols, e % cols);
    }
}

/// Half the distance between the smallest numbers: the error of a result that underflows.
fn smallest_step<T: Float>() -> f64 {
    match T::DTYPE {
        DType::F16 => 2f64.powi(-25),
        DType::F32 | DType::BF16 => 2f64.powi(-126),
    }
}

/// Asserts that `got` is exactly `want`, rounded once to the type it is stored in. For sums that are exact in `f32`.
#[track_caller]
pub fn assert_exact<T: Float>(what: &str, got: &[T], want: &Mat) {
    assert_eq!(got.len(), want.data.len(), "{what}: length");
    let want_cols = want.cols;
    for (e, (got, want)) in got.iter().zip(&want.data).enumerate() {
        let rounded = T::from_f32(*want as f32);
        assert_eq!(*got, rounded, "{what}[{}, {}], exactly {want}", e / want_cols, e % want_cols);
    }
}

/// `‖got − want‖ / ‖want‖`; NaN if anything is.
pub fn relative_error<T: Float>(got: &[T], want: &Mat) -> f64 {
    assert_eq!(got.len(), want.data.len());
    let difference: f64 = got.iter().zip(&want.data).map(|(got, want)| (f64::from(got.to_f32()) - want).powi(2)).sum();
    difference.sqrt() / want.norm()
}
