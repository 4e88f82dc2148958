//! Adapter folders: saving and loading is exact bit for bit, and rewriting PEFT's files byte for byte.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lowrank::adapter::{self, AdapterConfig, CONFIG_FILE, Factors, Folder, HostMatrix, LayerTarget, TENSORS_FILE, TargetModules};
use lowrank::nn::{Adaptable, Adapter, Bias, DEFAULT, Init, Linear, LoraConfig, Mlp, Scaling, Targets};
use lowrank::random::Rng;
use lowrank::{Backend, DType, Error, Float, Tensor, bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use support::adapters::{SIZES, adapted, base_bits, batch, cpu, document, net, outputs, read, state, trained};

/// Every kind of scaling, on some of the layers, with different ranks and alphas: 0.1 / 3 is no finite binary fraction.
fn all_kinds() -> Vec<(&'static str, [Option<LoraConfig>; 3])> {
    let config = |rank, alpha, scaling| Some(LoraConfig { scaling, ..LoraConfig::new(rank, alpha) });
    let over_rank = |rank, alpha| config(rank, alpha, Scaling::AlphaOverRank);
    let dropping = LoraConfig { dropout: 0.1, init: Init::Gaussian { std: 1.0 }, ..LoraConfig::new(1, 1.0) };
    let lora_only = LoraConfig { bias: Bias::LoraOnly, ..usual() };
    let (raw, rslora) = (Scaling::Raw, Scaling::AlphaOverSqrtRank);
    vec![
        ("plain", [over_rank(3, 6.0), over_rank(3, 6.0), over_rank(3, 6.0)]),
        ("one_layer", [None, over_rank(16, 0.1), None]),
        ("patterns", [over_rank(3, 0.1), over_rank(5, 0.1), over_rank(5, -7.25)]),
        ("raw", [config(3, 0.1, raw), None, config(7, 1.3, raw)]),
        ("rslora", [config(3, 0.1, rslora), config(2, 0.1, rslora), None]),
        ("mixed", [config(3, 0.1, rslora), config(3, 0.7, raw), over_rank(3, 0.1)]),
        ("dropout", [Some(dropping.clone()), None, Some(dropping)]),
        ("dora", all(&LoraConfig { use_dora: true, ..usual() })),
        ("lora_bias", all(&LoraConfig { lora_bias: true, ..usual() })),
        ("bias_all", [None, Some(LoraConfig { bias: Bias::All, ..usual() }), None]),
        ("bias_lora_only", [Some(lora_only.clone()), None, Some(lora_only)]),
        ("modules_to_save", all(&LoraConfig { modules_to_save: vec!["linear3".into()], ..usual() })),
        ("dora_and_whole", all(&LoraConfig { use_dora: true, modules_to_save: vec!["linear1".into()], ..usual() })),
        ("dora_and_biases", all(&LoraConfig { use_dora: true, bias: Bias::LoraOnly, ..usual() })),
    ]
}

fn usual() -> LoraConfig {
    LoraConfig::new(3, 7.0)
}

fn all(config: &LoraConfig) -> [Option<LoraConfig>; 3] {
    [Some(config.clone()), Some(config.clone()), Some(config.clone())]
}

fn comes_back_bit_for_bit<E: Float>() {
    let cpu = cpu::<E>();
    for (name, configs) in all_kinds() {
        let folder = tempfile::tempdir().unwrap();
        let (model, mut other) = (adapted(&cpu, configs), net(&cpu));
        adapter::save(&cpu, &model, folder.path()).unwrap();
        adapter::load(&cpu, &mut other, folder.path()).unwrap();
        assert_eq!(outputs(&cpu, &model), outputs(&cpu, &other), "{name}");
        assert_ne!(outputs(&cpu, &model), outputs(&cpu, &net(&cpu)), "{name} changes nothing");

        let again = tempfile::tempdir().unwrap();
        adapter::save(&cpu, &other, again.path()).unwrap();
        for file in [CONFIG_FILE, TENSORS_FILE] {
            assert_eq!(read(folder.path(), file), read(again.path(), file), "{name}: {file}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "{name}: temporary files");
    }
}

#[test]
fn adapters_come_back_bit_for_bit_in_f32() {
    comes_back_bit_for_bit::<f32>();
}

#[test]
fn adapters_come_back_bit_for_bit_in_f16() {
    comes_back_bit_for_bit::<f16>();
}

#[test]
fn adapters_come_back_bit_for_bit_in_bf16() {
    comes_back_bit_for_bit::<bf16>();
}

fn peft_folders() -> Vec<PathBuf> {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let paths = fs::read_dir(cases).unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<_> = paths.filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 6);
    folders
}

/// PEFT's own files, read and written again, keep every byte: regular expressions, the order of keys, an `auto_mapping` that this
/// crate does not use.
#[test]
fn the_files_of_peft_survive_a_round_trip_byte_for_byte() {
    for theirs in peft_folders() {
        let ours = tempfile::tempdir().unwrap();
        let (cpu32, cpu16, cpub16) = (cpu::<f32>(), cpu::<f16>(), cpu::<bf16>());
        match theirs.file_name().unwrap().to_str().unwrap() {
            "peft_f16" => copy(&cpu16, &theirs, ours.path()),
            "peft_bf16" => copy(&cpub16, &theirs, ours.path()),
            _ => copy(&cpu32, &theirs, ours.path()),
        }
        assert_eq!(read(&theirs, CONFIG_FILE), read(ours.path(), CONFIG_FILE), "{}", theirs.display());
        assert_eq!(read(&theirs, TENSORS_FILE), read(ours.path(), TENSORS_FILE), "{}", theirs.display());
    }
}

fn copy<B: Backend>(backend: &B, from: &Path, to: &Path) {
    let mut model = net(backend);
    let config = adapter::load(backend, &mut model, from).unwrap();
    adapter::save_with(backend, &model, &config, to).unwrap();
}

#[test]
fn a_new_config_has_the_keys_and_defaults_of_peft() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = cpu::<f32>();
    let config = LoraConfig { dropout: 0.1, ..LoraConfig::new(3, 6.0) };
    adapter::save(&cpu, &adapted(&cpu, [Some(config.clone()), Some(config.clone()), Some(config)]), folder.path()).unwrap();
    let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/peft_plain");
    let (ours, mut theirs) = (document(folder.path()), document(&peft));
    theirs["auto_mapping"] = Value::Null; // PEFT's note of the Python class
    theirs["init_lora_weights"] = json!(true); // PEFT's default; the case was made with another
    theirs["target_modules"] = json!(["linear1", "linear2", "linear3"]); // a set there
    let text = |document| serde_json::to_string_pretty(&Value::Object(document)).unwrap();
    assert_eq!(text(ours), text(theirs));
}

#[test]
fn unknown_keys_and_the_order_of_keys_are_kept_when_the_model_changes() {
    let theirs =
        br#"{"peft_type": "LORA", "zeta": 2.50, "r": 2, "target_modules": ["linear1"], "auto_mapping": {"b": [1, 2.50], "a": null}, "alpha": 0}"#;
    let cpu = cpu::<f32>();
    let model = adapted(&cpu, [None, Some(LoraConfig::new(5, 2.5)), None]);
    let folder = tempfile::tempdir().unwrap();
    adapter::save_with(&cpu, &model, &AdapterConfig::from_json(theirs).unwrap(), folder.path()).unwrap();
    let document = document(folder.path());
    let keys: Vec<&str> = document.keys().map(String::as_str).collect();
    assert_eq!(keys[..6], ["peft_type", "zeta", "r", "target_modules", "auto_mapping", "alpha"]);
    assert_eq!(document["zeta"].to_string(), "2.5");
    assert_eq!(document["auto_mapping"].to_string(), r#"{"b":[1,2.5],"a":null}"#);
    assert_eq!((&document["r"], &document["lora_alpha"]), (&json!(5), &json!(2.5)));
    let mut other = net(&cpu);
    adapter::load(&cpu, &mut other, folder.path()).unwrap();
    assert_eq!(outputs(&cpu, &model), outputs(&cpu, &other));
}

/// The settings of a config can be read and set, and are kept when a loaded adapter is saved again.
#[test]
fn a_config_has_its_settings_and_the_name_of_its_model() {
    let read = |targets: Value| {
        let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 2.5, "target_modules": targets});
        AdapterConfig::from_json(config.to_string().as_bytes()).unwrap()
    };
    let config = read(json!(["q_proj", "v_proj"]));
    assert_eq!((config.r(), config.lora_alpha()), (4, 2.5));
    assert_eq!((config.base_model_name_or_path(), config.task_type()), (None, None));
    assert_eq!(config.target_modules(), TargetModules::Names(&["q_proj".into(), "v_proj".into()]));
    assert_eq!(read(json!(".*_proj")).target_modules(), TargetModules::Matching(".*_proj"));
    assert_eq!(read(json!("all-linear")).target_modules(), TargetModules::AllLinear);

    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let model = adapted(&cpu, all(&usual()));
    let config = AdapterConfig::of(&model).unwrap().with_base_model_name_or_path("org/model").with_task_type("CAUSAL_LM");
    assert_eq!((config.r(), config.lora_alpha()), (3, 7.0));
    adapter::save_with(&cpu, &model, &config, folder.path()).unwrap();
    for _ in 0..2 {
        let mut other = net(&cpu);
        let loaded = adapter::load(&cpu, &mut other, folder.path()).unwrap();
        assert_eq!((loaded.base_model_name_or_path(), loaded.task_type()), (Some("org/model"), Some("CAUSAL_LM")));
        other.add_adapters(&cpu, Targets::All, &LoraConfig::new(5, 1.0), &mut Rng::new(1)).unwrap();
        adapter::save_with(&cpu, &other, &loaded, folder.path()).unwrap(); // even of a model that is another by now
    }
    let mine = Folder::read(folder.path()).unwrap();
    let again = Folder::new(Some(mine.config()), mine.modules().clone()).unwrap();
    assert_eq!(again.config().base_model_name_or_path(), Some("org/model"));
}

