//! A decoder for Llama, Qwen2 and Qwen3, of which every projection can have adapters.

mod block;
mod files;
mod layer;
mod save;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

pub use block::PROJECTIONS;
use block::{Block, Flow};

use crate::attention::Past;
use crate::config::ModelConfig;
use crate::gguf::Gguf;
use crate::lend::on_threads;
use crate::linear::{LoraLinear, Pass};
use crate::loss::HeadLoss;
use crate::norm::RmsNorm;
use crate::rope::Rope;
use crate::{Adaptable, Error, Result};

/// Tokens of one or more sequences, one after the other: no padding. A token attends to those of its own sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    ids: Vec<u32>,
    sequences: Arc<Vec<Range<usize>>>,
}

impl Tokens {
    /// One sequence.
    pub fn one(ids: &[u32]) -> Self {
        Self { ids: ids.to_vec(), sequences: Arc::new(std::iter::once(0..ids.len()).collect()) }
    }

    /// These sequences.
    pub fn batch<S: AsRef<[u32]>>(sequences: &[S]) -> Self {
        let mut end = 0;
        let mut range = |sequence: &S| {
            let start = end;
            end += sequence.as_ref().len();
            start..end
        };
        let ranges = sequences.iter().map(&mut range).collect();
        Self {
            ids: sequences.iter().flat_map(|sequence| sequence.as_ref().iter().copied()).collect(),
            sequences: Arc::new(ranges),
        }
    }

    /// The tokens of all sequences.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The rows of each sequence.
    pub fn sequences(&self) -> &[Range<usize>] {
        &self.sequences
    }
}

/// Keys and values of the tokens of one sequence that are behind, so that the next token costs one token.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    layers: Vec<Past>,
    length: usize,
}

impl Cache {
    /// Nothing is behind.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many tokens are behind.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token is behind.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// A causal language model whose weights are frozen, with adapters on its projections: see [`Adaptable`].
#[derive(Debug)]
pub struct CausalLm {
    config: ModelConfig,
    dir: Option<PathBuf>,
    embed: Tensor,
    names: Vec<String>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: LoraLinear,
    rope: Rope,
}

impl CausalLm {
    /// Reads a folder of Hugging Face's: `config.json`, and `model.safetensors` or its shards. The weights are converted to `dtype`: f32,
    /// f16 or bf16.
    ///
    /// Errors: [`Error::File`] for a file that is missing or damaged, a model that this crate does not compute, a tensor that is missing
    /// or has another shape than `config.json` says.
    pub fn from_dir(dir: impl AsRef<Path>, dtype: DType) -> Result<Self> {
        let dir = dir.as_ref();
        let config = ModelConfig::read(dir)?;
        let tensors = files::read_tensors(dir, dtype)?;
        let model = Self::from_tensors(config, tensors, dtype).map_err(|error| match error {
            Error::File { path, problem } => Error::File { path: dir.join(path), problem },
            other => other,
        })?;
        Ok(Self { dir: Some(dir.into()), ..model })
    }

    /// From tensors by Hugging Face's names, such as `model.layers.0.self_attn.q_proj.weight`. Those that no model has are passed over.
    ///
    /// Errors: as [`from_dir`](Self::from_dir).
    pub fn from_tensors(config: ModelConfig, tensors: HashMap<String, Tensor>, dtype: DType) -> Result<Self> {
        let mut tensors = files::Tensors::new(tensors, dtype);
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let embed = tensors.take("model.embed_tokens.weight", &[vocab, d])?;
        let blocks = (0..config.layers).map(|at| Block::new(&config, at, &mut tensors)).collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::new(tensors.take("model.norm.weight", &[d])?, config.rms_norm_eps)?;
        let head = if config.tied { embed.clone() } else { tensors.take("lm_head.weight", &[vocab, d])? };
        let names = (0..config.layers).flat_map(|at| PROJECTIONS.map(|name| format!("model.layers.{at}.{name}"))).collect();
        let rope = Rope::new(&config);
        let head = LoraLinear::new(head, None)?.numbered((config.layers * PROJECTIONS.len()) as u64);
        Ok(Self { config, dir: None, embed, names, blocks, norm, head, rope })
    }

