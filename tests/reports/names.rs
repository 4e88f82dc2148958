//! Names that changed between versions, that wrappers changed, or that the caller maps.

use serde_json::json;

use crate::desk::{Desk, Tensors, factors, is_sum, language_model, prefixed, product, tensors};

fn q_proj(prefix: &str) -> Tensors {
    factors(&[(&format!("{prefix}layers.0.self_attn.q_proj"), [6, 6]), (&format!("{prefix}layers.1.self_attn.q_proj"), [6, 6])])
}

fn is_merged(got: &Tensors, base: &Tensors, prefix: &str, adapter: &Tensors, its: &str) {
    assert!(got.keys().eq(base.keys()));
    for (name, weight) in base {
        let module = name.strip_suffix(".weight").and_then(|name| name.strip_prefix(prefix));
        let a = module.and_then(|module| adapter.get(&format!("{its}{module}.lora_A.weight")));
        match (a, module) {
            (Some(a), Some(module)) => {
                is_sum(&got[name], weight, &product(a, &adapter[&format!("{its}{module}.lora_B.weight")], 2.0), 2);
            }
            _ => assert_eq!(got[name], *weight, "{name}"),
        }
    }
}

/// The adapter's prefix, the checkpoint's, and the note about the pair; with a vision tower whose names end in the same way.
#[test]
fn renamed_prefixes_are_found() {
    for (its, there, told) in [
        ("model.language_model.", "language_model.model.", "`model.language_model.` of the adapter is `language_model.model.`"),
        ("language_model.model.", "model.language_model.", "`language_model.model.` of the adapter is `model.language_model.`"),
        ("model.language_model.", "model.", "`model.language_model.` of the adapter is `model.`"),
        ("model.", "model.language_model.", "`model.` of the adapter is `model.language_model.`"),
        ("transformer.", "", "the adapter has `transformer.`, which the base leaves out"),
        ("", "model.", "the base has `model.`, which the adapter leaves out"),
        ("bert.encoder.", "encoder.", "the adapter has `bert.`, which the base leaves out"),
        ("module.model.", "model.", "the adapter has `module.`, which the base leaves out"),
        ("model.", "_orig_mod.model.", "the base has `_orig_mod.`, which the adapter leaves out"),
        ("base_model.model.model.", "model.", ""),
    ] {
        let desk = Desk::new();
        let (mut base, adapter) = (language_model(there, None), q_proj(its));
        base.extend(tensors(&[("vision_tower.encoder.layers.0.self_attn.q_proj.weight", &[8, 6])]));
        desk.model("base", &base, &json!({"model_type": "llama"}));
        desk.adapter(&prefixed(&adapter), json!({"target_modules": ["q_proj"]}));
        let (got, said) = desk.merged();
        is_merged(&got, &base, there, &adapter, its);
        assert!(said.contains(told), "{its} {there}: {said}");
        assert_eq!(told.is_empty(), !said.contains("names:"), "{said}");
        if there == "model.language_model." {
            desk.comes_back();
        }
    }
}

/// If two tensors match, they are named, and the caller must choose; the number of a layer is never dropped.
#[test]
fn ambiguous_names_are_refused_with_the_candidates() {
    let (mut base, adapter) = (language_model("text.", None), q_proj("net."));
    base.extend(language_model("audio.", None));
    let desk = Desk::new();
    desk.model("base", &base, &json!({"model_type": "llama"}));
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"]}));
    let merge = "merge --base base --adapter adapter --out merged";
    desk.refused(merge, &["has no `net.layers.0.self_attn.q_proj.weight`", "--map OLD=NEW", "text.layers"]);
    desk.refused(&format!("{merge} --map nat=text"), &["begins with or is `nat`"]);
    desk.refused(&format!("{merge} --map net=test"), &["has no `test.layers.0.self_attn.q_proj.weight`", "mapped"]);
    desk.good(&format!("{merge} --map net=text"));
    is_merged(&desk.load("merged"), &base, "text.", &adapter, "net.");
    desk.good("unmerge --base merged --adapter adapter --out back --map net.=text.");

    let bare = q_proj("");
    desk.adapter(&bare, json!({"target_modules": ["q_proj"]}));
    let merge = &format!("{merge} --overwrite");
    desk.refused(
        merge,
        &["may be", "`audio.layers.0.self_attn.q_proj.weight`", "`text.layers.0.self_attn.q_proj.weight`", "--map"],
    );
    desk.good(&format!("{merge} --map =audio."));
    is_merged(&desk.load("merged"), &base, "audio.", &bare, "");

    let desk = Desk::new();
    desk.model("base", &tensors(&[("model.layers.0.self_attn.q_proj.weight", &[6, 6])]), &json!({}));
    desk.adapter(&factors(&[("model.layers.7.self_attn.q_proj", [6, 6])]), json!({"target_modules": ["q_proj"]}));
    desk.refused(merge, &["has no `model.layers.7.self_attn.q_proj.weight`"]);
    desk.adapter(&factors(&[("encoder.self_attn.q_proj", [6, 6])]), json!({"target_modules": ["q_proj"]}));
    desk.model("base", &tensors(&[("decoder.self_attn.q_proj.weight", &[6, 6])]), &json!({}));
    desk.refused(merge, &["has no `encoder.self_attn.q_proj.weight`", "`decoder.self_attn.q_proj.weight`"]);
}

/// A tensor of another shape does not match, even if its name ends in the same way; a bias follows its weight.
#[test]
fn shapes_and_biases_of_renamed_modules() {
    let base = tensors(&[
        ("vision.layers.0.q_proj.weight", &[8, 6]),
        ("text.layers.0.q_proj.weight", &[6, 6]),
        ("text.layers.0.q_proj.bias", &[6]),
    ]);
    let mut adapter = factors(&[("layers.0.q_proj", [6, 6])]);
    adapter.extend(tensors(&[("layers.0.q_proj.lora_B.bias", &[6])]));
    let desk = Desk::new();
    desk.model("base", &base, &json!({}));
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"], "lora_bias": true}));
    let (got, _) = desk.merged();
    let [a, b] = ["lora_A", "lora_B"].map(|which| &adapter[&format!("layers.0.q_proj.{which}.weight")]);
    is_sum(&got["text.layers.0.q_proj.weight"], &base["text.layers.0.q_proj.weight"], &product(a, b, 2.0), 2);
    let plus = adapter["layers.0.q_proj.lora_B.bias"].values.iter().map(|v| [2.0 * f64::from(*v), 2.0 * f64::from(v.abs())]);
    is_sum(&got["text.layers.0.q_proj.bias"], &base["text.layers.0.q_proj.bias"], &plus.collect::<Vec<_>>(), 1);
    assert_eq!(got["vision.layers.0.q_proj.weight"], base["vision.layers.0.q_proj.weight"]);
}