/// An initialisation that did not change the weights does not matter for loading; the setting is kept in the file.
#[test]
fn initialisations_that_keep_the_weights_are_plain_adapters() {
    for (begins, extra) in [("gaussian", json!({})), ("orthogonal", json!({})), ("eva", json!({"rho": 2.0})), ("mica", json!({}))]
    {
        let config =
            json!({"peft_type": "LORA", "target_modules": ["linear1"], "init_lora_weights": begins, "eva_config": extra});
        let config = AdapterConfig::from_json(config.to_string().as_bytes()).unwrap();
        assert_eq!(config.principal(), None);
        let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
        let model = adapted(&cpu, [Some(LoraConfig::new(8, 8.0)), None, None]);
        adapter::save_with(&cpu, &model, &config, folder.path()).unwrap();
        let mut other = net(&cpu);
        adapter::load(&cpu, &mut other, folder.path()).unwrap();
        assert_eq!(outputs(&cpu, &model), outputs(&cpu, &other));
        assert_eq!(document(folder.path())["init_lora_weights"], json!(begins));
    }
}

#[test]
fn the_minimum_config_means_the_defaults_of_peft() {
    let config = AdapterConfig::from_json(br#"{"peft_type": "LORA", "target_modules": ["fc.linear1", "linear2"]}"#).unwrap();
    assert_eq!(config.lora_config("linear2"), Some(LoraConfig::new(8, 8.0)));
    assert_eq!(config.lora_config("block.linear2"), Some(LoraConfig::new(8, 8.0)), "the end of a path");
    for other in ["linear1", "xlinear2", "linear2.x"] {
        assert_eq!(config.lora_config(other), None, "{other}");
    }
    let all = AdapterConfig::from_json(br#"{"peft_type": "LORA", "target_modules": "all-linear", "r": null}"#).unwrap();
    assert_eq!(all.lora_config("anything"), Some(LoraConfig::new(8, 8.0)));
}

/// PEFT matches patterns against the end of a name, and the first one that fits wins; a whole `target_modules` must match.
#[test]
fn patterns_match_as_in_peft() {
    let config = json!({"peft_type": "LORA", "target_modules": r".*fc\d", "r": 4, "lora_alpha": 3, "use_rslora": true,
        "rank_pattern": {"a.fc1": 1, "fc1": 2, "fc": 3, "fc2|fc3": 5}, "alpha_pattern": {"^fc1": 7.5}});
    let config = AdapterConfig::from_json(config.to_string().as_bytes()).unwrap();
    let rank_alpha = |layer| config.lora_config(layer).map(|config| (config.rank, config.alpha, config.scaling));
    let rslora = Scaling::AlphaOverSqrtRank;
    assert_eq!(rank_alpha("fc1"), Some((2, 7.5, rslora)));
    assert_eq!(rank_alpha("a.fc1"), Some((1, 3.0, rslora)));
    assert_eq!(rank_alpha("b.fc1"), Some((2, 3.0, rslora)));
    assert_eq!(rank_alpha("xfc1"), Some((4, 3.0, rslora)));
    assert_eq!(rank_alpha("fc3"), Some((5, 3.0, rslora)));
    assert_eq!(rank_alpha("fc12"), None);
}

/// `exclude_modules` takes precedence over targets; `layers_to_transform` applies to layers that match the end of a name, not to
/// those named in full; the first number in a name counts; modules that are saved whole, and those within them, get no update.
#[test]
fn layers_are_excluded_and_picked_by_number_as_in_peft() {
    let asked = |extra: Value, layer: &str| {
        let mut config = json!({"peft_type": "LORA", "target_modules": ["q", "v", "h.9.full"]});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        AdapterConfig::from_json(config.to_string().as_bytes()).unwrap().layer_target(layer)
    };
    let is_lora = |extra: Value, layer: &str| matches!(asked(extra, layer), Some(LayerTarget::Lora(_)));
    assert!(!is_lora(json!({"exclude_modules": ["v"]}), "h.1.v") && is_lora(json!({"exclude_modules": ["v"]}), "h.1.q"));
    assert!(!is_lora(json!({"exclude_modules": r".*\.1\..*"}), "h.1.q") && is_lora(json!({"exclude_modules": ".*1"}), "h.1.q"));
    for (layer, want) in
        [("h.1.q", true), ("h.2.q", false), ("a.h.1.x.2.v", true), ("a.h.2.x.1.v", false), ("h.9.full", true), ("q", true)]
    {
        assert_eq!(
            is_lora(json!({"layers_to_transform": [1, 3]}), &format!("m.{layer}")),
            want && !["h.9.full", "q"].contains(&layer),
            "{layer}"
        );
        assert_eq!(is_lora(json!({"layers_to_transform": 1, "layers_pattern": "h"}), layer), want, "{layer}");
    }
    assert!(!is_lora(json!({"layers_to_transform": 1, "layers_pattern": ["g"]}), "h.1.q"));
    let saved = json!({"modules_to_save": ["head"], "bias": "all"});
    assert_eq!(asked(saved.clone(), "m.head"), Some(LayerTarget::Whole));
    assert_eq!(asked(saved.clone(), "m.head.q"), Some(LayerTarget::Bias));
    assert!(is_lora(saved, "m.q"));
    assert_eq!(asked(json!({}), "m.head"), None);
}

#[test]
fn loading_replaces_all_adapters() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let model = adapted(&cpu, [Some(LoraConfig::new(2, 4.0)), None, None]);
    adapter::save(&cpu, &model, folder.path()).unwrap();
    let mut other = adapted(&cpu, [None, Some(LoraConfig::new(3, 4.0)), Some(LoraConfig::new(1, 1.0))]);
    other.merge_adapters(&cpu).unwrap();
    let before = state(&cpu, &mut other);
    let merged = adapter::load(&cpu, &mut other, folder.path()).unwrap_err();
    assert!(merged.to_string().contains("merged into the weight"), "{merged}");
    assert_eq!(state(&cpu, &mut other), before);

    let mut other = adapted(&cpu, [None, Some(LoraConfig::new(3, 4.0)), Some(LoraConfig::new(1, 1.0))]);
    adapter::load(&cpu, &mut other, folder.path()).unwrap();
    assert_eq!(outputs(&cpu, &model), outputs(&cpu, &other));
    let trainable: Vec<bool> = other.params_mut().map(|param| param.trainable).collect();
    assert_eq!(trainable, [false, false, true, true, false, false, false, false], "the base is frozen");
}

#[test]
fn settings_that_no_config_can_hold_are_not_saved() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let with_dropout = |dropout| Some(LoraConfig { dropout, ..LoraConfig::new(2, 4.0) });
    for (configs, word) in [([None, None, None], "no adapter"), ([with_dropout(0.0), with_dropout(0.5), None], "lora_dropout")] {
        let dir = folder.path().join("adapter");
        let error = adapter::save(&cpu, &adapted(&cpu, configs), &dir).unwrap_err();
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(word), "{error}");
        assert!(!dir.exists());
    }
}

