//! Recognises files and folders: by the first bytes, by the names and shapes of tensors, by the files in the folder.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::gguf;
use super::kind::Kind;
use crate::adapter::{CONFIG_FILE, TENSORS_FILE};
use crate::error::{Error, Result};
use crate::file::{self, failed};

/// mlx-lm's tensors, beside an `adapter_config.json` of its own.
pub(super) const MLX_TENSORS: &str = "adapters.safetensors";
/// The number of bytes that are read to recognise a file that is not safetensors.
const BEGINNING: u64 = 1 << 20;
/// The longest header that the safetensors format allows.
const LONGEST_HEADER: u64 = 100_000_000;
const JSON: &str = "JSON text";
const ZIP: &str = "a zip archive";
/// The file extensions of pickles.
const PICKLES: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

/// The result of [`recognise`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    /// The kind of the file or folder.
    pub kind: Kind,
    /// The file that determines the kind, or the folder.
    pub path: PathBuf,
}

impl Recognised {
    /// An error that says what it is and what to do: `FILE: is …; …`.
    pub fn refusal(&self) -> Error {
        Error::File { path: self.path.clone(), reason: sentence(&self.kind, &self.path) }
    }
}

/// A sentence that says what a file is and what to do: `is …; …`.
pub(crate) fn sentence(kind: &Kind, path: &Path) -> String {
    match kind.advice(path) {
        instead if instead.is_empty() => format!("is {kind}"),
        instead => format!("is {kind}; {instead}"),
    }
}

/// The header of a tensor, as far as recognising needs it.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The element type, in the spelling of safetensors.
    pub dtype: String,
}

/// Recognises the kind of a file or a folder. Reads headers and settings, but no tensors.
///
/// Errors: [`Error::File`] for a path that cannot be read, or whose kind is not known.
pub fn recognise(path: &Path) -> Result<Recognised> {
    if path.is_dir() { folder(path) } else { single(path) }
}

/// Recognises a file by its first bytes; `None` if it may be safetensors, or its kind is not known.
pub fn by_first_bytes(bytes: &[u8]) -> Option<Kind> {
    const MAGIC: [(&[u8], Kind); 10] = [
        (b"version https://git-lfs.github.com/spec/", Kind::LfsPointer),
        (b"PK\x03\x04", Kind::Other(ZIP)),
        (b"algg", Kind::Ggml),
        (b"lmgg", Kind::Ggml),
        (b"tjgg", Kind::Ggml),
        (b"\x89HDF\r\n\x1a\n", Kind::Other("an HDF5 file, as Keras writes it")),
        (b"\x93NUMPY", Kind::Other("a NumPy array")),
        (b"\x1f\x8b", Kind::Other("a gzip archive")),
        (b"{", Kind::Other(JSON)),
        (b"\xef\xbb\xbf{", Kind::Other(JSON)),
    ];
    if begins_safetensors(bytes) {
        return None;
    }
    let text: Vec<u8> = bytes.iter().copied().skip_while(u8::is_ascii_whitespace).take(64).collect();
    let text = text.to_ascii_lowercase();
    match bytes {
        _ if bytes.starts_with(b"GGUF") => Some(gguf::kind(bytes)),
        _ if text.starts_with(b"<!doctype") || text.starts_with(b"<html") => Some(Kind::WebPage),
        // A pickle of protocol 2 to 5. `torch.save` writes a zip archive with a pickle named `NAME/data.pkl`.
        [0x80, 2..=5, ..] => Some(Kind::Pickle),
        _ if bytes.starts_with(b"PK\x03\x04") && contains(bytes, b"data.pkl") => Some(Kind::Pickle),
        _ => MAGIC.into_iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, kind)| kind),
    }
}

/// True if the bytes begin with a valid header length and the brace of a header. (A length of 640 alone would look like a pickle.)
fn begins_safetensors(bytes: &[u8]) -> bool {
    let length = bytes.first_chunk().map(|&length| u64::from_le_bytes(length));
    length.is_some_and(|length| length <= LONGEST_HEADER) && bytes.get(8) == Some(&b'{')
}

/// Recognises a safetensors file by its tensors.
pub fn by_tensors(tensors: &[TensorInfo]) -> Kind {
    let empty = |tensor: &TensorInfo| tensor.shape.contains(&0);
    let weights = || tensors.iter().filter(|tensor| tensor.name.ends_with("weight") || tensor.name.contains("lora_"));
    if weights().count() > 0 && weights().filter(|tensor| empty(tensor)).count() * 2 > weights().count() {
        return Kind::EmptyTensors;
    }
    if let Some(kind) = adapter(tensors) {
        return kind;
    }
    quantisation(tensors).map_or(Kind::Checkpoint, Kind::Quantised)
}

