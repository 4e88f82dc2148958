//! Chat templates in Jinja, with what transformers gives them: trimmed blocks, `raise_exception`, `strftime_now`, `tojson`, the methods of
//! Python's strings, special tokens by name, and `{% generation %}`.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::ops::Range;

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, Value, context};

use super::Message;
use super::json::to_json;
use crate::error::{Error, Result};

const NAME: &str = "chat";
/// What a `{% generation %}` block becomes: a call of this function, which is given the block.
const CALL: &str = "call __generation()";
/// These two stand around answers while a conversation is rendered to find them; Unicode has them for private use.
const MARKS: [char; 2] = ['\u{10_fffc}', '\u{10_fffd}'];

/// A template, ready to render.
#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    source: String,
    special: BTreeMap<String, String>,
    has_marks: bool,
}

impl Template {
    pub(super) fn new(source: &str, special: &BTreeMap<String, String>) -> Result<Self> {
        let (called, has_marks) = with_calls(source);
        let mut environment = environment(None).map_err(|error| refused(&error))?;
        environment.add_template_owned(NAME, called).map_err(|error| refused(&error))?;
        Ok(Self { environment, source: source.to_owned(), special: special.clone(), has_marks })
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn set_date(&mut self, date: &str, special: &BTreeMap<String, String>) -> Result<()> {
        let day = || date.parse::<jiff::civil::Date>().map(|day| day.at(0, 0, 0, 0));
        let time: DateTime =
            date.parse().or_else(|_| day()).map_err(|_| Error::setting("date", date, "a date such as 2024-07-26"))?;
        let (called, _) = with_calls(&self.source);
        let mut environment = environment(Some(time)).map_err(|error| refused(&error))?;
        environment.add_template_owned(NAME, called).map_err(|error| refused(&error))?;
        self.environment = environment;
        self.special.clone_from(special);
        Ok(())
    }

    pub(super) fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        self.rendered(messages, answer, false)
    }

    /// The text, and where the blocks marked as generated are in it; `None` for a template without marks.
    pub(super) fn marked(&self, messages: &[Message]) -> Result<Option<(String, Vec<Range<usize>>)>> {
        if !self.has_marks {
            return Ok(None);
        }
        if messages.iter().any(|message| message.content.contains(MARKS)) {
            return Err(Error::template("a message has the private characters U+10FFFC or U+10FFFD, which mark answers here"));
        }
        let marked = self.rendered(messages, false, true)?;
        let (mut text, mut spans) = (String::with_capacity(marked.len()), Vec::new());
        for part in marked.split_inclusive(MARKS) {
            let mark = part.chars().next_back().filter(|last| MARKS.contains(last));
            text.push_str(part.trim_end_matches(MARKS));
            if mark == Some(MARKS[0]) {
                spans.push(text.len()..text.len());
            } else if let (Some(_), Some(span)) = (mark, spans.last_mut()) {
                span.end = text.len();
            }
        }
        Ok(Some((text, spans)))
    }

    fn rendered(&self, messages: &[Message], answer: bool, marks: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(|error| refused(&error))?;
        let special = Value::from(Serde(&self.special));
        let own = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => answer,
            tools => Value::from(()),
            documents => Value::from(()),
            __marks => marks,
        };
        template.render(context! { ..own, ..special }).map_err(|error| refused(&error))
    }
}

/// What a template says with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

/// The first line of what the template or the engine says.
fn refused(error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let problem = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let problem = problem.lines().next().unwrap_or_default();
    if error.source().is_some_and(|source| source.is::<Raised>()) {
        return Error::template(problem);
    }
    Error::template(format!("{}: {problem}{line}", error.kind()))
}

fn environment(date: Option<DateTime>) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(print);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: &str| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()).with_source(Raised))
    });
    environment.add_function("strftime_now", move |format: &str| {
        let now = date.unwrap_or_else(|| jiff::Zoned::now().datetime());
        jiff::fmt::strtime::format(format, now)
            .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
    });
    environment.add_function("__generation", |state: &mut State, keywords: Kwargs| {
        let block: Value = keywords.get("caller")?;
        let text = block.call(state, &[])?;
        let marks = state.lookup("__marks").is_some_and(|marks| marks.is_true());
        Ok::<_, minijinja::Error>(if marks { format!("{}{text}{}", MARKS[0], MARKS[1]) } else { text.to_string() })
    });
    Ok(environment)
}

/// Prints a value as Python does; lists and mappings, which Python prints in its own notation, are refused.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Into::into),
        ValueKind::None => out.write_str("None").map_err(Into::into),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            let problem = format!("it prints a {} as it is, which is taken with `| tojson` alone", value.kind());
            Err(minijinja::Error::new(ErrorKind::BadSerialization, problem))
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `{% generation %}` and `{% endgeneration %}` as the call of a function with a block, and whether there are any.
fn with_calls(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let word = inner.trim_matches(['-', '+', ' ', '\t', '\r', '\n']);
        let becomes = match word {
            "generation" => CALL,
            "endgeneration" => "endcall",
            other => other,
        };
        found |= word == "generation";
        out.push_str(before);
        if becomes == word {
            out.push_str(inner);
        } else {
            let start = inner.len() - inner.trim_start_matches(['-', '+', ' ', '\t', '\r', '\n']).len();
            let _ = write!(out, "{}{becomes}{}", &inner[..start], &inner[start + word.len()..]);
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    (out, found)
}
