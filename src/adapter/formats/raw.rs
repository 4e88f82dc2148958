//! The tensors of an adapter in any format, grouped by module, with the scalings that the file contains.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::gguf::{Header, Setting};
use super::kind::Kind;
use super::modules::{Module, transposed};
use super::recognise::{Recognised, header, recognise};
use super::spelling::{Part, Spelling, component};
use crate::adapter::tensors::spell;
use crate::adapter::{AdapterConfig, CONFIG_FILE, HostTensor, HostTensors, at, parse_tensors};
use crate::error::{Error, Result};
use crate::file;

/// Names of embeddings. Their updates are stored like those of linear layers, but with another meaning.
const EMBEDDINGS: [&str; 4] = ["embed_tokens", "tok_embeddings", "word_embeddings", "wte"];

/// The stored tensors of an adapter, by module.
pub(super) struct Raw {
    /// The file with the tensors.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) parts: BTreeMap<String, Parts>,
    /// The `adapter_config.json` beside the file; empty if there is none.
    pub(super) settings: Map<String, Value>,
    /// The scaling times the rank, for modules whose scaling is known.
    pub(super) alphas: BTreeMap<String, f64>,
}

/// The tensors of a module, as they are stored.
#[derive(Default)]
pub(super) struct Parts(BTreeMap<Part, HostTensor>);

impl Raw {
    /// Reads a file or a folder. Errors: [`Error::File`] if it is no adapter or is damaged, and for tensors that are not part of its
    /// format.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let Recognised { kind, path: file } = recognise(path)?;
        let spelling = match Spelling::of(&kind) {
            Some(spelling) => spelling,
            None if kind == Kind::Checkpoint => return Err(refused(&file, "is a model, where an adapter is needed".into())),
            None => return Err(Recognised { kind, path: file }.refusal()),
        };
        let bytes = file::read(&file)?;
        let (tensors, gguf_alpha) = match kind {
            Kind::GgufLora => from_gguf(&file, &bytes)?,
            _ => (parse_tensors(&bytes).map_err(|error| in_file(&file, error))?, None),
        };
        let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some((module, part)) = spelling.part(&name) else {
                return Err(refused(&file, format!("`{name}` is not a part of an update B·A, so it would be lost")));
            };
            if parts.entry(module).or_default().0.insert(part, tensor).is_some() {
                return Err(refused(&file, format!("`{name}` occurs in two spellings")));
            }
        }
        let settings = settings(&file)?;
        let mut raw = Self { path: file, kind, parts, settings, alphas: BTreeMap::new() };
        raw.alphas = raw.known_alphas(&bytes, gguf_alpha)?;
        Ok(raw)
    }

    /// The distinct ranks of the modules.
    pub(super) fn ranks(&self) -> BTreeSet<usize> {
        let side = usize::from(Spelling::of(&self.kind).is_some_and(|spelling| spelling.transposed));
        self.parts.values().filter_map(|parts| parts.0.get(&Part::A)?.shape.get(side).copied()).collect()
    }

    /// The scaling times the rank of every module whose scaling is known.
    fn known_alphas(&self, bytes: &[u8], gguf: Option<f64>) -> Result<BTreeMap<String, f64>> {
        let mut alphas = BTreeMap::new();
        let config = self.config(bytes)?;
        let number = |settings: &Map<String, Value>, key: &str| settings.get(key).and_then(Value::as_f64);
        let mlx = self.settings.get("lora_parameters").and_then(Value::as_object);
        for (module, parts) in &self.parts {
            let Some(a) = parts.0.get(&Part::A) else { continue };
            let rank = |side: usize| a.shape.get(side).map(|&rank| rank as f64);
            let alpha = match self.kind {
                Kind::Kohya | Kind::Diffusers => match parts.0.get(&Part::Alpha) {
                    Some(HostTensor { values, .. }) if values.len() == 1 => Some(f64::from(values[0])),
                    Some(other) => {
                        return Err(refused(
                            &self.path,
                            format!("the alpha of `{module}` is {}, want one number", spell(&other.shape)),
                        ));
                    }
                    None => config.as_ref().and_then(|config| alpha(config, component(module)?.1)).or(rank(0)),
                },
                Kind::Peft => config.as_ref().and_then(|config| alpha(config, module)),
                Kind::GgufLora => gguf.filter(|&alpha| alpha != 0.0).or(rank(0)),
                Kind::MlxLm => mlx.and_then(|mlx| number(mlx, "scale")).zip(rank(1)).map(|(scale, rank)| scale * rank),
                _ => number(&self.settings, "lora_alpha"),
            };
            if let Some(alpha) = alpha {
                alphas.insert(module.clone(), alpha);
            }
        }
        Ok(alphas)
    }

    /// PEFT's settings: from the file beside the tensors, or from the metadata that diffusers writes.
    fn config(&self, bytes: &[u8]) -> Result<Option<AdapterConfig>> {
        let document = match self.kind {
            Kind::Peft if self.settings.is_empty() => return Err(refused(&self.path, format!("has no {CONFIG_FILE} beside it"))),
            Kind::Peft => self.settings.clone(),
            Kind::Diffusers => match diffusers_settings(bytes, self.parts.keys()) {
                Some(settings) => settings,
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        let text = Value::Object(document).to_string();
        let config =
            AdapterConfig::from_json(text.as_bytes()).map_err(|error| at(self.path.parent().unwrap_or(Path::new("")), error))?;
        match config.principal() {
            Some(part) => Err(refused(
                &self.path,
                format!(
                    "was initialised with a part of the weights ({}), which can be computed only from its model",
                    part.name()
                ),
            )),
            None => Ok(Some(config)),
        }
    }
}

/// `lora_alpha`, or the scaling times the rank if the scaling is not `lora_alpha / r`.
fn alpha(config: &AdapterConfig, module: &str) -> Option<f64> {
    use crate::nn::Scaling;
    let update = config.lora_config(module)?;
    Some(match update.scaling {
        Scaling::AlphaOverRank => f64::from(update.alpha),
        scaling => f64::from(scaling.of(update.alpha, update.rank)) * update.rank as f64,
    })
}

/// The settings that diffusers writes into the metadata of a file; `None` if the file is for several models.
fn diffusers_settings<'m>(bytes: &[u8], modules: impl Iterator<Item = &'m String>) -> Option<Map<String, Value>> {
    let models: BTreeSet<&str> = modules.filter_map(|module| Some(component(module)?.0)).collect();
    let [model] = models.into_iter().collect::<Vec<_>>()[..] else { return None };
    let header = header(bytes)?;
    let text = header.get("__metadata__")?.get("lora_adapter_metadata")?.as_str()?;
    let all: Map<String, Value> = serde_json::from_str(text).ok()?;
    let of_model = |(key, value): (String, Value)| Some((key.strip_prefix(model)?.strip_prefix('.')?.to_string(), value));
    let mut settings: Map<String, Value> = all.into_iter().filter_map(of_model).collect();
    settings.insert("peft_type".into(), json!("LORA"));
    settings.contains_key("target_modules").then_some(settings)
}

