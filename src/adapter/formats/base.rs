//! Information that a file of another format may lack, and that comes from the model or the caller: names of modules, scaling, the order
//! of rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::kind::Kind;
use super::modules::Module;
use super::raw::{Parts, refused};
use super::recognise::{beginning, outline};
use super::spelling::{Names, component, prefixed, renamed};
use crate::adapter::TENSORS_FILE;
use crate::adapter::tensors::spell;
use crate::error::Result;
use crate::file::{self, failed};

/// Information about an adapter that its format may lack, given by the caller.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hints {
    /// The model that the adapter is for.
    pub base: Option<Base>,
    /// Its `lora_alpha`.
    pub alpha: Option<f64>,
    /// The model of a pipeline that the adapter is for, by the prefix of its modules' names: `lora_unet`, `text_encoder`.
    pub prefix: Option<String>,
    /// Pairs of the name of a module in the file and its name in the model.
    pub map: Vec<(String, String)>,
}

/// The part of a model that converting an adapter needs: its config, and the names and shapes of its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    path: PathBuf,
    config: Map<String, Value>,
    /// The shapes of weights, by the name of the module. Empty if there is only a config.
    weights: BTreeMap<String, Vec<usize>>,
}

/// The order of the rows of a query or key projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As in transformers.
    Same,
    /// The two halves of each of this many heads are interleaved, for the rotary embeddings of Llama's original code.
    Interleaved(usize),
}

/// How torchtune and llama.cpp store the models of one family.
pub(super) struct Family {
    model_type: &'static str,
    /// llama.cpp's name of the architecture.
    pub(super) gguf: &'static str,
    pub(super) gguf_interleaved: bool,
    /// True if torchtune interleaves; `None` if it uses other names of modules.
    torchtune_interleaved: Option<bool>,
}

const FAMILIES: [Family; 8] = {
    const fn family(model_type: &'static str, gguf: &'static str, gguf_interleaved: bool, torchtune: Option<bool>) -> Family {
        Family { model_type, gguf, gguf_interleaved, torchtune_interleaved: torchtune }
    }
    [
        family("llama", "llama", true, Some(true)),
        family("mistral", "llama", true, Some(true)),
        family("qwen2", "qwen2", false, Some(false)),
        family("qwen3", "qwen3", false, Some(false)),
        family("gemma", "gemma", false, Some(true)),
        family("gemma2", "gemma2", false, Some(true)),
        family("gemma3_text", "gemma3", false, None),
        family("phi3", "phi3", false, None),
    ]
};

impl Base {
    /// Reads the headers and the `config.json` of a model: a folder, or a safetensors file. A folder with only a config is accepted; the
    /// shapes of weights are not checked then. Errors: [`Error::File`](crate::Error::File).
    pub fn read(path: &Path) -> Result<Self> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let files = if path.is_dir() { safetensors(path)? } else { vec![path.into()] };
        let config = folder.join("config.json");
        let config = if config.exists() {
            let bytes = file::read(&config)?;
            serde_json::from_slice(&bytes).map_err(|error| refused(&config, super::json_damage(&config, &bytes, &error)))?
        } else {
            Map::new()
        };
        let mut weights = BTreeMap::new();
        for file in files {
            let bytes = beginning(&file)?;
            let tensors = outline(&bytes).ok_or_else(|| refused(&file, super::unknown(&bytes)))?;
            let module = |name: &str| name.strip_suffix(".weight").map(String::from);
            weights.extend(tensors.into_iter().filter_map(|tensor| Some((module(&tensor.name)?, tensor.shape))));
        }
        if config.is_empty() && weights.is_empty() {
            return Err(refused(path, "holds no model: neither safetensors nor a config.json".into()));
        }
        Ok(Self { path: path.into(), config, weights })
    }

    /// Errors: [`Error::File`](crate::Error::File) unless the model has a weight of this name, n×k. Not checked if there is only a config.
    pub(super) fn fits(&self, name: &str, module: &Module) -> Result<()> {
        if self.weights.is_empty() {
            return Ok(());
        }
        let Some(shape) = self.weights.get(name) else {
            return Err(refused(&self.path, format!("has no `{name}.weight`, which the adapter changes")));
        };
        let mut want = vec![module.b.shape[0]];
        want.extend(&module.a.shape[1..]);
        match *shape == want {
            true => Ok(()),
            false => {
                Err(refused(&self.path, format!("`{name}.weight` is {}, want {} for the adapter", spell(shape), spell(&want))))
            }
        }
    }

    pub(super) fn family(&self) -> Result<&'static Family> {
        let kind = self.setting("model_type").and_then(Value::as_str).unwrap_or("missing");
        let known = || FAMILIES.map(|family| family.model_type).join(", ");
        let family = FAMILIES.iter().find(|family| family.model_type == kind);
        family.ok_or_else(|| refused(&self.path, format!("its `model_type` is {kind}, want one of {}", known())))
    }

    /// The order of the rows of a module; `interleaved` says whether the format interleaves query and key projections.
    pub(super) fn order(&self, module: &str, interleaved: bool) -> Result<Order> {
        let heads = ["num_attention_heads", "num_key_value_heads"].map(|key| self.setting(key).and_then(Value::as_u64));
        let heads = match module.rsplit('.').next() {
            Some("q_proj") if interleaved => heads[0],
            Some("k_proj") if interleaved => heads[1].or(heads[0]),
            _ => return Ok(Order::Same),
        };
        let missing = || refused(&self.path, "its config.json lacks `num_attention_heads`".into());
        heads.and_then(|heads| usize::try_from(heads).ok()).map(Order::Interleaved).ok_or_else(missing)
    }

    fn setting(&self, key: &str) -> Option<&Value> {
        self.config.get(key)
    }

    /// The modules whose name is `flat` once its dots are replaced by underscores, as kohya's scripts write it.
    fn flat(&self, flat: &str) -> Vec<&String> {
        self.weights.keys().filter(|name| name.replace('.', "_") == flat).collect()
    }
}

