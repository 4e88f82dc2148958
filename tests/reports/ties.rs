//! Output heads that share the embedding's weight, new heads, and enlarged vocabularies.

use serde_json::{Value, json};

use crate::desk::{Desk, Tensor, Tensors, factors, is_sum, language_model, product};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn config(ties: Option<bool>) -> Value {
    let mut config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10});
    if let Some(ties) = ties {
        config["tie_word_embeddings"] = json!(ties);
    }
    config
}

fn whole(named: &[(&str, u64, usize)]) -> Tensors {
    let mut adapter = factors(&[("model.layers.0.self_attn.q_proj", [6, 6])]);
    adapter.extend(named.iter().map(|(name, seed, rows)| (name.to_string(), Tensor::random(*seed, &[*rows, 6]))));
    adapter
}

/// The embedding and the head that the merged model uses.
fn tables(got: &Tensors, config: &Value) -> [Tensor; 2] {
    let embedding = got[EMBEDDING].clone();
    let tied = config["tie_word_embeddings"] != json!(false);
    [embedding.clone(), if tied { embedding } else { got[HEAD].clone() }]
}

/// An adapter that changes one of the two, or both differently, unties them, and the config is changed.
#[test]
fn changing_one_of_two_tied_tables_unties_them() {
    for (ties, stored) in [(Some(true), false), (None, false), (Some(true), true), (Some(false), true)] {
        let mut base = language_model("model.", None);
        if stored {
            base.insert(HEAD.into(), base[EMBEDDING].clone());
        }
        let targets = ["q_proj"];
        let lora = factors(&[("model.layers.0.self_attn.q_proj", [6, 6]), ("lm_head", [10, 6])]);
        let delta = product(&lora["lm_head.lora_A.weight"], &lora["lm_head.lora_B.weight"], 2.0);
        let desk = Desk::new();
        desk.model("base", &base, &config(ties));

        desk.adapter(&whole(&[(EMBEDDING, 5, 10)]), json!({"target_modules": targets, "modules_to_save": ["embed_tokens"]}));
        let (got, said) = desk.merged();
        assert_eq!(tables(&got, &desk.json("merged/config.json")), [Tensor::random(5, &[10, 6]), base[EMBEDDING].clone()]);
        assert_eq!(said.contains("untied"), ties != Some(false), "{said}");

        let both = whole(&[(EMBEDDING, 5, 10), (HEAD, 6, 10)]);
        desk.adapter(&both, json!({"target_modules": targets, "modules_to_save": ["embed_tokens", "lm_head"]}));
        let (got, _) = desk.merged();
        assert_eq!(tables(&got, &desk.json("merged/config.json")), [5, 6].map(|seed| Tensor::random(seed, &[10, 6])));

        desk.adapter(&lora, json!({"target_modules": ["q_proj", "lm_head"]}));
        let (got, _) = desk.merged();
        let [embedding, head] = tables(&got, &desk.json("merged/config.json"));
        assert_eq!(embedding, base[EMBEDDING]);
        is_sum(&head, &base[EMBEDDING], &delta, 2);
        assert_eq!(desk.json("merged/config.json")["tie_word_embeddings"], json!(false));

        // PEFT also writes the weight that the update is added to.
        let mut saved = lora.clone();
        saved.insert("lm_head.base_layer.weight".into(), Tensor::random(8, &[10, 6]));
        desk.adapter(&saved, json!({"target_modules": ["q_proj", "lm_head"]}));
        is_sum(&desk.merged().0[HEAD], &Tensor::random(8, &[10, 6]), &delta, 2);
    }
}

