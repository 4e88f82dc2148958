//! Adapter folders that are damaged, malicious or for another model: an error that names the problem, never a panic, and the model does
//! not change.

mod support;

use std::fs;

use lowrank::adapter::{self, AdapterConfig, CONFIG_FILE, TENSORS_FILE};
use lowrank::nn::LoraConfig;
use lowrank::{Error, bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use support::adapters::{adapted, cpu, document, net, read, state};

/// A valid folder, in which each test damages something.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Some(LoraConfig::new(2, 4.0));
        adapter::save(&cpu::<f32>(), &adapted(&cpu(), [config.clone(), config, None]), folder.path()).unwrap();
        Self(folder)
    }

    fn write(&self, file: &str, bytes: &[u8]) -> &Self {
        fs::write(self.0.path().join(file), bytes).unwrap();
        self
    }

    fn set(&self, key: &str, value: Value) -> &Self {
        let mut document = document(self.0.path());
        document.insert(key.into(), value);
        self.write(CONFIG_FILE, Value::Object(document).to_string().as_bytes())
    }

    /// Adds tensors of zeros with these names, types and shapes.
    fn tensors(&self, tensors: &[(&str, Dtype, &[usize])]) -> &Self {
        let zeros = [0; 4096];
        let view = |&(name, dtype, shape): &(_, Dtype, &[usize])| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.into(), &zeros[..bytes]).unwrap())
        };
        self.write(TENSORS_FILE, &serialize(tensors.iter().map(view), None).unwrap())
    }

    /// Asserts that loading fails and does not change a model that has an adapter already.
    fn load(&self) -> lowrank::Result<()> {
        let cpu = cpu::<f32>();
        let mut model = adapted(&cpu, [None, None, Some(LoraConfig::new(1, 1.0))]);
        let before = state(&cpu, &mut model);
        let loaded = adapter::load(&cpu, &mut model, self.0.path());
        if loaded.is_err() {
            assert_eq!(state(&cpu, &mut model), before, "a failed load changed the model");
        }
        loaded.map(|_| ())
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let error = self.load().unwrap_err().to_string();
        assert!(error.contains(self.0.path().to_str().unwrap()), "{error}: no path");
        words.iter().for_each(|word| assert!(error.contains(word), "{error}: no {word}"));
    }
}

const GOOD: [(&str, Dtype, &[usize]); 4] = [
    ("linear1.lora_A.weight", Dtype::F32, &[2, 13]),
    ("base_model.model.linear1.lora_B.weight", Dtype::F16, &[11, 2]),
    ("linear2.lora_A.weight", Dtype::BF16, &[2, 11]),
    ("linear2.lora_B.weight", Dtype::F32, &[9, 2]),
];

#[test]
fn tensors_that_do_not_fit_are_named_with_both_shapes() {
    let folder = Folder::new();
    folder.tensors(&GOOD).load().unwrap();
    let with = |at: usize, tensor| {
        let mut tensors = GOOD;
        tensors[at] = tensor;
        tensors
    };
    let a = "linear1.lora_A.weight";
    folder.tensors(&with(0, (a, Dtype::F32, &[3, 13]))).refused(&[TENSORS_FILE, a, "3×13", "2×13"]);
    folder.tensors(&with(0, (a, Dtype::F32, &[2, 12]))).refused(&[TENSORS_FILE, a, "2×12", "2×13"]);
    folder.tensors(&with(0, (a, Dtype::F32, &[26]))).refused(&[TENSORS_FILE, a, "26", "2×13"]);
    folder.tensors(&with(0, (a, Dtype::F32, &[2, 13, 1]))).refused(&[TENSORS_FILE, a, "2×13×1", "2×13"]);
    folder.tensors(&with(0, (a, Dtype::F64, &[2, 13]))).refused(&[TENSORS_FILE, a, "F64"]);
    folder.tensors(&with(0, (a, Dtype::I8, &[2, 13]))).refused(&[TENSORS_FILE, a, "I8"]);
    folder.tensors(&GOOD[1..]).refused(&[TENSORS_FILE, a, "missing", "2×13"]);
    folder.tensors(&with(1, ("linear3.lora_A.weight", Dtype::F32, &[2, 9]))).refused(&["linear1.lora_B.weight", "missing"]);
    let extra = |name| [&GOOD[..], &[(name, Dtype::F32, &[2, 9])]].concat();
    folder.tensors(&extra("linear3.lora_A.weight")).refused(&["linear3.lora_A.weight", "not part of"]);
    folder.tensors(&extra("linear1.lora_B.bias")).refused(&["linear1.lora_B.bias", "not part of"]);
    folder.tensors(&extra("base_model.model.linear1.lora_A.weight")).refused(&[a, "twice"]);
}

