//! Which way round the weights of linear layers are stored.

use std::str::FromStr;

use super::model::ModelConfig;
use crate::error::{Error, Result};

/// How the weight of a linear layer with k inputs and n outputs is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `n×k`, as `nn.Linear` stores it.
    OutIn,
    /// `k×n`, as the `Conv1D` of GPT-2 stores it.
    InOut,
}

impl FromStr for Layout {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "out-in" => Ok(Self::OutIn),
            "in-out" => Ok(Self::InOut),
            _ => Err(Error::Value { verb: "layout", name: "layout", got: name.into(), want: "`out-in` or `in-out`".into() }),
        }
    }
}

/// The model types whose layers of [`CONV1D`] names are stored `k×n`.
const CONV1D_MODELS: [&str; 6] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"];
/// The last names of such layers.
const CONV1D: [&str; 4] = ["c_attn", "q_attn", "c_proj", "c_fc"];

/// Whether a module has the name of a layer that is stored `k×n` in some models.
pub(super) fn is_conv1d(module: &str) -> bool {
    CONV1D.contains(&module.rsplit('.').next().unwrap_or(module))
}

/// How a module is stored in the model that a config describes; `None` if it does not tell.
pub(super) fn told(config: Option<&ModelConfig>, module: &str) -> Option<Layout> {
    let mut types = config?.model_types().peekable();
    types.peek()?;
    let conv1d = is_conv1d(module) && types.any(|name| CONV1D_MODELS.contains(&name));
    Some(if conv1d { Layout::InOut } else { Layout::OutIn })
}

/// How the layers of an adapter are stored: what was asked for, what sides of different lengths show, what the config tells.
pub(super) struct Layouts<'l> {
    pub(super) asked: Option<Layout>,
    pub(super) config: Option<&'l ModelConfig>,
    pub(super) fan_in_fan_out: bool,
    /// Shown by weights that are not square: of the layers with names of `Conv1D`, and of all others.
    shown: [Option<Layout>; 2],
}

impl<'l> Layouts<'l> {
    pub(super) fn new(asked: Option<Layout>, config: Option<&'l ModelConfig>, fan_in_fan_out: bool) -> Self {
        Self { asked, config, fan_in_fan_out, shown: [None; 2] }
    }

    /// How a weight is stored; `None` if its shape does not tell.
    pub(super) fn shape(&self, module: &str, stored: &[usize], [n, k]: [usize; 2]) -> Option<Layout> {
        let may_be = self.fan_in_fan_out || self.asked == Some(Layout::InOut);
        match stored {
            _ if n == k => None,
            stored if stored == [k, n] && (may_be || told(self.config, module) == Some(Layout::InOut)) => Some(Layout::InOut),
            _ => Some(Layout::OutIn), // or it does not fit
        }
    }

    /// Takes note of what the shape of a weight shows.
    pub(super) fn see(&mut self, module: &str, stored: &[usize], sides: [usize; 2]) {
        let of = usize::from(is_conv1d(module));
        let fits = stored == sides || stored == [sides[1], sides[0]];
        if fits && self.shown[of].is_none() {
            self.shown[of] = self.shape(module, stored, sides);
        }
    }

    /// How a weight is stored; `None` if nothing tells.
    pub(super) fn of(&self, module: &str, stored: &[usize], sides: [usize; 2]) -> Option<Layout> {
        let shown = self.shown[usize::from(is_conv1d(module))];
        let usual = (!self.fan_in_fan_out).then_some(Layout::OutIn);
        let known = self.shape(module, stored, sides).or(self.asked).or(shown).or_else(|| told(self.config, module));
        known.or(usual)
    }
}
