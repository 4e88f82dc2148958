//! Every command recognises adapters and models of other programs, and says what they are and what to do. Inputs are made here,
//! as small as possible.

mod desk;

use std::fs;

use desk::{Desk, Tensor};
use safetensors::tensor::Dtype;
use serde_json::json;

const Q: &str = "model.layers.0.self_attn.q_proj";
const PLAIN: [Tensor<'static>; 2] = [("model.layers.0.self_attn.q_proj.weight", &[8, 4]), ("model.norm.weight", &[4])];

/// Contents of files that are not safetensors, or not plain models, each with words of the message.
fn strange_files() -> Vec<(Vec<u8>, [&'static str; 2])> {
    let zip = |name: &str| [b"PK\x03\x04".as_slice(), &[0; 26], name.as_bytes(), &[0; 30]].concat();
    let gguf = |kind: &str| {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let head = [b"GGUF".as_slice(), &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
        [head, text("general.type"), 8u32.to_le_bytes().to_vec(), text(kind)].concat()
    };
    vec![
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n".to_vec(), ["Git LFS pointer", "git lfs pull"]),
        (zip("archive/data.pkl"), ["pickle", "torch.load("]),
        (b"\x80\x02}q\x00.".to_vec(), ["pickle", "weights_only=True"]),
        (gguf("model"), ["GGUF file", "safetensors"]),
        (b"tjgg\x01\0\0\0".to_vec(), ["GGML", "before GGUF"]),
        (b"\n<!DOCTYPE html><html>".to_vec(), ["HTML page", "download it again"]),
        (zip("weights.npy"), ["zip archive", "safetensors"]),
        (b"\x89HDF\r\n\x1a\n\0".to_vec(), ["HDF5", "safetensors"]),
        (vec![0xff; 40], ["not a safetensors file", "ff ff ff"]),
    ]
}

#[test]
fn files_of_other_formats_are_named() {
    for (bytes, words) in strange_files() {
        let desk = Desk::new();
        desk.adapter("good", &[(Q, [8, 4, 2])], &json!({}));
        desk.tensors("base/model.safetensors", &PLAIN);
        desk.adapter("bad", &[(Q, [8, 4, 2])], &json!({}));
        for name in ["bad/adapter_model.safetensors", "model/model.safetensors", "file.safetensors"] {
            desk.write(name, &bytes);
        }
        desk.refused("merge --base base --adapter bad --out out", &["bad/adapter_model.safetensors", words[0], words[1]]);
        desk.refused("merge --base model --adapter good --out out", &["model/model.safetensors", words[0], words[1]]);
        desk.refused("merge --base file.safetensors --adapter good --out out", &["file.safetensors: is", words[0], words[1]]);
        desk.refused("convert file.safetensors --to peft --out out", &["file.safetensors: is", words[0], words[1]]);
        desk.refused("compress bad --rank 1 --out out", &["bad/adapter_model.safetensors", words[0]]);
        desk.refused("combine good bad --out out", &["bad/adapter_model.safetensors", words[0]]);
        match words[0].starts_with("not") {
            true => desk.refused("info file.safetensors", &words),
            false => ["file.safetensors", "bad", "model"].iter().for_each(|path| desk.good(&format!("info {path}"), &words)),
        }
    }
}

/// The bytes of a header length of 640 are the start of a pickle of protocol 2.
#[test]
fn a_header_of_any_length_is_no_pickle() {
    for length in (576..1600).step_by(8) {
        let text = format!("{:<length$}", r#"{"x.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#);
        let bytes = [&(length as u64).to_le_bytes(), text.as_bytes(), &[0; 4]].concat();
        assert_eq!(lowrank::adapter::formats::by_first_bytes(&bytes), None, "{length}");
    }
}

#[test]
fn a_pickle_a_pointer_or_a_sub_folder_instead_of_an_adapter() {
    let desk = Desk::new();
    desk.tensors("base/model.safetensors", &PLAIN);
    desk.adapter("pickled", &[(Q, [8, 4, 2])], &json!({}));
    fs::remove_file(desk.path("pickled/adapter_model.safetensors")).unwrap();
    desk.write("pickled/adapter_model.bin", b"\x80\x02}q\x00.");
    desk.write("old/pytorch_model.bin", b"\x80\x02}q\x00.");
    desk.adapter("outer/reviewer", &[(Q, [8, 4, 2])], &json!({}));
    desk.adapter("pointed", &[(Q, [8, 4, 2])], &json!({}));
    desk.write("pointed/adapter_config.json", "version https://git-lfs.github.com/spec/v1\n");
    let merge = |adapter: &str| format!("merge --base base --adapter {adapter} --out out");
    desk.refused(&merge("pickled"), &["pickled/adapter_model.bin: is a pickle", "adapter_model.safetensors"]);
    desk.refused(&merge("outer"), &["outer: is a folder of adapters", "outer/reviewer"]);
    desk.refused(&merge("pointed"), &["pointed/adapter_config.json: is a Git LFS pointer"]);
    desk.refused(&merge("base"), &["base: is a model, not an adapter"]);
    desk.refused(&merge("outer/reviewer/adapter_model.safetensors"), &["name its folder"]);
    desk.refused("merge --base old --adapter outer/reviewer --out out", &["old/pytorch_model.bin: is a pickle"]);
    desk.refused("merge --base outer/reviewer --adapter outer/reviewer --out out", &["is an adapter, where a model is needed"]);
    desk.good("info pickled", &["pickle"]);
    desk.good("info outer", &["outer/reviewer"]);
    desk.json("pipe/model_index.json", &json!({}));
    desk.json("pipe/unet/config.json", &json!({}));
    desk.refused("merge --base pipe --adapter outer/reviewer --out out", &["pipe: is a diffusers pipeline", "pipe/unet"]);
    desk.good("info pipe", &["diffusers pipeline", "pipe/unet"]);
    desk.write("base/adapter_model.safetensors", fs::read(desk.path("outer/reviewer/adapter_model.safetensors")).unwrap());
    desk.good(&merge("outer/reviewer"), &["1 module merged"]); // in a folder with both, the model is read
}

/// Ends of names, shapes, the element type, and a word of the message.
type Model = (&'static [&'static str], &'static [&'static [usize]], Dtype, &'static str);

#[test]
fn quantised_and_broken_models_are_no_base() {
    let x = "m.q_proj";
    let named = |ends: &[&str]| -> Vec<String> { ends.iter().map(|end| format!("{x}.{end}")).collect() };
    let cases: [Model; 6] = [
        (&["qweight", "scales", "qzeros", "g_idx"], &[&[2, 16], &[1, 16], &[1, 2], &[16]], Dtype::I32, "GPTQ"),
        (&["qweight", "scales", "qzeros"], &[&[16, 2], &[1, 16], &[1, 2]], Dtype::I32, "AWQ"),
        (&["weight", "scales", "biases"], &[&[8, 2], &[8, 1], &[8, 1]], Dtype::U32, "MLX"),
        (&["weight", "weight_scale"], &[&[8, 4], &[1]], Dtype::F8_E4M3, "FP8"),
        (&["weight"], &[&[0]], Dtype::F32, "ZeRO-3"),
        (
            &["base_layer.weight", "lora_A.default.weight", "norm.weight"],
            &[&[8, 4], &[2, 4], &[4]],
            Dtype::F32,
            "an adapter inside",
        ),
    ];
    for (ends, shapes, dtype, word) in cases {
        let desk = Desk::new();
        let names = named(ends);
        let tensors: Vec<Tensor<'_>> = names.iter().map(String::as_str).zip(shapes.iter().copied()).collect();
        desk.typed("base/model.safetensors", &tensors, dtype, None);
        desk.adapter("adapter", &[(x, [8, 4, 2])], &json!({}));
        desk.refused("merge --base base --adapter adapter --out out", &["base: is", word]);
        desk.refused("extract --base base --tuned base --rank 1 --out out", &["base: is", word]);
        desk.good("info base", &[word]);
    }
}

/// bitsandbytes' models are read; damaged ones are named by `info`, and refused by the rest.
#[test]
fn damaged_models_of_bitsandbytes_are_refused() {
    let x = "m.q_proj";
    let cases: [(Model, [&str; 2]); 2] = [
        (
            (
                &["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"],
                &[&[16, 1], &[2], &[8]],
                Dtype::U8,
                "quant_state",
            ),
            ["bitsandbytes, 4", "cannot be read: "],
        ),
        ((&["weight", "SCB"], &[&[8, 4], &[7]], Dtype::I8, "m.q_proj"), ["bitsandbytes, 8", "1 weights are quantised"]),
    ];
    for ((ends, shapes, dtype, word), described) in cases {
        let desk = Desk::new();
        let names: Vec<String> = ends.iter().map(|end| format!("{x}.{end}")).collect();
        let tensors: Vec<Tensor<'_>> = names.iter().map(String::as_str).zip(shapes.iter().copied()).collect();
        desk.typed("base/model.safetensors", &tensors, dtype, None);
        desk.adapter("adapter", &[(x, [8, 4, 2])], &json!({}));
        desk.refused("merge --base base --adapter adapter --out out", &["base: ", word]);
        desk.refused("extract --base base --tuned base --rank 1 --out out", &["base: ", "bitsandbytes"]);
        desk.good("info base", &described);
    }
}

#[test]
fn empty_tensors_of_an_adapter_are_explained() {
    let desk = Desk::new();
    desk.adapter("adapter", &[(Q, [8, 4, 2])], &json!({}));
    let names = ["A", "B"].map(|f| format!("base_model.model.{Q}.lora_{f}.weight"));
    desk.tensors("adapter/adapter_model.safetensors", &[(&names[0], &[0]), (&names[1], &[0])]);
    desk.tensors("base.safetensors", &PLAIN);
    let words = ["adapter/adapter_model.safetensors", "ZeRO-3", "save it again"];
    desk.refused("merge --base base.safetensors --adapter adapter --out out", &words);
    desk.good("info adapter", &["ZeRO-3"]);
}

#[test]
fn combine_names_the_folder_of_an_error() {
    let desk = Desk::new();
    desk.adapter("first", &[(Q, [8, 4, 2])], &json!({}));
    desk.adapter("second", &[(Q, [8, 4, 2])], &json!({"bias": "lora_only"}));
    desk.refused("combine first second --out out", &["second/adapter_config.json", "`bias`"]);
    desk.adapter("third", &[(Q, [8, 4, 2])], &json!({"init_lora_weights": "pissa"}));
    desk.refused("compress third --rank 1 --out out", &["third/adapter_config.json", "`init_lora_weights`"]);
}

#[test]
fn an_empty_file_is_called_empty() {
    let desk = Desk::new();
    desk.adapter("adapter", &[(Q, [8, 4, 2])], &json!({}));
    desk.write("empty.safetensors", []);
    desk.refused("info empty.safetensors", &["is empty"]);
    desk.refused("convert empty.safetensors --to peft --out out", &["is empty"]);
    desk.refused("merge --base empty.safetensors --adapter adapter --out out", &["0 bytes"]);
}

/// Some editors write a byte order mark before JSON.
#[test]
fn a_byte_order_mark_is_ignored() {
    let desk = Desk::new();
    desk.adapter("adapter", &[(Q, [8, 4, 2])], &json!({}));
    let config = fs::read(desk.path("adapter/adapter_config.json")).unwrap();
    desk.write("adapter/adapter_config.json", [b"\xef\xbb\xbf".as_slice(), &config].concat());
    desk.good("info adapter", &["1 module"]);
}