/// The settings and the tensors agree with each other, but not with the model.
#[test]
fn a_missing_layer_is_named_with_the_existing_ones() {
    let folder = Folder::new();
    folder.set("target_modules", json!(["linear1", "linear9"]));
    let other =
        [GOOD[0], GOOD[1], ("linear9.lora_A.weight", Dtype::F32, &[2, 11][..]), ("linear9.lora_B.weight", Dtype::F32, &[9, 2])];
    folder.tensors(&other).refused(&[
        TENSORS_FILE,
        "is for `linear9`, which the model does not have",
        "linear1, linear2, linear3",
    ]);
    folder.set("modules_to_save", json!(["head"]));
    let saved = [GOOD[0], GOOD[1], ("head.weight", Dtype::F32, &[2, 11])];
    folder.tensors(&saved).refused(&["`head.weight` is for `head`, which the model does not have"]);
}

/// Tensors that PEFT writes for embeddings: an update of one, and a whole one whose vocabulary was resized.
#[test]
fn updates_of_embeddings_are_refused_by_name() {
    let folder = Folder::new();
    let with = |extra: &[(&'static str, Dtype, &'static [usize])]| [&GOOD[..], extra].concat();
    let update = with(&[("wte.lora_embedding_A", Dtype::F32, &[2, 5]), ("wte.lora_embedding_B", Dtype::F32, &[4, 2])]);
    let whole = with(&[("base_model.model.wte.weight", Dtype::F32, &[5, 4])]);
    for (tensors, words) in [
        (update, ["`wte.lora_embedding_A`, an update of an embedding", "not supported"]),
        (whole, ["`wte.weight` is for `wte`", "which the model does not have"]),
    ] {
        folder.tensors(&tensors).refused(&words);
    }
}

/// Settings that require further tensors, which are missing or have another shape.
#[test]
fn magnitudes_and_biases_that_are_missing_or_do_not_fit_are_named() {
    let needs = [
        ("lora_bias", json!(true), "linear1.lora_B.bias", "11"),
        ("use_dora", json!(true), "linear1.lora_magnitude_vector", "11"),
        ("bias", json!("lora_only"), "linear1.base_layer.bias", "11"),
        ("modules_to_save", json!(["linear3"]), "linear3.weight", "7×9"),
    ];
    for (field, value, tensor, want) in needs {
        let folder = Folder::new();
        folder.tensors(&GOOD).set(field, value).refused(&[TENSORS_FILE, tensor, "missing", want]);
        let wrong = [&GOOD[..], &[(tensor, Dtype::F32, &[2, 5])]].concat();
        folder.tensors(&wrong).refused(&[TENSORS_FILE, tensor, "2×5", want]);
    }
}

#[test]
fn numbers_too_large_for_the_element_type_are_refused() {
    let (folder, cpu16) = (tempfile::tempdir().unwrap(), cpu::<f16>());
    let (a, b) = ([1e6f32; 13].map(f32::to_le_bytes).concat(), [0; 44]);
    let a = TensorView::new(Dtype::F32, vec![1, 13], &a).unwrap();
    let b = TensorView::new(Dtype::F32, vec![11, 1], &b).unwrap();
    let bytes = serialize([("linear1.lora_A.weight", a), ("linear1.lora_B.weight", b)], None).unwrap();
    fs::write(folder.path().join(TENSORS_FILE), bytes).unwrap();
    let config = json!({"peft_type": "LORA", "r": 1, "target_modules": ["linear1"]});
    fs::write(folder.path().join(CONFIG_FILE), config.to_string()).unwrap();
    let error = adapter::load(&cpu16, &mut net(&cpu16), folder.path()).unwrap_err().to_string();
    assert!(error.contains("linear1.lora_A.weight") && error.contains("1000000") && error.contains("f16"), "{error}");
    adapter::load(&cpu::<bf16>(), &mut net(&cpu()), folder.path()).unwrap();
}

