//! Extracting adapters from checkpoints that differ in more than weights.

use lowrank::adapter::Folder;
use serde_json::json;

use crate::desk::{Desk, Tensor, Tensors, factors, is_sum, language_model, product, tensors};

const EXTRACT: &str = "extract --base base --tuned tuned --rank 2 --out extracted";

/// Adds an update of rank 2 to a weight.
fn tune(model: &mut Tensors, name: &str) -> Vec<[f64; 2]> {
    let weight = model.get_mut(name).unwrap();
    let made = factors(&[("x", [weight.shape[0], weight.shape[1]])]);
    let delta = product(&made["x.lora_A.weight"], &made["x.lora_B.weight"], 1.0);
    weight.values.iter_mut().zip(&delta).for_each(|(w, [delta, _])| *w += *delta as f32);
    delta
}

/// Layers of GPT-2, also square ones, give factors in the layout of the layer, and `fan_in_fan_out`.
#[test]
fn from_gpt2() {
    let base = tensors(&[("h.0.attn.c_attn.weight", &[6, 18]), ("h.0.attn.c_proj.weight", &[6, 6]), ("wte.weight", &[10, 6])]);
    let mut tuned = base.clone();
    let deltas = ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"].map(|name| (name, tune(&mut tuned, name)));
    let desk = Desk::new();
    desk.model("base", &base, &json!({"model_type": "gpt2"}));
    desk.model("tuned", &tuned, &json!({"model_type": "gpt2"}));
    desk.good(EXTRACT);
    let folder = Folder::read(&desk.path("extracted")).unwrap();
    let sides = |module: &str| [folder.modules()[module].b.rows(), folder.modules()[module].a.cols()];
    assert_eq!((sides("h.0.attn.c_attn"), folder.config().fan_in_fan_out()), ([18, 6], true));
    desk.good("merge --base base --adapter extracted --out merged");
    let got = desk.load("merged");
    for (name, delta) in deltas {
        is_sum(&got[name], &base[name], &delta, 40); // a decomposition is a longer sum
    }
    // Without a config the layout is not known, but the caller can give it.
    for folder in ["base", "tuned"] {
        desk.write(&format!("{folder}/config.json"), "{}");
    }
    desk.refused(&format!("{EXTRACT} --overwrite"), &["`h.0.attn.c_attn.weight`", "--layout"]);
    desk.good(&format!("{EXTRACT} --overwrite --layout in-out"));
    assert!(Folder::read(&desk.path("extracted")).unwrap().config().fan_in_fan_out());
}

/// Equal values of different types are equal, and tensors that only one of the models has are named.
#[test]
fn differences_other_than_weights() {
    let base = language_model("model.", None);
    let mut tuned = base.clone();
    tune(&mut tuned, "model.layers.0.self_attn.q_proj.weight");
    let desk = Desk::new();
    desk.model("base", &base, &json!({}));
    desk.model("tuned", &tuned, &json!({}));
    desk.good("convert base --dtype f16 --out half");
    desk.good("convert half --dtype f32 --out wide");
    let mut wide = desk.load("wide");
    tune(&mut wide, "model.layers.0.self_attn.q_proj.weight");
    desk.model("wide-tuned", &wide, &json!({}));
    desk.good("extract --base half --tuned wide-tuned --rank 2 --out from-half");
    assert_eq!(Folder::read(&desk.path("from-half")).unwrap().modules().len(), 1);

    tuned.insert("lm_head.weight".into(), Tensor::random(5, &[10, 6]));
    desk.model("tuned", &tuned, &json!({}));
    desk.refused(EXTRACT, &["only in the tuned model: `lm_head.weight`", "--leave-others"]);
    tuned.insert("model.embed_tokens.weight".into(), Tensor::random(5, &[13, 6]));
    tuned.insert("model.layers.0.norm.weight".into(), Tensor::random(77, &[6]));
    tuned.remove("model.layers.1.norm.weight");
    desk.model("tuned", &tuned, &json!({}));
    desk.refused(EXTRACT, &["model.embed_tokens.weight (13×6, not 10×6)", "only in the base: `model.layers.1.norm.weight`"]);
    let said = desk.good(&format!("{EXTRACT} --leave-others"));
    for name in ["lm_head", "model.embed_tokens", "model.layers.0.norm", "model.layers.1.norm"] {
        assert!(said.contains(&format!("{name}.weight")), "{said}");
    }
    assert_eq!(Folder::read(&desk.path("extracted")).unwrap().modules().len(), 1);
}