/// Writes folders for scripts/check-adapter-in-peft.py, in the format of the reference cases, and checks them here too.
#[test]
fn adapters_for_peft_to_check() {
    let cpu = cpu::<f32>();
    for (name, configs) in all_kinds() {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("for_peft").join(format!("peft_{name}"));
        let mut model = adapted(&cpu, configs);
        adapter::save(&cpu, &model, &folder).unwrap();
        let mut tensors = vec![("x".to_string(), vec![5, SIZES[0]], batch(&cpu).to_vec(&cpu).unwrap())];
        let y = |name: &str, model: &Mlp<_>| (name.to_string(), vec![5, SIZES[3]], outputs(&cpu, model));
        tensors.extend([y("y_adapter", &model), y("y_base", &net(&cpu))]);
        tensors.extend(base(&cpu, &model, "base"));
        model.merge_and_unload(&cpu).unwrap();
        tensors.push(y("y_merged", &model));
        tensors.extend(base(&cpu, &model, "merged"));
        write_expected(&folder, &tensors);

        let case = support::cases::read(&folder).unwrap();
        assert!(case.failures(&case.run(&cpu).unwrap()).is_empty(), "{name}");
    }
}

/// `Folder::adapter` gives a single layer the same adapter, including biases and magnitudes, that loading gives a model's layer.
#[test]
fn one_layer_gets_the_same_adapter_as_a_model() {
    let cpu = cpu::<f32>();
    for (kind, configs) in all_kinds() {
        let folder = tempfile::tempdir().unwrap();
        adapter::save(&cpu, &adapted(&cpu, configs), folder.path()).unwrap();
        let mut model = net(&cpu);
        adapter::load(&cpu, &mut model, folder.path()).unwrap();
        let theirs = Folder::read(folder.path()).unwrap();
        for (layer, linear) in net(&cpu).layers() {
            let want = model.layer(layer).unwrap().adapter(DEFAULT);
            let got = theirs.adapter(&cpu, layer, linear.base());
            let Some(want) = want else {
                assert!(matches!(got, Err(Error::NoSuchLayer { .. })), "{kind} {layer}");
                continue;
            };
            let got = got.unwrap();
            assert_eq!(got.config(), want.config(), "{kind} {layer}");
            let numbers = |adapter: &Adapter<_>| -> Vec<Vec<f32>> {
                adapter.params().map(|param| param.tensor().to_vec(&cpu).unwrap()).collect()
            };
            assert_eq!(numbers(&got), numbers(want), "{kind} {layer}");
        }
    }
}

