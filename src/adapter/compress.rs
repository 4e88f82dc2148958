//! Adapters of a smaller rank, and adapters out of the difference of two weights.

use super::decompose::{Keep, Svd};
use super::folder::{Factors, Folder};
use super::matrix::HostMatrix;
use crate::error::{Error, Result};

/// The best approximation of every module's `scaling·B·A` of a smaller rank; a module that has no more is only rewritten.
///
/// The result has `lora_alpha = r`; where modules differ in rank, the settings say so. Whole modules and biases stay. Errors: [`Error::Value`] for what
/// [`Keep`] excludes and factors that are not finite; [`Error::Unsupported`] for an adapter that does something
/// else to a module than add `scaling·B·A`.
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

/// The factors `A` and `B` for which `W + B·A` is as near to the tuned weight as their rank allows.
///
/// Errors: [`Error::Shape`] if the weights differ in shape; [`Error::Value`] for what [`Keep`] excludes and weights that are
/// not finite.
pub fn extract(w: &HostMatrix, tuned: &HostMatrix, keep: Keep) -> Result<(HostMatrix, HostMatrix)> {
    if w.shape() != tuned.shape() {
        return Err(Error::Shape { verb: "extract", name: "tuned", got: tuned.shape(), want: w.shape() });
    }
    let (cols, w, tuned) = (w.cols(), w.values(), tuned.values());
    let delta = |i: usize, j: usize| f64::from(tuned[i * cols + j]) - f64::from(w[i * cols + j]);
    let svd = Svd::leading(&HostMatrix::from_fn(w.len() / cols.max(1), cols, delta), keep)?;
    Ok(svd.factors(svd.rank(keep)?))
}

/// The same error, with the name of the module.
pub(crate) fn inside(module: &str, error: Error) -> Error {
    match error {
        Error::Value { verb, name, got, want } => Error::Value { verb, name, got: format!("{got} in `{module}`"), want },
        other => other,
    }
}
