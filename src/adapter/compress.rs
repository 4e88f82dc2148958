//! Compressing adapters to a smaller rank, and extracting adapters from the difference of two weights, by SVD.

use super::decompose::{Keep, Svd};
use super::folder::{Factors, Folder};
use super::matrix::HostMatrix;
use crate::error::{Error, Result};

/// Replaces every module's `scaling·B·A` by its best approximation of a smaller rank. A module whose rank is small already keeps it, but
/// its factors change.
///
/// The result has `lora_alpha = r`, with `rank_pattern` and `alpha_pattern` where modules differ. Whole modules and biases are kept.
///
/// Errors: [`Error::Value`] for a `keep` out of range and factors that are not finite; [`Error::Unsupported`] for an adapter that is more
/// than a sum of products, such as DoRA.
pub fn compress(adapter: &Folder, keep: Keep) -> Result<Folder> {
    keep.check("compress")?;
    adapter.only_products()?;
    let compressed = adapter.modules().iter().map(|(name, factors)| {
        let svd = Svd::of_product(&factors.b, &factors.a, f64::from(factors.scaling)).map_err(|error| inside(name, error))?;
        let (a, b) = svd.factors(svd.rank(keep)?);
        Ok((name.clone(), Factors { a, b, scaling: 1.0, dtype: factors.dtype }))
    });
    let folder = Folder::new(Some(adapter.config()), compressed.collect::<Result<_>>()?)?;
    Ok(folder.of_kinds(adapter.kinds().clone()).with_extras(adapter))
}

/// The factors `A` and `B` that make `W + B·A` the best approximation of the fine-tuned weight.
///
/// Errors: [`Error::Shape`] if the weights differ in shape; [`Error::Value`] for a `keep` out of range and weights that are not finite.
pub fn extract(w: &HostMatrix, tuned: &HostMatrix, keep: Keep) -> Result<(HostMatrix, HostMatrix)> {
    if w.shape() != tuned.shape() {
        return Err(Error::Shape { verb: "extract", name: "tuned", got: tuned.shape(), want: w.shape() });
    }
    let (cols, w, tuned) = (w.cols(), w.values(), tuned.values());
    let delta = |i: usize, j: usize| f64::from(tuned[i * cols + j]) - f64::from(w[i * cols + j]);
    let svd = Svd::leading(&HostMatrix::from_fn(w.len() / cols.max(1), cols, delta), keep)?;
    Ok(svd.factors(svd.rank(keep)?))
}

/// Adds the name of the module to an error.
pub(crate) fn inside(module: &str, error: Error) -> Error {
    match error {
        Error::Value { verb, name, got, want } => Error::Value { verb, name, got: format!("{got} in `{module}`"), want },
        other => other,
    }
}