#[test]
fn a_layer_that_does_not_fit_the_folder_is_refused() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let biased = LoraConfig { bias: Bias::LoraOnly, ..usual() };
    adapter::save(&cpu, &adapted(&cpu, all(&biased)), folder.path()).unwrap();
    let folder = Folder::read(folder.path()).unwrap();
    let zeros = |shape| Tensor::zeros(&cpu, shape).unwrap();
    let refused = |name, shape| {
        let layer = Linear::from_tensors(zeros(shape), None).unwrap();
        folder.adapter(&cpu, name, &layer).err().unwrap().to_string()
    };
    assert_eq!(refused("q_proj", (11, 13)), "no layer is named `q_proj`; the layers are linear1, linear2, linear3");
    assert!(refused("linear1", (11, 12)).contains("`linear1.lora_A.weight` is 3×13, want 3×12"));
    assert!(refused("linear1", (11, 13)).contains("`linear1.base_layer.bias` has no place in layer `linear1`"), "no bias there");
}

/// Scalings survive writing to the bit: zero, negative, without a finite decimal, with different ranks, at the limits of `f32`.
#[test]
fn a_written_folder_keeps_its_scalings() {
    let kinds: [&[(usize, f32)]; 7] = [
        &[(2, 2.0)],
        &[(2, 1.0), (4, 1.0)],
        &[(3, 0.1), (3, 0.1), (5, 0.1)],
        &[(3, 0.1), (3, -7.3), (5, 1.0 / 3.0), (1, 0.0)],
        &[(7, f32::MAX), (7, f32::MIN_POSITIVE), (6, f32::from_bits(1))],
        &[(49, 1.1754945e-38), (13, 16777217.0), (64, 0.125)],
        &[(2, -0.5), (4, 2.0)],
    ];
    for modules in kinds {
        let factors = |&(r, scaling): &(usize, f32)| {
            let zeros = |rows, cols| HostMatrix::new((rows, cols), vec![0.0; rows * cols]).unwrap();
            Factors { a: zeros(r, 3), b: zeros(4, r), scaling, dtype: DType::F32 }
        };
        let modules: BTreeMap<String, Factors> =
            modules.iter().enumerate().map(|(at, module)| (format!("h.{at}.q_proj"), factors(module))).collect();
        let folder = tempfile::tempdir().unwrap();
        Folder::new(None, modules.clone()).unwrap().write(folder.path()).unwrap();
        assert_eq!(Folder::read(folder.path()).unwrap().modules(), &modules, "{}", document(folder.path())["alpha_pattern"]);
        // As PEFT reads it: f64, divided and then rounded.
        let document = document(folder.path());
        for (name, module) in &modules {
            let told = |pattern: &str, usual: &str| document[pattern].get(name).unwrap_or(&document[usual]).as_f64().unwrap();
            let (alpha, rank) = (told("alpha_pattern", "lora_alpha"), told("rank_pattern", "r"));
            assert_eq!(((alpha / rank) as f32, rank as usize), (module.scaling, module.rank()), "{name}");
        }
    }
    let one = |scaling| Factors {
        a: HostMatrix::new((1, 1), vec![1.0]).unwrap(),
        b: HostMatrix::new((1, 1), vec![1.0]).unwrap(),
        scaling,
        dtype: DType::F32,
    };
    for scaling in [f32::NAN, f32::INFINITY] {
        let error = Folder::new(None, BTreeMap::from([("q".to_string(), one(scaling))])).unwrap_err().to_string();
        assert!(error.contains("`q` of scaling") && error.contains("finite"), "{error}");
    }
    // `a.q` ends with `q`, and PEFT matches patterns at the end of a name.
    let alike = BTreeMap::from([("a.q".to_string(), one(1.0)), ("q".to_string(), one(2.0)), ("z".to_string(), one(3.0))]);
    let error = Folder::new(None, alike).unwrap_err().to_string();
    assert!(error.contains("`a.q` of rank 1, scaling 1, want told from others by its name"), "{error}");
}

