//! A decoder with attention blocks like those of Llama, and adapters on its linear layers.
//!
//! ```text
//! h = x + o_proj(attention(q_proj(n), k_proj(n), v_proj(n)))        n = norm(x)
//! y = h + down_proj(silu(gate_proj(n))·up_proj(n))                  n = norm(h)
//! ```
//!
//! To support adapters, the model lends its layers by name ([`Adaptable`]). The names are those of Llama in `transformers`, so a saved
//! folder has the keys that PEFT uses for such a model.

use lowrank::autograd::{Param, Tape, Var};
use lowrank::nn::{Adaptable, Adapters, Init, Layer, Linear};
use lowrank::random::Rng;
use lowrank::{Backend, Float, Result, Tensor};

use super::ops::{Attention, rms_norm, silu_gate};

/// The sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Number of blocks.
    pub blocks: usize,
    /// Number of features of a token.
    pub width: usize,
    /// Number of features between `up_proj` and `down_proj`.
    pub hidden: usize,
    /// Number of outputs.
    pub classes: usize,
    /// Number of heads and length of a sequence.
    pub attention: Attention,
}

/// A decoder: from a matrix with one row for each token to logits.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    blocks: Vec<Block<B>>,
    norm: Param<B>,
    lm_head: Named<B>,
    attention: Attention,
}

#[derive(Debug)]
struct Block<B: Backend> {
    attention_norm: Param<B>,
    mlp_norm: Param<B>,
    q_proj: Named<B>,
    k_proj: Named<B>,
    v_proj: Named<B>,
    o_proj: Named<B>,
    gate_proj: Named<B>,
    up_proj: Named<B>,
    down_proj: Named<B>,
}

type Named<B> = (String, Layer<B>);

impl<B: Backend> Adaptable<B> for Decoder<B> {
    fn layers(&self) -> impl Iterator<Item = (&str, &Layer<B>)> {
        let layers = self.blocks.iter().flat_map(Block::layers).chain([&self.lm_head]);
        layers.map(|(name, layer)| (name.as_str(), layer))
    }

    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<B>)> {
        let layers = self.blocks.iter_mut().flat_map(Block::layers_mut).chain([&mut self.lm_head]);
        layers.map(|(name, layer)| (name.as_str(), layer))
    }

    fn other_params(&self) -> impl Iterator<Item = &Param<B>> {
        self.blocks.iter().flat_map(|block| [&block.attention_norm, &block.mlp_norm]).chain([&self.norm])
    }

    fn other_params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let norms = self.blocks.iter_mut().flat_map(|Block { attention_norm, mlp_norm, .. }| [attention_norm, mlp_norm]);
        norms.chain([&mut self.norm])
    }
}

impl<B: Backend> Decoder<B> {
    /// A decoder with random weights and no biases.
    pub fn new(backend: &B, sizes: Sizes, rng: &mut Rng) -> Result<Self> {
        let blocks = (0..sizes.blocks).map(|i| Block::new(backend, &format!("model.layers.{i}"), sizes, rng));
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            norm: ones(backend, sizes.width)?,
            lm_head: linear(backend, "lm_head".into(), (sizes.width, sizes.classes), rng)?,
            attention: sizes.attention,
        })
    }

    /// The logits, on the tape, with the chosen adapters. With a `seed` their dropout is applied.
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, mut x: Var, seed: Option<u64>, adapters: Adapters<'_>) -> Result<Var> {
        let layers = self.layers().count() as u64;
        let mut pass = Pass { adapters, seed: seed.map(|seed| seed.wrapping_mul(layers)) };
        for block in &self.blocks {
            x = block.forward(tape, x, self.attention, &mut pass)?;
        }
        let x = rms_norm(tape, x, &self.norm)?;
        pass.layer(tape, &self.lm_head, x)
    }

    /// The logits, in host memory.
    pub fn predict(&self, backend: &B, x: Tensor<B>) -> Result<Vec<B::Elem>> {
        let mut tape = Tape::new(backend);
        let x = tape.input(x);
        let logits = self.forward(&mut tape, x, None, Adapters::Active)?;
        tape.value(logits)?.to_vec(backend)
    }
}

impl<B: Backend> Block<B> {
    fn new(backend: &B, path: &str, Sizes { width, hidden, .. }: Sizes, rng: &mut Rng) -> Result<Self> {
        let mut new = |name, inputs, outputs| linear(backend, format!("{path}.{name}"), (inputs, outputs), rng);
        Ok(Self {
            attention_norm: ones(backend, width)?,
            mlp_norm: ones(backend, width)?,
            q_proj: new("self_attn.q_proj", width, width)?,
            k_proj: new("self_attn.k_proj", width, width)?,
            v_proj: new("self_attn.v_proj", width, width)?,
            o_proj: new("self_attn.o_proj", width, width)?,
            gate_proj: new("mlp.gate_proj", width, hidden)?,
            up_proj: new("mlp.up_proj", width, hidden)?,
            down_proj: new("mlp.down_proj", hidden, width)?,
        })
    }

    fn layers(&self) -> [&Named<B>; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    fn layers_mut(&mut self) -> [&mut Named<B>; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    fn forward<'m>(&'m self, tape: &mut Tape<'m, B>, x: Var, attention: Attention, pass: &mut Pass<'_>) -> Result<Var> {
        let n = rms_norm(tape, x, &self.attention_norm)?;
        let q = pass.layer(tape, &self.q_proj, n)?;
        let k = pass.layer(tape, &self.k_proj, n)?;
        let v = pass.layer(tape, &self.v_proj, n)?;
        let attended = attention.forward(tape, [q, k, v])?;
        let attended = pass.layer(tape, &self.o_proj, attended)?;
        let h = tape.add(x, attended)?;

        let n = rms_norm(tape, h, &self.mlp_norm)?;
        let gate = pass.layer(tape, &self.gate_proj, n)?;
        let up = pass.layer(tape, &self.up_proj, n)?;
        let gated = silu_gate(tape, gate, up)?;
        let down = pass.layer(tape, &self.down_proj, gated)?;
        tape.add(h, down)
    }
}

/// The state of a forward pass.
struct Pass<'a> {
    adapters: Adapters<'a>,
    /// The seed of the next layer: each has its own dropout mask.
    seed: Option<u64>,
}

impl Pass<'_> {
    fn layer<'m, B: Backend>(&mut self, tape: &mut Tape<'m, B>, (name, layer): &'m Named<B>, x: Var) -> Result<Var> {
        let y = layer.forward_with(tape, x, self.seed, self.adapters).map_err(|error| error.in_layer(name))?;
        self.seed = self.seed.map(|seed| seed.wrapping_add(1));
        Ok(y)
    }
}

fn linear<B: Backend>(backend: &B, name: String, (inputs, outputs): (usize, usize), rng: &mut Rng) -> Result<Named<B>> {
    let weight = Init::KaimingUniform.tensor(backend, (outputs, inputs), rng)?;
    Ok((name, Linear::from_tensors(weight, None)?.into()))
}

fn ones<B: Backend>(backend: &B, width: usize) -> Result<Param<B>> {
    Ok(Param::new(Tensor::from_slice(backend, (1, width), &vec![B::Elem::from_f32(1.0); width])?))
}
