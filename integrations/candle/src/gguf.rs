//! Language models from GGUF, the files of llama.cpp: weights, configuration, tokenizer and chat template of one file, under the names and in the
//! layout that Hugging Face's transformers give them, so that adapters trained on them fit the model there.
//!
//! Taken are the architectures `llama` (also Mistral, SmolLM, TinyLlama), `qwen2` and `qwen3`, with dense layers.

mod config;
mod names;
mod tokenizer;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{Device, Tensor};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use names::Order;

/// An open GGUF file. Weights are read when they are asked for.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    content: Content,
    file: Mutex<BufReader<File>>,
    config: Json,
    /// From the names of transformers to those in the file.
    names: BTreeMap<String, (String, Order)>,
}

impl Gguf {
    /// Opens a file and reads all but its weights. Errors: [`Error::File`] for a file that is missing, damaged, or holds a model of
    /// another family.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let refuse = |problem: String| Error::file(path, problem);
        let mut file = BufReader::new(File::open(path).map_err(|error| refuse(error.to_string()))?);
        refuse_no_alignment(&mut file).map_err(|error| refuse(error.to_string()))?;
        let content = Content::read(&mut file)
            .map_err(|error| refuse(format!("not a GGUF file that can be read: {}", first_line(&error))))?;
        let metadata = Metadata { path, values: &content.metadata };
        let layers = config::layers(&metadata)?;
        let names = names::in_transformers(&content.tensor_infos, metadata.architecture()?, layers).map_err(refuse)?;
        let mut opened = Self { path: path.into(), content, file: Mutex::new(file), config: Json::Null, names };
        let frequencies = match opened.content.tensor_infos.get(names::ROPE_FACTORS) {
            Some(info) => Some(opened.read(names::ROPE_FACTORS, info)?.flatten_all()?.to_vec1::<f32>()?),
            None => None,
        };
        opened.config = config::config(&opened.metadata(), &opened.names, frequencies.as_deref())?;
        Ok(opened)
    }

    /// The content of the `config.json` that the model has in transformers.
    pub fn config(&self) -> &Json {
        &self.config
    }

    /// The names of the weights, as transformers has them, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// A weight in f32, by its name in transformers. Errors: [`Error::File`] if there is none, or its numbers are not all there.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some((stored, order)) = self.names.get(name) else {
            return Err(Error::file(&self.path, format!("there is no weight `{name}`")));
        };
        let tensor = self.read(stored, &self.content.tensor_infos[stored])?;
        let heads = |key: &str| self.config[key].as_u64().unwrap_or(1) as usize;
        match order {
            Order::AsStored => Ok(tensor),
            Order::QueryHeads => self.turned_back(name, &tensor, heads("num_attention_heads")),
            Order::KeyHeads => self.turned_back(name, &tensor, heads("num_key_value_heads")),
        }
    }

    /// All weights in f32, by their names in transformers.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        self.names().map(|name| Ok((name.to_owned(), self.tensor(name)?))).collect()
    }

    /// The tokenizer, as transformers has it. Errors: [`Error::File`] for a file without one, or with one of a kind that is not taken.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        tokenizer::tokenizer(&self.metadata())
    }

    /// The chat template (Jinja), if the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        match self.content.metadata.get("tokenizer.chat_template") {
            Some(Value::String(template)) => Some(template),
            _ => None,
        }
    }

    /// The special tokens by transformers' names: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    pub fn special_tokens(&self) -> Result<BTreeMap<String, String>> {
        tokenizer::special_tokens(&self.metadata())
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata { path: &self.path, values: &self.content.metadata }
    }

    /// A tensor in f32, laid out as in the file.
    fn read(&self, stored: &str, info: &TensorInfo) -> Result<Tensor> {
        let refuse = |problem: &dyn std::fmt::Display| Error::file(&self.path, format!("tensor `{stored}`: {problem}"));
        let dims = info.shape.dims();
        if dims.iter().try_fold(1usize, |product, &side| product.checked_mul(side)).is_none_or(|count| count == 0) {
            return Err(refuse(&format!("its shape is {dims:?}")));
        }
        let mut file = self.file.lock().map_err(|_| refuse(&"a thread that read the file has panicked"))?;
        let tensor =
            info.read(&mut *file, self.content.tensor_data_offset, &Device::Cpu).map_err(|error| refuse(&first_line(&error)))?;
        tensor.dequantize(&Device::Cpu).map_err(|error| refuse(&first_line(&error)))
    }

    /// `out[h, s·d/2 + j] = stored[h, 2·j + s]` for each head h of d rows, s of 0 and 1, j below d/2.
    ///
    /// llama.cpp rotates neighbouring rows of a head, transformers row j with row j + d/2; who made the file has interleaved the two halves.
    fn turned_back(&self, name: &str, stored: &Tensor, heads: usize) -> Result<Tensor> {
        let dims = stored.dims();
        let head = self.config["head_dim"].as_u64().unwrap_or(0) as usize;
        if dims.first() != Some(&(heads * head)) || !head.is_multiple_of(2) {
            return Err(Error::file(
                &self.path,
                format!("`{name}` is {dims:?}, but {heads} heads of {head} rows are {} rows", heads * head),
            ));
        }
        let columns = dims[1..].iter().product::<usize>();
        Ok(stored.reshape((heads, head / 2, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape(dims)?)
    }
}

/// Other lines may be a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// candle divides by the alignment that a file states, and panics at 0.
fn refuse_no_alignment(file: &mut BufReader<File>) -> std::io::Result<()> {
    const KEY: &[u8] = b"general.alignment\x04\0\0\0\0\0\0\0";
    const HEADERS: u64 = 64 << 20; // vocabularies are a few MB
    let mut bytes = Vec::new();
    file.by_ref().take(HEADERS).read_to_end(&mut bytes)?;
    file.seek(SeekFrom::Start(0))?;
    let stated = bytes.windows(KEY.len()).any(|window| window == KEY);
    if stated { Err(std::io::Error::other("its `general.alignment` is 0")) } else { Ok(()) }
}

/// The settings of a file, with the errors that name it.
struct Metadata<'f> {
    path: &'f Path,
    values: &'f HashMap<String, Value>,
}

