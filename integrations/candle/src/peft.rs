//! Adapters of whole models, by name, as PEFT has them: a model lends its layers, and the rest is written once.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank::adapter::{AdapterConfig, Factors, Folder, Kind, TargetModules};
use lowrank::nn::{LoraConfig, ParameterReport};
use lowrank::random::Rng;

use crate::linear::{Adapter, LoraLinear};
use crate::{Error, Result};

/// The file of an adapter's settings, in its folder.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// A model whose linear layers can have adapters: [`CausalLm`](crate::CausalLm), or one's own.
///
/// The names are those that PEFT's files have for the layers, such as `model.layers.0.self_attn.q_proj`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lowrank_candle::{Adaptable, LoraConfig, LoraLinear, Rng, TargetModules};
///
/// struct Model {
///     layers: [(&'static str, LoraLinear); 2],
/// }
///
/// impl Adaptable for Model {
///     fn layers(&self) -> impl Iterator<Item = (&str, &LoraLinear)> {
///         self.layers.iter().map(|(name, layer)| (*name, layer))
///     }
///     fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut LoraLinear)> {
///         self.layers.iter_mut().map(|(name, layer)| (*name, layer))
///     }
/// }
///
/// let layer = || LoraLinear::new(Tensor::randn(0f32, 1.0, (4, 4), &Device::Cpu)?, None);
/// let mut model = Model { layers: [("up_proj", layer()?), ("down_proj", layer()?)] };
/// model.add_adapter("default", TargetModules::AllLinear, &LoraConfig::new(2, 4.0), &mut Rng::new(0))?;
/// assert_eq!(model.parameter_report().introduced, 2 * 2 * (4 + 4));
/// # Ok::<(), lowrank_candle::Error>(())
/// ```
pub trait Adaptable {
    /// The layers by name, first to last, each name once.
    fn layers(&self) -> impl Iterator<Item = (&str, &LoraLinear)>;

