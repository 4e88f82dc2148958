//! `lowrank convert --to`: adapters of other programs are converted to PEFT folders and back, bit for bit. Missing information
//! must be given by an option, and content that the new format cannot hold is refused.

mod desk;

use std::fs;

use desk::{Desk, Tensor};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

const LAYER: &str = "model.layers.0";

fn llama() -> Value {
    json!({"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1})
}

/// q, k and down of one layer: 2 heads and 1 head of size 4.
fn decoder(desk: &Desk, settings: &Value) {
    let [q, k, down] = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"].map(|name| format!("{LAYER}.{name}"));
    desk.adapter("peft", &[(&q, [8, 6, 2]), (&k, [4, 6, 2]), (&down, [6, 10, 2])], settings);
    desk.json("base/config.json", &llama());
    let [q, k, down] = [q, k, down].map(|name| format!("{name}.weight"));
    desk.tensors("base/model.safetensors", &[(&q, &[8, 6]), (&k, &[4, 6]), (&down, &[6, 10])]);
}

#[test]
fn converting_there_and_back_gives_the_same_bits() {
    for (to, path, back) in [
        ("mlx-lm", "there", ""),
        ("kohya --prefix lora_te", "there.safetensors", "--base base"),
        ("gguf --base base", "there.gguf", "--base base"),
        ("peft", "there", ""),
    ] {
        for settings in [json!({}), json!({"use_rslora": true}), json!({"lora_alpha": 0.3})] {
            let desk = Desk::new();
            decoder(&desk, &settings);
            desk.good(&format!("convert peft --to {to} --out {path}"), &["3 modules"]);
            desk.good(&format!("convert {path} --to peft {back} --out out"), &["3 modules"]);
            desk.same("peft", "out");
            // Once more, from the converted file.
            desk.good(&format!("convert out --to {to} --out again-{path}"), &[]);
            let file =
                |path: &str| if path.ends_with("there") { format!("{path}/{}", desk.tensors_of(path)) } else { path.into() };
            let read = |path: &str| fs::read(desk.path(&file(path))).unwrap();
            assert_eq!(read(path), read(&format!("again-{path}")), "{to}");
        }
    }
}

#[test]
fn half_precision_magnitudes_and_convolutions_survive_a_round_trip() {
    let desk = Desk::new();
    decoder(&desk, &json!({}));
    desk.good("convert peft --to mlx-lm --dtype bf16 --out mlx", &[]);
    desk.good("convert mlx --to kohya --prefix lora_te --out k.safetensors", &[]);
    desk.good("convert k.safetensors --to peft --base base --out half", &[]);
    desk.good("convert peft --to peft --dtype bf16 --out out", &[]);
    desk.same("half", "out");

    let desk = Desk::new();
    desk.adapter("peft", &[("down_blocks.0.conv", [8, 6, 2])], &json!({"use_dora": true}));
    let name = |end: &str| format!("base_model.model.down_blocks.0.conv.{end}");
    let [a, b, m] = [name("lora_A.weight"), name("lora_B.weight"), name("lora_magnitude_vector")];
    desk.tensors("peft/adapter_model.safetensors", &[(&a, &[2, 6, 3, 3]), (&b, &[8, 2, 1, 1]), (&m, &[8])]);
    desk.tensors("base.safetensors", &[("down_blocks.0.conv.weight", &[8, 6, 3, 3])]);
    desk.good("convert peft --to kohya --out k.safetensors", &[]);
    assert_eq!(desk.read("k.safetensors")["lora_unet_down_blocks_0_conv.dora_scale"].shape, [8, 1]);
    desk.good("convert k.safetensors --to peft --base base.safetensors --out out", &[]);
    let read = |dir: &str| desk.read(&format!("{dir}/adapter_model.safetensors"));
    assert_eq!(read("peft"), read("out"));
    fs::remove_dir_all(desk.path("out")).unwrap();
    desk.refused("convert peft --to mlx-lm --out out", &["`down_blocks.0.conv` is a convolution"]);
    desk.json("llama/config.json", &llama());
    desk.refused("convert peft --to gguf --base llama --out out", &["magnitudes"]);
}

/// mlx-lm has one rank for all modules: smaller factors are padded with zeros, which does not change the update.
#[test]
fn ranks_are_padded_for_mlx_lm_and_scalings_are_not_mixed() {
    let desk = Desk::new();
    decoder(&desk, &json!({"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 3}}));
    let [a, b] = ["A", "B"].map(|factor| format!("{LAYER}.self_attn.k_proj.lora_{factor}.weight"));
    let mut tensors = desk.read("peft/adapter_model.safetensors");
    tensors.get_mut(&a).unwrap().shape[0] = 1;
    tensors.get_mut(&a).unwrap().values.truncate(6);
    tensors.get_mut(&b).unwrap().shape[1] = 1;
    tensors.get_mut(&b).unwrap().values.truncate(4);
    desk.store("peft/adapter_model.safetensors", &tensors);
    desk.good("convert peft --to mlx-lm --out mlx", &[]);
    let there = desk.read("mlx/adapters.safetensors");
    let k = |end: &str| there[&format!("{LAYER}.self_attn.k_proj.{end}")].clone();
    let interleaved: Vec<f32> = tensors[&a].values.iter().flat_map(|&value| [value, 0.0]).collect();
    assert_eq!((k("lora_a").shape, k("lora_a").values), (vec![6, 2], interleaved));
    assert_eq!(k("lora_b").values, [tensors[&b].values.clone(), vec![0.0; 4]].concat());
    let config: Value = serde_json::from_slice(&fs::read(desk.path("mlx/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["lora_parameters"]["scale"], &config["lora_parameters"]["rank"]), (&json!(3.0), &json!(2)));
    for to in ["mlx-lm", "gguf --base base"] {
        decoder(&desk, &json!({"alpha_pattern": {"k_proj": 5}}));
        desk.refused(&format!("convert peft --to {to} --out out"), &["k_proj", "one for all", "lowrank combine peft"]);
    }
}

/// Rows of q and k: torchtune and llama.cpp interleave the halves of a head, for Llama and not for Qwen.
#[test]
fn rows_of_heads_are_put_in_order() {
    let desk = Desk::new();
    let names =
        ["q_proj", "k_proj", "output_proj"].map(|name| ["a", "b"].map(|f| format!("layers.0.attn.{name}.lora_{f}.weight")));
    let shapes: [[[usize; 2]; 2]; 3] = [[[1, 6], [8, 1]], [[1, 6], [4, 1]], [[1, 8], [6, 1]]];
    let tensors: Vec<Tensor<'_>> = (0..6).map(|i| (names[i / 2][i % 2].as_str(), &shapes[i / 2][i % 2][..])).collect();
    desk.tensors("adapter.safetensors", &tensors);
    desk.json("llama/config.json", &llama());
    desk.json("qwen/config.json", &json!({"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1}));
    desk.json("other/config.json", &json!({"model_type": "bert", "num_attention_heads": 2}));
    let convert = |more: &str| format!("convert adapter.safetensors --to peft {more} --out out");
    desk.refused(&convert("--alpha 4"), &["k_proj", "--base"]);
    desk.refused(&convert("--base llama"), &["the scaling of", "--alpha"]);
    desk.refused(&convert("--base other --alpha 4"), &["`model_type` is bert", "llama"]);
    let there = desk.read("adapter.safetensors");
    for (base, order) in [("llama", [0, 2, 1, 3, 4, 6, 5, 7]), ("qwen", [0, 1, 2, 3, 4, 5, 6, 7])] {
        desk.good(&convert(&format!("--base {base} --alpha 4")), &["3 modules"]);
        let here = desk.read("out/adapter_model.safetensors");
        let b = |module: &str| &here[&format!("{LAYER}.self_attn.{module}.lora_B.weight")].values;
        let reordered = |name: &str, rows: usize| order[..rows].iter().map(|&row| there[name].values[row]).collect::<Vec<_>>();
        assert_eq!(*b("q_proj"), reordered(&names[0][1], 8), "{base}");
        assert_eq!(*b("k_proj"), reordered(&names[1][1], 4), "{base}");
        assert_eq!(*b("o_proj"), there[&names[2][1]].values, "{base}");
        fs::remove_dir_all(desk.path("out")).unwrap();
    }
}

/// An mlx-lm folder is complete in itself: it can be merged directly, with the same result as its PEFT folder.
#[test]
fn mlx_lm_is_read_in_its_layout() {
    let desk = Desk::new();
    decoder(&desk, &json!({}));
    let name = |end: &str| format!("{LAYER}.mlp.down_proj.lora_{end}");
    desk.tensors("mlx/adapters.safetensors", &[(&name("a"), &[10, 2]), (&name("b"), &[2, 6])]);
    desk.refused("convert mlx --to peft --out out", &["does not contain the scaling", "--alpha"]);
    desk.json(
        "mlx/adapter_config.json",
        &json!({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}, "model": "org/m"}),
    );
    desk.good("info mlx", &["mlx-lm", "1 module, rank 2, alpha 40"]);
    desk.refused("convert mlx --to peft --alpha 3 --out out", &["`--alpha`"]);
    desk.good("convert mlx --to peft --out new", &[]);
    let (there, here) = (desk.read("mlx/adapters.safetensors"), desk.read("new/adapter_model.safetensors"));
    let a = &here[&format!("{LAYER}.mlp.down_proj.lora_A.weight")];
    assert!((0..2).all(|i| (0..10).all(|j| a.values[i * 10 + j] == there[&name("a")].values[j * 2 + i])));
    for adapter in ["mlx", "new"] {
        desk.good(&format!("merge --base base --adapter {adapter} --out merged-{adapter}"), &["1 module"]);
    }
    assert_eq!(desk.read("merged-mlx/model.safetensors"), desk.read("merged-new/model.safetensors"));
}

#[test]
fn kohya_needs_the_model_for_its_names() {
    let desk = Desk::new();
    let flat = |end: &str| format!("lora_unet_down_blocks_0_attn1_to_q.{end}");
    let [down, up, alpha] = [flat("lora_down.weight"), flat("lora_up.weight"), flat("alpha")];
    let te = ["lora_te_text_model_x.lora_down.weight", "lora_te_text_model_x.lora_up.weight"];
    desk.tensors("k.safetensors", &[(&down, &[2, 4]), (&up, &[6, 2]), (&alpha, &[])]);
    desk.tensors("two.safetensors", &[(&down, &[2, 4]), (&up, &[6, 2]), (te[0], &[2, 4]), (te[1], &[6, 2])]);
    desk.tensors("unet.safetensors", &[("down_blocks.0.attn1.to_q.weight", &[6, 4])]);
    desk.tensors(
        "twins.safetensors",
        &[("down_blocks.0.attn1.to_q.weight", &[6, 4]), ("down_blocks.0.attn1_to_q.weight", &[6, 4])],
    );
    desk.tensors("small.safetensors", &[("down_blocks.0.attn1.to_q.weight", &[6, 3])]);
    let convert = |path: &str, more: &str| format!("convert {path} --to peft {more} --out out");
    desk.refused(&convert("k.safetensors", ""), &["underscores", "--base"]);
    desk.refused(&convert("k.safetensors", "--base twins.safetensors"), &["may be several", "--map"]);
    desk.refused(&convert("k.safetensors", "--base small.safetensors"), &["is 6×3, want 6×4"]);
    desk.refused(&convert("two.safetensors", "--base unet.safetensors"), &["several models", "lora_te, lora_unet"]);
    desk.refused(
        &convert("two.safetensors", "--base unet.safetensors --prefix lora_te"),
        &["lora_te_text_model_x", "is no module"],
    );
    desk.refused(&convert("two.safetensors", "--prefix unet"), &["nothing for `unet`"]);
    desk.good("info k.safetensors", &["kohya", "rank 2, alpha 2.75"]);
    desk.good(
        &convert("two.safetensors", "--base unet.safetensors --prefix lora_unet").replace("--out out", "--out chosen"),
        &["not converted", "lora_te"],
    );
    desk.good(
        &convert("k.safetensors", "--map lora_unet_down_blocks_0_attn1_to_q=x.y").replace("--out out", "--out mapped"),
        &[],
    );
    assert!(desk.read("mapped/adapter_model.safetensors").contains_key("x.y.lora_A.weight"));
    desk.tensors("lost.safetensors", &[(&down, &[2, 4]), (&up, &[6, 2]), ("lora_unet_x.bias", &[6])]);
    desk.refused(&convert("lost.safetensors", "--base unet.safetensors"), &["`lora_unet_x.bias`", "would be lost"]);
    desk.tensors("half.safetensors", &[(&down, &[2, 4])]);
    desk.refused(&convert("half.safetensors", "--base unet.safetensors"), &["has no B"]);
}

#[test]
fn names_and_scalings_of_the_others() {
    let desk = Desk::new();
    let metadata = json!({"unet.r": 2, "unet.lora_alpha": 5, "unet.target_modules": ["to_q"]}).to_string();
    let names = ["unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"];
    desk.typed(
        "d.safetensors",
        &[(names[0], &[2, 4]), (names[1], &[6, 2])],
        Dtype::F32,
        Some(("lora_adapter_metadata", metadata)),
    );
    let old = ["unet.mid.attn1.processor.to_out_lora.down.weight", "unet.mid.attn1.processor.to_out_lora.up.weight"];
    desk.tensors("old.safetensors", &[(old[0], &[2, 4]), (old[1], &[6, 2])]);
    desk.tensors("lib.safetensors", &[("m.q.lora_A", &[2, 4]), ("m.q.lora_B", &[6, 2])]);
    desk.tensors("fused.safetensors", &[("m.q.lora_A", &[4, 4]), ("m.q.lora_B", &[6, 2])]);
    desk.tensors("candle.safetensors", &[("lora_llama.a0.weight", &[2, 4]), ("lora_llama.b0.weight", &[6, 2])]);
    desk.tensors("words.safetensors", &[("model.embed_tokens.lora_A", &[2, 4]), ("model.embed_tokens.lora_B", &[6, 2])]);
    let convert = |path: &str, more: &str, out: &str| format!("convert {path}.safetensors --to peft {more} --out {out}");
    for (path, more, module, alpha) in [
        ("d", "", "mid.to_q", json!(5)),
        ("old", "", "mid.attn1.to_out.0", json!(2)),
        ("lib", "--alpha 7", "m.q", json!(7)),
        ("candle", "--alpha 7 --map lora_llama.0=m.q", "m.q", json!(7)),
    ] {
        desk.good(&convert(path, more, &format!("peft-{path}")), &["1 module"]);
        let config: Value =
            serde_json::from_slice(&fs::read(desk.path(&format!("peft-{path}/adapter_config.json"))).unwrap()).unwrap();
        assert_eq!((&config["lora_alpha"], &config["target_modules"]), (&alpha, &json!([module])), "{path}");
    }
    desk.refused(&convert("lib", "", "out"), &["does not contain the scaling", "--alpha"]);
    desk.refused(&convert("candle", "--alpha 7", "out"), &["`lora_llama.0` is a number", "--map lora_llama.0=MODULE"]);
    desk.refused(&convert("fused", "--alpha 7", "out"), &["4×4 and 6×2", "MergedLinear"]);
    desk.refused(&convert("words", "--alpha 7", "out"), &["is an embedding"]);
    desk.refused("convert d.safetensors --to gguf --out out", &["`base`", "config.json"]);
    desk.refused("convert d.safetensors --to kohya --out out", &["`mid.to_q`", "--prefix"]);
    desk.adapter("biased", &[("m.q", [8, 4, 2])], &json!({"init_lora_weights": "pissa"}));
    desk.refused("convert biased --to mlx-lm --out out", &["pissa"]);
}
