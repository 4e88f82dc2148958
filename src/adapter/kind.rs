//! The kinds of layers that get an update, and how a file stores the factors of each.
//!
//! | kind | `A` in the file | `B` in the file | `ΔW` |
//! |---|---|---|---|
//! | linear | `lora_A.weight` `[r, k]` | `lora_B.weight` `[n, r]` | `B·A` |
//! | embedding | `lora_embedding_A` `[r, rows]` | `lora_embedding_B` `[n, r]` | `(B·A)ᵀ` |
//! | convolution | `lora_A.weight` `[r, channels, kernel…]` | `lora_B.weight` `[n, r, 1…]` | `B·A`, a row for each output channel |
//! | parameter of E experts | `lora_A.weight` `[E·r, k]` | `lora_B.weight` `[n, r·E]` | of expert e: `B[:, e::E]·A[e·r..(e+1)·r, :]` |

use super::factors::Factors;
use super::files::bad_tensors;
use super::matrix::HostMatrix;
use super::tensors::{HostTensor, HostTensors, dimensions, key};
use crate::element::DType;
use crate::error::Result;

/// The kind of layer that an update is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A linear layer, stored `n×k`, or `k×n` (`fan_in_fan_out`).
    #[default]
    Linear,
    /// An embedding table, stored `rows×n`.
    Embedding,
    /// A convolution of `channels` inputs, stored `n × channels × kernel…`.
    Convolution {
        /// Input channels.
        channels: usize,
        /// The kernel size in each dimension: one to three.
        kernel: Vec<usize>,
    },
    /// A parameter of a module, with a matrix for each expert: `target_parameters`.
    Parameter {
        /// Number of experts.
        experts: usize,
        /// Number of updates of other parameters of the module that are nested in this one.
        nested: usize,
    },
}

impl Kind {
    /// The shapes of the two factors in a file.
    fn shapes(&self, a: &HostMatrix, b: &HostMatrix) -> [Vec<usize>; 2] {
        match self {
            Kind::Convolution { channels, kernel } => {
                let ones = vec![1; kernel.len()];
                [[&[a.rows(), *channels], &kernel[..]].concat(), [&[b.rows(), b.cols()], &ones[..]].concat()]
            }
            Kind::Linear | Kind::Embedding | Kind::Parameter { .. } => [a, b].map(|factor| vec![factor.rows(), factor.cols()]),
        }
    }

    /// The names of the two factors in a file.
    fn names(&self, module: &str) -> [String; 2] {
        match self {
            Kind::Embedding => ["lora_embedding_A", "lora_embedding_B"].map(|factor| format!("{module}.{factor}")),
            Kind::Parameter { nested, .. } => {
                let module = module.rsplit_once('.').map_or(module, |(module, _)| module);
                ["lora_A", "lora_B"].map(|factor| key(&format!("{module}{}", ".base_layer".repeat(*nested)), factor))
            }
            Kind::Linear | Kind::Convolution { .. } => ["lora_A", "lora_B"].map(|factor| key(module, factor)),
        }
    }

    /// The factors of a module, as the tensors of a file.
    pub(super) fn stored(&self, module: &str, Factors { a, b, dtype, .. }: &Factors) -> [(String, HostTensor); 2] {
        let ([a_name, b_name], [a_shape, b_shape]) = (self.names(module), self.shapes(a, b));
        let tensor = |shape, matrix: &HostMatrix| HostTensor { shape, dtype: *dtype, values: matrix.values().to_vec() };
        [(a_name, tensor(a_shape, a)), (b_name, tensor(b_shape, b))]
    }
}

/// Takes the factors of a module from the tensors of a file, and finds its kind. `parameter` is `Some(nested)` for a parameter of
/// experts. Errors: [`Error::File`] for factors that are missing, empty, or not of this rank.
pub(super) fn read(
    tensors: &mut HostTensors,
    module: &str,
    parameter: Option<usize>,
    (rank, scaling): (usize, f32),
) -> Result<(Kind, Factors)> {
    let embedding = tensors.contains_key(&format!("{module}.lora_embedding_A"));
    let kind = match (embedding, parameter) {
        (true, _) => Kind::Embedding,
        (false, Some(nested)) => Kind::Parameter { experts: 1, nested },
        (false, None) => Kind::Linear,
    };
    let names = kind.names(module);
    let mut take = |name: &String| {
        let tensor = tensors.remove(name).ok_or_else(|| bad_tensors(format!("`{name}` is missing")))?;
        match tensor.values.is_empty() {
            true => Err(bad_tensors(format!(
                "`{name}` is empty ({}): the parameters were not gathered when it was saved, as with DeepSpeed ZeRO-3 or \
                 FSDP; save the adapter again from the gathered model",
                dimensions(&tensor.shape)
            ))),
            false => Ok(tensor),
        }
    };
    let (a, b) = (take(&names[0])?, take(&names[1])?);
    let dtype = if a.dtype == b.dtype { a.dtype } else { DType::F32 };
    let kind = match kind {
        Kind::Parameter { nested, .. } => Kind::Parameter { experts: a.shape.first().map_or(0, |rows| rows / rank), nested },
        Kind::Linear if (3..=5).contains(&a.shape.len()) => convolution(&names, &a, &b)?,
        kind => kind,
    };
    let rows = match kind {
        Kind::Parameter { experts, .. } => experts.max(1) * rank,
        _ => rank,
    };
    let flat = |name: &str, tensor: HostTensor, wanted: usize| match tensor.shape[..] {
        [first, ..] if tensor.shape.len() == wanted => HostMatrix::new((first, tensor.values.len() / first), tensor.values),
        _ => Err(bad_tensors(format!("`{name}` has {} dimensions, want {wanted}", tensor.shape.len()))),
    };
    let wanted = if let Kind::Convolution { kernel, .. } = &kind { 2 + kernel.len() } else { 2 };
    let (a, b) = (flat(&names[0], a, wanted)?, flat(&names[1], b, wanted)?);
    let wants = [(&names[0], a.shape(), (rows, a.cols()).into()), (&names[1], b.shape(), (b.rows(), rows).into())];
    match wants.into_iter().find(|(_, got, want)| got != want) {
        Some((name, got, want)) => Err(bad_tensors(format!("`{name}` is {got}, want {want}"))),
        None => Ok((kind, Factors { a, b, scaling, dtype })),
    }
}

/// The kind of a convolution. Errors: [`Error::File`] for other shapes, and for a grouped convolution, because `A` mixes all
/// channels, and the weight of a grouped convolution cannot hold such an update.
fn convolution(names: &[String; 2], a: &HostTensor, b: &HostTensor) -> Result<Kind> {
    let pointwise = b.shape.len() == a.shape.len() && b.shape[2..].iter().all(|&side| side == 1);
    if !pointwise {
        let want = format!("[n, {}] and ones", a.shape[0]);
        return Err(bad_tensors(format!("`{}` is {}, want {want} for a convolution", names[1], dimensions(&b.shape))));
    }
    if b.shape[1] > 0 && b.shape[1] < a.shape[0] && a.shape[0].is_multiple_of(b.shape[1]) {
        let groups = a.shape[0] / b.shape[1];
        let why = "its `A` mixes all channels, and the weight has only those of a group, so that it cannot hold the update";
        return Err(bad_tensors(format!(
            "`{}` is of a convolution in {groups} groups: {why} (PEFT does not merge it either)",
            names[1]
        )));
    }
    Ok(Kind::Convolution { channels: a.shape[1], kernel: a.shape[2..].to_vec() })
}
