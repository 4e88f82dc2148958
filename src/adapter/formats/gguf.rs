//! Reading and writing GGUF, the format of llama.cpp: magic, version, settings, tensor headers, then the data, each tensor at a multiple
//! of 32 bytes.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Integers are little-endian; shapes are stored with the innermost
//! dimension first, so a matrix n×k is stored as `[k, n]`.

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;

use super::kind::Kind;
use crate::adapter::HostTensor;
use crate::adapter::tensors::{stored, widen};
use crate::error::Result;

/// A setting; the content of arrays is skipped.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Setting {
    Text(String),
    Number(f64),
    Array,
}

/// The header of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Info {
    pub(super) name: String,
    /// The outermost dimension first.
    pub(super) shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

/// The file before the data.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) settings: BTreeMap<String, Setting>,
    pub(super) tensors: Vec<Info>,
    /// The offset of the data in the file.
    data: usize,
}

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT: usize = 32;
/// The largest number of dimensions that is accepted.
const DIMENSIONS: u32 = 8;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 6;

/// The kind of a GGUF file, a LoRA or a model, by its settings.
pub(super) fn kind(bytes: &[u8]) -> Kind {
    let mut reader = Reader(bytes);
    match reader.settings() {
        Some((settings, _)) if settings.get("general.type") == Some(&Setting::Text("adapter".into())) => Kind::GgufLora,
        Some(_) => Kind::GgufModel,
        None => Kind::Other("a GGUF file of llama.cpp, truncated or damaged"),
    }
}

impl Header {
    /// Parses the header of a file; `None` for one that is truncated, damaged or of another version than 2 and 3.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let (settings, count) = reader.settings()?;
        let tensors = (0..count).map(|_| reader.tensor()).collect::<Option<Vec<_>>>()?;
        let alignment = match settings.get("general.alignment") {
            Some(Setting::Number(number)) => *number as usize,
            _ => ALIGNMENT,
        };
        let data = (bytes.len() - reader.0.len()).checked_next_multiple_of(Some(alignment).filter(|&bytes| bytes > 0)?)?;
        Some(Self { settings, tensors, data })
    }

    /// Reads a tensor; `None` if its element type is not f32, f16 or bf16, or if its data is incomplete.
    pub(super) fn tensor(&self, bytes: &[u8], info: &Info) -> Option<HostTensor> {
        let stored = TYPES.into_iter().find(|(kind, _)| *kind == info.kind)?.1;
        let elements = info.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?;
        let start = self.data.checked_add(usize::try_from(info.offset).ok()?)?;
        let numbers = bytes.get(start..start.checked_add(elements.checked_mul(stored.bitsize() / 8)?)?)?;
        let (dtype, values) = widen(stored, numbers)?;
        Some(HostTensor { shape: info.shape.clone(), dtype, values })
    }
}

/// GGUF's numbers for element types.
const TYPES: [(u32, Dtype); 3] = [(0, Dtype::F32), (1, Dtype::F16), (30, Dtype::BF16)];

/// The bytes of a file with these settings (strings and numbers) and tensors. Errors: [`Error::File`](crate::Error::File) for an element
/// that overflows its type.
pub(super) fn write(settings: &[(&str, Setting)], tensors: &[(String, HostTensor)]) -> Result<Vec<u8>> {
    let mut file = MAGIC.to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    let settings = || settings.iter().filter(|(_, setting)| *setting != Setting::Array);
    file.extend((settings().count() as u64).to_le_bytes());
    let text = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    for (key, setting) in settings() {
        text(&mut file, key);
        match setting {
            Setting::Text(value) => {
                file.extend(TEXT.to_le_bytes());
                text(&mut file, value);
            }
            Setting::Number(value) => {
                file.extend(F32.to_le_bytes());
                file.extend((*value as f32).to_le_bytes());
            }
            Setting::Array => {}
        }
    }
    let mut numbers = Vec::new();
    for (name, tensor) in tensors {
        text(&mut file, name);
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&side| file.extend((side as u64).to_le_bytes()));
        let (dtype, bytes) = stored(name, tensor.dtype, &tensor.values)?;
        let kind = TYPES.into_iter().find(|(_, stored)| *stored == dtype).map_or(0, |(kind, _)| kind);
        file.extend(kind.to_le_bytes());
        file.extend((numbers.len() as u64).to_le_bytes());
        numbers.extend(bytes);
        numbers.resize(numbers.len().next_multiple_of(ALIGNMENT), 0);
    }
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend(numbers);
    Ok(file)
}

