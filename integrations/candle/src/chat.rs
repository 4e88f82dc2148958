//! Conversations as tokens: a model's tokenizer and its chat template, rendered as transformers does it.

mod files;
mod json;
mod template;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use template::Template;

/// The role whose messages are trained on.
const ASSISTANT: &str = "assistant";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// Whatever else a file has in a message; the template sees it.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Message {
    /// A message of a role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), more: Map::new() }
    }

    /// A message of the user's.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the assistant's.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(ASSISTANT, content)
    }

    /// Instructions that come first.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// Which answers of a conversation are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answers {
    /// Every message of the assistant's.
    #[default]
    All,
    /// The last message alone, which must be the assistant's.
    Last,
}

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The tokens, those of transformers' `apply_chat_template`.
    pub ids: Vec<u32>,
    /// For each token whether it is of an answer: of what the template makes of the message behind the prompt, with the token that ends it.
    pub answer: Vec<bool>,
}

/// A tokenizer and a chat template.
#[derive(Debug)]
pub struct Chat {
    /// Without its post-processor, which trims the places of tokens; no special tokens are added to what a template renders.
    tokenizer: Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    template: Template,
    special: BTreeMap<String, String>,
    stops: Vec<u32>,
}

impl Chat {
    /// From parts. `special` are the special tokens by transformers' names, such as `bos_token` and `eos_token`, which the template sees.
    ///
    /// Errors: [`Error::Template`] for a template that is not Jinja.
    pub fn new(mut tokenizer: Tokenizer, template: &str, special: BTreeMap<String, String>) -> Result<Self> {
        // A file may ask for texts to be cut or filled up; transformers does neither unless it is asked.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(Error::template)?;
        let post_processor = tokenizer.get_post_processor().cloned();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        let stops = special.get("eos_token").and_then(|token| tokenizer.token_to_id(token)).into_iter().collect();
        let template = Template::new(template, &special)?;
        Ok(Self { tokenizer, post_processor, template, special, stops })
    }

    /// From a folder of Hugging Face's: `tokenizer.json`, and the template from `chat_template.jinja` or `tokenizer_config.json`.
    ///
    /// Errors: [`Error::File`] for files that are missing or damaged; [`Error::Template`] if there is no template, or it is not Jinja.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        files::read(dir.as_ref())
    }

    /// From a GGUF file. Errors: [`Error::File`] for a tokenizer that is not taken, [`Error::Template`] if there is no template.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let template = gguf.chat_template().ok_or_else(|| Error::template("the file has none (`tokenizer.chat_template`)"))?;
        Self::new(gguf.tokenizer()?, template, gguf.special_tokens()?)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into a folder, for transformers and [`from_dir`](Self::from_dir).
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        files::write(self, dir.as_ref())
    }

    /// Templates that ask for the date get this one, such as `2024-07-26`, in place of today's, so that a run can be repeated.
    ///
    /// Errors: [`Error::Setting`] unless it is a date, with or without a time.
    pub fn with_date(mut self, date: &str) -> Result<Self> {
        self.template.set_date(date, &self.special)?;
        Ok(self)
    }

    /// The text that the template makes of messages; with `answer` also of what comes before the assistant's next one.
    ///
    /// Errors: [`Error::Template`] with what the template says of messages that it does not take.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        self.template.render(messages, answer)
    }

    /// The tokens of a conversation so far, with what comes before the assistant's next answer.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.ids(&self.render(messages, true)?)
    }

    /// The tokens of a text. Special tokens in it are found, none is added.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, false).map_err(Error::template)?.get_ids().to_vec())
    }

    /// The text of tokens, without special ones.
    pub fn text(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(Error::template)
    }

    /// The tokens that end an answer.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// How many tokens there are.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The tokens of a conversation, and which of them are answers.
    ///
    /// Answers are what the template marks with `{% generation %}`. In a template without such marks an answer is what the template adds
    /// when the message is appended to a prompt. A token that reaches over the beginning of an answer counts as prompt.
    ///
    /// Errors: [`Error::Template`] if the template does not take the messages, or renders earlier ones in another way once others
    /// follow, so that nobody can tell where answers are; or if there is no answer.
    pub fn encode(&self, messages: &[Message], answers: Answers) -> Result<Encoded> {
        if messages.last().is_none_or(|last| answers == Answers::Last && last.role != ASSISTANT) {
            return Err(Error::template("the last message is not the assistant's"));
        }
        let (text, mut spans) = match self.template.marked(messages)? {
            Some(marked) => marked,
            None => self.spans(messages, answers)?,
        };
        if answers == Answers::Last {
            spans.drain(..spans.len().saturating_sub(1));
        }
        if spans.iter().all(Range::is_empty) {
            return Err(Error::template("there is no answer of the assistant's"));
        }
        let encoding = self.tokenizer.encode(text, false).map_err(Error::template)?;
        let within =
            |&(start, end): &(usize, usize)| spans.iter().any(|span| span.start <= start && end <= span.end && start < end);
        Ok(Encoded { ids: encoding.get_ids().to_vec(), answer: encoding.get_offsets().iter().map(within).collect() })
    }

    /// The text of a conversation, and where in it the answers are, by rendering its beginnings.
    fn spans(&self, messages: &[Message], answers: Answers) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render(messages, false)?;
        let first = if answers == Answers::Last { messages.len() - 1 } else { 0 };
        let mut spans = Vec::new();
        for at in (first..messages.len()).filter(|&at| messages[at].role == ASSISTANT) {
            if at == 0 {
                return Err(Error::template("the first message is the assistant's, so it answers nothing"));
            }
            let prompt = self.render(&messages[..at], true)?;
            let answered = if at + 1 == messages.len() { text.clone() } else { self.render(&messages[..=at], false)? };
            if !answered.starts_with(&prompt) {
                return Err(unstable(
                    at,
                    "the prompt before it, as it is when the answer is generated, is not how the answered text begins",
                ));
            }
            if !text.starts_with(&answered) {
                return Err(unstable(at, "it is rendered in another way once more messages follow"));
            }
            spans.push(prompt.len()..answered.len());
        }
        Ok((text, spans))
    }
}

fn unstable(at: usize, problem: &str) -> Error {
    Error::template(format!(
        "where the answer in message {} is cannot be told: {problem}; train on last answers alone, or mark answers with {{% generation %}} in the template",
        at + 1
    ))
}
