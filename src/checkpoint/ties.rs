//! Models whose output head shares the weight of the embedding (tied weights).

use super::change::{Change, Piece, Source};
use super::model::ModelConfig;
use super::names::Place;
use super::{Checkpoint, Entry};

/// The names of token embeddings: the last components, or the last two where one says too little.
const EMBEDDINGS: [&str; 11] = [
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "word_embedding",
    "tokens_embed",
    "backbone.embeddings",
    "transformer.embeddings",
    "rwkv.embeddings",
    "transformer.w",
];
/// The names of the output heads of language models.
const HEADS: [&str; 15] = [
    "lm_head",
    "language_model.lm_head",
    "thinker.lm_head",
    "embed_out",
    "cls.predictions.decoder",
    "lm_head.decoder",
    "lm_head.out_proj",
    "predictions.decoder",
    "mlm_score.decoder",
    "vocab_projector",
    "proj_out",
    "generator_lm_head",
    "pred_layer.proj",
    "output_projection",
    "lm_loss",
];
/// Heads whose names other modules have too, so that they count only without a prefix.
const PLAIN_HEADS: [&str; 3] = ["decoder", "head", "output"];
/// The heads of classes whose names begin so, as transformers (5.24) spells them; those of most other classes are `lm_head`.
const HEADS_OF_CLASSES: [(&str, &str); 18] = [
    ("DistilBert", "vocab_projector"),
    ("Whisper", "proj_out"),
    ("Moonshine", "proj_out"),
    ("CohereAsr", "proj_out"),
    ("Canary", "proj_out"),
    ("Electra", "generator_lm_head"),
    ("ConvBert", "generator_lm_head"),
    ("XLMWithLMHead", "pred_layer.proj"),
    ("Flaubert", "pred_layer.proj"),
    ("XLNet", "lm_loss"),
    ("Albert", "predictions.decoder"),
    ("ModernBert", "decoder"),
    ("T5Gemma", "lm_head.out_proj"),
    ("Rwkv", "head"),
    ("BioGpt", "output_projection"),
    ("TrOCR", "output_projection"),
    ("Vilt", "mlm_score.decoder"),
    ("Git", "output"),
];
/// Words in the class names of models that have an output head.
const WITH_HEAD: [&str; 5] = ["ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining"];

/// The embedding and the output head of a model, which share or may share one weight.
#[derive(Clone)]
pub(super) struct Tie<'r> {
    pub(super) embedding: Place<'r>,
    /// The name of the head's weight; `None` if it is not known.
    pub(super) head: Option<String>,
    /// True if the head's weight is stored as a tensor of its own.
    pub(super) stored: bool,
    /// True if the config says that the weight is shared; false if that is not known.
    pub(super) known: bool,
}

impl<'r> Tie<'r> {
    /// The tie of a model; `None` if the weight is not shared, or there is not exactly one embedding.
    pub(super) fn of(base: &'r Checkpoint, config: Option<&ModelConfig>) -> Option<Self> {
        let ties = config.and_then(ModelConfig::ties);
        if ties == Some(false) {
            return None;
        }
        let mut embeddings = base.entries().filter(|entry| is_embedding(&entry.name) && entry.shape.len() == 2);
        let (embedding, None) = (embeddings.next()?, embeddings.next()) else { return None };
        let embedding = base.find(&embedding.name)?;
        let weight = |head: &str| format!("{head}.weight");
        let heads = HEADS.iter().chain(&PLAIN_HEADS);
        let stored = heads.map(|head| weight(head)).find(|head| base.find(head).is_some());
        let class = config.and_then(ModelConfig::architecture);
        let headless = class.is_some_and(|class| !WITH_HEAD.iter().any(|word| class.contains(word)));
        if stored.is_none() && headless {
            return None;
        }
        let known = config.is_some() && (ties.is_some() || stored.is_some() || class.is_some());
        let (is_stored, head) = (stored.is_some(), stored.or_else(|| head_of(base, embedding.1, class).map(weight)));
        Some(Self { embedding, head, stored: is_stored, known })
    }
}

