//! GGUF files: the weights, the configuration and the tokenizer that transformers has for the model, and files that are refused.

use std::path::{Path, PathBuf};

use candle_core::safetensors::load;
use candle_core::{Device, Tensor};
use lowrank_candle::Error;
use lowrank_candle::gguf::Gguf;
use serde_json::{Value, json};

mod support;

use support::{bytes, fixture, json_file, smollm2};

#[test]
fn weights_are_those_that_were_written_bit_for_bit() {
    let gguf = Gguf::open(fixture("tiny-llama.gguf")).unwrap();
    let want = load(fixture("tiny-llama/model.safetensors"), &Device::Cpu).unwrap();
    let got = gguf.tensors().unwrap();
    assert_eq!(got.len(), want.len());
    for (name, tensor) in &want {
        assert_eq!(got[name].dims(), tensor.dims(), "{name}");
        assert_eq!(bits(&got[name]), bits(tensor), "{name}");
    }
    assert!(gguf.names().eq({
        let mut names: Vec<_> = want.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }));
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Each setting that the file's `config.json` has too says the same; Llama 3's scaling is found again from its factors.
#[test]
fn the_configuration_is_that_of_config_json() {
    let gguf = Gguf::open(fixture("tiny-llama.gguf")).unwrap();
    let want = json_file("tiny-llama/config.json");
    let got = gguf.config();
    let mut compared = 0;
    for (key, value) in got.as_object().unwrap() {
        if let Some(want) = want.get(key) {
            assert_eq!(value, want, "{key}");
            compared += 1;
        }
    }
    assert!(compared >= 17, "only {compared} settings are in both");
    let rope = &want["rope_parameters"];
    assert_eq!(got["rope_theta"], rope["rope_theta"]);
    for (key, value) in got["rope_scaling"].as_object().unwrap() {
        assert_eq!(value.as_f64(), rope[key].as_f64(), "{key}");
        assert_eq!(value.as_str(), rope[key].as_str(), "{key}");
    }
}

#[test]
fn the_tokenizer_is_that_of_tokenizer_json() {
    let gguf = Gguf::open(fixture("tiny-llama.gguf")).unwrap();
    let want = tokenizers::Tokenizer::from_file(fixture("tiny-llama/tokenizer.json")).unwrap();
    let got = gguf.tokenizer().unwrap();
    for text in ["", "The river of 12 names,  34\n\n", "<|im_start|>user\nWhat is 1 + 1?<|im_end|>", "é 日本 👩‍👩‍👧 \t\r\n x"]
    {
        let ids = |tokenizer: &tokenizers::Tokenizer| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids(&got), ids(&want), "{text:?}");
        assert_eq!(got.decode(&ids(&got), false).unwrap(), text);
    }
    let special = gguf.special_tokens().unwrap();
    assert_eq!(special["bos_token"], "<|im_start|>");
    assert_eq!(special["eos_token"], "<|im_end|>");
    assert_eq!(gguf.chat_template(), json_file("tiny-llama/tokenizer_config.json")["chat_template"].as_str());
}

/// The real file, where it is: weights as transformers dequantises them, token ids of awkward texts.
#[test]
fn smollm2_is_what_transformers_makes_of_it() {
    let Some(path) = smollm2() else { return };
    let gguf = Gguf::open(path).unwrap();
    let want = json_file("smollm2.json");
    for (name, digest) in want["weights"].as_object().unwrap() {
        let tensor = gguf.tensor(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(support::sha256(bytemuck_bytes(&tensor).as_slice()), digest.as_str().unwrap(), "{name}");
    }
    assert_eq!(gguf.names().count(), 272);
    let tokenizer = gguf.tokenizer().unwrap();
    for case in want["tokens"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let got = tokenizer.encode(text, false).unwrap();
        assert_eq!(json!(got.get_ids()), case["ids"], "{text:?}");
    }
    for (key, value) in [("rms_norm_eps", json!(1e-5)), ("rope_theta", json!(1e5)), ("vocab_size", json!(49152))] {
        assert_eq!(gguf.config()[key], value);
    }
    assert_eq!(gguf.config()["rope_scaling"], Value::Null);
}

fn bytemuck_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Cut anywhere, and with bytes changed: an error of one line that names the file, or a model whose weights are all there. Never a panic.
#[test]
fn damaged_files_are_refused_in_one_line() {
    let whole = bytes("tiny-llama.gguf");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path).and_then(|gguf| {
            gguf.tensors()?;
            gguf.tokenizer()
        })
    };
    for cut in (0..whole.len()).step_by(1499) {
        one_line(read(&whole[..cut]).unwrap_err(), &path);
    }
    let mut random = lowrank::random::Rng::new(7);
    for _ in 0..120 {
        let mut changed = whole.clone();
        let at = random.below(12_000); // settings, vocabulary and headers
        changed[at] ^= 1 << random.below(8);
        if let Err(error) = read(&changed) {
            one_line(error, &path);
        }
    }
    let at = whole.windows(14).position(|bytes| bytes == b"blk.1.ffn_down").unwrap();
    let mut renamed = whole.clone();
    renamed[at + 4] = b'7';
    let error = read(&renamed).unwrap_err();
    assert!(error.to_string().contains("blk.7.ffn_down.weight"), "{error}");
}

#[test]
fn other_models_are_refused_by_what_they_are() {
    let whole = bytes("tiny-llama.gguf");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    let replaced = |from: &[u8], to: &[u8]| {
        assert_eq!(from.len(), to.len());
        let mut bytes = whole.clone();
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path).and_then(|gguf| gguf.tokenizer()).unwrap_err().to_string()
    };
    for (from, to, says) in [
        (&b"llama"[..], &b"gemma"[..], "its architecture is `gemma`"),
        (b"gpt2", b"bert", "its tokenizer is of the kind `bert`"),
        (b"smollm", b"dbrx-x", "cuts texts as `dbrx-x`"),
        (b"llama.block_count", b"llama.block_caunt", "does not have `llama.block_count`"),
        (b"GGUF", b"GGML", "not a GGUF file"),
    ] {
        let error = replaced(from, to);
        assert!(error.contains(says), "{error}");
    }
    let error = Gguf::open(folder.path().join("none.gguf")).unwrap_err();
    one_line(error, &folder.path().join("none.gguf"));
}

fn one_line(error: Error, path: &Path) {
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()) && !text.contains('\n'), "{text}");
}

/// Without a tensor for every weight of every layer, the file is no model.
#[test]
fn a_missing_weight_is_named() {
    let whole = bytes("tiny-llama.gguf");
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("longer.gguf");
    let key = b"llama.block_count";
    let at = whole.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let mut longer = whole;
    longer[at] = 3;
    std::fs::write(&path, longer).unwrap();
    let error = Gguf::open(&path).unwrap_err().to_string();
    assert!(error.contains("`model.layers.2.input_layernorm.weight` is missing"), "{error}");
}
