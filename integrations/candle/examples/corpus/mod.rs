//! Dialogues of the Python package chatterbot-corpus, as conversations.
//!
//! A file is YAML: `categories`, and `conversations`, each a list of what is said in turn, the first by the user. A list of odd length ends with a
//! question without an answer, which is left away. An entry that is no list is no conversation and is passed over: version 1.3.3 has one, where
//! a dash is missing.

use std::path::Path;

use lowrank_candle::chat::Message;
use lowrank_candle::data::Conversation;
use saphyr::{LoadableYamlNode, Scalar, Yaml};

/// The conversations of all `*.yml` files of a folder, by the names of the files. The error says which file cannot be read.
pub(crate) fn read_folder(folder: &Path) -> Result<Vec<Conversation>, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yml"));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        all.extend(conversations(&text).map_err(|problem| format!("{}: {problem}", path.display()))?);
    }
    if all.is_empty() { Err(format!("{}: there are no conversations in it", folder.display())) } else { Ok(all) }
}

/// The conversations of one file.
pub(crate) fn conversations(text: &str) -> Result<Vec<Conversation>, String> {
    let documents = Yaml::load_from_str(text).map_err(|error| format!("not YAML: {error}"))?;
    let root = documents.first().ok_or("it is empty")?;
    let listed = root.as_mapping_get("conversations").and_then(Yaml::as_vec).ok_or("it has no list `conversations`")?;
    let lists = listed.iter().enumerate().filter_map(|(at, said)| Some((at, said.as_vec()?)));
    lists
        .map(|(at, said)| turns(said).map_err(|problem| format!("conversation {}: {problem}", at + 1)))
        .filter(|turns| !matches!(turns, Ok(turns) if turns.is_empty()))
        .collect()
}

fn turns(said: &[Yaml]) -> Result<Conversation, String> {
    let texts = said.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let pairs = texts.chunks_exact(2);
    Ok(pairs.flat_map(|pair| [Message::user(pair[0]), Message::assistant(pair[1])]).collect())
}

/// A number as YAML reads it need not be the text that was written.
fn text<'y>(said: &'y Yaml) -> Result<&'y str, String> {
    match said {
        Yaml::Value(Scalar::String(text)) => Ok(text.trim()),
        _ => Err("what is said is no text; put numbers and truth values in quotes".into()),
    }
}
