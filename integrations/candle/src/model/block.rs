//! One layer of the decoder: attention, then the gate, each behind a norm and beside a residual connection.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::Tensor;

use super::files::Tensors;
use super::layer::{Factors, LayerOp, Projection};
use crate::Result;
use crate::attention::{Attention, Heads, Past, attend};
use crate::config::{Family, ModelConfig};
use crate::gate::Gate;
use crate::lend::by_dtype;
use crate::linear::{LoraLinear, Pass};
use crate::norm::RmsNorm;
use crate::rope::Angles;

/// The projections of a layer, by the ends of their names.
pub const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

#[derive(Debug)]
pub(super) struct Block {
    /// In the order of [`PROJECTIONS`].
    projections: [LoraLinear; 7],
    input_norm: RmsNorm,
    post_norm: RmsNorm,
    /// Qwen3's norms of the heads of q and k.
    head_norms: Option<[RmsNorm; 2]>,
    heads: Heads,
}

/// What is the same for all layers of a pass.
pub(super) struct Flow<'p> {
    pub(super) angles: Angles,
    pub(super) sequences: Arc<Vec<Range<usize>>>,
    pub(super) pass: &'p Pass<'p>,
}

impl Block {
    /// Layer `at` of a model.
    pub(super) fn new(config: &ModelConfig, at: usize, tensors: &mut Tensors) -> Result<Self> {
        let (d, ff, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let (qkv_bias, o_bias, mlp_bias) = (config.qkv_bias, config.o_bias, config.mlp_bias);
        let sizes = [(q, d), (kv, d), (kv, d), (d, q), (ff, d), (ff, d), (d, ff)];
        let biases = [qkv_bias, qkv_bias, qkv_bias, o_bias, mlp_bias, mlp_bias, mlp_bias];
        let mut projections = Vec::new();
        for (place, name) in PROJECTIONS.iter().enumerate() {
            let ((n, k), name) = (sizes[place], format!("model.layers.{at}.{name}"));
            let weight = tensors.take(&format!("{name}.weight"), &[n, k])?;
            let bias = biases[place].then(|| tensors.take(&format!("{name}.bias"), &[n])).transpose()?;
            projections.push(LoraLinear::new(weight, bias)?.numbered((at * PROJECTIONS.len() + place) as u64));
        }
        let mut norm = |name: &str, n: usize| -> Result<RmsNorm> {
            Ok(RmsNorm::new(tensors.take(&format!("model.layers.{at}.{name}.weight"), &[n])?, config.rms_norm_eps)?)
        };
        let head_norms = match config.family {
            Family::Qwen3 => Some([norm("self_attn.q_norm", dim)?, norm("self_attn.k_norm", dim)?]),
            Family::Llama | Family::Qwen2 => None,
        };
        let [input_norm, post_norm] = [norm("input_layernorm", d)?, norm("post_attention_layernorm", d)?];
        let heads = Heads { q: config.heads, kv: config.kv_heads, dim };
        let projections =
            <[LoraLinear; 7]>::try_from(projections).map_err(|_| crate::Error::setting("projections", "not seven", "seven"))?;
        Ok(Self { projections, input_norm, post_norm, head_norms, heads })
    }

    pub(super) fn projections(&self) -> impl Iterator<Item = &LoraLinear> {
        self.projections.iter()
    }

    pub(super) fn projections_mut(&mut self) -> impl Iterator<Item = &mut LoraLinear> {
        self.projections.iter_mut()
    }

    /// The norms by the ends of their names.
    pub(super) fn norms(&self) -> impl Iterator<Item = (&'static str, &RmsNorm)> {
        let heads = self.head_norms.iter().flat_map(|[q, k]| [("self_attn.q_norm", q), ("self_attn.k_norm", k)]);
        [("input_layernorm", &self.input_norm), ("post_attention_layernorm", &self.post_norm)].into_iter().chain(heads)
    }

    /// How many heads there are, and how wide they are.
    pub(super) fn heads(&self) -> Heads {
        self.heads
    }

    /// The hidden states, tokens × hidden size, behind this layer. With pasts, the tokens follow those of their sequences.
    pub(super) fn forward(&self, x: &Tensor, flow: &Flow<'_>, pasts: Option<Vec<&mut Past>>) -> Result<Tensor> {
        if pasts.is_none()
            && flow.pass.gradients
            && let Some(out) = self.forward_at_once(x, flow)?
        {
            return Ok(out);
        }
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = &self.projections;
        let h = self.input_norm.forward(x)?;
        let (mut q, mut k) = (q_proj.forward_with(&h, flow.pass)?, k_proj.forward_with(&h, flow.pass)?);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let (q, k, v) = (flow.angles.turn(&q)?, flow.angles.turn(&k)?, v_proj.forward_with(&h, flow.pass)?);
        let y = match pasts {
            Some(mut pasts) => attend(self.heads, [&q, &k, &v], &flow.sequences, &mut pasts)?,
            None => Attention::new(self.heads, flow.sequences.clone()).forward(&q, &k, &v)?,
        };
        let x = (x + o_proj.forward_with(&y, flow.pass)?)?;
        let h = self.post_norm.forward(&x)?;
        let y = Gate::forward(&gate_proj.forward_with(&h, flow.pass)?, &up_proj.forward_with(&h, flow.pass)?)?;
        Ok((x + down_proj.forward_with(&y, flow.pass)?)?)
    }
    /// The layer as one operation, where each projection has one active adapter or none, and one has.
    fn forward_at_once(&self, x: &Tensor, flow: &Flow<'_>) -> Result<Option<Tensor>> {
        let mut factors = Factors::default();
        let mut projections = Vec::with_capacity(PROJECTIONS.len());
        for layer in &self.projections {
            let Some(single) = layer.single(flow.pass)? else { return Ok(None) };
            projections.push(factors.projection(layer, single)?);
        }
        let (Some([a, b]), Ok(projections)) = (factors.join()?, <[Projection; 7]>::try_from(projections)) else {
            return Ok(None);
        };
        by_dtype!(x.dtype(), E => {
            let op = LayerOp::<E> {
                projections,
                norms: [self.input_norm.clone(), self.post_norm.clone()],
                head_norms: self.head_norms.clone(),
                heads: self.heads,
                angles: flow.angles.clone(),
                attention: Attention::new(self.heads, flow.sequences.clone()),
                checkpoint: flow.pass.checkpoint,
                kept: Mutex::new(None),
            };
            Ok(Some(x.contiguous()?.apply_op3(&a, &b, op)?))
        })
    }
}
