//! Layers that are not linear.

use serde_json::json;

use crate::desk::{Desk, Tensor, Tensors, factors, has_lengths, is_sum, prefixed, product, tensors, turned};

const GPT2: &str = r#"{"model_type": "gpt2", "architectures": ["GPT2Model"]}"#;

fn gpt2() -> serde_json::Value {
    serde_json::from_str(GPT2).unwrap()
}

/// `W += scaling·(B·A)ᵀ` for a table, with and without DoRA, whose magnitudes are the norms of columns here.
#[test]
fn embeddings() {
    let desk = Desk::new();
    let base = tensors(&[("model.embed_tokens.weight", &[10, 6]), ("model.norm.weight", &[6])]);
    desk.model("base", &base, &json!({"model_type": "llama", "tie_word_embeddings": false}));
    let (a, b) = (Tensor::random(7, &[2, 10]), Tensor::random(8, &[6, 2]));
    let mut adapter: Tensors = [
        ("model.embed_tokens.lora_embedding_A".to_string(), a.clone()),
        ("model.embed_tokens.lora_embedding_B".to_string(), b.clone()),
    ]
    .into();
    desk.adapter(&prefixed(&adapter), json!({"target_modules": ["embed_tokens"]}));
    let delta = product(&a, &b, 2.0);
    let (got, _) = desk.merged();
    is_sum(&got["model.embed_tokens.weight"], &base["model.embed_tokens.weight"], &turned(&delta, 10), 2);
    assert_eq!(got["model.norm.weight"], base["model.norm.weight"]);
    desk.comes_back();

    let lengths = Tensor::random(9, &[6]);
    adapter.insert("model.embed_tokens.lora_magnitude_vector".into(), lengths.clone());
    let desk = Desk::new();
    desk.model("base", &base, &json!({"tie_word_embeddings": false}));
    desk.adapter(&adapter, json!({"target_modules": ["embed_tokens"], "use_dora": true}));
    let (got, columns) =
        (desk.merged().0["model.embed_tokens.weight"].transposed(), base["model.embed_tokens.weight"].transposed());
    has_lengths(&got.values, &columns.values, &delta, &lengths.values, 2);
    desk.comes_back();
}

#[test]
fn convolutions_of_one_two_and_three_dimensions() {
    for kernel in [&[3][..], &[3, 2], &[2, 1, 3], &[1, 1]] {
        let desk = Desk::new();
        let (shape, ones) = ([&[8, 5], kernel].concat(), vec![1; kernel.len()]);
        let base = tensors(&[("conv.weight", &shape), ("conv.bias", &[8])]);
        desk.model("base", &base, &json!({}));
        let (a, b) = (Tensor::random(7, &[&[2, 5], kernel].concat()), Tensor::random(8, &[&[8, 2], &ones[..]].concat()));
        let mut adapter: Tensors = [("conv.lora_A.weight".into(), a.clone()), ("conv.lora_B.weight".into(), b.clone())].into();
        desk.adapter(&adapter, json!({"target_modules": ["conv"]}));
        let (delta, weight) = (product(&a, &b, 2.0), &base["conv.weight"]);
        is_sum(&desk.merged().0["conv.weight"], weight, &delta, 2);
        desk.good("compress adapter --rank 2 --out same");
        desk.good("merge --base base --adapter same --out again");
        is_sum(&desk.load("again")["conv.weight"], weight, &delta, 40); // a decomposition is a longer sum

        let lengths = Tensor::random(9, &[&[1, 8], &ones[..]].concat());
        adapter.insert("conv.lora_magnitude_vector".into(), lengths.clone());
        desk.adapter(&adapter, json!({"target_modules": ["conv"], "use_dora": true}));
        has_lengths(&desk.merged().0["conv.weight"].values, &weight.values, &delta, &lengths.values, 2);
        desk.comes_back();
    }
}