/// The tensors in the header of a safetensors file; `bytes` may end after the header. `None` if the header is not valid.
pub fn outline(bytes: &[u8]) -> Option<Vec<TensorInfo>> {
    let tensor = |(name, info): (String, Value)| {
        let shape = info.get("shape")?.as_array()?.iter().map(|side| side.as_u64().and_then(|side| side.try_into().ok()));
        Some(TensorInfo { name, shape: shape.collect::<Option<_>>()?, dtype: info.get("dtype")?.as_str()?.into() })
    };
    Some(header(bytes)?.into_iter().filter_map(tensor).collect())
}

/// The header of a safetensors file.
pub(super) fn header(bytes: &[u8]) -> Option<Map<String, Value>> {
    let (&length, rest) = bytes.split_first_chunk()?;
    serde_json::from_slice(rest.get(..usize::try_from(u64::from_le_bytes(length)).ok()?)?).ok()
}

/// The kind of an adapter by the ends of names; `None` for a model.
fn adapter(tensors: &[TensorInfo]) -> Option<Kind> {
    let any = |holds: fn(&str) -> bool| tensors.iter().any(|tensor| holds(&tensor.name));
    let lycoris =
        |name: &str| ["hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "oft_diag"].iter().any(|end| name.ends_with(end));
    let numbered = |name: &str| super::spelling::numbered(name).is_some();
    if !tensors.is_empty() && tensors.iter().all(|tensor| numbered(&tensor.name)) {
        return Some(Kind::CandleLora);
    }
    if any(lycoris) {
        return Some(Kind::LyCoris);
    }
    if any(|name| name.ends_with(".lora_down.weight") || name.ends_with(".lora_up.weight")) {
        return Some(Kind::Kohya);
    }
    if any(|name| ["lora.down.weight", "lora_linear_layer.down.weight"].iter().any(|end| name.ends_with(end))) {
        return Some(Kind::Diffusers);
    }
    let peft = |name: &str| name.contains(".lora_A.") || name.contains(".lora_embedding_A");
    if any(peft) {
        let modules = || tensors.iter().filter_map(|tensor| Some(tensor.name.split_once(".lora_A.")?.0));
        let held = |module: &str| tensors.iter().any(|tensor| tensor.name == format!("{module}.base_layer.weight"));
        let rest = any(|name| !name.contains("lora_") && !name.contains(".base_layer."));
        return Some(match rest && modules().next().is_some() && modules().all(held) {
            true => Kind::AdapterInside,
            false if any(|name| super::spelling::component(name).is_some()) => Kind::Diffusers,
            false => Kind::Peft,
        });
    }
    let ending = |end: &str| tensors.iter().any(|tensor| tensor.name.ends_with(end));
    let kinds = [(".lora_a.weight", Kind::Torchtune), (".lora_a", Kind::MlxLm), (".lora_A", Kind::LoraLib)];
    kinds.into_iter().find(|(end, _)| ending(end)).map(|(_, kind)| kind)
}

/// The quantisation method of a model; `None` if it is not quantised.
fn quantisation(tensors: &[TensorInfo]) -> Option<&'static str> {
    let ending = |end: &str| tensors.iter().find(|tensor| tensor.name.ends_with(end));
    let beside = |tensor: &TensorInfo, end: &str, other: &str| {
        let name = format!("{}{other}", tensor.name.strip_suffix(end)?);
        tensors.iter().find(|tensor| tensor.name == name)
    };
    if tensors.iter().any(|tensor| tensor.name.contains(".quant_state.bitsandbytes__")) || ending(".weight.absmax").is_some() {
        return Some("bitsandbytes, 4 bits");
    }
    if ending(".SCB").is_some() {
        return Some("bitsandbytes, 8 bits");
    }
    if let Some(packed) = ending(".qweight") {
        // GPTQ packs along the inputs, AWQ along the outputs.
        let scales = beside(packed, ".qweight", ".scales").map(|scales| scales.shape.last());
        let gptq = ending(".g_idx").is_some() || scales == Some(packed.shape.last());
        return Some(if gptq { "GPTQ" } else { "AWQ" });
    }
    let mlx = |tensor: &&TensorInfo| {
        tensor.name.ends_with(".scales") && beside(tensor, ".scales", ".weight").is_some_and(|w| w.dtype == "U32")
    };
    if tensors.iter().any(|tensor| mlx(&tensor)) {
        return Some("MLX");
    }
    if ending(".weight_packed").is_some() {
        return Some("compressed-tensors");
    }
    if tensors.iter().any(|tensor| tensor.dtype.starts_with("F8_") && tensor.shape.len() > 1) {
        return Some("FP8");
    }
    if tensors.iter().any(|tensor| tensor.name.ends_with("_blocks") && beside(tensor, "_blocks", "_scales").is_some()) {
        return Some("MXFP4");
    }
    if ending(".W_q").is_some() {
        return Some("HQQ");
    }
    let bytes = |tensor: &TensorInfo| {
        tensor.name.ends_with(".weight") && tensor.shape.len() > 1 && matches!(tensor.dtype.as_str(), "I8" | "U8")
    };
    tensors.iter().any(bytes).then_some("8-bit integers")
}