impl<'f> Metadata<'f> {
    fn error(&self, problem: impl ToString) -> Error {
        Error::file(self.path, problem)
    }

    fn architecture(&self) -> Result<&'f str> {
        self.text("general.architecture")?
            .ok_or_else(|| self.error("it does not say which architecture it is (`general.architecture`)"))
    }

    fn get<T>(&self, key: &str, kind: &str, read: impl Fn(&'f Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.error(format!("`{key}` is not {kind}")))
    }

    fn text(&self, key: &str) -> Result<Option<&'f str>> {
        self.get(key, "text", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| value.to_bool().ok())
    }

    fn whole(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", |value| match *value {
            Value::U8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::U32(n) => usize::try_from(n).ok(),
            Value::U64(n) => usize::try_from(n).ok(),
            Value::I8(n) => usize::try_from(n).ok(),
            Value::I16(n) => usize::try_from(n).ok(),
            Value::I32(n) => usize::try_from(n).ok(),
            Value::I64(n) => usize::try_from(n).ok(),
            _ => None,
        })
    }

    /// A number, as its shortest decimal form says: 1e-5, not 0.000009999999747378752.
    fn real(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| match *value {
            Value::F32(x) if x.is_finite() => x.to_string().parse().ok(),
            Value::F64(x) if x.is_finite() => Some(x),
            _ => None,
        })
    }

    fn list<T>(&self, key: &str, kind: &str, read: impl Fn(&'f Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        self.get(key, kind, |value| match value {
            Value::Array(items) => items.iter().map(&read).collect(),
            _ => None,
        })
    }
}