impl Hints {
    /// The modules of one model, and the names of the other models in the file. Errors: [`Error::File`](crate::Error::File) if there are
    /// several and none was chosen, or the chosen one is not among them.
    pub(super) fn of_one_model(
        &self,
        path: &Path,
        kind: &Kind,
        parts: BTreeMap<String, Parts>,
    ) -> Result<(BTreeMap<String, Parts>, Vec<String>)> {
        if !matches!(kind, Kind::Kohya | Kind::Diffusers) {
            return Ok((parts, Vec::new()));
        }
        let models: BTreeSet<&str> = parts.keys().map(|module| model_of(module)).collect();
        let listed = models.iter().copied().collect::<Vec<_>>().join(", ");
        let chosen = match (&self.prefix, models.len()) {
            (Some(prefix), _) if models.contains(prefix.as_str()) => prefix.clone(),
            (Some(prefix), _) => return Err(refused(path, format!("holds nothing for `{prefix}`, only for {listed}"))),
            (None, 0 | 1) => listed.clone(),
            (None, _) => {
                return Err(refused(path, format!("holds updates of several models; choose one with `--prefix`: {listed}")));
            }
        };
        let others = models.into_iter().filter(|model| *model != chosen).map(String::from).collect();
        Ok((parts.into_iter().filter(|(module, _)| model_of(module) == chosen).collect(), others))
    }

    /// The name that a module of the file has in transformers or diffusers.
    pub(super) fn named(&self, path: &Path, kind: &Kind, there: &str) -> Result<String> {
        if let Some((_, name)) = self.map.iter().find(|(old, _)| old == there) {
            return Ok(name.clone());
        }
        let unknown = |why: &str| Err(refused(path, format!("`{there}` {why}; `--map {there}=MODULE` names its module")));
        match kind {
            Kind::Kohya => match (prefixed(there), &self.base) {
                (None, _) => Ok(component(there).map_or(there, |(_, rest)| rest).into()),
                (Some(_), None) => {
                    Err(refused(path, format!("`{there}` has underscores instead of dots; name its model with `--base`")))
                }
                (Some((_, flat)), Some(base)) => match base.flat(flat)[..] {
                    [name] => Ok(name.clone()),
                    [] => unknown(&format!("is no module of {}", base.path.display())),
                    _ => unknown(&format!("may be several modules of {}", base.path.display())),
                },
            },
            Kind::Diffusers => {
                let name = component(there).map_or(there, |(_, rest)| rest);
                Ok(name.replace(".processor.to_out", ".to_out.0").replace(".processor.", "."))
            }
            Kind::CandleLora => unknown("is a number instead of a name"),
            Kind::Torchtune | Kind::GgufLora => {
                let names = if *kind == Kind::Torchtune { Names::Torchtune } else { Names::Gguf };
                renamed(there, names, Names::Transformers).map_or_else(|| unknown("is no layer whose name is known"), Ok)
            }
            _ => Ok(there.into()),
        }
    }

    /// The order of the rows of a module in the file.
    pub(super) fn order(&self, path: &Path, kind: &Kind, name: &str) -> Result<Order> {
        let rotated = ["q_proj", "k_proj"].iter().any(|end| name.ends_with(end));
        if !matches!(kind, Kind::Torchtune | Kind::GgufLora) || !rotated {
            return Ok(Order::Same);
        }
        let Some(base) = &self.base else {
            return Err(refused(path, format!("orders the rows of `{name}` by heads; name its model with `--base`")));
        };
        let family = base.family()?;
        let interleaved = if *kind == Kind::Torchtune { family.torchtune_interleaved } else { Some(family.gguf_interleaved) };
        match interleaved {
            Some(interleaved) => base.order(name, interleaved),
            None => Err(refused(&base.path, format!("its `model_type` {} is not known for this format", family.model_type))),
        }
    }
}

/// The prefix of a module's name that names the model, in formats whose files may hold several models.
fn model_of(module: &str) -> &str {
    prefixed(module).or(component(module)).map_or("", |(model, _)| model)
}

/// The safetensors files of a folder, except that of an adapter.
fn safetensors(dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let paths: Vec<PathBuf> = listed.map_err(|error| failed(dir, error))?;
    let of_model = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors") && !path.ends_with(TENSORS_FILE);
    Ok(paths.into_iter().filter(of_model).collect())
}