fn single(path: &Path) -> Result<Recognised> {
    let bytes = beginning(path)?;
    let kind = other_kind(path, &bytes).or_else(|| Some(by_tensors(&outline(&bytes)?)));
    let kind = kind.ok_or_else(|| Error::File { path: path.into(), reason: unknown(&bytes) })?;
    Ok(Recognised { kind, path: path.into() })
}

/// [`by_first_bytes`], except that a zip archive with the extension of a pickle is one: `torch.save` writes such archives.
pub(crate) fn other_kind(path: &Path, bytes: &[u8]) -> Option<Kind> {
    let pickle = || path.file_name().is_some_and(|name| PICKLES.iter().any(|end| name.to_string_lossy().ends_with(end)));
    by_first_bytes(bytes).map(|kind| if kind == Kind::Other(ZIP) && pickle() { Kind::Pickle } else { kind })
}

/// Describes why a file is not JSON: it is a file of another kind, or else the message of the parser.
pub(crate) fn json_damage(path: &Path, bytes: &[u8], error: &serde_json::Error) -> String {
    let other = by_first_bytes(bytes).filter(|kind| *kind != Kind::Other(JSON));
    other.map_or_else(|| error.to_string(), |kind| sentence(&kind, path))
}

/// The message for a file whose kind is not known.
pub(crate) fn unknown(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "is empty; download or save it again".into();
    }
    let first: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("is not a safetensors file, nor of another known kind; its first bytes are {}", first.join(" "))
}

/// The header of a safetensors file, or the first bytes of any other file.
pub(super) fn beginning(path: &Path) -> Result<Vec<u8>> {
    let read = || -> std::io::Result<Vec<u8>> {
        let (mut file, mut bytes) = (File::open(path)?, Vec::new());
        file.by_ref().take(9).read_to_end(&mut bytes)?;
        let header = match bytes.first_chunk() {
            Some(&length) if begins_safetensors(&bytes) => u64::from_le_bytes(length),
            _ => BEGINNING,
        };
        file.take(header).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error| failed(path, error))
}

fn folder(dir: &Path) -> Result<Recognised> {
    let names = names(dir)?;
    let has = |name: &str| names.iter().any(|there| there == name);
    if has(CONFIG_FILE) {
        let path = dir.join(CONFIG_FILE);
        let settings = file::read(&path)?;
        if let Some(kind) = by_first_bytes(&settings).filter(|kind| *kind != Kind::Other(JSON)) {
            return Ok(Recognised { kind, path });
        }
        let numbers = [TENSORS_FILE, MLX_TENSORS, "adapter_model.bin", "adapter_model.pt", "adapter_model.pth"];
        if let Some(name) = numbers.into_iter().find(|name| has(name)) {
            let found = single(&dir.join(name))?;
            // `transformer.h.0…` may also be a GPT-2 adapter without PEFT's prefix.
            let kind =
                if found.kind == Kind::Diffusers && contains(&settings, b"\"peft_type\"") { Kind::Peft } else { found.kind };
            return Ok(Recognised { kind, ..found });
        }
    }
    let folders =
        |file: &dyn Fn(&Path) -> bool| -> Vec<String> { names.iter().filter(|name| file(&dir.join(name))).cloned().collect() };
    if has("model_index.json") {
        let weights = |part: &Path| {
            let names = fs::read_dir(part).into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.into_iter().any(|name| name.to_string_lossy().ends_with(".safetensors"))
        };
        let model = |part: &Path| part.is_dir() && (part.join("config.json").exists() || weights(part));
        return Ok(Recognised { kind: Kind::Pipeline(folders(&model)), path: dir.into() });
    }
    if let Some(model) = model(dir, &names)? {
        return Ok(model);
    }
    let adapters = folders(&|part| part.join(CONFIG_FILE).exists());
    if !adapters.is_empty() {
        return Ok(Recognised { kind: Kind::NamedAdapters(adapters), path: dir.into() });
    }
    let pickle = |name: &&String| PICKLES.iter().any(|end| name.ends_with(end)) && !name.starts_with("training_args");
    match names.iter().find(|name| name.ends_with(".gguf")).or_else(|| names.iter().find(pickle)) {
        Some(name) => single(&dir.join(name)),
        None => Err(Error::File { path: dir.into(), reason: "holds no model and no adapter".into() }),
    }
}

/// The kind of the safetensors files of a folder: that of the first file which is not a plain model.
fn model(dir: &Path, names: &[String]) -> Result<Option<Recognised>> {
    let mut found = None;
    for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
        let file = single(&dir.join(name))?;
        if file.kind != Kind::Checkpoint {
            return Ok(Some(file));
        }
        found = Some(Recognised { kind: Kind::Checkpoint, path: dir.into() });
    }
    Ok(found)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
    let entries: Vec<std::ffi::OsString> = listed.map_err(|error| failed(dir, error))?;
    let mut names: Vec<String> = entries.into_iter().filter_map(|name| name.into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
