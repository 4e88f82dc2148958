//! Conversations for training: read from JSON lines, turned into tokens, shuffled by a seed, and handed out in batches whose place can be saved.

mod batches;

use std::path::Path;

use lowrank::random::Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use batches::{Batch, BatchSettings, Batches, Position};

use crate::chat::{Answers, Chat, Encoded, Message};
use crate::error::{Error, Result};

/// A conversation: its messages.
pub type Conversation = Vec<Message>;

/// One line of a file.
#[derive(Deserialize)]
struct Line {
    messages: Conversation,
    #[serde(default)]
    tools: Value,
}

/// Reads a file with a conversation on each line: `{"messages": [{"role": "user", "content": "…"}, …]}`. Empty lines are passed over, and so are
/// other entries of a line, except `tools`.
///
/// Errors: [`Error::File`] if the file cannot be read or holds no conversation, [`Error::Line`] with the line that is not one.
pub fn read_conversations(path: impl AsRef<Path>) -> Result<Vec<Conversation>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let read =
        lines.map(|(at, line)| conversation(line).map_err(|problem| Error::Line { path: path.into(), line: at + 1, problem }));
    let conversations = read.collect::<Result<Vec<_>>>()?;
    if conversations.is_empty() { Err(Error::file(path, "there is no conversation in it")) } else { Ok(conversations) }
}

fn conversation(line: &str) -> Result<Conversation, String> {
    let line: Line = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        format!("want {{\"messages\": [{{\"role\": …, \"content\": …}}, …]}}: {what} (column {})", error.column())
    })?;
    match line {
        Line { messages, .. } if messages.is_empty() => Err("it has no messages".into()),
        Line { tools, .. } if !tools.is_null() => Err("it has `tools`, which are not taken".into()),
        Line { messages, .. } => Ok(messages),
    }
}

/// Writes conversations as [`read_conversations`] reads them.
pub fn write_conversations(path: impl AsRef<Path>, conversations: &[Conversation]) -> Result<()> {
    let path = path.as_ref();
    let line = |messages| serde_json::to_string(&serde_json::json!({"messages": messages})).map(|line| line + "\n");
    let text = conversations.iter().map(line).collect::<Result<String, _>>().map_err(|error| Error::file(path, error))?;
    std::fs::write(path, text).map_err(|error| Error::file(path, error))
}

/// What becomes of a conversation that is longer than allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// It is refused, and with it the data.
    #[default]
    Refuse,
    /// Its end is cut off. It is refused if no answer is left.
    Truncate,
    /// It is left out, and counted in [`Dataset::left_out`].
    LeaveOut,
}

/// How conversations become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoding {
    /// Which answers are trained on.
    pub answers: Answers,
    /// The most tokens a conversation may have.
    pub max_len: usize,
    /// What becomes of longer ones.
    pub too_long: TooLong,
}

/// Conversations as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    examples: Vec<Encoded>,
    left_out: usize,
    truncated: usize,
}

impl Dataset {
    /// Turns conversations into tokens.
    ///
    /// Errors: [`Error::Conversation`] with the number of one that the template does not take, that has no answer, or that is too long
    /// where that is refused; [`Error::Setting`] for a limit below 2, or if no conversation is left.
    pub fn encode(chat: &Chat, conversations: &[Conversation], encoding: &Encoding) -> Result<Self> {
        Error::unless(encoding.max_len >= 2, "max_len", encoding.max_len, "2 tokens or more")?;
        let mut data = Self { examples: Vec::with_capacity(conversations.len()), left_out: 0, truncated: 0 };
        for (at, messages) in conversations.iter().enumerate() {
            data.push(chat, messages, encoding)
                .map_err(|error| Error::Conversation { number: at + 1, problem: error.to_string() })?;
        }
        let want = || format!("one of at most {} tokens or more", encoding.max_len);
        Error::unless(
            !data.examples.is_empty(),
            "conversations",
            format!("{}, all of them left out", conversations.len()),
            want(),
        )?;
        Ok(data)
    }

    fn push(&mut self, chat: &Chat, messages: &[Message], encoding: &Encoding) -> Result<()> {
        let mut example = chat.encode(messages, encoding.answers)?;
        let (length, max) = (example.ids.len(), encoding.max_len);
        if length > max {
            match encoding.too_long {
                TooLong::Refuse => {
                    let want = format!("at most {max}; truncate long conversations or leave them out");
                    return Err(Error::setting("length in tokens", length, want));
                }
                TooLong::Truncate => {
                    example.ids.truncate(max);
                    example.answer.truncate(max);
                    self.truncated += 1;
                }
                TooLong::LeaveOut => {
                    self.left_out += 1;
                    return Ok(());
                }
            }
        }
        if !example.answer.iter().skip(1).any(|&answer| answer) {
            return Err(Error::template(format!("no token of an answer is among the first {max}")));
        }
        self.examples.push(example);
        Ok(())
    }

    /// From tokens that are there already. Errors: [`Error::Conversation`] for one whose parts differ in length or that has no answer.
    pub fn from_examples(examples: Vec<Encoded>) -> Result<Self> {
        for (at, example) in examples.iter().enumerate() {
            let fits = example.ids.len() == example.answer.len() && example.answer.iter().skip(1).any(|&answer| answer);
            if !fits {
                let (ids, answer) = (example.ids.len(), example.answer.len());
                let problem = format!(
                    "it has {ids} tokens and {answer} marks of answers, want as many, and an answer behind the first token"
                );
                return Err(Error::Conversation { number: at + 1, problem });
            }
        }
        Error::unless(!examples.is_empty(), "examples", "none", "one or more")?;
        Ok(Self { examples, left_out: 0, truncated: 0 })
    }

    /// The conversations.
    pub fn examples(&self) -> &[Encoded] {
        &self.examples
    }

    /// How many conversations there are; never 0.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// How many conversations were too long and left out.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// How many conversations were too long and cut.
    pub fn truncated(&self) -> usize {
        self.truncated
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|example| example.ids.len()).sum()
    }

    /// How many tokens are trained on.
    pub fn answer_tokens(&self) -> usize {
        self.examples.iter().map(|example| example.answer.iter().skip(1).filter(|&&answer| answer).count()).sum()
    }

    /// A part to train on and a part held back for evaluation: the given part of the conversations, rounded up, picked by the seed. Both keep
    /// the order.
    ///
    /// Errors: [`Error::Setting`] unless both parts get a conversation.
    pub fn split(self, held_back: f64, seed: u64) -> Result<(Self, Self)> {
        let held = (self.len() as f64 * held_back).ceil();
        let fits = held_back > 0.0 && held >= 1.0 && held < self.len() as f64;
        let want = format!("a part of {} conversations that leaves one or more for each side", self.len());
        Error::unless(fits, "held_back", held_back, want)?;
        let mut order: Vec<usize> = (0..self.len()).collect();
        Rng::new(seed).shuffle(&mut order);
        let mut is_held = vec![false; self.len()];
        order[..held as usize].iter().for_each(|&at| is_held[at] = true);
        let (mut train, mut evaluate) = (Vec::new(), Vec::new());
        for (example, held) in self.examples.into_iter().zip(is_held) {
            if held { evaluate.push(example) } else { train.push(example) }
        }
        let (left_out, truncated) = (self.left_out, self.truncated);
        Ok((Self { examples: train, left_out, truncated }, Self { examples: evaluate, left_out: 0, truncated: 0 }))
    }
}
