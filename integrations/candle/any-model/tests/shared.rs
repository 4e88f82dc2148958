//! Adapters merged in place into live models of candle-transformers.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::{bert, qwen2};
use lowrank_candle::Shared;
use lowrank_candle::lowrank::adapter::{Factors, Folder, HostMatrix};
use lowrank_candle::lowrank::random::Rng;

const CPU: Device = Device::Cpu;

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest number of the second.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).fold(0f32, |most, (got, want)| most.max((got - want).abs())) / largest
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

#[test]
fn qwen2_computes_what_transformers_and_peft_do() {
    let text = std::fs::read(fixture("tiny-qwen2/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in [("sliding_window", 512.into()), ("max_window_layers", 2.into()), ("use_sliding_window", false.into())] {
        config[key] = value; // candle wants them, whether or not they are used
    }
    let config: qwen2::Config = serde_json::from_value(config).unwrap();
    let reference = candle_core::safetensors::load(fixture("tiny-qwen2/reference.safetensors"), &CPU).unwrap();
    let ids = reference["input_ids"].to_dtype(DType::U32).unwrap().narrow(0, 0, 1).unwrap();
    let last = |name: &str| numbers(&reference[name].narrow(0, 0, 1).unwrap().narrow(1, 11, 1).unwrap());

    let shared = Shared::safetensors(&[fixture("tiny-qwen2/model.safetensors")]).unwrap();
    let mut model = qwen2::ModelForCausalLM::new(&config, shared.var_builder(DType::F32)).unwrap();
    let mut logits = || {
        model.clear_kv_cache();
        numbers(&model.forward(&ids, 0).unwrap())
    };
    let before = logits();
    assert!(difference(&before, &last("base_logits")) < 1e-4);
    let adapter = Folder::read(&fixture("tiny-qwen2/adapter")).unwrap();
    shared.merge(&adapter).unwrap();
    assert!(difference(&logits(), &last("logits")) < 1e-4);
    assert!(difference(&before, &last("logits")) > 0.05);
    shared.unmerge().unwrap();
    assert_eq!(logits(), before); // to the bit

    // One of another model is refused, and what of it was merged already is taken out.
    let other = Folder::read(&fixture("tiny-qwen3/adapter")).unwrap();
    assert!(shared.merge(&other).is_err());
    assert_eq!(logits(), before);
}

/// Weights of a tiny BERT by name.
fn bert_weights(config: &bert::Config) -> HashMap<String, Tensor> {
    let map = VarMap::new();
    bert::BertModel::load(VarBuilder::from_varmap(&map, DType::F32, &CPU), config).unwrap();
    let mut rng = Rng::new(0);
    let data = map.data().lock().unwrap();
    let mut names: Vec<&String> = data.keys().collect();
    names.sort();
    let random = |shape: &[usize], rng: &mut Rng| {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| 0.3 * rng.gaussian() as f32).collect();
        Tensor::from_vec(numbers, shape, &CPU).unwrap()
    };
    names.into_iter().map(|name| (name.clone(), random(data[name].dims(), &mut rng))).collect()
}

/// The weights in the model that the adapters change, as bits.
fn bits(shared: &Shared, dtype: DType) -> Vec<u32> {
    let layer = |layer: usize| ["attention.self.query", "attention.self.value", "output.dense"].map(|end| (layer, end));
    let names = (0..2).flat_map(layer).map(|(layer, end)| format!("encoder.layer.{layer}.{end}.weight"));
    let weights = names.flat_map(|name| numbers(&shared.var_builder(dtype).get_unchecked(&name).unwrap()));
    weights.map(f32::to_bits).collect()
}

#[test]
fn bert_switches_between_adapters() {
    let config = bert::Config {
        vocab_size: 64,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 48,
        max_position_embeddings: 32,
        ..bert::Config::default()
    };
    let weights = bert_weights(&config);
    let ids = Tensor::new(&[[1u32, 5, 9, 60, 3]], &CPU).unwrap();
    let run = |model: &bert::BertModel| numbers(&model.forward(&ids, &ids.zeros_like().unwrap(), None).unwrap());

    for dtype in [DType::F32, DType::BF16] {
        let shared = Shared::new(weights.clone());
        let model = bert::BertModel::load(shared.var_builder(dtype), &config).unwrap();
        // In bf16 candle's BERT makes NaN of its attention mask, 0 · -∞, so only its weights are compared.
        let (before, unmerged) = (run(&model), bits(&shared, dtype));
        for (seed, prefix) in [(1, ""), (2, "bert.")] {
            let mut rng = Rng::new(seed);
            let (mut modules, mut changed) = (std::collections::BTreeMap::new(), weights.clone());
            for layer in 0..2 {
                for end in ["attention.self.query", "attention.self.value", "output.dense"] {
                    let name = format!("encoder.layer.{layer}.{end}");
                    let weight = &changed[&format!("{name}.weight")];
                    let (n, k) = weight.dims2().unwrap();
                    let mut matrix = |rows, cols| {
                        let numbers = (0..rows * cols).map(|_| 0.3 * rng.gaussian() as f32).collect();
                        HostMatrix::new((rows, cols), numbers).unwrap()
                    };
                    let (a, b) = (matrix(3, k), matrix(n, 3));
                    let tensor = |m: &HostMatrix| Tensor::from_slice(m.values(), (m.rows(), m.cols()), &CPU).unwrap();
                    let sum = (weight + (tensor(&b).matmul(&tensor(&a)).unwrap() * 0.5).unwrap()).unwrap();
                    changed.insert(format!("{name}.weight"), sum);
                    let factors = Factors { a, b, scaling: 0.5, dtype: lowrank_candle::lowrank::DType::F32 };
                    modules.insert(format!("{prefix}{name}"), factors);
                }
            }
            shared.merge(&Folder::new(None, modules).unwrap()).unwrap();
            // In bf16 the weight is rounded before and behind the sum, by the unit roundoff at most each time.
            let unit = if dtype == DType::F32 { 1e-6 } else { 1.0 / 256.0 };
            for (name, want) in &changed {
                let got = numbers(&shared.var_builder(dtype).get_unchecked(name).unwrap());
                for ((got, want), w) in got.iter().zip(numbers(want)).zip(numbers(&weights[name])) {
                    assert!(
                        (got - want).abs() <= 1.01 * unit * (w.abs() + got.abs()),
                        "{dtype:?} {seed} {name}: {got}, want {want}"
                    );
                }
            }
            if dtype == DType::F32 {
                let changed_by = difference(&run(&model), &before);
                assert!(changed_by > 0.3, "{seed}: {changed_by}");
                let want = bert::BertModel::load(VarBuilder::from_tensors(changed, dtype, &CPU), &config).unwrap();
                assert!(difference(&run(&model), &run(&want)) < 1e-5, "{seed}");
            }
            shared.unmerge().unwrap();
            assert_eq!(bits(&shared, dtype), unmerged, "{dtype:?} {seed}");
            if dtype == DType::F32 {
                assert_eq!(run(&model), before, "{seed}");
            }
        }
    }
}
