//! Folders with several checkpoints or other files, and outputs that exist already.

use std::fs;

use serde_json::{Value, json};

use crate::desk::{Desk, Tensor, Tensors, factors, language_model};

const MERGE: &str = "merge --base base --adapter adapter --out merged";

fn desk() -> (Desk, Tensors) {
    let (desk, base) = (Desk::new(), language_model("model.", Some("lm_head")));
    desk.model("base", &base, &json!({"model_type": "llama", "tie_word_embeddings": false}));
    desk.adapter(
        &factors(&[("model.layers.0.self_attn.q_proj", [6, 6])]),
        json!({"target_modules": ["layers.0.self_attn.q_proj"]}),
    );
    (desk, base)
}

/// An index of two shards with these tensors; of a tensor that is in both, the index selects one.
fn shards(desk: &Desk, tensors: [&Tensors; 2]) {
    let mut map = serde_json::Map::new();
    for (at, tensors) in tensors.iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", at + 1);
        desk.store(&format!("base/{file}"), tensors);
        tensors.keys().for_each(|name| {
            map.entry(name.clone()).or_insert(file.clone().into());
        });
    }
    desk.write("base/model.safetensors.index.json", json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string());
}

#[test]
fn the_checkpoint_of_a_folder() {
    let (desk, base) = desk();
    let whole = desk.load("base");
    let others: Tensors = base.keys().map(|name| (name.clone(), base["lm_head.weight"].clone())).collect();
    shards(&desk, [&others, &Tensors::new()]);
    desk.refused(MERGE, &["two checkpoints", "`model.safetensors`", "`model.safetensors.index.json`"]);
    fs::remove_file(desk.path("base/model-00001-of-00002.safetensors")).unwrap();
    let (got, said) = desk.merged();
    assert!(got.keys().eq(whole.keys()) && got["lm_head.weight"] == whole["lm_head.weight"]);
    assert!(
        said.contains("`model.safetensors.index.json` is stale") && said.contains("model-00001-of-00002.safetensors"),
        "{said}"
    );
    fs::remove_file(desk.path("base/model.safetensors")).unwrap();
    desk.refused("merge --base base --adapter adapter --out x", &["model-00001-of-00002.safetensors", "index.json"]);

    // A tensor in two shards: the index selects one, and the other is dropped.
    let (first, mut second) = base.clone().into_iter().partition::<Tensors, _>(|(name, _)| name.contains("layers.0"));
    second.extend(first.keys().map(|name| (name.clone(), base["lm_head.weight"].clone())));
    shards(&desk, [&first, &second]);
    fs::remove_file(desk.path("base/model.safetensors")).ok();
    let (got, _) = desk.merged();
    assert!(got.keys().eq(base.keys()));
    assert!(base.iter().all(|(name, tensor)| name.contains("q_proj") || got[name] == *tensor));
}

/// An untied head is stored in the last shard, in the usual type, and added to the index.
#[test]
fn new_tensors_of_a_sharded_checkpoint() {
    let desk = Desk::new();
    let base = language_model("model.", None);
    let (first, second) = base.clone().into_iter().partition::<Tensors, _>(|(name, _)| name.contains("embed"));
    desk.write("base/config.json", r#"{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true}"#);
    shards(&desk, [&first, &second]);
    let mut adapter = factors(&[("model.layers.0.self_attn.q_proj", [6, 6])]);
    adapter.insert("model.embed_tokens.weight".into(), Tensor::random(5, &[10, 6]));
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}));
    let (got, _) = desk.merged();
    assert_eq!((&got["lm_head.weight"], got.len()), (&base["model.embed_tokens.weight"], base.len() + 1));
    let index = desk.json("merged/model.safetensors.index.json");
    assert_eq!(index["weight_map"]["lm_head.weight"], "model-00002-of-00002.safetensors");
    for (dtype, size) in [("f16", 2), ("f32", 4)] {
        desk.good(&format!("{MERGE}-{dtype} --dtype {dtype}"));
        let elements: usize = got.values().map(|tensor| tensor.values.len()).sum();
        let index = desk.json(&format!("merged-{dtype}/model.safetensors.index.json"));
        assert_eq!(index["metadata"]["total_size"], size * elements);
        let words = format!("{}: {} tensors, {elements} elements", dtype.to_uppercase(), got.len());
        assert!(desk.good(&format!("info merged-{dtype}")).contains(&words));
    }
}

/// The file of the model takes precedence over that of an adapter and over variants; for a pipeline, its models are listed.
#[test]
fn folders_with_several_files() {
    let (desk, base) = desk();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(desk.path("adapter").join(file), desk.path("base").join(file)).unwrap();
    }
    desk.store("base/model.fp16.safetensors", &Tensors::new());
    let (got, said) = desk.merged();
    assert!(got.keys().eq(base.keys()) && !desk.path("merged/adapter_config.json").exists());
    assert!(said.contains("not copied: `adapter_model.safetensors`, `model.fp16.safetensors`"), "{said}");
    fs::remove_file(desk.path("base/model.safetensors")).unwrap();
    desk.store("base/other.safetensors", &base);
    desk.refused(
        "merge --base base --adapter adapter --out x",
        &["several checkpoints", "`model.fp16.safetensors`", "`other.safetensors`"],
    );
    desk.write("pipeline/model_index.json", "{}");
    desk.store("pipeline/unet/diffusion_pytorch_model.safetensors", &base);
    desk.refused("merge --base pipeline --adapter adapter --out x", &["pipeline", "unet"]);
    desk.good("convert adapter --dtype f16 --out narrow"); // without other files, the adapter's file is read
    assert!(desk.path("narrow/adapter_config.json").exists());
}