/// An `Mlp` whose layers have the names of the folder's modules.
#[test]
fn a_model_of_named_layers_loads_a_folder_of_those_names() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let named = |names: [&str; 2]| {
        let linear = |(name, (k, n)): (&str, _)| (name.to_string(), Linear::new(&cpu, k, n, &mut Rng::new(3)).unwrap());
        Mlp::from_named_layers(names.into_iter().zip([(5, 4), (4, 3)]).map(linear).collect())
    };
    let mut model = named(["mlp.up_proj", "mlp.down_proj"]).unwrap();
    model
        .add_adapters(&cpu, Targets::Names(&["mlp.down_proj"]), &LoraConfig { init: Init::NonZero, ..usual() }, &mut Rng::new(1))
        .unwrap();
    adapter::save(&cpu, &model, folder.path()).unwrap();
    let mut other = named(["mlp.up_proj", "mlp.down_proj"]).unwrap();
    adapter::load(&cpu, &mut other, folder.path()).unwrap();
    let outputs = |model: &Mlp<_>| model.predict(&cpu, Tensor::from_slice(&cpu, (1, 5), &[1.0f32; 5]).unwrap()).unwrap();
    assert_eq!(outputs(&model), outputs(&other));
    assert_ne!(outputs(&model), outputs(&named(["a", "b"]).unwrap()));
    let twice = named(["up", "up"]).err().unwrap().to_string();
    assert!(twice.contains("two of the name `up`"), "{twice}");
}

