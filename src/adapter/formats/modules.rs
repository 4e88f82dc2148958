//! An adapter as a set of modules, independent of the names and the layout of a format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::base::{Base, Hints, Order};
use super::gguf::{self, Setting};
use super::kind::Kind;
use super::raw::{Raw, refused};
use super::spelling::{Names, Part, Spelling, prefix_for, renamed};
use crate::adapter::config::number;
use crate::adapter::tensors::{serialize, spell};
use crate::adapter::{AdapterConfig, CONFIG_FILE, Folder, HostMatrix, HostTensor, HostTensors, folder, publish, write_files};
use crate::element::DType;
use crate::error::Result;
use crate::file;

/// The updates of an adapter by module, `ΔW = alpha/r·B·A`.
#[derive(Clone, Debug, PartialEq)]
pub struct Modules {
    path: PathBuf,
    modules: BTreeMap<String, Module>,
    /// The name of the model, if the format contains it.
    model: Option<String>,
    /// Other models for which the file holds updates.
    others: Vec<String>,
}

/// The update of one module.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Module {
    /// r×k; r×channels×… for a convolution.
    pub(super) a: HostTensor,
    /// n×r; n×r×1×… for a convolution.
    pub(super) b: HostTensor,
    /// n
    pub(super) magnitude: Option<HostTensor>,
    /// The scaling times the rank.
    pub(super) alpha: f64,
}

impl Module {
    fn rank(&self) -> usize {
        self.a.shape.first().copied().unwrap_or(0)
    }

    fn scaling(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    fn tensors(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.magnitude)
    }
}

impl Modules {
    /// Reads an adapter, a file or a folder, of any [`Kind`] that [is an adapter](Kind::is_adapter).
    ///
    /// Errors: [`Error::File`](crate::Error::File) for a file that is no adapter, is damaged, or holds more than updates `B·A` and
    /// magnitudes, and if a hint is missing (the error says which one);
    /// [`Error::Unsupported`](crate::Error::Unsupported) for settings of PEFT that this crate does not support.
    pub fn read(path: &Path, hints: &Hints) -> Result<Self> {
        let Raw { path, kind, parts, settings, alphas } = Raw::read(path)?;
        let has_scaling = !alphas.is_empty() && !matches!(kind, Kind::LoraLib | Kind::Torchtune | Kind::CandleLora);
        if has_scaling && hints.alpha.is_some() {
            return Err(refused(&path, "contains its scaling, so `--alpha` must not be given".into()));
        }
        let (parts, others) = hints.of_one_model(&path, &kind, parts)?;
        let mut modules = BTreeMap::new();
        for (there, part) in parts {
            let name = hints.named(&path, &kind, &there)?;
            let alpha = hints.alpha.or(alphas.get(&there).copied());
            let mut module = part.module(&path, &kind, &there, alpha)?;
            if let Order::Interleaved(heads) = hints.order(&path, &kind, &name)? {
                module.reorder(&path, &name, heads, false)?;
            }
            if let Some(base) = &hints.base {
                base.fits(&name, &module)?;
            }
            if modules.insert(name.clone(), module).is_some() {
                return Err(refused(&path, format!("two of its modules are named `{name}`")));
            }
        }
        let model = settings.get("base_model_name_or_path").or(settings.get("model")).and_then(Value::as_str).map(String::from);
        Ok(Self { path, modules, model, others })
    }

    /// The number of modules.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// The other models of a pipeline for which the file holds updates; these are not in this adapter.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// Sets the element type of every tensor. An element that overflows it is refused when the adapter is written.
    #[must_use]
    pub fn stored_as(mut self, dtype: DType) -> Self {
        self.modules.values_mut().flat_map(Module::tensors).for_each(|tensor| tensor.dtype = dtype);
        self
    }

    /// Writes a PEFT folder. Errors: [`Error::File`](crate::Error::File).
    pub fn write_peft(&self, dir: &Path) -> Result<()> {
        publish(&[(dir.into(), &self.config()?, self.tensors(&Kind::Peft, |name, _| Ok(name.into()))?)])
    }

    /// The adapter as a PEFT folder in memory.
    pub(super) fn folder(&self) -> Result<Folder> {
        let tensors = serialize("", &self.tensors(&Kind::Peft, |name, _| Ok(name.into()))?)?;
        Folder::parse(self.config()?.to_json().as_bytes(), &tensors)
    }

    /// PEFT's settings, with the rank and the scaling of each module.
    fn config(&self) -> Result<AdapterConfig> {
        let ranks = self.modules.iter().map(|(name, module)| (name.clone(), (module.rank(), number(module.alpha))));
        let mut settings = folder::settings(&ranks.collect());
        settings.push(("use_dora", json!(self.magnitudes()?)));
        settings.push(("base_model_name_or_path", json!(self.model)));
        let config = AdapterConfig::with_defaults(settings)?;
        for (name, module) in &self.modules {
            let update = config.lora_config(name).map(|update| (update.rank, update.scaling.of(update.alpha, update.rank)));
            if update != Some((module.rank(), module.scaling() as f32)) {
                return Err(refused(&self.path, format!("`{name}` cannot be told from other modules by the end of its name")));
            }
        }
        Ok(config)
    }