#[test]
fn outputs_are_replaced_only_with_overwrite_and_inputs_never() {
    let (desk, base) = desk();
    desk.write("there.safetensors", "precious");
    desk.write("folder/note.txt", "precious");
    desk.good("convert base/model.safetensors --dtype f32 --out one.safetensors");
    let before = fs::read(desk.path("one.safetensors")).unwrap();
    let file = "merge --base one.safetensors --adapter adapter --out";
    desk.refused(&format!("{file} there.safetensors"), &["there.safetensors: exists already", "--overwrite"]);
    for line in [
        format!("{file} one.safetensors --overwrite"),
        format!("{file} adapter/adapter_model.safetensors --overwrite"),
        format!("{MERGE}/ --keep-residue base/model.safetensors --overwrite"),
        "merge --base base --adapter adapter --out base --overwrite".into(),
        "merge --base base/model.safetensors --adapter adapter --out base --overwrite".into(),
        "convert one.safetensors --dtype f16 --out one.safetensors --overwrite".into(),
        "compress adapter --rank 1 --out adapter --overwrite".into(),
        "combine adapter adapter --type cat --out adapter --overwrite".into(),
    ] {
        desk.refused(&line, &["is an input"]);
    }
    desk.refused(&format!("{file} x.safetensors --keep-residue there.safetensors"), &["exists already"]);
    desk.refused(&format!("{file} x.safetensors --keep-residue x.safetensors"), &["where the result goes"]);
    desk.refused("compress adapter --rank 1 --out there.safetensors", &["exists already"]);
    desk.refused("merge --base base --adapter adapter --out folder --overwrite", &["holds no model"]);
    assert_eq!(fs::read_to_string(desk.path("there.safetensors")).unwrap(), "precious");
    assert!(fs::read(desk.path("one.safetensors")).unwrap() == before && desk.load("base") == base);

    desk.good(&format!("{file} there.safetensors --overwrite"));
    desk.good("compress adapter --rank 1 --out folder"); // does not replace other files of the folder
    desk.refused("compress adapter --rank 1 --out folder", &["exists already"]);
    desk.good(MERGE);
    desk.refused(MERGE, &["merged", "exists already"]);
    desk.write("merged/stale.json", "{}");
    desk.good(&format!("{MERGE} --overwrite"));
    assert!(!desk.path("merged/stale.json").exists() && desk.path("merged/config.json").exists());
    let names = fs::read_dir(desk.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.filter(|name| name.starts_with('.')).count() == 0);
}

/// Other files of the folder are copied, or a note says that they are not.
#[test]
fn companions() {
    let (desk, _) = desk();
    for (name, text) in [
        ("base/tokenizer_config.json", "base"),
        ("base/special_tokens_map.json", "same"),
        ("base/1_Pooling/config.json", "pooling"),
        ("base/2_Dense/model.safetensors", "dense"),
        ("base/onnx/model.onnx", "onnx"),
        ("base/onnx/config.json", "onnx config"),
        ("base/checkpoint-5/config.json", "old"),
        ("base/pytorch_model.bin", "pickle"),
        ("base/.cache/x.json", "hidden"),
        ("adapter/tokenizer_config.json", "adapter"),
        ("adapter/special_tokens_map.json", "same"),
        ("adapter/chat_template.jinja", "template"),
    ] {
        desk.write(name, text);
    }
    desk.write("base/modules.json", r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]"#);
    let said = desk.good(MERGE);
    let read = |name: &str| fs::read_to_string(desk.path("merged").join(name)).ok();
    for (name, text) in [
        ("tokenizer_config.json", Some("adapter")),
        ("special_tokens_map.json", Some("same")),
        ("chat_template.jinja", Some("template")),
        ("1_Pooling/config.json", Some("pooling")),
        ("2_Dense/model.safetensors", Some("dense")),
        ("onnx/config.json", Some("onnx config")),
        ("onnx/model.onnx", None),
        ("checkpoint-5/config.json", None),
        ("pytorch_model.bin", None),
        (".cache/x.json", None),
    ] {
        assert_eq!(read(name).as_deref(), text, "{name}");
    }
    for words in [
        "from the adapter's folder: `tokenizer_config.json`, in place of the base's",
        "from the adapter's folder: `chat_template.jinja`, which the base does not have",
        "copied: the folder `1_Pooling`",
        "not copied: `model.onnx` in the folder `onnx`",
        "not copied: the folder `checkpoint-5`",
        "not copied: `pytorch_model.bin`",
    ] {
        assert!(said.contains(words), "{said}: no {words}");
    }
}

/// An adapter without the factors of a module, and one whose updates are zero.
#[test]
fn missing_factors_and_zero_updates_are_noted() {
    let (desk, base) = desk();
    let adapter = factors(&[("model.layers.0.self_attn.q_proj", [6, 6])]);
    desk.adapter(&adapter, json!({"target_modules": ["q_proj", "v_proj"]}));
    let (_, said) = desk.merged();
    assert!(
        said.contains("unchanged: 3 tensors that `target_modules` names") && said.contains("layers.1.self_attn.q_proj"),
        "{said}"
    );
    let mut dead = adapter;
    dead.iter_mut().filter(|(name, _)| name.contains("lora_B")).for_each(|(_, b)| b.values.fill(0.0));
    desk.adapter(&dead, json!({"target_modules": ["layers.0.self_attn.q_proj"]}));
    let (got, said) = desk.merged();
    assert!(got == base && said.contains("changes nothing"), "{said}");
    assert!(desk.good("info adapter").contains("changes nothing"));
    assert_eq!(desk.json("merged/config.json"), desk.json("base/config.json") as Value);
}
