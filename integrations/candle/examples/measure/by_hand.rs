//! The same model with LoRA written by hand: three `Linear`s a layer, candle's operations, candle's autograd.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module, RmsNorm};
use lowrank_candle::{Adaptable, CausalLm};

/// A projection with its adapter.
struct Lora {
    base: Linear,
    a: Var,
    b: Var,
    scale: f64,
}

impl Lora {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = Linear::new(self.a.as_tensor().clone(), None).forward(x)?;
        let update = Linear::new(self.b.as_tensor().clone(), None).forward(&h)?;
        self.base.forward(x)? + (update * self.scale)?
    }
}

struct Block {
    projections: Vec<Lora>,
    norms: [RmsNorm; 2],
}

/// A llama with LoRA by hand.
pub(crate) struct ByHand {
    embed: Tensor,
    blocks: Vec<Block>,
    norm: RmsNorm,
    heads: [usize; 3],
    frequencies: Tensor,
}

impl ByHand {
    /// The weights of a model, and copies of the factors of its adapter.
    pub(crate) fn of(model: &CausalLm) -> Result<Self> {
        let config = model.config();
        let tensors: std::collections::HashMap<String, Tensor> = model.tensors().into_iter().collect();
        let norm = |name: String| RmsNorm::new(tensors[&name].clone(), config.rms_norm_eps);
        let mut layers = model.adapters("default").map(|(name, adapter)| {
            let copy = |var: &Var| Var::from_tensor(&var.as_tensor().copy()?);
            Ok(Lora {
                base: Linear::new(tensors[&format!("{name}.weight")].clone(), None),
                a: copy(adapter.a())?,
                b: copy(adapter.b())?,
                scale: f64::from(adapter.scaling()),
            })
        });
        let mut block = |at: usize| {
            let projections = layers.by_ref().take(7).collect::<Result<_>>()?;
            let names = ["input_layernorm", "post_attention_layernorm"];
            Ok(Block { projections, norms: names.map(|name| norm(format!("model.layers.{at}.{name}.weight"))) })
        };
        let blocks = (0..config.layers).map(&mut block).collect::<Result<_>>()?;
        let d = config.head_dim;
        let frequencies: Vec<f32> = (0..d / 2).map(|j| config.rope_theta.powf(-2.0 * j as f64 / d as f64) as f32).collect();
        Ok(Self {
            embed: tensors["model.embed_tokens.weight"].clone(),
            blocks,
            norm: norm("model.norm.weight".into()),
            heads: [config.heads, config.kv_heads, d],
            frequencies: Tensor::from_vec(frequencies, (1, d / 2), &Device::Cpu)?,
        })
    }

    /// What is trained.
    pub(crate) fn vars(&self) -> Vec<Var> {
        let layers = self.blocks.iter().flat_map(|block| &block.projections);
        layers.flat_map(|layer| [layer.a.clone(), layer.b.clone()]).collect()
    }

    /// The mean loss of one sequence; each token predicts the next.
    pub(crate) fn loss(&self, ids: &[u32]) -> Result<Tensor> {
        let (t, [heads, kv, d]) = (ids.len(), self.heads);
        let positions = Tensor::arange(0u32, t as u32, &Device::Cpu)?.to_dtype(DType::F32)?.reshape((t, 1))?;
        let angles = positions.matmul(&self.frequencies)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let mask: Vec<f32> = (0..t).flat_map(|i| (0..t).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
        let mask = Tensor::from_vec(mask, (1, 1, t, t), &Device::Cpu)?;
        let mut x = self.embed.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?.unsqueeze(0)?;
        for Block { projections, norms } in &self.blocks {
            let [q, k, v, o, gate, up, down] = &projections[..] else { candle_core::bail!("not seven projections") };
            let h = norms[0].forward_diff(&x)?;
            let split = |y: Tensor, n: usize| y.reshape((1, t, n, d))?.transpose(1, 2)?.contiguous();
            let repeat =
                |y: Tensor| y.unsqueeze(2)?.broadcast_as((1, kv, heads / kv, t, d))?.reshape((1, heads, t, d))?.contiguous();
            let q = candle_nn::rotary_emb::rope_slow(&split(q.forward(&h)?, heads)?, &cos, &sin)?;
            let k = repeat(candle_nn::rotary_emb::rope_slow(&split(k.forward(&h)?, kv)?, &cos, &sin)?)?;
            let v = repeat(split(v.forward(&h)?, kv)?)?;
            let scores = (q.contiguous()?.matmul(&k.t()?)? / (d as f64).sqrt())?.broadcast_add(&mask)?;
            let y = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
            let y = y.transpose(1, 2)?.reshape((1, t, heads * d))?.contiguous()?;
            x = (x + o.forward(&y)?)?;
            let h = norms[1].forward_diff(&x)?;
            let y = (gate.forward(&h)?.silu()? * up.forward(&h)?)?;
            x = (&x + down.forward(&y)?)?;
        }
        let hidden = self.norm.forward_diff(&x)?.squeeze(0)?.narrow(0, 0, t - 1)?;
        let logits = hidden.matmul(&self.embed.t()?)?;
        candle_nn::loss::cross_entropy(&logits, &Tensor::new(&ids[1..], &Device::Cpu)?)
    }
}
