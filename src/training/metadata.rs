//! What a checkpoint says beside its tensors, as JSON.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Progress, bad};
use crate::backend::Backend;
use crate::distributed::{Fingerprint, SamplerPosition};
use crate::error::Result;
use crate::nn::Adam;
use crate::random::Rng;

/// The key in the header of the file.
const KEY: &str = "lowrank_training";
/// The key of the fingerprint of everything else.
const FINGERPRINT: &str = "lowrank_fingerprint";
/// The version of the format.
const VERSION: u64 = 1;

/// Everything that is no tensor.
pub(super) struct Metadata {
    step: u64,
    position: SamplerPosition,
    rng: Rng,
    pub(super) settings: String,
    extra: String,
    pub(super) adam: AdamSettings,
}

/// The scalars of the optimizer.
pub(super) struct AdamSettings {
    /// `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `loraplus_lr_ratio`
    scalars: [f32; 6],
    pub(super) steps: u64,
    /// The steps of each parameter that has made one.
    pub(super) param_steps: BTreeMap<String, u64>,
}

/// The names of [`AdamSettings::scalars`].
const SCALARS: [&str; 6] = ["lr", "beta1", "beta2", "eps", "weight_decay", "loraplus_lr_ratio"];

impl AdamSettings {
    /// An optimizer with these settings, without states. Errors: [`Error::Value`](crate::Error::Value) for settings out of range.
    pub(super) fn restore<B: Backend>(&self) -> Result<Adam<B>> {
        let [lr, beta1, beta2, eps, weight_decay, loraplus_lr_ratio] = self.scalars;
        let mut adam = Adam::adamw(lr, weight_decay)?;
        (adam.beta1, adam.beta2, adam.eps, adam.loraplus_lr_ratio) = (beta1, beta2, eps, loraplus_lr_ratio);
        Ok(adam)
    }
}

impl Metadata {
    /// Without the steps of parameters.
    pub(super) fn new<B: Backend>(progress: &Progress, adam: &Adam<B>) -> Self {
        let Progress { step, position, rng, settings, extra } = progress.clone();
        let scalars = [adam.lr, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.loraplus_lr_ratio];
        let adam = AdamSettings { scalars, steps: adam.steps(), param_steps: BTreeMap::new() };
        Self { step, position, rng, settings, extra, adam }
    }

    pub(super) fn progress(&self) -> Progress {
        let Self { step, position, rng, settings, extra, .. } = self;
        Progress { step: *step, position: *position, rng: rng.clone(), settings: settings.clone(), extra: extra.clone() }
    }

    /// As the header of a safetensors file holds it; `tensors` is the fingerprint of the tensors.
    pub(super) fn to_map(&self, tensors: u64) -> HashMap<String, String> {
        let scalars: Map<String, Value> =
            SCALARS.iter().zip(self.adam.scalars).map(|(name, scalar)| (name.to_string(), json!(f64::from(scalar)))).collect();
        let text = json!({
            "version": VERSION,
            "step": self.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "rng_seed": self.rng.seed(),
            "rng_position": self.rng.position(),
            "settings": self.settings,
            "extra": self.extra,
            "adam": scalars,
            "adam_steps": self.adam.steps,
            "param_steps": self.adam.param_steps,
        })
        .to_string();
        let fingerprint = together(tensors, &text);
        HashMap::from([(KEY.to_string(), text), (FINGERPRINT.to_string(), fingerprint)])
    }

    /// Errors: [`Error::File`](crate::Error::File) for a file that is no checkpoint of this version, or damaged.
    pub(super) fn read(path: &Path, header: Option<&HashMap<String, String>>, tensors: u64) -> Result<Self> {
        let Some(text) = header.and_then(|header| header.get(KEY)) else {
            return Err(bad(path, "is a safetensors file, but no checkpoint of training"));
        };
        if header.and_then(|header| header.get(FINGERPRINT)) != Some(&together(tensors, text)) {
            return Err(bad(path, "is damaged: its content is not what was written"));
        }
        let json: Value = serde_json::from_str(text).map_err(|error| bad(path, format!("`{KEY}` is damaged: {error}")))?;
        let missing = |name: &str| bad(path, format!("`{KEY}` is damaged: no `{name}`"));
        let number = |name: &str| json[name].as_u64().ok_or_else(|| missing(name));
        let words = |name: &str| json[name].as_str().map(String::from).ok_or_else(|| missing(name));
        let version = number("version")?;
        if version != VERSION {
            return Err(bad(path, format!("is a checkpoint of version {version}; this program reads version {VERSION}")));
        }
        let mut scalars = [0.0; 6];
        for (name, scalar) in SCALARS.iter().zip(&mut scalars) {
            *scalar = json["adam"][name].as_f64().ok_or_else(|| missing(name))? as f32;
        }
        let steps = json["param_steps"].as_object().ok_or_else(|| missing("param_steps"))?;
        let steps = steps.iter().map(|(name, t)| Ok((name.clone(), t.as_u64().ok_or_else(|| missing(name))?)));
        Ok(Self {
            step: number("step")?,
            position: SamplerPosition { epoch: number("epoch")?, batch: number("batch")? },
            rng: Rng::at(number("rng_seed")?, number("rng_position")?),
            settings: words("settings")?,
            extra: words("extra")?,
            adam: AdamSettings { scalars, steps: number("adam_steps")?, param_steps: steps.collect::<Result<_>>()? },
        })
    }
}

/// The fingerprint of the whole file.
fn together(tensors: u64, text: &str) -> String {
    let mut fingerprint = Fingerprint::default();
    fingerprint.word(tensors);
    fingerprint.bytes(text.as_bytes());
    format!("{:016x}", fingerprint.value())
}