/// `A` mixes all channels, so its update does not fit a grouped convolution.
#[test]
fn a_convolution_in_groups_is_refused() {
    let desk = Desk::new();
    desk.model("base", &tensors(&[("conv.weight", &[8, 2, 3])]), &json!({}));
    desk.adapter(
        &tensors(&[("conv.lora_A.weight", &[2, 4, 3]), ("conv.lora_B.weight", &[8, 1, 1])]),
        json!({"target_modules": ["conv"]}),
    );
    desk.refused("merge --base base --adapter adapter --out merged", &["`conv.lora_B.weight`", "2 groups", "cannot hold"]);
}

/// Weights stored `k×n`, also square ones: the model type in the config determines the layout, not the shape.
#[test]
fn conv1d_of_gpt2() {
    let modules = [("h.0.attn.c_attn", [18, 6]), ("h.0.attn.c_proj", [6, 6]), ("h.0.mlp.c_proj", [6, 24])];
    let named: Vec<(String, [usize; 2])> = modules.iter().map(|(name, [n, k])| (format!("{name}.weight"), [*k, *n])).collect();
    let base = tensors(&named.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect::<Vec<_>>());
    let plain = factors(&modules);
    let targets = json!({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": true});
    let delta =
        |module: &str| product(&plain[&format!("{module}.lora_A.weight")], &plain[&format!("{module}.lora_B.weight")], 2.0);

    let desk = Desk::new();
    desk.model("base", &base, &gpt2());
    desk.adapter(&plain, targets.clone());
    for (name, [_, k]) in modules {
        let weight = format!("{name}.weight");
        is_sum(&desk.merged().0[&weight], &base[&weight], &turned(&delta(name), k), 2);
    }
    desk.comes_back();

    let mut dora = plain.clone();
    modules
        .iter()
        .for_each(|(name, [n, _])| drop(dora.insert(format!("{name}.lora_magnitude_vector"), Tensor::random(9, &[*n]))));
    let desk = Desk::new();
    desk.model("base", &base, &gpt2());
    let mut settings = targets.clone();
    settings["use_dora"] = json!(true);
    desk.adapter(&dora, settings);
    for (name, _) in modules {
        let (got, columns) =
            (desk.merged().0[&format!("{name}.weight")].transposed(), base[&format!("{name}.weight")].transposed());
        has_lengths(&got.values, &columns.values, &delta(name), &dora[&format!("{name}.lora_magnitude_vector")].values, 2);
    }
    desk.comes_back();

    // `pissa` on a transposed weight gives the transposed result, to the bit.
    let mut settings = targets;
    settings["init_lora_weights"] = json!("pissa");
    let desk = Desk::new();
    desk.model("base", &base, &gpt2());
    desk.adapter(&plain, settings.clone());
    let (got, _) = desk.merged();
    let linear: Tensors = base.iter().map(|(name, weight)| (name.clone(), weight.transposed())).collect();
    desk.model("linear", &linear, &json!({"model_type": "llama"}));
    desk.good("merge --base linear --adapter adapter --out straight");
    let straight = desk.load("straight");
    assert!(got.iter().all(|(name, weight)| *weight == straight[name].transposed()));
}

/// `fan_in_fan_out` does not change linear layers, as in PEFT; if the layout is not known, `--layout` is required.
#[test]
fn the_config_gives_the_layout_of_a_square_weight() {
    let (base, adapter) = (tensors(&[("q_proj.weight", &[6, 6]), ("up_proj.weight", &[8, 6])]), factors(&[("q_proj", [6, 6])]));
    let with_up = all([adapter.clone(), factors(&[("q_proj", [6, 6]), ("up_proj", [8, 6])])]);
    let delta = product(&adapter["q_proj.lora_A.weight"], &adapter["q_proj.lora_B.weight"], 2.0);
    let settings = json!({"target_modules": ["q_proj", "up_proj"], "fan_in_fan_out": true});
    for (config, tensors) in [(json!({"model_type": "llama"}), &adapter), (json!({}), &with_up)] {
        let desk = Desk::new();
        desk.model("base", &base, &config);
        desk.adapter(tensors, settings.clone());
        is_sum(&desk.merged().0["q_proj.weight"], &base["q_proj.weight"], &delta, 2);
    }
    let desk = Desk::new();
    desk.model("base", &base, &json!({}));
    desk.adapter(&adapter, settings);
    desk.refused("merge --base base --adapter adapter --out merged", &["`q_proj.weight`", "it is not known", "--layout"]);
    desk.good("merge --base base --adapter adapter --out in-out --layout in-out");
    is_sum(&desk.load("in-out")["q_proj.weight"], &base["q_proj.weight"], &turned(&delta, 6), 2);
    desk.good("merge --base base --adapter adapter --out out-in --layout out-in");
    is_sum(&desk.load("out-in")["q_proj.weight"], &base["q_proj.weight"], &delta, 2);
}

fn all<const N: usize>(parts: [Tensors; N]) -> Tensors {
    parts.into_iter().flatten().collect()
}

const EXPERTS: usize = 3;

/// `A` and `B` of expert e from a stack of rank 2: rows `2e..2e+2`, and columns `e, E+e`.
fn of_expert(a: &Tensor, b: &Tensor, e: usize) -> [Tensor; 2] {
    let k = a.shape[1];
    let values = (0..b.shape[0]).flat_map(|i| [b.at(i, e) as f32, b.at(i, EXPERTS + e) as f32]).collect();
    [Tensor { shape: vec![2, k], values: a.values[2 * e * k..][..2 * k].to_vec() }, Tensor { shape: vec![b.shape[0], 2], values }]
}

/// Experts with 4 hidden units and 6 inputs: PEFT nests the update of `gate_up_proj` in that of `down_proj`.
fn expert_factors() -> Tensors {
    let named: [(&str, &[usize]); 4] = [
        ("model.layers.0.mlp.experts.base_layer.lora_A.weight", &[2 * EXPERTS, 6]),
        ("model.layers.0.mlp.experts.base_layer.lora_B.weight", &[8, 2 * EXPERTS]),
        ("model.layers.0.mlp.experts.lora_A.weight", &[2 * EXPERTS, 4]),
        ("model.layers.0.mlp.experts.lora_B.weight", &[6, 2 * EXPERTS]),
    ];
    tensors(&named)
}

fn expert_deltas(adapter: &Tensors) -> [Vec<Vec<[f64; 2]>>; 2] {
    ["experts.base_layer", "experts"].map(|module| {
        let [a, b] = ["lora_A", "lora_B"].map(|which| &adapter[&format!("model.layers.0.mlp.{module}.{which}.weight")]);
        let delta = |e| {
            let [a, b] = of_expert(a, b, e);
            product(&a, &b, 2.0)
        };
        (0..EXPERTS).map(delta).collect()
    })
}

fn parameters() -> serde_json::Value {
    json!({"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]})
}

#[test]
fn stacked_experts_in_both_layouts() {
    let adapter = expert_factors();
    let [up, down] = expert_deltas(&adapter);
    for in_out in [false, true] {
        let side = |n: usize, k: usize| if in_out { vec![EXPERTS, k, n] } else { vec![EXPERTS, n, k] };
        let [gate_up, down_shape] = [side(8, 6), side(6, 4)];
        let base = tensors(&[
            ("model.layers.0.mlp.experts.gate_up_proj", &gate_up),
            ("model.layers.0.mlp.experts.down_proj", &down_shape),
        ]);
        let desk = Desk::new();
        desk.model("base", &base, &json!({"model_type": if in_out { "gpt_oss" } else { "qwen3_moe" }}));
        desk.adapter(&adapter, parameters());
        let (got, _) = desk.merged();
        for (name, deltas, k) in [("gate_up_proj", &up, 6), ("down_proj", &down, 4)] {
            let name = format!("model.layers.0.mlp.experts.{name}");
            let oriented = |delta: &Vec<[f64; 2]>| if in_out { turned(delta, k) } else { delta.clone() };
            is_sum(&got[&name], &base[&name], &deltas.iter().flat_map(oriented).collect::<Vec<_>>(), 2);
        }
        desk.comes_back();
    }
}

/// A tensor for each expert, with the names of Qwen and of Mixtral; the router as a parameter of rank 2.
#[test]
fn experts_in_separate_tensors() {
    for (above, [gate, up_name, down_name]) in
        [("mlp", ["gate_proj", "up_proj", "down_proj"]), ("block_sparse_moe", ["w1", "w3", "w2"])]
    {
        let name = |e: usize, part: &str| format!("model.layers.0.{above}.experts.{e}.{part}.weight");
        let mut base = Tensors::new();
        for e in 0..EXPERTS {
            base.insert(name(e, gate), Tensor::random(e as u64, &[4, 6]));
            base.insert(name(e, up_name), Tensor::random(10 + e as u64, &[4, 6]));
            base.insert(name(e, down_name), Tensor::random(20 + e as u64, &[6, 4]));
        }
        let router = format!("model.layers.0.{above}.gate.weight");
        base.insert(router.clone(), Tensor::random(30, &[EXPERTS, 6]));
        let mut adapter = expert_factors();
        adapter.extend(factors(&[("model.layers.0.mlp.gate", [EXPERTS, 6])]));
        adapter.extend(factors(&[("model.layers.0.self_attn.q_proj", [6, 6])]));
        base.insert("model.layers.0.self_attn.q_proj.weight".into(), Tensor::random(31, &[6, 6]));
        let settings = json!({"target_modules": ["q_proj"], "target_parameters": ["down_proj", "gate_up_proj", "gate.weight"]});
        let desk = Desk::new();
        desk.model("base", &base, &json!({"model_type": "mixtral"}));
        desk.adapter(&adapter, settings);
        let (got, _) = desk.merged();
        let [up, down] = expert_deltas(&adapter);
        for e in 0..EXPERTS {
            is_sum(&got[&name(e, gate)], &base[&name(e, gate)], &up[e][..24], 2);
            is_sum(&got[&name(e, up_name)], &base[&name(e, up_name)], &up[e][24..], 2);
            is_sum(&got[&name(e, down_name)], &base[&name(e, down_name)], &down[e], 2);
        }
        let [a, b] = ["lora_A", "lora_B"].map(|which| &adapter[&format!("model.layers.0.mlp.gate.{which}.weight")]);
        is_sum(&got[&router], &base[&router], &product(a, b, 2.0), 2);
        desk.comes_back();
    }
}

#[test]
fn parameters_of_unknown_order_are_refused() {
    let desk = Desk::new();
    desk.model("base", &tensors(&[("experts.w9", &[EXPERTS, 8, 6]), ("experts.w8", &[EXPERTS, 8, 6])]), &json!({}));
    let adapter = tensors(&[("experts.base_layer.lora_A.weight", &[6, 6]), ("experts.base_layer.lora_B.weight", &[8, 6])]);
    desk.adapter(&adapter, json!({"target_parameters": ["experts.w9", "experts.w8"]}));
    desk.refused("merge --base base --adapter adapter --out merged", &["`target_parameters`", "`experts`", "`w9`"]);
}

/// Replaced rows of tables, together with other changes.
#[test]
fn trainable_tokens() {
    let base = tensors(&[("model.embed_tokens.weight", &[10, 6]), ("lm_head.weight", &[10, 6]), ("q_proj.weight", &[6, 6])]);
    let rows = Tensor::random(7, &[2, 6]);
    let delta = |module: &str| (format!("{module}.token_adapter.trainable_tokens_delta"), rows.clone());
    let q_proj = factors(&[("q_proj", [6, 6])]);
    let replaced = |name: &str| {
        let mut table = base[name].clone();
        [(7, 0), (2, 6)].iter().for_each(|&(row, at)| table.values[row * 6..][..6].copy_from_slice(&rows.values[at..][..6]));
        table
    };
    let desk = Desk::new();
    desk.model("base", &base, &json!({"tie_word_embeddings": false}));
    let mut adapter = q_proj.clone();
    adapter.extend([delta("model.embed_tokens")]);
    desk.adapter(&prefixed(&adapter), json!({"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}));
    let (got, _) = desk.merged();
    assert_eq!(
        (&got["model.embed_tokens.weight"], &got["lm_head.weight"]),
        (&replaced("model.embed_tokens.weight"), &base["lm_head.weight"])
    );
    desk.comes_back();

    adapter.extend([delta("lm_head")]);
    desk.adapter(
        &adapter,
        json!({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]}}),
    );
    assert_eq!(desk.merged().0["lm_head.weight"], replaced("lm_head.weight"));
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"], "trainable_token_indices": [7, 10]}));
    desk.refused("merge --base base --adapter adapter --out x", &["`trainable_token_indices`", "10×6"]);
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"], "trainable_token_indices": [7]}));
    desk.refused("merge --base base --adapter adapter --out x", &["names 1 rows", "2×6"]);
}

/// The spellings of names that PEFT reads, and patterns with look-around.
#[test]
fn spellings() {
    let base = tensors(&[("visual.q_proj.weight", &[6, 6]), ("text.q_proj.weight", &[6, 6])]);
    let plain = factors(&[("text.q_proj", [6, 6])]);
    let lengths = Tensor::random(9, &[6]);
    let [a, b] = ["lora_A", "lora_B"].map(|which| plain[&format!("text.q_proj.{which}.weight")].clone());
    let delta = product(&a, &b, 2.0);
    for (a_name, b_name, length) in [
        (
            "text.q_proj.lora_A.default.weight",
            "text.q_proj.lora_B.default.weight",
            "text.q_proj.lora_magnitude_vector.default.weight",
        ),
        (
            "_orig_mod.text.q_proj.lora_A.weight",
            "_orig_mod.text.q_proj.lora_B.weight",
            "_orig_mod.text.q_proj.lora_magnitude_vector.weight",
        ),
        (
            "base_model.model.text.q_proj.lora_A.weight",
            "base_model.model.text.q_proj.lora_B.weight",
            "text.q_proj.lora_magnitude_vector",
        ),
    ] {
        let adapter: Tensors = [(a_name, &a), (b_name, &b), (length, &lengths)].map(|(n, t)| (n.to_string(), t.clone())).into();
        let desk = Desk::new();
        desk.model("base", &base, &json!({"model_type": "llama"}));
        let settings = json!({"target_modules": "^(?!.*visual).*(?<=q_)proj", "use_dora": true, "ensure_weight_tying": true,
            "runtime_config": {"ephemeral_gpu_offload": false, "steps": 3}});
        desk.adapter(&adapter, settings);
        let (got, said) = desk.merged();
        has_lengths(&got["text.q_proj.weight"].values, &base["text.q_proj.weight"].values, &delta, &lengths.values, 2);
        assert_eq!(got["visual.q_proj.weight"], base["visual.q_proj.weight"]);
        assert!(!said.contains("unchanged"), "{said}");
    }
    let desk = Desk::new();
    desk.model("base", &base, &json!({}));
    for (target, words) in [
        ("q_proj(", ["`target_modules`", "regular expression"]),
        ("(a|a?)+$(?!x)|(?=b)(q|q_|_)*x", ["text.q_proj", "target_modules"]),
    ] {
        desk.adapter(&plain, json!({ "target_modules": target }));
        desk.refused("merge --base base --adapter adapter --out x", &words);
    }
    desk.adapter(&plain, json!({"target_modules": ["q_proj"], "runtime_config": {"ephemeral_gpu_offload": true}}));
    desk.refused("merge --base base --adapter adapter --out x", &["runtime_config"]);
    let twice: Tensors =
        all([plain.clone(), prefixed(&plain).into_iter().map(|(name, t)| (format!("module.{name}"), t)).collect()]);
    desk.adapter(&twice, json!({"target_modules": ["q_proj"]}));
    desk.refused("merge --base base --adapter adapter --out x", &["are both", "text.q_proj.lora_A.weight"]);
}