    /// The same layers in the same order.
    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut LoraLinear)>;

    /// The name of the output layer, which `all-linear` leaves out.
    fn head(&self) -> Option<&str> {
        None
    }

    /// How many numbers of the model are in no layer, such as embeddings.
    fn other_count(&self) -> usize {
        0
    }

    /// What adapters say they are for: `base_model_name_or_path`.
    fn base_name(&self) -> Option<String> {
        None
    }

    /// What adapters say they are for, by PEFT's names: `task_type`.
    fn task_type(&self) -> Option<&str> {
        None
    }

    /// A new adapter beside each target, in place of one of this name. The first of a model is active.
    ///
    /// Errors: for settings out of range or not supported, targets that pick no layer, a name with a dot or a slash, and while an adapter
    /// is merged. Nothing is changed then.
    fn add_adapter(&mut self, name: &str, targets: TargetModules<'_>, config: &LoraConfig, rng: &mut Rng) -> Result<()> {
        let told = AdapterConfig::new(config, targets)?;
        let head = self.head().filter(|_| targets == TargetModules::AllLinear);
        let mut parts = Vec::new();
        for (layer, there) in self.layers().filter(|(layer, _)| Some(*layer) != head) {
            if told.lora_config(layer).is_some() {
                parts.push((layer.to_string(), Adapter::new(there.shape(), config, rng)?));
            }
        }
        check_targets(self, targets, &parts)?;
        insert(self, name, parts)
    }

    /// The adapter of a folder as PEFT writes it, under a name, in place of one of this name. The first of a model is active. Returns
    /// the settings of the folder.
    ///
    /// Errors: for a folder that is missing, damaged, or does not fit the model, and settings that are not supported: DoRA, biases, whole
    /// modules, adapters that began with a part of the weights. Nothing is changed then.
    fn load_adapter(&mut self, name: &str, dir: impl AsRef<Path>) -> Result<AdapterConfig> {
        let dir = dir.as_ref();
        let folder = Folder::read(dir)?;
        let refuse = |problem: String| Error::file(&dir.join(ADAPTER_CONFIG), problem);
        if let Some(began) = folder.config().principal() {
            return Err(refuse(format!("`init_lora_weights` is {}, which is not supported here", began.name())));
        }
        if let Some(extra) = folder.extras().keys().next() {
            return Err(refuse(format!("`{extra}` is there beside the factors, which is not supported here")));
        }
        let mut parts = Vec::new();
        for (module, factors) in folder.modules() {
            let shape = self.layers().find(|(layer, _)| layer == module).map(|(_, there)| there.shape());
            let config = folder.config().lora_config(module).filter(|_| *folder.kind(module) == Kind::Linear);
            let (Some(shape), Some(config)) = (shape, config) else {
                return Err(refuse(format!("adapts `{module}`, which is no layer of the model that can have adapters")));
            };
            let adapter = Adapter::from_factors(shape, factors, config);
            parts.push((module.clone(), adapter.map_err(|error| refuse(format!("{error}, in `{module}`")))?));
        }
        insert(self, name, parts)?;
        Ok(folder.config().clone())
    }

    /// Writes an adapter as PEFT would: `adapter_config.json` and `adapter_model.safetensors`, whole or not at all.
    ///
    /// Errors: for a name that no adapter has, and files that cannot be written.
    fn save_adapter(&self, name: &str, dir: impl AsRef<Path>) -> Result<()> {
        check_names(self, &[name])?;
        to_folder(self, name)?.write(dir.as_ref()).map_err(Error::from)
    }

    /// The names of all adapters.
    fn adapter_names(&self) -> Vec<&str> {
        unique(self.layers().flat_map(|(_, layer)| layer.adapters().map(|(name, _)| name)))
    }

    /// The names of those that take part.
    fn active_adapters(&self) -> Vec<&str> {
        unique(self.layers().flat_map(|(_, layer)| layer.active().iter().map(String::as_str)))
    }

    /// The names of those that are merged into the weights.
    fn merged_adapters(&self) -> Vec<&str> {
        unique(self.layers().flat_map(|(_, layer)| layer.merged()))
    }

    /// The layers that an adapter changes, and its updates.
    fn adapters<'s>(&'s self, name: &'s str) -> impl Iterator<Item = (&'s str, &'s Adapter)> {
        self.layers().filter_map(move |(layer, there)| Some((layer, there.adapter(name)?)))
    }

    /// Makes these take part, added up, and no others; an empty list is the base model.
    ///
    /// Errors: for a name that no adapter has, and while one is merged. Nothing is changed then.
    fn set_active(&mut self, names: &[&str]) -> Result<()> {
        check_names(self, names)?;
        check_unmerged(self)?;
        self.layers_mut().try_for_each(|(_, layer)| layer.set_active(names))
    }

    /// Switches the adapters on or off. Errors: while one is merged.
    fn set_adapters_enabled(&mut self, enabled: bool) -> Result<()> {
        check_unmerged(self)?;
        self.layers_mut().try_for_each(|(_, layer)| layer.set_enabled(enabled))
    }

    /// Makes the scaling of an adapter `scale` times what its settings say. Not saved.
    ///
    /// Errors: for a name that no adapter has, while one is merged, and unless `scale` is finite.
    fn set_scale(&mut self, name: &str, scale: f32) -> Result<()> {
        check_names(self, &[name])?;
        check_unmerged(self)?;
        self.layers_mut().try_for_each(|(_, layer)| layer.set_scale(name, scale))
    }

    /// Takes an adapter away. Errors: for a name that no adapter has, and while one is merged.
    fn delete_adapter(&mut self, name: &str) -> Result<()> {
        check_names(self, &[name])?;
        check_unmerged(self)?;
        self.layers_mut().try_for_each(|(_, layer)| layer.remove(name))
    }

    /// Merges these adapters into the weights, in this order, on top of those that are merged.
    ///
    /// Errors: for a name that no adapter has, while adapters are off, and for numbers that would not be finite. Nothing is changed then.
    fn merge_adapters(&mut self, names: &[&str]) -> Result<()> {
        check_names(self, names)?;
        let before: Vec<usize> = self.layers().map(|(_, layer)| layer.merged().count()).collect();
        let Err(error) = self.layers_mut().try_for_each(|(_, layer)| layer.merge(names)) else { return Ok(()) };
        self.layers_mut().zip(before).try_for_each(|((_, layer), before)| layer.unmerge_down_to(before))?;
        Err(error)
    }

    /// Takes every merged adapter out of the weights, which then are what they were, bit for bit.
    fn unmerge_adapters(&mut self) -> Result<()> {
        self.layers_mut().try_for_each(|(_, layer)| layer.unmerge())
    }

    /// Merges the active adapters and takes all away: a plain model that does what this one did.
    ///
    /// Errors: those of [`merge_adapters`](Self::merge_adapters). Nothing is changed then.
    fn merge_and_unload(&mut self) -> Result<()> {
        let active: Vec<String> = self.active_adapters().into_iter().map(String::from).collect();
        self.merge_adapters(&active.iter().map(String::as_str).collect::<Vec<_>>())?;
        self.layers_mut().for_each(|(_, layer)| layer.unload());
        Ok(())
    }

    /// How many numbers there are, how many the adapters add, and how many of the active ones are trained.
    #[doc(alias = "print_trainable_parameters")]
    fn parameter_report(&self) -> ParameterReport {
        let count = |adapter: &Adapter| adapter.a().elem_count() + adapter.b().elem_count();
        let mut report = ParameterReport { original: self.other_count(), introduced: 0, trainable: 0 };
        for (_, layer) in self.layers() {
            report.original += layer.count();
            report.introduced += layer.adapters().map(|(_, adapter)| count(adapter)).sum::<usize>();
            let active = layer.adapters().filter(|(name, _)| layer.active().iter().any(|active| active == name));
            report.trainable += active.map(|(_, adapter)| count(adapter)).sum::<usize>();
        }
        report
    }
}