    /// Writes an mlx-lm folder: `adapters.safetensors`, and settings with the names of all modules. Factors of smaller rank than the
    /// largest are padded with zeros, because mlx-lm has one rank for all modules.
    ///
    /// Errors: [`Error::File`](crate::Error::File), also if scalings differ between modules, and for convolutions.
    pub fn write_mlx_lm(&self, dir: &Path) -> Result<()> {
        let scale = self.only("scaling", Module::scaling)?;
        let rank = self.modules.values().map(Module::rank).max().unwrap_or(0);
        let mut padded = self.clone();
        for (name, module) in &mut padded.modules {
            if module.a.shape.len() != 2 {
                return Err(refused(&self.path, format!("`{name}` is a convolution, which mlx-lm has no adapters for")));
            }
            module.pad(rank);
        }
        let tensors = padded.tensors(&Kind::MlxLm, |name, _| Ok(name.into()))?;
        let dora = if self.magnitudes()? { "dora" } else { "lora" };
        let keys: Vec<&String> = self.modules.keys().collect();
        let config = json!({
            "fine_tune_type": dora,
            "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": rank, "scale": scale},
            "model": self.model,
            "num_layers": -1,
        });
        let files =
            [(super::recognise::MLX_TENSORS, serialize("", &tensors)?), (CONFIG_FILE, format!("{config:#}\n").into_bytes())];
        write_files(files.into_iter().map(|(name, bytes)| (dir.to_path_buf(), name, bytes)).collect())
    }

    /// Writes a file with kohya's names, `prefix_MODULE.lora_down.weight`. The prefix names the model, such as `lora_unet` or `lora_te`;
    /// `None` derives it from the names of modules. Errors: [`Error::File`](crate::Error::File), also if it cannot be derived.
    pub fn write_kohya(&self, out: &Path, prefix: Option<&str>) -> Result<()> {
        let flat = |name: &str, _: &Module| {
            let unknown = || {
                refused(
                    &self.path,
                    format!(
                        "the name `{name}` does not show which model it belongs to; give `--prefix`, such as lora_unet or lora_te"
                    ),
                )
            };
            let prefix = prefix.or(prefix_for(name)).ok_or_else(unknown)?;
            Ok(format!("{prefix}_{}", name.replace('.', "_")))
        };
        let tensors = self.tensors(&Kind::Kohya, flat)?;
        file::write_whole(out, &serialize("", &tensors)?)
    }

    /// Writes a LoRA of llama.cpp for this model. Errors: [`Error::File`](crate::Error::File), also for a model or modules whose names in
    /// llama.cpp are not known here, for magnitudes, and if alphas differ between modules.
    pub fn write_gguf(&self, out: &Path, base: &Base) -> Result<()> {
        let family = base.family()?;
        if self.magnitudes()? {
            return Err(refused(&self.path, "has magnitudes (DoRA), which llama.cpp does not read".into()));
        }
        // llama.cpp takes an alpha of 0 as a scaling of 1.
        let plain = self.modules.values().all(|module| module.scaling() == 1.0);
        let alpha = if plain { 0.0 } else { self.only("lora_alpha", |module| module.alpha)? };
        if alpha == 0.0 && !plain {
            return Err(refused(&self.path, "has a scaling of 0, which llama.cpp would read as 1".into()));
        }
        let mut reordered = self.clone();
        for (name, module) in &mut reordered.modules {
            base.fits(name, module)?;
            if let Order::Interleaved(heads) = base.order(name, family.gguf_interleaved)? {
                module.reorder(&self.path, name, heads, true)?;
            }
        }
        let name = |name: &str, _: &Module| {
            let unknown = || refused(&self.path, format!("`{name}` is not a linear layer whose name in llama.cpp is known"));
            renamed(name, Names::Transformers, Names::Gguf).ok_or_else(unknown)
        };
        let tensors: Vec<(String, HostTensor)> = reordered.tensors(&Kind::GgufLora, name)?.into_iter().collect();
        let settings = [
            ("general.architecture", Setting::Text(family.gguf.into())),
            ("general.type", Setting::Text("adapter".into())),
            ("adapter.type", Setting::Text("lora".into())),
            ("adapter.lora.alpha", Setting::Number(alpha)),
        ];
        file::write_whole(out, &gguf::write(&settings, &tensors)?)
    }

    /// The tensors with the names and the layout of a format; `name` maps a module to its name there.
    fn tensors(&self, kind: &Kind, name: impl Fn(&str, &Module) -> Result<String>) -> Result<HostTensors> {
        let mut tensors = HostTensors::new();
        let Some(spelling) = Spelling::of(kind) else { return Ok(tensors) };
        for (module, Module { a, b, magnitude, alpha }) in &self.modules {
            let there = name(module, &self.modules[module])?;
            let mut push = |part: Part, tensor: HostTensor| match spelling.name(&there, part) {
                Some(name) if tensors.insert(name.clone(), tensor).is_some() => {
                    Err(refused(&self.path, format!("two modules become `{name}`")))
                }
                _ => Ok(()),
            };
            let layout = |tensor: &HostTensor| if spelling.transposed { transposed(tensor) } else { Ok(tensor.clone()) };
            push(Part::A, layout(a)?)?;
            push(Part::B, layout(b)?)?;
            push(Part::Alpha, scalar(*alpha, a.dtype))?;
            if let Some(magnitude) = magnitude {
                // kohya stores magnitudes as a column.
                let shape = if *kind == Kind::Kohya { vec![magnitude.values.len(), 1] } else { magnitude.shape.clone() };
                push(Part::Magnitude, HostTensor { shape, ..magnitude.clone() })?;
            }
        }
        Ok(tensors)
    }

    /// True if every module has magnitudes. Errors: [`Error::File`](crate::Error::File) if only some have.
    fn magnitudes(&self) -> Result<bool> {
        let with = self.modules.values().filter(|module| module.magnitude.is_some()).count();
        match with == 0 || with == self.modules.len() {
            true => Ok(with > 0),
            false => Err(refused(&self.path, format!("has magnitudes for {with} of {} modules", self.modules.len()))),
        }
    }

    /// The value of a setting that the format has once for all modules. Errors: [`Error::File`](crate::Error::File) if modules differ.
    fn only(&self, what: &str, setting: impl Fn(&Module) -> f64) -> Result<f64> {
        let mut settings = self.modules.iter().map(|(name, module)| (name, setting(module)));
        let first = settings.next().map_or(1.0, |(_, setting)| setting);
        match settings.find(|(_, setting)| *setting != first) {
            None => Ok(first),
            Some((name, other)) => Err(refused(
                &self.path,
                format!(
                    "`{name}` has the {what} {other} and others {first}, where the format has one for all; `lowrank combine {} --out DIR` \
                     gives every module the scaling 1",
                    self.path.parent().unwrap_or(&self.path).display()
                ),
            )),
        }
    }
}

