//! The weights of a checkpoint that bitsandbytes quantised: how they are spelled, and reading them.
//!
//! | tensor | of `nf4` and `fp4` | of `int8` |
//! |---|---|---|
//! | `x.weight` | two codes in a byte, `⌈n·k/2⌉ × 1` | `n×k` |
//! | `x.weight.absmax` | scales: `f32`, or 8 bits | |
//! | `x.weight.quant_map` | the values of the 16 codes | |
//! | `x.weight.nested_absmax`, `….nested_quant_map` | of scales in 8 bits: their scales, the values of their codes | |
//! | `x.weight.quant_state.bitsandbytes__nf4` | JSON: shape, block, … | |
//! | `x.SCB`, `x.weight_format` | | the scales of rows; 0 |

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::header::Entry;
use super::{Checkpoint, refused};
use crate::element::DType;
use crate::error::Result;
use crate::quant::{Blocks, HostQuantised, QuantKind, Scales};

/// Between the name of a weight and the name of its format.
const STATE: &str = ".quant_state.bitsandbytes__";
/// The other tensors of a weight of 4 bits.
pub(super) const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];
/// The element types, as PyTorch spells them.
const TORCH: [(&str, DType); 3] = [("float32", DType::F32), ("float16", DType::F16), ("bfloat16", DType::BF16)];

/// What a checkpoint says of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct State {
    pub(super) kind: QuantKind,
    pub(super) shape: [usize; 2],
    /// What it was before; not told of `int8`.
    pub(super) dtype: Option<DType>,
    /// Of scales in 8 bits.
    offset: f32,
}

/// The names of the tensors that belong to a quantised weight, beside itself.
pub(super) fn companions(name: &str, kind: QuantKind) -> Vec<String> {
    match kind {
        QuantKind::Int8 => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            vec![format!("{module}.SCB"), format!("{module}.weight_format")]
        }
        _ => PARTS.iter().map(|part| format!("{name}{part}")).chain([format!("{name}{STATE}{kind}")]).collect(),
    }
}

impl Checkpoint {
    /// The quantised weights, by name.
    ///
    /// Errors: [`Error::File`](crate::Error::File) for what says of a weight how it is quantised and cannot be so.
    pub(super) fn states(&self) -> Result<BTreeMap<String, State>> {
        let mut states = BTreeMap::new();
        for entry in self.entries() {
            let found = match entry.name.split_once(STATE) {
                Some((name, _)) => Some((name.to_string(), self.state(entry)?)),
                None => self.int8(entry).map(|state| (entry.name.clone(), state)),
            };
            if let Some((name, state)) = found
                && states.insert(name, state).is_some()
            {
                return Err(self.bad(entry, "says a second time how its weight is quantised".into()));
            }
        }
        for (name, state) in &states {
            self.find(name)
                .ok_or_else(|| self.unreadable(format!("has no `{name}`, though it says that it is {}", state.kind)))?;
        }
        for entry in self.entries() {
            let part = PARTS.iter().find_map(|part| entry.name.strip_suffix(part));
            let weight = part.map(String::from).or_else(|| Some(format!("{}.weight", entry.name.strip_suffix(".SCB")?)));
            if weight.is_some_and(|weight| !states.contains_key(&weight)) {
                return Err(self.bad(entry, "belongs to a quantised weight, and nothing says how that is quantised".into()));
            }
        }
        Ok(states)
    }

    /// The names of the weights that bitsandbytes quantised: `nf4`, `fp4` or `int8`, which [`quantised`](Self::quantised) reads.
    pub fn quantised_names(&self) -> Result<Vec<String>> {
        Ok(self.states()?.into_keys().collect())
    }

    /// A quantised weight `n×k` by name, bit for bit as it is stored.
    ///
    /// Errors: [`Error::File`](crate::Error::File) for a name without one, and for tensors that do not fit one another.
    pub fn quantised(&self, name: &str) -> Result<HostQuantised> {
        let states = self.states()?;
        let state = states.get(name).ok_or_else(|| refused(self.path(), format!("has no quantised weight `{name}`")))?;
        self.read_quantised(name, *state)
    }

