//! Models whose head multiplies with the embedding, and what an adapter makes of them.

use super::change::{Change, Source};
use super::model::ModelConfig;
use super::names::Place;
use super::{Checkpoint, Entry};

/// The last names of modules that hold an embedding for each token.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"];
/// The heads of language models.
const HEADS: [&str; 6] =
    ["lm_head", "language_model.lm_head", "thinker.lm_head", "embed_out", "cls.predictions.decoder", "lm_head.decoder"];
/// Words in the names of classes of models that have one.
const WITH_HEAD: [&str; 5] = ["ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining"];

/// The embedding of a model and its head, which may be one weight.
#[derive(Clone)]
pub(super) struct Tie<'r> {
    pub(super) embedding: Place<'r>,
    /// The head's weight; `None` if the checkpoint has no place for one.
    pub(super) head: Option<String>,
    /// Whether the head's weight is stored.
    pub(super) stored: bool,
    /// Whether the config tells that the two are one; else nothing tells.
    pub(super) known: bool,
}

impl<'r> Tie<'r> {
    /// `None` if the two are not one weight, or there is no embedding, or more than one.
    pub(super) fn of(base: &'r Checkpoint, config: Option<&ModelConfig>) -> Option<Self> {
        let ties = config.and_then(ModelConfig::ties);
        if ties == Some(false) {
            return None;
        }
        let mut embeddings = base.entries().filter(|entry| is_embedding(&entry.name) && entry.shape.len() == 2);
        let (embedding, None) = (embeddings.next()?, embeddings.next()) else { return None };
        let embedding = base.find(&embedding.name)?;
        let weight = |head: &str| format!("{head}.weight");
        let stored = HEADS.iter().map(|head| weight(head)).find(|head| base.find(head).is_some());
        let class = config.and_then(ModelConfig::architecture);
        let headless = class.is_some_and(|class| !WITH_HEAD.iter().any(|word| class.contains(word)));
        if stored.is_none() && headless {
            return None;
        }
        let known = config.is_some() && (ties.is_some() || stored.is_some() || class.is_some());
        let (is_stored, head) = (stored.is_some(), stored.or_else(|| head_of(base, embedding.1).map(weight)));
        Some(Self { embedding, head, stored: is_stored, known })
    }
}

/// Where transformers looks for the head of a model whose embedding has this name.
fn head_of(base: &Checkpoint, embedding: &Entry) -> Option<&'static str> {
    let begins = |beginning: &str| base.entries().any(|entry| entry.name.starts_with(beginning));
    match embedding.name.as_str() {
        name if !name.contains('.') || name.matches('.').count() == 1 => None, // a model without its head, and without a prefix
        name if name.starts_with("language_model.") => Some("language_model.lm_head"),
        name if name.starts_with("thinker.") => Some("thinker.lm_head"),
        name if name.starts_with("gpt_neox.") => Some("embed_out"),
        _ if begins("cls.predictions.") => Some("cls.predictions.decoder"),
        _ if begins("lm_head.dense.") => Some("lm_head.decoder"),
        _ => Some("lm_head"),
    }
}

/// Whether a tensor is the table that an encoder and a decoder share (T5, BART), in a model whose config does not set them apart.
pub(super) fn is_shared(base: &Checkpoint, name: &str) -> bool {
    let last = name.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    let config = base.beside().and_then(ModelConfig::read);
    last == Some("shared") && config.and_then(|config| config.ties()) != Some(false)
}

/// Whether a tensor is an embedding of tokens.
pub(super) fn is_embedding(name: &str) -> bool {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    EMBEDDINGS.contains(&module.rsplit('.').next().unwrap_or_default())
}

/// Whether a tensor is the head of a language model.
pub(super) fn is_head(name: &str) -> bool {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    HEADS.iter().any(|head| module == *head || module.ends_with(&format!(".{head}")))
}

/// Whether two changes only put the same numbers in place of what is there.
pub(super) fn same(one: &Change<'_>, other: &Change<'_>) -> bool {
    let plain = |change: &Change<'_>| change.pieces.is_empty() && change.rows.is_none() && change.magnitude.is_none();
    match (one.source, other.source) {
        (Source::Instead(a), Source::Instead(b)) => plain(one) && plain(other) && one.shape == other.shape && a == b,
        _ => false,
    }
}