#[test]
fn missing_and_empty_files_are_named() {
    for file in [CONFIG_FILE, TENSORS_FILE] {
        let folder = Folder::new();
        folder.write(file, b"").refused(&[file]);
        fs::remove_file(folder.0.path().join(file)).unwrap();
        folder.refused(&[file]);
    }
}

#[test]
fn every_unsupported_setting_is_named() {
    let set = [
        ("alora_invocation_tokens", json!([1, 2])),
        ("corda_config", json!({"a": 1})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["weight"])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_qalora", json!(true)),
    ];
    for (field, value) in set {
        let folder = Folder::new();
        let error = folder.set(field, value).load().unwrap_err();
        assert!(matches!(error, Error::Unsupported { field: named, .. } if named == field), "{field}: {error}");
        folder.refused(&[CONFIG_FILE, field]);
    }
}

/// An unknown key, of a later version perhaps, is refused if it enables something, and accepted otherwise.
#[test]
fn unknown_keys_that_switch_something_on_are_named() {
    for value in [json!(true), json!([1]), json!({"a": 1})] {
        Folder::new().set("use_new_trick", value).refused(&[CONFIG_FILE, "`use_new_trick` is", "no such setting"]);
    }
    for value in [Value::Null, json!(false), json!([]), json!({}), json!(0.1), json!("yes")] {
        Folder::new().set("use_new_trick", value).load().unwrap();
    }
}

/// The settings are valid, but need a decomposition, which this build does not have.
#[cfg(not(feature = "svd"))]
#[test]
fn a_feature_that_is_missing_is_named() {
    for part in ["pissa", "olora"] {
        let folder = Folder::new();
        let error = folder.tensors(&GOOD).set("init_lora_weights", json!(part)).load().unwrap_err();
        assert!(matches!(error, Error::Unsupported { field: "init_lora_weights", .. }), "{error}");
        folder.refused(&[CONFIG_FILE, part, "without the feature `svd`"]);
    }
}

#[test]
fn settings_outside_their_range_are_named() {
    let set = [
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("target_modules", Value::Null),
        ("target_modules", json!([])),
        ("target_modules", json!(["linear9"])),
        ("target_modules", json!([1])),
        ("target_modules", json!("linear1(?=x)")),
        ("target_modules", json!("(linear1")),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!(2.5)),
        ("r", json!("2")),
        ("rank_pattern", json!({"linear1": 0})),
        ("rank_pattern", json!({"(": 1})),
        ("rank_pattern", json!([2])),
        ("alpha_pattern", json!({"linear1": "2"})),
        ("lora_alpha", json!("4")),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(-0.1)),
        ("use_rslora", json!(1)),
        ("bias", json!("some")),
        ("bias", json!(true)),
        ("exclude_modules", json!("(")),
        ("exclude_modules", json!([1])),
        ("fan_in_fan_out", json!("yes")),
        ("layers_pattern", json!("layers")),
        ("layers_to_transform", json!("first")),
        ("layers_to_transform", json!([-1])),
        ("lora_bias", json!(0)),
        ("modules_to_save", json!("linear3")),
        ("modules_to_save", json!(["("])),
        ("use_dora", json!("yes")),
    ];
    for (field, value) in set {
        Folder::new().set(field, value).refused(&[CONFIG_FILE, field]);
    }
    let both = Folder::new();
    both.set("use_dora", json!(true)).set("lora_bias", json!(true)).refused(&["use_dora", "lora_bias"]);
    let regex = Folder::new();
    regex.set("target_modules", json!("linear.")).set("layers_to_transform", json!(0)).refused(&["layers_to_transform", "list"]);
    let huge = Folder::new();
    huge.set("lora_alpha", json!(1e300)).refused(&[CONFIG_FILE, "`lora_alpha` of `linear1` is 1e300", "f32"]);
    let error = adapter::Folder::read(huge.0.path()).unwrap_err().to_string();
    assert!(error.contains(CONFIG_FILE) && error.contains("`lora_alpha` of `linear1` is 1e300"), "{error}");
    let odd = Folder::new();
    odd.set("r", json!(3)).set("init_lora_weights", json!("orthogonal")).refused(&[CONFIG_FILE, "rank", "orthogonal"]);
    let deep = Folder::new();
    deep.write(CONFIG_FILE, &b"[".repeat(100_000)).refused(&[CONFIG_FILE]);
    deep.write(CONFIG_FILE, &[0xff; 10]).refused(&[CONFIG_FILE]);
}