/// The bytes that have not been read yet.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, bytes: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.first_chunk().map(|&bytes| u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.first_chunk().map(|&bytes| u64::from_le_bytes(bytes))
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.u64()?).ok()?;
        String::from_utf8(self.take(length)?.to_vec()).ok()
    }

    /// The settings, and the number of tensors.
    fn settings(&mut self) -> Option<(BTreeMap<String, Setting>, u64)> {
        (self.take(4)? == MAGIC && (2..=3).contains(&self.u32()?)).then_some(())?;
        let (tensors, settings) = (self.u64()?, self.u64()?);
        let setting = |reader: &mut Self| {
            let (key, kind) = (reader.text()?, reader.u32()?);
            Some((key, reader.value(kind, 0)?))
        };
        Some(((0..settings).map(|_| setting(self)).collect::<Option<_>>()?, tensors))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Option<Setting> {
        let number = |value: f64| Some(Setting::Number(value));
        match kind {
            0 | 7 => number(f64::from(*self.take(1)?.first()?)),
            1 => number(f64::from(self.take(1)?.first()?.cast_signed())),
            2 => number(f64::from(u16::from_le_bytes(*self.take(2)?.first_chunk()?))),
            3 => number(f64::from(i16::from_le_bytes(*self.take(2)?.first_chunk()?))),
            4 => number(f64::from(self.u32()?)),
            5 => number(f64::from(self.u32()?.cast_signed())),
            F32 => number(f64::from(f32::from_bits(self.u32()?))),
            TEXT => self.text().map(Setting::Text),
            ARRAY => {
                let (kind, length) = (self.u32()?, self.u64()?);
                (depth < 4).then_some(())?;
                (0..length).try_for_each(|_| self.value(kind, depth + 1).map(drop))?;
                Some(Setting::Array)
            }
            10 => number(self.u64()? as f64),
            11 => number(self.u64()?.cast_signed() as f64),
            12 => number(f64::from_bits(self.u64()?)),
            _ => None,
        }
    }

    fn tensor(&mut self) -> Option<Info> {
        let (name, dimensions) = (self.text()?, self.u32()?);
        (dimensions <= DIMENSIONS).then_some(())?;
        let mut shape = (0..dimensions).map(|_| usize::try_from(self.u64()?).ok()).collect::<Option<Vec<_>>>()?;
        shape.reverse();
        Some(Info { name, shape, kind: self.u32()?, offset: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::DType;

    fn file() -> Vec<u8> {
        let tensor = |shape: &[usize], dtype| HostTensor {
            shape: shape.into(),
            dtype,
            values: (0..shape.iter().product()).map(|i: usize| i as f32 - 2.5).collect(),
        };
        let tensors = [
            ("first".to_string(), tensor(&[2, 3], DType::F32)),
            ("second".to_string(), tensor(&[5], DType::BF16)),
            ("third".to_string(), tensor(&[1, 2, 2], DType::F16)),
        ];
        let settings = [("general.type", Setting::Text("adapter".into())), ("alpha", Setting::Number(0.5))];
        write(&settings, &tensors).unwrap()
    }

    #[test]
    fn a_written_file_is_read_back() {
        let bytes = file();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.settings["alpha"], Setting::Number(0.5));
        assert_eq!(kind(&bytes), Kind::GgufLora);
        for (info, shape) in header.tensors.iter().zip([&[2, 3][..], &[5], &[1, 2, 2]]) {
            let tensor = header.tensor(&bytes, info).unwrap();
            assert_eq!(tensor.shape, shape);
            assert!(tensor.values.iter().enumerate().all(|(i, value)| *value == i as f32 - 2.5), "{}", info.name);
        }
    }

    /// Truncated at any byte, or with any byte changed: no panic, and no incomplete tensor.
    #[test]
    fn damaged_files_give_none_or_complete_tensors() {
        let bytes = file();
        let all = |bytes: &[u8]| {
            let header = Header::parse(bytes)?;
            header.tensors.iter().map(|info| header.tensor(bytes, info)).collect::<Option<Vec<_>>>()
        };
        let last = 8; // of the last tensor, before the padding
        let end = bytes.len() - ALIGNMENT + last;
        assert!((0..end).all(|cut| all(&bytes[..cut]).is_none()) && all(&bytes[..end]).is_some());
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= flip;
                let _ = (all(&bytes), kind(&bytes));
            }
        }
    }
}