impl Module {
    /// Pads A with rows and B with columns of zeros to this rank; `B·A` does not change.
    fn pad(&mut self, rank: usize) {
        let (Some(&r), Some(&n)) = (self.a.shape.first(), self.b.shape.first()) else { return };
        if r == rank {
            return;
        }
        let k = self.a.values.len() / r.max(1);
        self.a.values.resize(rank * k, 0.0);
        self.a.shape[0] = rank;
        let row = |i: usize| self.b.values[i * r..][..r].iter().copied().chain(std::iter::repeat_n(0.0, rank - r));
        self.b.values = (0..n).flat_map(row).collect();
        self.b.shape[1] = rank;
        self.alpha *= rank as f64 / r as f64;
    }

    /// Reorders the rows of B and the magnitudes: in each head, the two halves become interleaved, or are separated again.
    fn reorder(&mut self, path: &Path, name: &str, heads: usize, interleave: bool) -> Result<()> {
        let n = self.b.shape.first().copied().unwrap_or(0);
        if heads == 0 || !n.is_multiple_of(2 * heads) {
            return Err(refused(path, format!("`{name}` has {n} rows, want a multiple of 2·{heads} for {heads} heads")));
        }
        let size = n / heads;
        let source = |row: usize| {
            let (head, at) = (row / size, row % size);
            let inside = if interleave { at % 2 * (size / 2) + at / 2 } else { at % (size / 2) * 2 + at / (size / 2) };
            head * size + inside
        };
        for tensor in [&mut self.b].into_iter().chain(&mut self.magnitude) {
            let width = tensor.values.len() / n;
            tensor.values = (0..n).flat_map(|row| tensor.values[source(row) * width..][..width].to_vec()).collect();
        }
        Ok(())
    }
}

/// A transposed matrix. Errors: [`Error::File`](crate::Error::File) for another number of dimensions.
pub(super) fn transposed(tensor: &HostTensor) -> Result<HostTensor> {
    let &[rows, cols] = &tensor.shape[..] else {
        return Err(crate::adapter::tensors::refused(format!("a tensor is {}, want a matrix", spell(&tensor.shape))));
    };
    let matrix = HostMatrix::new((rows, cols), tensor.values.clone())?.transposed();
    Ok(HostTensor { shape: vec![cols, rows], dtype: tensor.dtype, values: matrix.values().to_vec() })
}

/// kohya's alpha as a tensor: in the element type of the factors if that is exact, else in f32.
fn scalar(value: f64, dtype: DType) -> HostTensor {
    use crate::element::{bf16, f16};
    let value = value as f32;
    let holds = match dtype {
        DType::F32 => true,
        DType::F16 => f16::from_f32(value).to_f32() == value,
        DType::BF16 => bf16::from_f32(value).to_f32() == value,
    };
    HostTensor { shape: Vec::new(), dtype: if holds { dtype } else { DType::F32 }, values: vec![value] }
}