/// Errors: for the first of these that no layer has.
pub(crate) fn check_names(model: &(impl Adaptable + ?Sized), names: &[&str]) -> Result<()> {
    let known = model.adapter_names();
    match names.iter().find(|name| !known.contains(name)) {
        Some(name) => Err(lowrank::Error::NoSuchAdapter { name: name.to_string(), known: known.join(", ") }.into()),
        None => Ok(()),
    }
}

/// Errors: while an adapter is merged.
pub(crate) fn check_unmerged(model: &(impl Adaptable + ?Sized)) -> Result<()> {
    model.layers().try_for_each(|(_, layer)| layer.unmerged())
}

/// Errors: for a target that picks no layer.
fn check_targets(model: &(impl Adaptable + ?Sized), targets: TargetModules<'_>, parts: &[(String, Adapter)]) -> Result<()> {
    let ends = |layer: &str, name: &str| layer.strip_suffix(name).is_some_and(|above| above.is_empty() || above.ends_with('.'));
    let unknown = match targets {
        TargetModules::Names(names) => names.iter().find(|name| !parts.iter().any(|(layer, _)| ends(layer, name))).cloned(),
        TargetModules::Matching(pattern) => parts.is_empty().then(|| pattern.to_string()),
        TargetModules::AllLinear => parts.is_empty().then(|| "all-linear".to_string()),
    };
    let known = || unique(model.layers().map(|(layer, _)| layer.rsplit('.').next().unwrap_or(layer))).join(", ");
    unknown.map_or(Ok(()), |name| Err(lowrank::Error::NoSuchLayer { name, known: known() }.into()))
}

/// Gives the model an adapter, in place of one of this name as a whole.
fn insert(model: &mut (impl Adaptable + ?Sized), name: &str, parts: Vec<(String, Adapter)>) -> Result<()> {
    check_unmerged(model)?;
    let active = model.active_adapters();
    let activate = active.is_empty() || active.contains(&name);
    for (layer, adapter) in &parts {
        let there = model.layers().find(|(known, _)| known == layer).map(|(_, there)| there);
        there.map_or(Ok(()), |there| there.check_insert(name, adapter))?;
    }
    let mut parts: BTreeMap<String, Adapter> = parts.into_iter().collect();
    for (layer, there) in model.layers_mut() {
        match parts.remove(layer) {
            Some(adapter) => there.insert(name, adapter, activate)?,
            None => there.remove(name)?,
        }
    }
    Ok(())
}

/// An adapter as a folder.
fn to_folder(model: &(impl Adaptable + ?Sized), name: &str) -> Result<Folder> {
    let mut modules: BTreeMap<String, Factors> = BTreeMap::new();
    let mut configs: Vec<&LoraConfig> = Vec::new();
    for (layer, adapter) in model.adapters(name) {
        modules.insert(layer.into(), adapter.to_factors()?);
        configs.push(adapter.config());
    }
    let config = configs.first().copied().cloned().unwrap_or_else(|| LoraConfig::new(1, 1.0));
    let alike =
        configs.iter().all(|other| (other.rank, other.alpha, other.scaling) == (config.rank, config.alpha, config.scaling));
    let names = target_names(model, name);
    let mut told = AdapterConfig::new(&config, TargetModules::Names(&names))?;
    if let Some(task) = model.task_type() {
        told = told.with_task_type(task);
    }
    if let Some(base) = model.base_name() {
        told = told.with_base_model_name_or_path(&base);
    }
    Ok(if alike { Folder::from_config(told, modules)? } else { Folder::new(Some(&told), modules)? })
}

/// The shortest names that pick the layers of an adapter and no others: `q_proj`, or else names in full.
fn target_names(model: &(impl Adaptable + ?Sized), adapter: &str) -> Vec<String> {
    let last = |layer: &str| layer.rsplit('.').next().unwrap_or(layer).to_string();
    let has: Vec<&str> = model.adapters(adapter).map(|(layer, _)| layer).collect();
    let mut names: Vec<String> = has.iter().map(|layer| last(layer)).collect();
    names.sort_unstable();
    names.dedup();
    let others = model.layers().filter(|(layer, _)| !has.contains(layer));
    let ambiguous = others.map(|(layer, _)| last(layer)).any(|name| names.contains(&name));
    if ambiguous { has.into_iter().map(String::from).collect() } else { names }
}

/// Each name once, in the order they come.
fn unique<'n>(names: impl Iterator<Item = &'n str>) -> Vec<&'n str> {
    names.fold(Vec::new(), |mut unique, name| {
        if !unique.contains(&name) {
            unique.push(name);
        }
        unique
    })
}
