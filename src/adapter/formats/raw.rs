//! The tensors of an adapter in any format, grouped by module, with what is told of their scaling.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::gguf::{Header, Setting};
use super::kind::Kind;
use super::modules::{Module, transposed};
use super::recognise::{Thing, header, recognise};
use super::spelling::{Part, Spelling, component};
use crate::adapter::tensors::spell;
use crate::adapter::{AdapterConfig, CONFIG_FILE, HostTensor, HostTensors, at, parse_tensors};
use crate::error::{Error, Result};
use crate::file;

/// Names of modules whose weight is looked up and not multiplied with: their updates are stored alike and mean something else.
const EMBEDDINGS: [&str; 4] = ["embed_tokens", "tok_embeddings", "word_embeddings", "wte"];

/// An adapter as it is stored, module by module.
pub(super) struct Raw {
    /// The file with the tensors.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) parts: BTreeMap<String, Parts>,
    /// The `adapter_config.json` beside the file, or nothing.
    pub(super) settings: Map<String, Value>,
    /// Scaling times rank, for modules of which it is told.
    pub(super) alphas: BTreeMap<String, f64>,
}

/// The tensors of a module, as they are stored.
#[derive(Default)]
pub(super) struct Parts(BTreeMap<Part, HostTensor>);

impl Raw {
    /// Errors: [`Error::File`] for what is no adapter or is damaged, and for tensors that have no place in its format.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let Thing { kind, path: file } = recognise(path)?;
        let spelling = match Spelling::of(&kind) {
            Some(spelling) => spelling,
            None if kind == Kind::Checkpoint => return Err(refused(&file, "is a model, where an adapter is wanted".into())),
            None => return Err(Thing { kind, path: file }.refused()),
        };
        let bytes = file::read(&file)?;
        let (tensors, told) = match kind {
            Kind::GgufLora => from_gguf(&file, &bytes)?,
            _ => (parse_tensors(&bytes).map_err(|error| in_file(&file, error))?, None),
        };
        let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some((module, part)) = spelling.part(&name) else {
                return Err(refused(&file, format!("`{name}` is not a part of an update B·A, so it would be lost")));
            };
            if parts.entry(module).or_default().0.insert(part, tensor).is_some() {
                return Err(refused(&file, format!("`{name}` is there in two spellings")));
            }
        }
        let settings = settings(&file)?;
        let mut raw = Self { path: file, kind, parts, settings, alphas: BTreeMap::new() };
        raw.alphas = raw.told(&bytes, told)?;
        Ok(raw)
    }

    /// The ranks there are.
    pub(super) fn ranks(&self) -> BTreeSet<usize> {
        let side = usize::from(Spelling::of(&self.kind).is_some_and(|spelling| spelling.transposed));
        self.parts.values().filter_map(|parts| parts.0.get(&Part::A)?.shape.get(side).copied()).collect()
    }

    /// Scaling times rank of every module of which it is told.
    fn told(&self, bytes: &[u8], gguf: Option<f64>) -> Result<BTreeMap<String, f64>> {
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

    /// PEFT's settings: beside the file, or as diffusers writes them into it.
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
        match config.began_with() {
            Some(part) => Err(refused(
                &self.path,
                format!("began with a part of the weights ({}), which only its model can tell", part.name()),
            )),
            None => Ok(Some(config)),
        }
    }
}

/// `lora_alpha`, or what comes to the scaling where that is not `lora_alpha / r`.
fn alpha(config: &AdapterConfig, module: &str) -> Option<f64> {
    use crate::nn::Scaling;
    let told = config.lora_config(module)?;
    Some(match told.scaling {
        Scaling::AlphaOverRank => f64::from(told.alpha),
        scaling => f64::from(scaling.of(told.alpha, told.rank)) * told.rank as f64,
    })
}

/// The settings that diffusers puts into the metadata of a file, for the one model that it is of.
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
    let header = Header::parse(bytes).ok_or_else(|| refused(path, "is a GGUF file that is cut short or damaged".into()))?;
    let tensor = |info| {
        let Some(tensor) = header.tensor(bytes, info) else {
            let reason = format!("`{}` is not all there, or is quantised; only F32, F16 and BF16 are read", info.name);
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
    /// The module: factors laid out as PEFT has them, checked against each other.
    pub(super) fn module(mut self, path: &Path, kind: &Kind, name: &str, alpha: Option<f64>) -> Result<Module> {
        if EMBEDDINGS.iter().any(|embedding| name.rsplit(['.', '_']).next() == Some(embedding) || name.ends_with(embedding)) {
            return Err(refused(path, format!("`{name}` is an embedding, whose updates are not converted")));
        }
        let missing = |what: &str| refused(path, format!("`{name}` has no {what}; the file is not complete"));
        let (a, b) = (self.0.remove(&Part::A).ok_or_else(|| missing("A"))?, self.0.remove(&Part::B).ok_or_else(|| missing("B"))?);
        let turned = Spelling::of(kind).is_some_and(|spelling| spelling.transposed);
        let shapes = format!("`{name}` has factors {} and {}", spell(&a.shape), spell(&b.shape));
        let unfit = |want: &str| refused(path, format!("{shapes}, {want}"));
        let (a, b) = match turned {
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
        let untold = || refused(path, format!("does not tell how `{name}` is scaled; give its lora_alpha with `--alpha`"));
        let alpha = alpha.ok_or_else(untold)?;
        if !alpha.is_finite() {
            return Err(refused(path, format!("`{name}` has an alpha of {alpha}")));
        }
        Ok(Module { a, b, magnitude, alpha })
    }
}

/// The same error, with the file that it speaks of.
fn in_file(file: &Path, error: Error) -> Error {
    match error {
        Error::File { reason, .. } => refused(file, reason),
        other => other,
    }
}

pub(super) fn refused(path: &Path, reason: String) -> Error {
    Error::File { path: path.into(), reason }
}