    /// From a GGUF file of the llama family; its weights are dequantised. Errors: as [`from_dir`](Self::from_dir).
    pub fn from_gguf(gguf: &Gguf, dtype: DType) -> Result<Self> {
        let config = ModelConfig::from_json(gguf.config().to_string().as_bytes())?;
        Self::from_tensors(config, gguf.tensors()?, dtype)
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder that it was read from, if it was.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// The type of its weights.
    pub fn dtype(&self) -> DType {
        self.embed.dtype()
    }

    /// All tensors of the base model by Hugging Face's names; they hold what is merged.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut all = vec![("model.embed_tokens.weight".to_string(), self.embed.clone())];
        for (name, layer) in self.layers() {
            all.push((format!("{name}.weight"), layer.weight().clone()));
            all.extend(layer.bias().map(|bias| (format!("{name}.bias"), bias.clone())));
        }
        for (at, block) in self.blocks.iter().enumerate() {
            all.extend(block.norms().map(|(name, norm)| (format!("model.layers.{at}.{name}.weight"), norm.weight().clone())));
        }
        all.push(("model.norm.weight".into(), self.norm.weight().clone()));
        all
    }

    /// The hidden states behind the last norm, tokens × hidden size.
    ///
    /// Errors: for tokens that the vocabulary does not have, and sequences longer than the model's positions.
    pub fn hidden(&self, tokens: &Tokens, pass: &Pass<'_>) -> Result<Tensor> {
        on_threads(|| self.run(tokens, pass, None))
    }

    /// [`hidden`](Self::hidden) of tokens that follow those in the caches, one cache for each sequence; the tokens join them. After an error the
    /// caches are refused. A pass
    /// without gradients.
    pub fn hidden_after(&self, tokens: &Tokens, pass: &Pass<'_>, caches: &mut [Cache]) -> Result<Tensor> {
        Error::unless(!pass.gradients, "pass", "one with gradients", "one without, where caches are used")?;
        let (got, want) = (caches.len(), tokens.sequences.len());
        Error::unless(got == want, "caches", got, format!("{want}, one for each sequence"))?;
        let holds = |cache: &Cache, block: &Block, past: &Past| past.holds(cache.length, block.heads());
        let fits = |cache: &Cache| {
            let pasts = self.blocks.iter().zip(&cache.layers).all(|(block, past)| holds(cache, block, past));
            cache.is_empty() && cache.layers.is_empty() || pasts && cache.layers.len() == self.blocks.len()
        };
        Error::unless(
            caches.iter().all(fits),
            "caches",
            "of another model, or left by an error",
            "new ones, or as this model left them",
        )?;
        on_threads(|| self.run(tokens, pass, Some(caches)))
    }

    fn run(&self, tokens: &Tokens, pass: &Pass<'_>, mut caches: Option<&mut [Cache]>) -> Result<Tensor> {
        let past = |at: usize| caches.as_ref().map_or(0, |caches| caches[at].length);
        let positions: Vec<usize> = tokens
            .sequences
            .iter()
            .enumerate()
            .flat_map(|(at, rows)| (0..rows.len()).map(move |i| (at, i)))
            .map(|(at, i)| past(at) + i)
            .collect();
        self.check(tokens, &positions)?;
        let mut x = self.embed.index_select(&Tensor::new(tokens.ids.as_slice(), &Device::Cpu)?, 0)?;
        let flow = Flow { angles: self.rope.angles(&positions), sequences: tokens.sequences.clone(), pass };
        for (at, block) in self.blocks.iter().enumerate() {
            let pasts = caches.as_mut().map(|caches| {
                let layers = self.config.layers;
                let past = |cache| past_of(cache, layers, at);
                caches.iter_mut().map(past).collect::<Vec<_>>()
            });
            x = block.forward(&x, &flow, pasts)?;
        }
        for (cache, rows) in caches.into_iter().flatten().zip(tokens.sequences.iter()) {
            cache.length += rows.len();
        }
        Ok(self.norm.forward(&x)?)
    }