/// The `adapter_config.json` beside a file. Errors: [`Error::File`] for one that is no JSON object.
fn settings(file: &Path) -> Result<Map<String, Value>> {
    let path = file.with_file_name(CONFIG_FILE);
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = file::read(&path)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(text).map_err(|error| refused(&path, super::json_damage(&path, &bytes, &error)))
}

fn from_gguf(path: &Path, bytes: &[u8]) -> Result<(HostTensors, Option<f64>)> {
    let header = Header::parse(bytes).ok_or_else(|| refused(path, "is a GGUF file that is truncated or damaged".into()))?;
    let tensor = |info| {
        let Some(tensor) = header.tensor(bytes, info) else {
            let reason = format!("`{}` is incomplete or quantised; only F32, F16 and BF16 are read", info.name);
            return Err(refused(path, reason));
        };
        Ok((info.name.clone(), tensor))
    };
    let alpha = match header.settings.get("adapter.lora.alpha") {
        Some(&Setting::Number(alpha)) => Some(alpha),
        _ => None,
    };
    Ok((header.tensors.iter().map(tensor).collect::<Result<_>>()?, alpha))
}

impl Parts {
    /// The module, with factors in PEFT's layout. Errors: [`Error::File`] for missing tensors, and shapes that do not fit one another.
    pub(super) fn module(mut self, path: &Path, kind: &Kind, name: &str, alpha: Option<f64>) -> Result<Module> {
        if EMBEDDINGS.iter().any(|embedding| name.rsplit(['.', '_']).next() == Some(embedding) || name.ends_with(embedding)) {
            return Err(refused(path, format!("`{name}` is an embedding, whose updates are not converted")));
        }
        let missing = |what: &str| refused(path, format!("`{name}` has no {what}; the file is incomplete"));
        let (a, b) = (self.0.remove(&Part::A).ok_or_else(|| missing("A"))?, self.0.remove(&Part::B).ok_or_else(|| missing("B"))?);
        let is_transposed = Spelling::of(kind).is_some_and(|spelling| spelling.transposed);
        let shapes = format!("`{name}` has factors {} and {}", spell(&a.shape), spell(&b.shape));
        let unfit = |want: &str| refused(path, format!("{shapes}, {want}"));
        let (a, b) = match is_transposed {
            true if a.shape.len() != 2 || b.shape.len() != 2 => {
                return Err(unfit("want k×r and r×n; those of experts are not converted"));
            }
            true => (transposed(&a)?, transposed(&b)?),
            false => (a, b),
        };
        let kernel = |shape: &[usize]| shape.len() >= 2 && shape.iter().all(|&side| side > 0);
        let pair = kernel(&a.shape) && a.shape.len() == b.shape.len() && a.shape[0] == b.shape[1];
        if !pair || b.shape[2..].iter().any(|&side| side != 1) {
            return Err(unfit("want r×k and n×r of one rank; layers that were fused (loralib's MergedLinear) are not converted"));
        }
        let n = b.shape[0];
        let magnitude = self.0.remove(&Part::Magnitude);
        if let Some(other) =
            magnitude.as_ref().filter(|magnitude| magnitude.values.len() != n || magnitude.shape.first() != Some(&n))
        {
            return Err(unfit(&format!("and magnitudes {}, want one for each of {n} rows", spell(&other.shape))));
        }
        let magnitude = magnitude.map(|magnitude| HostTensor { shape: vec![n], ..magnitude });
        let unknown = || refused(path, format!("does not contain the scaling of `{name}`; give its lora_alpha with `--alpha`"));
        let alpha = alpha.ok_or_else(unknown)?;
        if !alpha.is_finite() {
            return Err(refused(path, format!("`{name}` has an alpha of {alpha}")));
        }
        Ok(Module { a, b, magnitude, alpha })
    }
}

/// Adds the path of the file to an error.
fn in_file(file: &Path, error: Error) -> Error {
    match error {
        Error::File { reason, .. } => refused(file, reason),
        other => other,
    }
}

pub(super) fn refused(path: &Path, reason: String) -> Error {
    Error::File { path: path.into(), reason }
}
