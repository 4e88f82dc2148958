//! A tokenizer's folder, as Hugging Face has it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::Chat;
use crate::error::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";
const GENERATION: &str = "generation_config.json";
/// The special tokens that templates may name.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn read(dir: &Path) -> Result<Chat> {
    let path = dir.join(TOKENIZER);
    let bytes = std::fs::read(&path).map_err(|error| Error::file(&path, error))?;
    let tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| Error::file(&path, format!("not a tokenizer: {error}")))?;
    let config = object(&dir.join(CONFIG))?.unwrap_or_default();
    let mut special = special_tokens(&object(&dir.join(SPECIAL))?.unwrap_or_default());
    special.extend(special_tokens(&config));
    let template = template(dir, &config)?;
    let mut chat = Chat::new(tokenizer, &template, special)?;
    let ends = object(&dir.join(GENERATION))?.and_then(|mut config| config.remove("eos_token_id")).unwrap_or_default();
    let more = ends.as_u64().into_iter().chain(ends.as_array().into_iter().flatten().filter_map(Value::as_u64));
    for id in more.filter_map(|id| u32::try_from(id).ok()) {
        if !chat.stops.contains(&id) {
            chat.stops.push(id);
        }
    }
    Ok(chat)
}

pub(super) fn write(chat: &Chat, dir: &Path) -> Result<()> {
    let save = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|error| Error::file(&path, error))
    };
    std::fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
    let mut tokenizer = chat.tokenizer.clone();
    tokenizer.with_post_processor(chat.post_processor.clone());
    let text = tokenizer.to_string(false).map_err(|error| Error::file(&dir.join(TOKENIZER), error))?;
    save(TOKENIZER, text)?;
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    for (name, token) in &chat.special {
        config[name] = json!(token);
    }
    save(CONFIG, format!("{config:#}\n"))?;
    save(TEMPLATE, chat.template.source().to_owned())
}

/// A file that holds a mapping; `None` if it is not there.
fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file(path, error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| Error::file(path, format!("not a JSON object: {error}")))
}

/// A token stands there as a text, or as an object with its `content`.
fn special_tokens(config: &Map<String, Value>) -> BTreeMap<String, String> {
    let token = |name: &str| {
        let value = config.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    NAMES.iter().filter_map(|name| Some(((*name).to_owned(), token(name)?))).collect()
}

fn template(dir: &Path, config: &Map<String, Value>) -> Result<String> {
    let path = dir.join(TEMPLATE);
    match std::fs::read_to_string(&path) {
        Ok(template) => return Ok(template),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::file(&path, error)),
    }
    // Several by name: the one for chats without tools is `default`.
    let template = config.get("chat_template").and_then(|template| match template {
        Value::Array(items) => items.iter().find(|item| item["name"] == "default")?["template"].as_str(),
        other => other.as_str(),
    });
    template
        .map(str::to_owned)
        .ok_or_else(|| Error::template(format!("{} has none: neither {TEMPLATE} nor `chat_template` in {CONFIG}", dir.display())))
}
