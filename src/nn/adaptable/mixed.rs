//! Prediction for a batch in which each part names its adapter.

use crate::autograd::{Tape, Var};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::nn::Adapters;
use crate::tensor::Tensor;

/// [`Adaptable::predict_mixed_with`](super::Adaptable::predict_mixed_with) after its checks. The parts of one adapter are gathered into
/// one batch, and their outputs go back to their places.
pub(super) fn predict<'m, B: Backend>(
    backend: &'m B,
    x: &Tensor<B>,
    adapters: &[Option<&str>],
    forward: impl Fn(&mut Tape<'m, B>, Var, Adapters<'_>) -> Result<Var>,
) -> Result<Vec<B::Elem>> {
    let parts = adapters.len();
    let rows = x.rows().checked_div(parts).unwrap_or(0);
    let want = "one for each row, or for each of as many equal parts";
    Error::unless(rows * parts == x.rows(), "predict_mixed", "adapters", format!("{parts} for {} rows", x.rows()), want)?;

    let (inputs, size) = (x.to_vec(backend)?, rows * x.cols());
    let mut outputs = vec![Vec::new(); parts];
    let mut left: Vec<usize> = (0..parts).collect();
    while let Some(&first) = left.first() {
        let group: Vec<usize>;
        (group, left) = left.into_iter().partition(|&part| adapters[part] == adapters[first]);
        let batch: Vec<B::Elem> = group.iter().flat_map(|&part| inputs[part * size..][..size].iter().copied()).collect();
        let batch = Tensor::from_slice(backend, (group.len() * rows, x.cols()), &batch)?;
        let mut tape = Tape::new(backend);
        let x = tape.input(batch);
        let y = forward(&mut tape, x, Adapters::Named(adapters[first].as_slice()))?;
        let y = tape.value(y)?;
        let (got, want) = (y.rows(), "as many for each part");
        let each = Some(got / group.len()).filter(|each| each * group.len() == got);
        Error::unless(each.is_some(), "predict_mixed", "forward", format!("{got} rows for {} parts", group.len()), want)?;
        let (host, length) = (y.to_vec(backend)?, each.unwrap_or(0) * y.cols());
        for (at, part) in group.into_iter().enumerate() {
            outputs[part] = host[at * length..][..length].to_vec();
        }
    }
    Ok(outputs.concat())
}
