//! Conversion between the tensors of a file and the parts of an adapter in a model.
//!
//! | tensor | shape | meaning |
//! |---|---|---|
//! | `linear1.lora_A.weight` | `[r, k]` | `A` |
//! | `linear1.lora_B.weight` | `[n, r]` | `B` |
//! | `linear1.lora_B.bias` | `[n]` | the bias of the update |
//! | `linear1.lora_magnitude_vector` | `[n]` | DoRA's magnitudes |
//! | `linear1.base_layer.bias` | `[n]` | the bias of a layer that gets an update |
//! | `linear1.weight`, `linear1.bias` | `[n, k]`, `[n]` | a whole layer, or its bias only |

use super::config::{AdapterConfig, LayerTarget};
use super::extra_tensors::{role, unfit};
use super::folder::module_of;
#[cfg(feature = "svd")]
use super::principal::plain;
use super::tensors::{self, HostTensor, HostTensors, spell};
use super::{HostMatrix, Principal, config_fields};
use crate::autograd::Param;
use crate::backend::Backend;
use crate::element::Float;
use crate::error::{Error, Result};
use crate::nn::{Adaptable, Adapter, Bias, LayerAdapter, Linear, LoraConfig, distinct};
use crate::tensor::{Shape, Tensor};

/// The parts of an adapter for the layers of a model, from the settings and tensors of a folder. Errors: [`Error::File`] for a tensor
/// that is missing, of another shape, or not used.
pub(super) fn read<B: Backend>(
    backend: &B,
    model: &impl Adaptable<B>,
    config: &AdapterConfig,
    tensors: HostTensors,
) -> Result<Vec<(String, LayerAdapter<B>)>> {
    distinct(model, "load")?;
    config.only_layers()?;
    let mut file = File { backend, tensors };
    let mut parts = Vec::new();
    for (layer, there) in model.layers() {
        let part = match config.layer_target(layer) {
            Some(LayerTarget::Lora(update)) => {
                config.check(layer, &update)?;
                LayerAdapter::Lora(file.adapter(layer, there.base(), update, config.principal())?)
            }
            Some(LayerTarget::Whole) => LayerAdapter::Whole(file.whole(layer, there.base())?),
            Some(LayerTarget::Bias) => match there.base().bias() {
                Some(bias) => LayerAdapter::Bias(Param::plus(file.row(&format!("{layer}.bias"), bias.tensor.cols())?)),
                None => continue,
            },
            None => continue,
        };
        parts.push((layer.to_string(), part));
    }
    if !parts.iter().any(|(_, part)| part.adapter().is_some()) {
        let layers: Vec<&str> = model.layers().map(|(name, _)| name).collect();
        return Err(config_fields::refused(format!("`target_modules` names none of the layers {}", layers.join(", "))));
    }
    match file.tensors.keys().next() {
        Some(name) => Err(unused(model, config, name)),
        None => Ok(parts),
    }
}

/// The update of one layer from its tensors. Errors: [`Error::File`] for a tensor that is missing, of another shape, or not used.
pub(super) fn adapter<B: Backend>(
    (backend, tensors): (&B, HostTensors),
    (layer, base): (&str, &Linear<B>),
    config: LoraConfig,
    part: Option<Principal>,
) -> Result<Adapter<B>> {
    let mut file = File { backend, tensors };
    let adapter = file.adapter(layer, base, config, part)?;
    match file.tensors.keys().next() {
        Some(name) => Err(tensors::refused(format!("`{name}` has no place in layer `{layer}`"))),
        None => Ok(adapter),
    }
}

/// The error for a tensor that no layer uses.
fn unused<B: Backend>(model: &impl Adaptable<B>, config: &AdapterConfig, name: &str) -> Error {
    let factor = name.strip_suffix(".lora_A.weight").or(name.strip_suffix(".lora_B.weight"));
    let factor = factor.filter(|module| config.lora_config(module).is_some()).map(String::from);
    let Some(layer) = factor.or_else(|| role(config, name).map(|(_, target)| module_of(&target).into())) else {
        return unfit(name);
    };
    let known: Vec<&str> = model.layers().map(|(name, _)| name).collect();
    tensors::refused(match known.contains(&layer.as_str()) {
        true => format!("`{name}` has no place in layer `{layer}`"),
        false => format!("`{name}` is for `{layer}`, which the model does not have; its layers are {}", known.join(", ")),
    })
}

