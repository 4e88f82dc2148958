//! The layout of the weights of linear layers: `out × in` or `in × out`.

use std::str::FromStr;

use super::model::ModelConfig;
use crate::error::{Error, Result};

/// The layout of the weight of a linear layer with k inputs and n outputs.
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
/// The names (last components) of such layers.
const CONV1D: [&str; 4] = ["c_attn", "q_attn", "c_proj", "c_fc"];

/// True if a module has the name of a layer that is stored `k×n` in some models.
pub(super) fn is_conv1d(module: &str) -> bool {
    CONV1D.contains(&module.rsplit('.').next().unwrap_or(module))
}

/// The layout of a module according to the model's config; `None` if the config has no model type.
pub(super) fn from_config(config: Option<&ModelConfig>, module: &str) -> Option<Layout> {
    let mut types = config?.model_types().peekable();
    types.peek()?;
    let conv1d = is_conv1d(module) && types.any(|name| CONV1D_MODELS.contains(&name));
    Some(if conv1d { Layout::InOut } else { Layout::OutIn })
}

/// Finds the layout of the layers of an adapter: from the caller's request, from the shapes of weights that are not square, and from the
/// config.
pub(super) struct Layouts<'l> {
    pub(super) requested: Option<Layout>,
    pub(super) config: Option<&'l ModelConfig>,
    pub(super) fan_in_fan_out: bool,
    /// Layouts observed on weights that are not square: of layers without and with names of `Conv1D`.
    observed: [Option<Layout>; 2],
}

impl<'l> Layouts<'l> {
    pub(super) fn new(requested: Option<Layout>, config: Option<&'l ModelConfig>, fan_in_fan_out: bool) -> Self {
        Self { requested, config, fan_in_fan_out, observed: [None; 2] }
    }

    /// The layout of a weight by its shape; `None` if it is square.
    pub(super) fn shape(&self, module: &str, stored: &[usize], [n, k]: [usize; 2]) -> Option<Layout> {
        let may_be = self.fan_in_fan_out || self.requested == Some(Layout::InOut);
        match stored {
            _ if n == k => None,
            stored if stored == [k, n] && (may_be || from_config(self.config, module) == Some(Layout::InOut)) => {
                Some(Layout::InOut)
            }
            _ => Some(Layout::OutIn), // a shape that fits neither layout is refused later
        }
    }

    /// Records the layout that the shape of a weight shows.
    pub(super) fn observe(&mut self, module: &str, stored: &[usize], sides: [usize; 2]) {
        let of = usize::from(is_conv1d(module));
        let fits = stored == sides || stored == [sides[1], sides[0]];
        if fits && self.observed[of].is_none() {
            self.observed[of] = self.shape(module, stored, sides);
        }
    }

    /// The layout of a weight; `None` if it is not known.
    pub(super) fn of(&self, module: &str, stored: &[usize], sides: [usize; 2]) -> Option<Layout> {
        let observed = self.observed[usize::from(is_conv1d(module))];
        let usual = (!self.fan_in_fan_out).then_some(Layout::OutIn);
        let known =
            self.shape(module, stored, sides).or(self.requested).or(observed).or_else(|| from_config(self.config, module));
        known.or(usual)
    }
}