/// The same change of both keeps them one weight.
#[test]
fn changing_both_tied_tables_alike_keeps_the_tie() {
    for stored in [false, true] {
        let mut base = language_model("model.", None);
        if stored {
            base.insert(HEAD.into(), base[EMBEDDING].clone());
        }
        let desk = Desk::new();
        desk.model("base", &base, &config(Some(true)));
        let alike = |desk: &Desk, what: &str| {
            let (got, _) = desk.merged();
            let config = desk.json("merged/config.json");
            assert_eq!((config["tie_word_embeddings"].clone(), got.contains_key(HEAD)), (json!(true), stored), "{what}");
            assert!(!stored || got[HEAD] == got[EMBEDDING], "{what}");
            got[EMBEDDING].clone()
        };
        let saved =
            json!({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": true});
        desk.adapter(&whole(&[(EMBEDDING, 5, 10), (HEAD, 5, 10)]), saved.clone());
        assert_eq!(alike(&desk, "both"), Tensor::random(5, &[10, 6]));
        desk.adapter(&whole(&[(EMBEDDING, 5, 10)]), saved.clone());
        assert_eq!(alike(&desk, "one"), Tensor::random(5, &[10, 6]));
        desk.adapter(&whole(&[(EMBEDDING, 5, 10), (HEAD, 6, 10)]), saved);
        desk.refused("merge --base base --adapter adapter --out x", &[EMBEDDING, "`ensure_weight_tying`"]);

        let tokens = whole(&[("model.embed_tokens.token_adapter.trainable_tokens_delta", 7, 1)]);
        desk.adapter(&tokens, json!({"target_modules": ["q_proj"], "trainable_token_indices": [3]}));
        let mut want = base[EMBEDDING].clone();
        want.values[18..24].copy_from_slice(&Tensor::random(7, &[1, 6]).values);
        assert_eq!(alike(&desk, "tokens"), want);
    }
}

/// With `ensure_weight_tying`, PEFT stores the update of the embedding once more, transposed, as that of the head.
#[test]
fn a_tied_update_is_stored_for_both_tables() {
    let base = language_model("model.", None);
    let desk = Desk::new();
    desk.model("base", &base, &config(Some(true)));
    let settings = json!({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": true});
    let mut adapter = factors(&[("model.layers.0.self_attn.q_proj", [6, 6]), ("lm_head", [10, 6])]);
    let [a, b] = ["lora_A", "lora_B"].map(|factor| adapter[&format!("lm_head.{factor}.weight")].clone());
    adapter.insert("model.embed_tokens.lora_embedding_A".into(), b.transposed());
    adapter.insert("model.embed_tokens.lora_embedding_B".into(), a.transposed());
    for saved in [false, true] {
        if saved {
            for module in ["lm_head", "model.embed_tokens"] {
                adapter.insert(format!("{module}.base_layer.weight"), base[EMBEDDING].clone());
            }
        }
        desk.adapter(&adapter, settings.clone());
        let (got, said) = desk.merged();
        assert!(!got.contains_key(HEAD) && !said.contains("untied"), "{said}");
        is_sum(&got[EMBEDDING], &base[EMBEDDING], &product(&a, &b, 2.0), 2);
        assert_eq!(desk.json("merged/config.json")["tie_word_embeddings"], json!(true));
    }

    let line = "merge --base base --adapter adapter --out x";
    adapter.insert("lm_head.lora_B.weight".into(), Tensor::random(77, &b.shape));
    desk.adapter(&adapter, settings.clone());
    desk.refused(line, &[EMBEDDING, "`ensure_weight_tying`"]);
    adapter.insert("lm_head.lora_B.weight".into(), b);
    desk.adapter(&adapter, json!({"target_modules": ["q_proj", "embed_tokens"]}));
    desk.refused(line, &["`lm_head` is not one of the `target_modules`"]);
    desk.adapter(&adapter, settings);
    let untied = language_model("model.", Some("lm_head"));
    desk.model("base", &untied, &config(Some(false)));
    desk.refused(line, &["`lm_head`", "not one of the `target_modules`", "not tied"]);
}

/// With older and nested names. Refused if the base is a single file, because its config cannot be changed.
#[test]
fn the_tie_of_a_part_and_of_a_file() {
    let desk = Desk::new();
    let base = language_model("language_model.model.", None);
    let nested = json!({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": {"tie_word_embeddings": true, "vocab_size": 10}});
    desk.model("base", &base, &nested);
    let mut adapter = factors(&[("model.language_model.layers.0.self_attn.q_proj", [6, 6])]);
    adapter.insert("model.language_model.embed_tokens.weight".into(), Tensor::random(5, &[10, 6]));
    desk.adapter(&adapter, json!({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}));
    let (got, _) = desk.merged();
    assert_eq!(got["language_model.model.embed_tokens.weight"], Tensor::random(5, &[10, 6]));
    assert_eq!(got["language_model.lm_head.weight"], base["language_model.model.embed_tokens.weight"]);
    let config = desk.json("merged/config.json");
    assert_eq!([&config["tie_word_embeddings"], &config["text_config"]["tie_word_embeddings"]], [&json!(false); 2]);
    desk.refused(
        "merge --base base/model.safetensors --adapter adapter --out merged.safetensors",
        &["`language_model.model.embed_tokens.weight` is also the weight of the output head", "give the model's folder"],
    );
    desk.refused(
        "merge --base base --adapter adapter --out x --keep-residue y",
        &["`language_model.lm_head.weight` is new", "keep the base"],
    );
}

/// Tables with another number of rows, with and without `modules_to_save`; heads that the base lacks.
#[test]
fn new_shapes_and_new_heads() {
    for (ties, saved) in [(Some(false), true), (Some(false), false), (Some(true), false)] {
        let base = language_model("model.", (ties == Some(false)).then_some("lm_head"));
        let desk = Desk::new();
        desk.model("base", &base, &config(ties));
        let seed = if ties == Some(true) { 5 } else { 6 };
        let settings = json!({"target_modules": ["q_proj"], "modules_to_save": if saved { json!(["embed_tokens", "lm_head"]) } else { Value::Null }});
        desk.adapter(&whole(&[(EMBEDDING, 5, 13), (HEAD, seed, 13)]), settings);
        let (got, said) = desk.merged();
        let merged = desk.json("merged/config.json");
        assert_eq!(tables(&got, &merged), [5, seed].map(|seed| Tensor::random(seed, &[13, 6])));
        assert_eq!((&merged["vocab_size"], &merged["tie_word_embeddings"]), (&json!(13), &json!(ties.unwrap())));
        assert!(said.contains("resized: `model.embed_tokens.weight` from 10×6 to 13×6"), "{said}");
        desk.refused("merge --base base --adapter adapter --out x --keep-residue y", &["of another shape"]);
    }
    let desk = Desk::new();
    let base = language_model("model.", None);
    desk.model("base", &base, &config(Some(true)));
    desk.adapter(&whole(&[(EMBEDDING, 5, 13)]), json!({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}));
    desk.refused("merge --base base --adapter adapter --out x", &[EMBEDDING, "another number of rows for the embedding only"]);

    desk.adapter(
        &whole(&[("score.weight", 5, 3)]),
        json!({"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"]}),
    );
    let (got, said) = desk.merged();
    assert_eq!((&got["score.weight"], got.len()), (&Tensor::random(5, &[3, 6]), base.len() + 1));
    for words in ["added: `score.weight` (3×6)", "still names LlamaForCausalLM"] {
        assert!(said.contains(words), "{said}");
    }
    desk.adapter(&whole(&[("model.layers.0.up.weight", 5, 3)]), json!({"target_modules": ["q_proj"], "modules_to_save": ["up"]}));
    desk.refused("merge --base base --adapter adapter --out x", &["has no `model.layers.0.up.weight`"]);
}

/// A separate head is written under the name that the class looks for, with the bias that it then has of its own.
#[test]
fn heads_of_other_families_are_untied_under_their_names() {
    let cases = [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings", "cls.predictions.decoder", Some("cls.predictions")),
        ("RobertaForMaskedLM", "roberta.embeddings.word_embeddings", "lm_head.decoder", Some("lm_head")),
        ("AlbertForMaskedLM", "albert.embeddings.word_embeddings", "predictions.decoder", Some("predictions")),
        ("DistilBertForMaskedLM", "distilbert.embeddings.word_embeddings", "vocab_projector", None),
        ("WhisperForConditionalGeneration", "model.decoder.embed_tokens", "proj_out", None),
        ("BartForConditionalGeneration", "model.decoder.embed_tokens", "lm_head", None),
        ("MambaForCausalLM", "backbone.embeddings", "lm_head", None),
        ("XLMRobertaForCausalLM", "roberta.embeddings.word_embeddings", "lm_head.decoder", Some("lm_head")),
        ("XLMWithLMHeadModel", "transformer.embeddings", "pred_layer.proj", None),
        ("ElectraForMaskedLM", "electra.embeddings.word_embeddings", "generator_lm_head", None),
    ];
    for (class, embedding, head, bias) in cases {
        let [weight, head] = [embedding, head].map(|module| format!("{module}.weight"));
        let mut base = language_model("model.", None);
        let table = base.remove(EMBEDDING).unwrap();
        base.insert(weight.clone(), table.clone());
        for name in bias.iter().flat_map(|module| [format!("{module}.bias"), format!("{module}.dense.bias")]) {
            base.insert(name, Tensor::random(9, &[10]));
        }
        let desk = Desk::new();
        desk.model("base", &base, &json!({"architectures": [class], "tie_word_embeddings": true}));
        let saved = embedding.rsplit('.').next().unwrap();
        desk.adapter(&whole(&[(&weight, 5, 10)]), json!({"target_modules": ["q_proj"], "modules_to_save": [saved]}));
        let (got, said) = desk.merged();
        assert_eq!((&got[&weight], &got[&head]), (&Tensor::random(5, &[10, 6]), &table), "{class}");
        assert_eq!(desk.json("merged/config.json")["tie_word_embeddings"], json!(false), "{class}");
        let (own, random) = (bias.map(|module| &got[&format!("{module}.decoder.bias")]), Tensor::random(9, &[10]));
        assert_eq!(own, bias.map(|_| &random), "{class}");
        assert_eq!(got.len(), base.len() + 1 + usize::from(bias.is_some()), "{class}: {:?}", got.keys());
        assert!(!said.contains("still names"), "{said}");
    }
    // The head of an encoder that is not known is not guessed.
    let mut base = language_model("model.", None);
    let table = base.remove(EMBEDDING).unwrap();
    base.insert("new.embeddings.word_embeddings.weight".into(), table);
    let desk = Desk::new();
    desk.model("base", &base, &json!({"architectures": ["NewForMaskedLM"], "tie_word_embeddings": true}));
    let changed = whole(&[("new.embeddings.word_embeddings.weight", 5, 10)]);
    desk.adapter(&changed, json!({"target_modules": ["q_proj"], "modules_to_save": ["word_embeddings"]}));
    desk.refused(
        "merge --base base --adapter adapter --out x",
        &["new.embeddings.word_embeddings.weight", "is not known for this model"],
    );
}