/// Two adapters in one folder, the second in a sub-folder of its name: each, and their sum.
#[test]
fn named_adapters_for_peft_to_check() {
    let cpu = cpu::<f32>();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("for_peft/peft_named");
    let mut model = adapted(&cpu, all(&usual()));
    let other = trained(&cpu, [None, Some(LoraConfig::new(2, 5.0)), Some(LoraConfig::new(2, 5.0))], 12);
    model.insert_adapter("other", other).unwrap();
    adapter::save(&cpu, &model, &folder).unwrap();
    let mut tensors = vec![("x".to_string(), vec![5, SIZES[0]], batch(&cpu).to_vec(&cpu).unwrap())];
    let y = |name: &str, model: &Mlp<_>| (name.to_string(), vec![5, SIZES[3]], outputs(&cpu, model));
    tensors.extend([y("y_adapter", &model), y("y_base", &net(&cpu))]);
    tensors.extend(base(&cpu, &model, "base"));
    for (name, active) in [("y_other", &["other"][..]), ("y_both", &["default", "other"])] {
        model.set_active(active).unwrap();
        tensors.push(y(name, &model));
    }
    model.merge_and_unload(&cpu).unwrap(); // both
    tensors.push(y("y_merged", &model));
    tensors.extend(base(&cpu, &model, "merged"));
    write_expected(&folder, &tensors);

    let mut again = net(&cpu);
    for name in [DEFAULT, "other"] {
        adapter::load_as(&cpu, &mut again, name, &adapter::folder(&folder, name)).unwrap();
    }
    assert_eq!(again.active_adapters(), [DEFAULT], "the first is active");
    assert_eq!(outputs(&cpu, &again), tensors[1].2);
    again.set_active(&[DEFAULT, "other"]).unwrap();
    let both = tensors.iter().find(|(name, ..)| name == "y_both").unwrap();
    assert_eq!(outputs(&cpu, &again), both.2);
    assert_eq!(base_bits(&cpu, &again), base_bits(&cpu, &net(&cpu)));
}

type Named = (String, Vec<usize>, Vec<f32>);

fn write_expected(folder: &Path, tensors: &[Named]) {
    let view = |(name, shape, values): &Named| {
        let bytes = bytemuck::cast_slice(values).to_vec();
        (name.clone(), shape.clone(), bytes)
    };
    let data: Vec<_> = tensors.iter().map(view).collect();
    let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    lowrank::file::write_whole(&folder.join("expected.safetensors"), &serialize(views, None).unwrap()).unwrap();
}

fn base<B: Backend>(backend: &B, model: &Mlp<B>, what: &str) -> Vec<(String, Vec<usize>, Vec<B::Elem>)> {
    let mut tensors = Vec::new();
    for (name, layer) in model.layers() {
        let (weight, bias) = (layer.base().weight().tensor(), layer.base().bias().unwrap().tensor());
        let shape = vec![weight.rows(), weight.cols()];
        tensors.push((format!("{what}.{name}.weight"), shape, weight.to_vec(backend).unwrap()));
        tensors.push((format!("{what}.{name}.bias"), vec![bias.cols()], bias.to_vec(backend).unwrap()));
    }
    tensors
}