/// The name under which transformers looks for the head of a model with this embedding; `None` if that is not known.
fn head_of(base: &Checkpoint, embedding: &Entry, class: Option<&str>) -> Option<&'static str> {
    let begins = |beginning: &str| base.entries().any(|entry| entry.name.starts_with(beginning));
    let of_class = |class: &str| HEADS_OF_CLASSES.iter().find(|(beginning, _)| class.starts_with(beginning));
    if let Some((_, head)) = class.and_then(of_class) {
        return Some(head);
    }
    match embedding.name.as_str() {
        name if !name.contains('.') || name.matches('.').count() == 1 => None, // a model without its head, and without a prefix
        name if name.starts_with("language_model.") => Some("language_model.lm_head"),
        name if name.starts_with("thinker.") => Some("thinker.lm_head"),
        name if name.starts_with("gpt_neox.") => Some("embed_out"),
        _ if begins("cls.predictions.") => Some("cls.predictions.decoder"),
        _ if begins("lm_head.dense.") => Some("lm_head.decoder"),
        // The heads of encoders have many names.
        _ if class.is_some_and(|class| class.contains("ForMaskedLM") || class.contains("ForPreTraining")) => None,
        _ => Some("lm_head"),
    }
}

/// The bias of a head whose module has one, and the bias that it shares while the weights are tied.
pub(super) fn biases(head: &str) -> Option<[String; 2]> {
    let module = head.strip_suffix(".decoder.weight").filter(|module| *module == "lm_head" || module.ends_with("predictions"))?;
    Some([format!("{module}.decoder.bias"), format!("{module}.bias")])
}

/// True if a tensor is the table that encoder and decoder share (T5, BART), unless the config unties them.
pub(super) fn is_shared(base: &Checkpoint, name: &str) -> bool {
    let last = name.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    let config = base.parent().and_then(ModelConfig::read);
    last == Some("shared") && config.and_then(|config| config.ties()) != Some(false)
}

/// True if a tensor is a token embedding.
pub(super) fn is_embedding(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|module| EMBEDDINGS.iter().any(|embedding| ends_with(module, embedding)))
}

/// True if a tensor is the output head of a language model.
pub(super) fn is_head(name: &str) -> bool {
    let is = |module: &str| PLAIN_HEADS.contains(&module) || HEADS.iter().any(|head| ends_with(module, head));
    name.strip_suffix(".weight").is_some_and(is)
}

/// True if a tensor is the bias that a head has of its own.
pub(super) fn is_head_bias(name: &str) -> bool {
    name.strip_suffix(".bias").is_some_and(|module| biases(&format!("{module}.weight")).is_some())
}

/// True if the last components of a name are these.
fn ends_with(name: &str, last: &str) -> bool {
    name.strip_suffix(last).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// True if both changes give one table the same values: replacements and updates are equal, as they are or transposed.
pub(super) fn same(one: &Change<'_>, other: &Change<'_>) -> bool {
    let plain = |change: &Change<'_>| change.rows.is_none() && change.magnitude.is_none() && change.plus.is_none();
    let sources = match (one.source, other.source) {
        (Source::Stored, Source::Stored | Source::Other(_)) => true, // tied: the head's weight is the embedding's
        (Source::Replacement(a), Source::Replacement(b)) => a == b,
        _ => false,
    };
    let pieces = one.pieces.len() == other.pieces.len() && one.pieces.iter().zip(&other.pieces).all(|(a, b)| same_update(a, b));
    sources && pieces && plain(one) && plain(other) && one.shape == other.shape
}

/// True if two updates of one table are equal: `B·A` of both, or `B·A` of one and `Aᵀ·Bᵀ` of the other.
fn same_update(one: &Piece<'_>, other: &Piece<'_>) -> bool {
    let (a, b) = (&one.factors, &other.factors);
    let equal = match one.transposed == other.transposed {
        true => a.a == b.a && a.b == b.b,
        false => a.a == b.b.transposed() && a.b == b.a.transposed(),
    };
    equal && a.scaling == b.scaling && one.first_row == other.first_row && one.principal.is_none() && other.principal.is_none()
}