/// The tensors of an adapter of a model, under their names in a file.
pub(super) fn write<B: Backend>(backend: &B, model: &impl Adaptable<B>, name: &str) -> Result<HostTensors> {
    distinct(model, "save")?;
    let mut tensors = HostTensors::new();
    for (layer, there) in model.layers() {
        let mut push = |end: &str, shape: Vec<usize>, elements: Vec<B::Elem>| {
            let values = elements.into_iter().map(Float::to_f32).collect();
            tensors.insert(format!("{layer}.{end}"), HostTensor { shape, dtype: B::Elem::DTYPE, values });
        };
        let row = |param: &Param<B>| Ok((vec![param.tensor.cols()], param.tensor.to_vec(backend)?));
        let (mut rows, part) = (Vec::new(), there.lora().and_then(|lora| lora.part(name)));
        part.map_or(Ok(()), |part| part.fits(there.base()))?; // again, as `params_mut` lets a caller replace parameters
        match part {
            Some(LayerAdapter::Lora(adapter)) => {
                let (rank, [a, b]) = (adapter.config().rank, adapter.trimmed(backend)?);
                push("lora_A.weight", vec![rank, adapter.a().tensor.cols()], a);
                push("lora_B.weight", vec![adapter.b().tensor.rows(), rank], b);
                let own = [("lora_B.bias", adapter.lora_bias()), ("lora_magnitude_vector", adapter.magnitude())];
                rows.extend(own);
                rows.push(("base_layer.bias", adapter.bias()));
            }
            Some(LayerAdapter::Bias(bias)) => rows.push(("bias", Some(bias))),
            Some(LayerAdapter::Whole(linear)) => {
                let weight = &linear.weight().tensor;
                push("weight", vec![weight.rows(), weight.cols()], weight.to_vec(backend)?);
                rows.push(("bias", linear.bias()));
            }
            None => {}
        }
        for (end, param) in rows.into_iter().filter_map(|(end, param)| Some((end, param?))) {
            let (shape, tensor) = row(param)?;
            push(end, shape, tensor);
        }
    }
    Ok(tensors)
}

/// The tensors of a file that have not been used yet.
struct File<'b, B> {
    backend: &'b B,
    tensors: HostTensors,
}

impl<B: Backend> File<'_, B> {
    fn adapter(&mut self, layer: &str, base: &Linear<B>, config: LoraConfig, part: Option<Principal>) -> Result<Adapter<B>> {
        let Shape { rows: n, cols: k } = base.weight().tensor.shape();
        let names = [tensors::key(layer, "lora_A"), tensors::key(layer, "lora_B")];
        let factors = [self.matrix(&names[0], (config.rank, k).into())?, self.matrix(&names[1], (n, config.rank).into())?];
        let ([a, b], config) = match part {
            Some(part) => plain((self.backend, layer, &base.weight().tensor), factors, config, part)?,
            None => (factors, config),
        };
        let (a, b) = (self.upload(&names[0], &a)?, self.upload(&names[1], &b)?);
        let LoraConfig { lora_bias, use_dora, bias, .. } = config;
        let mut adapter = Adapter::from_tensors(a, b, config)?;
        if lora_bias {
            adapter = adapter.with_lora_bias(self.row(&format!("{layer}.lora_B.bias"), n)?);
        }
        if use_dora {
            adapter = adapter.with_magnitude(self.row(&format!("{layer}.lora_magnitude_vector"), n)?);
        }
        if bias != Bias::None && base.bias().is_some() {
            adapter = adapter.with_bias(self.row(&format!("{layer}.base_layer.bias"), n)?);
        }
        Ok(adapter)
    }

    fn whole(&mut self, layer: &str, base: &Linear<B>) -> Result<Linear<B>> {
        let Shape { rows: n, cols: k } = base.weight().tensor.shape();
        let name = format!("{layer}.weight");
        let weight = self.matrix(&name, (n, k).into())?;
        let weight = self.upload(&name, &weight)?;
        let bias = base.bias().map(|_| self.row(&format!("{layer}.bias"), n)).transpose()?;
        Linear::from_tensors(weight, bias)
    }

    /// Takes a vector of the file, and uploads it as `1×n`.
    fn row(&mut self, name: &str, n: usize) -> Result<Tensor<B>> {
        let row = HostMatrix::new((1, n), self.take(name, &[n])?)?;
        self.upload(name, &row)
    }

    fn matrix(&mut self, name: &str, shape: Shape) -> Result<HostMatrix> {
        HostMatrix::new(shape, self.take(name, &[shape.rows, shape.cols])?)
    }

    /// Takes a tensor of the file. Errors: [`Error::File`] if it is missing or has another shape.
    fn take(&mut self, name: &str, want: &[usize]) -> Result<Vec<f32>> {
        let missing = || tensors::refused(format!("`{name}` is missing, want {}", spell(want)));
        let tensor = self.tensors.remove(name).ok_or_else(missing)?;
        if tensor.shape != want {
            return Err(tensors::refused(format!("`{name}` is {}, want {}", spell(&tensor.shape), spell(want))));
        }
        Ok(tensor.values)
    }

    /// Rounds a matrix to the element type of the backend and uploads it. Errors: [`Error::File`] for an element that overflows.
    fn upload(&self, name: &str, matrix: &HostMatrix) -> Result<Tensor<B>> {
        Tensor::from_slice(self.backend, matrix.shape(), &tensors::narrow(name, matrix.values())?)
    }
}

/// Errors: [`Error::Unsupported`](crate::Error::Unsupported), always: the initial factors can be computed only by a decomposition.
#[cfg(not(feature = "svd"))]
fn plain<B: Backend>(
    _: (&B, &str, &Tensor<B>),
    _: [HostMatrix; 2],
    _: LoraConfig,
    part: Principal,
) -> Result<([HostMatrix; 2], LoraConfig)> {
    Err(part.needs_svd())
}