    pub(super) fn read_quantised(&self, name: &str, state: State) -> Result<HostQuantised> {
        let part = |end: &str| format!("{name}{end}");
        let codes = self.part(name, None)?;
        let scales = match state.kind.four_bits() {
            None => Scales::F32(floats(&self.part(&companions(name, state.kind)[0], Some(Dtype::F32))?)),
            Some((values, blocks)) => {
                let map = floats(&self.part(&part(".quant_map"), Some(Dtype::F32))?);
                if map != values {
                    return Err(self.unreadable(format!("`{name}.quant_map` is not that of {}", state.kind)));
                }
                if blocks.double {
                    let map = floats(&self.part(&part(".nested_quant_map"), Some(Dtype::F32))?);
                    let map: [f32; 256] =
                        map.try_into().map_err(|_| self.unreadable(format!("`{name}.nested_quant_map` has not 256 numbers")))?;
                    Scales::Double {
                        codes: self.part(&part(".absmax"), Some(Dtype::U8))?,
                        absmax: floats(&self.part(&part(".nested_absmax"), Some(Dtype::F32))?),
                        map: Box::new(map),
                        offset: state.offset,
                    }
                } else {
                    Scales::F32(floats(&self.part(&part(".absmax"), Some(Dtype::F32))?))
                }
            }
        };
        let [n, k] = state.shape;
        HostQuantised::new((n, k), state.kind, codes, scales)
            .map_err(|error| self.unreadable(format!("`{name}` cannot be dequantised: {error}")))
    }

    /// The bytes of a tensor. Errors: [`Error::File`](crate::Error::File) if it is not there, or of another type.
    fn part(&self, name: &str, dtype: Option<Dtype>) -> Result<Vec<u8>> {
        let (shard, entry) =
            self.find(name).ok_or_else(|| self.unreadable(format!("has no `{name}`, which a quantised weight needs")))?;
        if dtype.is_some_and(|dtype| dtype != entry.dtype) {
            return Err(self.bad(entry, format!("holds {:?}, want {:?}", entry.dtype, dtype.unwrap_or(entry.dtype))));
        }
        shard.read(entry, 0, entry.bytes)
    }

    /// What a weight of `int8` is, if its scales lie beside it.
    fn int8(&self, entry: &Entry) -> Option<State> {
        let scales = format!("{}.SCB", entry.name.strip_suffix(".weight")?);
        let shape: [usize; 2] = entry.shape.as_slice().try_into().ok()?;
        let there = entry.dtype == Dtype::I8 && self.find(&scales).is_some();
        there.then_some(State { kind: QuantKind::Int8, shape, dtype: None, offset: 0.0 })
    }

    /// What the JSON beside a weight of 4 bits says.
    fn state(&self, entry: &Entry) -> Result<State> {
        const MOST: usize = 1 << 16;
        let bad = |reason: String| self.bad(entry, reason);
        if entry.bytes > MOST {
            return Err(bad(format!("has {} bytes, want a few hundred of JSON", entry.bytes)));
        }
        let (shard, entry) = self.find(&entry.name).ok_or_else(|| bad("is not there".into()))?;
        let document: Map<String, Value> =
            serde_json::from_slice(&shard.read(entry, 0, entry.bytes)?).map_err(|error| bad(format!("is no JSON: {error}")))?;
        let text = |key: &str| document.get(key).and_then(Value::as_str);
        let number = |key: &str| document.get(key).and_then(Value::as_u64).and_then(|number| usize::try_from(number).ok());
        let want = |key: &str, want: &str| {
            let got = document.get(key).map_or_else(|| "missing".into(), Value::to_string);
            bad(format!("says that `{key}` is {got}, want {want}"))
        };
        let named = entry.name.rsplit("__").next().unwrap_or_default();
        let double = self.find(&format!("{}.nested_absmax", entry.name.split(STATE).next().unwrap_or_default())).is_some();
        let len = number("blocksize").ok_or_else(|| want("blocksize", "a number"))?;
        let blocks = Blocks { len, double };
        let kind = match text("quant_type") {
            Some("nf4") if named == "nf4" => QuantKind::Nf4(blocks),
            Some("fp4") if named == "fp4" => QuantKind::Fp4(blocks),
            _ => return Err(want("quant_type", &format!("`{named}`, as the tensor is named, of nf4 and fp4"))),
        };
        kind.check().map_err(|_| want("blocksize", "a power of two from 32 to 4096"))?;
        let sides = document.get("shape").and_then(Value::as_array);
        let sides =
            sides.and_then(|sides| sides.iter().map(|side| usize::try_from(side.as_u64()?).ok()).collect::<Option<Vec<_>>>());
        let shape = sides.and_then(|sides| sides.try_into().ok()).ok_or_else(|| want("shape", "two numbers"))?;
        let dtype = TORCH.iter().find(|(name, _)| text("dtype") == Some(name)).map(|(_, dtype)| *dtype);
        let dtype = dtype.ok_or_else(|| want("dtype", "float32, float16 or bfloat16"))?;
        let mut offset = 0.0;
        if double {
            let known = number("nested_blocksize") == Some(256) && text("nested_dtype") == Some("float32");
            if !known {
                return Err(want("nested_blocksize", "256, and `nested_dtype` float32"));
            }
            let told = document.get("nested_offset").and_then(Value::as_f64);
            offset = told.ok_or_else(|| want("nested_offset", "a number"))? as f32;
        }
        Ok(State { kind, shape, dtype: Some(dtype), offset })
    }