#[test]
fn a_truncated_file_is_reported_with_both_lengths() {
    let folder = Folder::new();
    let whole = read(folder.0.path(), TENSORS_FILE);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap());
    for (cut, want) in [
        (0, "at least 8".into()),
        (7, "at least 8".into()),
        (40, format!("at least {header}")),
        (whole.len() - 1, whole.len().to_string()),
    ] {
        folder.write(TENSORS_FILE, &whole[..cut]).refused(&[TENSORS_FILE, &format!("is truncated: {cut} bytes, want {want}")]);
    }
    let more = [&whole[..], &[0]].concat();
    folder.write(TENSORS_FILE, &more).refused(&[&format!(
        "is {} bytes, want {}: more than its tensors",
        more.len(),
        whole.len()
    )]);
}

/// Header sizes that are larger than the file, or than any file can be.
#[test]
fn absurd_headers_are_refused() {
    let (folder, whole) = (Folder::new(), Folder::new());
    let whole = read(whole.0.path(), TENSORS_FILE);
    for size in [0, 1, whole.len() as u64, u64::from(u32::MAX), u64::MAX] {
        folder.write(TENSORS_FILE, &[&size.to_le_bytes(), &whole[8..]].concat()).refused(&[TENSORS_FILE]);
    }
    for shape in ["[18446744073709551615, 2]", "[4294967296, 4294967296]", "[-1]", "[2, 13], \"x\": 1", "{}"] {
        for offsets in ["[0, 104]", "[104, 0]", "[0, 18446744073709551615]", "[0, 103]"] {
            let header =
                format!(r#"{{"linear1.lora_A.weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#);
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 104]].concat();
            folder.write(TENSORS_FILE, &bytes).refused(&[TENSORS_FILE]);
        }
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        r"[\[\](){}.*+?|\\a-z0-9^$-]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let object = proptest::collection::hash_map(".{0,8}", inner.clone(), 0..4);
        prop_oneof![
            proptest::collection::vec(inner, 0..4).prop_map(Value::from),
            object.prop_map(|map| map.into_iter().collect())
        ]
    })
}

proptest! {
    #[test]
    fn a_truncated_file_is_refused(file in prop_oneof![Just(CONFIG_FILE), Just(TENSORS_FILE)], cut in 0.0..1.0f64) {
        let folder = Folder::new();
        let whole = read(folder.0.path(), file);
        folder.write(file, &whole[..(cut * whole.len() as f64) as usize]).refused(&[file]);
    }

    #[test]
    fn flipped_bits_are_refused_or_read(
        file in prop_oneof![Just(CONFIG_FILE), Just(TENSORS_FILE)],
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0..8u32), 1..8),
    ) {
        let folder = Folder::new();
        let mut bytes = read(folder.0.path(), file);
        for (at, bit) in flips {
            *at.get_mut(&mut bytes) ^= 1 << bit;
        }
        let _ = folder.write(file, &bytes).load();
    }

    #[test]
    fn hostile_json_is_refused_or_read(key in any::<prop::sample::Index>(), value in json_value()) {
        let folder = Folder::new();
        let document = document(folder.0.path());
        let _ = folder.set(key.get::<String>(&Vec::from_iter(document.keys().cloned())), value).load();
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = AdapterConfig::from_json(&bytes);
        let _ = adapter::parse_tensors(&bytes);
    }
}