    fn check(&self, tokens: &Tokens, positions: &[usize]) -> Result<()> {
        Error::unless(!tokens.ids.is_empty(), "tokens", "none", "at least one")?;
        let vocab = self.config.vocab_size;
        let unknown = tokens.ids.iter().find(|&&id| id as usize >= vocab);
        Error::unless(unknown.is_none(), "tokens", format!("{unknown:?}"), format!("below the vocabulary of {vocab}"))?;
        let (longest, room) = (positions.iter().max().map_or(0, |last| last + 1), self.config.max_positions);
        Error::unless(
            longest <= room,
            "tokens",
            format!("a sequence of {longest}"),
            format!("at most the {room} positions of the model"),
        )
    }

    /// The logits of hidden states, rows × vocabulary.
    pub fn logits(&self, hidden: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.head.forward_with(hidden, pass)
    }

    /// `-Σ log p(label) / denominator` over the tokens that have a label: the token that should follow. A scalar in `f32`.
    ///
    /// The logits of the others are never made. Errors: those of [`hidden`](Self::hidden); unless there is a label, or `None`, for each
    /// token, and each is in the vocabulary; for a denominator that is not positive; for an active adapter of the head.
    pub fn loss(&self, tokens: &Tokens, labels: &[Option<u32>], denominator: f32, pass: &Pass<'_>) -> Result<Tensor> {
        let (got, want) = (labels.len(), tokens.ids.len());
        Error::unless(got == want, "labels", got, format!("{want}, one for each token"))?;
        let unknown = labels.iter().flatten().find(|&&label| label as usize >= self.config.vocab_size);
        Error::unless(unknown.is_none(), "labels", format!("{unknown:?}"), "in the vocabulary")?;
        Error::unless(denominator > 0.0, "denominator", denominator, "a positive number")?;
        let adapted = self.head.adapters().next().map(|(name, _)| format!("with the adapter `{name}`"));
        Error::unless(adapted.is_none(), "lm_head", adapted.unwrap_or_default(), "without adapters, for training")?;
        let hidden = self.hidden(tokens, pass)?;
        Ok(HeadLoss::new(self.head.weight().clone(), labels, denominator).forward(&hidden)?)
    }
}

/// The projections, and the head where it is not the embedding.
impl Adaptable for CausalLm {
    fn layers(&self) -> impl Iterator<Item = (&str, &LoraLinear)> {
        let head = (!self.config.tied).then_some((HEAD, &self.head));
        self.names.iter().map(String::as_str).zip(self.blocks.iter().flat_map(Block::projections)).chain(head)
    }

    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut LoraLinear)> {
        let head = (!self.config.tied).then_some((HEAD, &mut self.head));
        self.names.iter().map(String::as_str).zip(self.blocks.iter_mut().flat_map(Block::projections_mut)).chain(head)
    }

    fn head(&self) -> Option<&str> {
        Some(HEAD)
    }

    fn other_count(&self) -> usize {
        let norms = self.blocks.iter().flat_map(Block::norms).map(|(_, norm)| norm.weight().elem_count());
        self.embed.elem_count() + norms.sum::<usize>() + self.norm.weight().elem_count()
    }

    fn task_type(&self) -> Option<&str> {
        Some("CAUSAL_LM")
    }

    fn base_name(&self) -> Option<String> {
        self.dir.as_ref().map(|dir| dir.display().to_string())
    }
}

/// The name of the head, if it is not the embedding.
const HEAD: &str = "lm_head";

/// What is behind in one layer.
fn past_of(cache: &mut Cache, layers: usize, at: usize) -> &mut Past {
    cache.layers.resize_with(layers, Past::default);
    &mut cache.layers[at]
}