    fn bad(&self, entry: &Entry, reason: String) -> crate::Error {
        self.unreadable(format!("`{}` {reason}", entry.name))
    }

    fn unreadable(&self, reason: String) -> crate::Error {
        let advice = "use the model as it was before it was quantised";
        refused(self.path(), format!("its quantised weights cannot be read: {reason}; {advice}"))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// The tensors that a weight will be stored as, in their order: `f32` first, so that they stay aligned where what is before them was.
pub(super) fn stored(name: &str, shape: [usize; 2], kind: QuantKind) -> Result<Vec<Entry>> {
    let [n, k] = shape;
    let counts = kind.counts((n, k).into())?;
    let made = |end: &str, dtype, shape| Entry::new(&format!("{name}{end}"), dtype, shape);
    let Some((_, blocks)) = kind.four_bits() else {
        let [scales, format] = [0, 1].map(|at| companions(name, kind)[at].clone());
        let format = Entry::new(&format, Dtype::U8, Vec::new());
        return Ok(vec![Entry::new(&scales, Dtype::F32, vec![n]), made("", Dtype::I8, vec![n, k]), format]);
    };
    let codes = made("", Dtype::U8, vec![counts.codes, 1]);
    let map = made(".quant_map", Dtype::F32, vec![16]);
    let mut entries = if blocks.double {
        let nested = made(".nested_absmax", Dtype::F32, vec![counts.nested]);
        let nested_map = made(".nested_quant_map", Dtype::F32, vec![256]);
        vec![map, nested, nested_map, codes, made(".absmax", Dtype::U8, vec![counts.scales])]
    } else {
        vec![map, made(".absmax", Dtype::F32, vec![counts.scales]), codes]
    };
    // The JSON is as long as to give what follows the alignment that this weight had.
    const ROOM: usize = 320;
    let before: usize = entries.iter().map(|entry| entry.bytes).sum();
    let length = (before + ROOM).next_multiple_of(8) - before;
    entries.push(made(&format!("{STATE}{kind}"), Dtype::U8, vec![length]));
    Ok(entries)
}

/// The bytes of those tensors.
pub(super) fn bytes(w: &HostQuantised, dtype: DType, entries: &[Entry]) -> Vec<Vec<u8>> {
    let wide = |numbers: &[f32]| -> Vec<u8> { numbers.iter().flat_map(|number| number.to_le_bytes()).collect() };
    let part = |entry: &Entry| match (entry.name.rsplit('.').next().unwrap_or_default(), w.scales()) {
        ("weight_format", _) => vec![0], // row after row
        ("SCB", Scales::F32(scales)) => wide(scales),
        ("absmax", Scales::F32(scales)) => wide(scales),
        ("absmax", Scales::Double { codes, .. }) => codes.clone(),
        ("nested_absmax", Scales::Double { absmax, .. }) => wide(absmax),
        ("nested_quant_map", Scales::Double { map, .. }) => wide(&map[..]),
        ("quant_map", _) => w.kind().four_bits().map(|(values, _)| wide(values)).unwrap_or_default(),
        (state, _) if state.starts_with("bitsandbytes__") => {
            let mut text = state_json(w, dtype).to_string().into_bytes();
            text.resize(text.len().max(entry.bytes), b' ');
            text
        }
        _ => w.codes().to_vec(),
    };
    entries.iter().map(part).collect()
}

fn state_json(w: &HostQuantised, dtype: DType) -> Value {
    let torch = TORCH.iter().find(|(_, known)| *known == dtype).map_or("float32", |(name, _)| name);
    let shape = [w.shape().rows, w.shape().cols];
    let block = w.kind().four_bits().map(|(_, blocks)| blocks.len);
    let mut state = json!({"quant_type": w.kind().name(), "blocksize": block, "dtype": torch, "shape": shape});
    if let Scales::Double { offset, .. } = w.scales() {
        state["nested_blocksize"] = json!(256);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(f64::from(*offset));
    }
    state
}
