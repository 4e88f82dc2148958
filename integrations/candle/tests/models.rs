//! The decoder against transformers and PEFT: tests/fixtures, made by scripts/make-fixtures.py.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use lowrank_candle::{Adaptable, Cache, CausalLm, Chosen, LoraConfig, Pass, Rng, Sampling, TargetModules, Tokens};

const MODELS: [&str; 3] = ["tiny-llama", "tiny-qwen2", "tiny-qwen3"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn reference(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(name).join("reference.safetensors"), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest number of the second.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).fold(0f32, |most, (got, want)| most.max((got - want).abs())) / largest.max(1e-9)
}

/// The rows of `input_ids` without their padding, and for each token the one that should follow.
fn batch(reference: &HashMap<String, Tensor>) -> (Vec<Vec<u32>>, Vec<Option<u32>>) {
    let rows = |name: &str| reference[name].to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
    let (ids, mask, labels) = (rows("input_ids"), rows("attention_mask"), rows("labels"));
    let mut sequences = Vec::new();
    let mut next = Vec::new();
    for ((ids, mask), labels) in ids.iter().zip(&mask).zip(&labels) {
        let len = mask.iter().sum::<i64>() as usize;
        sequences.push(ids[..len].iter().map(|&id| id as u32).collect());
        next.extend((0..len).map(|i| labels.get(i + 1).filter(|_| i + 1 < len).and_then(|&label| u32::try_from(label).ok())));
    }
    (sequences, next)
}

fn loss(model: &CausalLm, reference: &HashMap<String, Tensor>, pass: &Pass<'_>) -> Tensor {
    let (sequences, labels) = batch(reference);
    let counted = labels.iter().flatten().count() as f32;
    model.loss(&Tokens::batch(&sequences), &labels, counted, pass).unwrap()
}

#[test]
fn logits_and_loss_are_those_of_transformers() {
    for name in MODELS {
        let reference = reference(name);
        let mut model = CausalLm::from_dir(fixture(name), DType::F32).unwrap();
        let (sequences, _) = batch(&reference);
        let tokens = Tokens::batch(&sequences);
        let logits = |model: &CausalLm| {
            let pass = Pass::inference();
            numbers(&model.logits(&model.hidden(&tokens, &pass).unwrap(), &pass).unwrap())
        };
        let want = |name: &str| {
            let rows =
                sequences.iter().enumerate().map(|(at, ids)| reference[name].get(at).unwrap().narrow(0, 0, ids.len()).unwrap());
            rows.flat_map(|rows| numbers(&rows)).collect::<Vec<f32>>()
        };
        assert!(difference(&logits(&model), &want("base_logits")) < 1e-5, "{name}");
        model.load_adapter("default", fixture(name).join("adapter")).unwrap();
        assert!(difference(&logits(&model), &want("logits")) < 1e-5, "{name}");
        let want_loss = numbers(&reference["loss"]);
        assert!(difference(&numbers(&loss(&model, &reference, &Pass::inference())), &want_loss) < 1e-5, "{name}");

        model.merge_adapters(&["default"]).unwrap();
        assert!(difference(&logits(&model), &want("logits")) < 1e-5, "{name}");
        model.unmerge_adapters().unwrap();
        model.set_active(&[]).unwrap();
        assert!(difference(&logits(&model), &want("base_logits")) < 1e-5, "{name}");
    }
}

#[test]
fn gradients_are_those_of_pytorch() {
    for name in MODELS {
        let reference = reference(name);
        let mut model = CausalLm::from_dir(fixture(name), DType::F32).unwrap();
        model.load_adapter("default", fixture(name).join("adapter")).unwrap();
        let gradients = loss(&model, &reference, &Pass { gradients: true, ..Pass::inference() }).backward().unwrap();
        let mut compared = 0;
        for (layer, adapter) in model.adapters("default") {
            for (var, factor) in [(adapter.a(), "lora_A"), (adapter.b(), "lora_B")] {
                let want = &reference[&format!("grad.base_model.model.{layer}.{factor}.weight")];
                let got = gradients.get(var.as_tensor()).unwrap();
                assert!(difference(&numbers(got), &numbers(want)) < 1e-4, "{name} {layer} {factor}");
                compared += 1;
            }
        }
        assert_eq!(compared, 2 * 2 * 7);
    }
}

/// The loss and the gradients of the adapter `default`, in the order of its layers.
fn trained(model: &CausalLm, reference: &HashMap<String, Tensor>, checkpoint: bool) -> (f32, Vec<Vec<f32>>) {
    let loss = loss(model, reference, &Pass { checkpoint, ..Pass::training(7) });
    let gradients = loss.backward().unwrap();
    let vars = model.adapters("default").flat_map(|(_, adapter)| [adapter.a(), adapter.b()]);
    (loss.to_scalar().unwrap(), vars.map(|var| numbers(gradients.get(var.as_tensor()).unwrap())).collect())
}

/// With one adapter a layer is one operation, with two it is many; the second one here adds zeros. With dropout, and of the second layer
/// some projections have no adapter.
#[test]
fn a_layer_as_one_operation_is_its_operations_one_by_one() {
    for (name, dtype, bound) in MODELS.map(|name| (name, DType::F32, 1e-5)).into_iter().chain([("tiny-qwen3", DType::BF16, 0.05)])
    {
        let reference = reference(name);
        let mut model = CausalLm::from_dir(fixture(name), dtype).unwrap();
        let config = LoraConfig { dropout: 0.3, ..LoraConfig::new(3, 6.0) };
        model.add_adapter("default", TargetModules::AllLinear, &config, &mut Rng::new(1)).unwrap();
        for (layer, adapter) in model.adapters("default") {
            let b = Tensor::randn(0f32, 0.1, adapter.b().shape(), &Device::Cpu).unwrap();
            adapter.b().set(&b).unwrap();
            assert!(layer.contains("proj"));
        }
        for (layer, without) in model.layers_mut() {
            if ["layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"].iter().any(|end| layer.ends_with(end)) {
                without.remove("default").unwrap();
            }
        }
        let (loss, gradients) = trained(&model, &reference, false);
        assert_eq!(trained(&model, &reference, true), (loss, gradients.clone()), "{name}: checkpointing changed bits");
        model.add_adapter("zeros", TargetModules::AllLinear, &LoraConfig::new(1, 1.0), &mut Rng::new(2)).unwrap();
        model.set_active(&["default", "zeros"]).unwrap();
        let (want_loss, want) = trained(&model, &reference, false);
        assert!((loss - want_loss).abs() < bound * want_loss, "{name}: {loss}, want {want_loss}");
        assert_eq!(gradients.len(), 2 * (2 * 7 - 2));
        for (at, (got, want)) in gradients.iter().zip(&want).enumerate() {
            assert!(difference(got, want) < bound, "{name}, gradient {at}: {}", difference(got, want));
        }
    }
}

#[test]
fn a_cache_changes_nothing_and_greedy_tokens_are_those_of_transformers() {
    for name in MODELS {
        let reference = reference(name);
        let mut model = CausalLm::from_dir(fixture(name), DType::F32).unwrap();
        model.load_adapter("tuned", fixture(name).join("adapter")).unwrap();
        let ids = |name: &str| reference[name].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
        for (adapters, want) in [(&[][..], ids("greedy_base")), (&["tuned"], ids("greedy"))] {
            let pass = Pass { adapters: Chosen::Named(adapters), ..Pass::inference() };
            let (mut caches, mut next, mut got) = ([Cache::new()], ids("greedy_prompt"), Vec::new());
            while got.len() < want.len() {
                let hidden = model.hidden_after(&Tokens::one(&next), &pass, &mut caches).unwrap();
                let last = hidden.narrow(0, next.len() - 1, 1).unwrap();
                let logits = numbers(&model.logits(&last, &pass).unwrap());
                let best = (0..logits.len()).max_by(|&i, &j| logits[i].total_cmp(&logits[j])).unwrap();
                got.push(best as u32);
                next = vec![best as u32];
            }
            assert_eq!(got, want, "{name} {adapters:?}");
            assert_eq!(caches[0].len(), 5 + want.len() - 1);
            let other = if name == "tiny-qwen3" { "tiny-llama" } else { "tiny-qwen3" }; // their heads differ in width
            let other = CausalLm::from_dir(fixture(other), DType::F32).unwrap();
            let error = other.hidden_after(&Tokens::one(&[1]), &Pass::inference(), &mut caches).unwrap_err().to_string();
            assert!(error.contains("caches"), "{error}");
        }
    }
}

#[test]
fn narrow_types_are_close() {
    for name in MODELS {
        let reference = reference(name);
        for (dtype, tolerance) in [(DType::BF16, 0.05), (DType::F16, 0.01)] {
            let mut model = CausalLm::from_dir(fixture(name), dtype).unwrap();
            model.load_adapter("default", fixture(name).join("adapter")).unwrap();
            let loss = loss(&model, &reference, &Pass { gradients: true, ..Pass::inference() });
            assert!(difference(&numbers(&loss), &numbers(&reference["loss"])) < tolerance, "{name} {dtype:?}");
            assert!(loss.backward().unwrap().get_ids().count() >= 28);
        }
    }
}

/// With `LOWRANK_CANDLE_SAVED` the folders stay there, for `scripts/check-in-peft.py`.
#[test]
fn what_is_saved_is_what_is_loaded() {
    for name in MODELS {
        let (reference, temporary) = (reference(name), tempfile::tempdir().unwrap());
        let kept = std::env::var_os("LOWRANK_CANDLE_SAVED").map(|kept| PathBuf::from(kept).join(name));
        let dir = kept.as_deref().unwrap_or(temporary.path());
        let mut model = CausalLm::from_dir(fixture(name), DType::F32).unwrap();
        model.load_adapter("default", fixture(name).join("adapter")).unwrap();
        let want = numbers(&loss(&model, &reference, &Pass::inference()));
        model.save_adapter("default", dir.join("adapter")).unwrap();
        let mut other = CausalLm::from_dir(fixture(name), DType::F32).unwrap();
        let config = other.load_adapter("other", dir.join("adapter")).unwrap();
        assert_eq!((config.r(), config.lora_alpha(), config.task_type()), (3, 6.0, Some("CAUSAL_LM")));
        assert_eq!(numbers(&loss(&other, &reference, &Pass::inference())), want);

        assert!(model.save(dir.join("merged")).unwrap_err().to_string().contains("merge_and_unload"));
        model.merge_and_unload().unwrap();
        model.save(dir.join("merged")).unwrap();
        let merged = CausalLm::from_dir(dir.join("merged"), DType::F32).unwrap();
        assert!(difference(&numbers(&loss(&merged, &reference, &Pass::inference())), &want) < 1e-5);
        assert!(model.save(fixture(name)).is_err());
    }
}

#[test]
fn adapters_are_managed_by_name() {
    let mut model = CausalLm::from_dir(fixture("tiny-qwen2"), DType::F32).unwrap();
    let config = lowrank_candle::LoraConfig::new(2, 4.0);
    let names = ["q_proj", "v_proj"].map(String::from);
    model.add_adapter("small", TargetModules::Names(&names), &config, &mut Rng::new(0)).unwrap();
    model.add_adapter("large", TargetModules::AllLinear, &config, &mut Rng::new(0)).unwrap();
    assert_eq!((model.adapters("small").count(), model.adapters("large").count()), (4, 14)); // the head has none
    assert_eq!(model.active_adapters(), ["small"]);
    let report = model.parameter_report();
    assert_eq!(
        report.introduced,
        report.trainable + model.adapters("large").map(|(_, a)| a.a().elem_count() + a.b().elem_count()).sum::<usize>()
    );
    assert!(model.set_active(&["unknown"]).unwrap_err().to_string().contains("small, large"));
    assert!(
        model
            .add_adapter("x", TargetModules::Names(&["w_proj".into()]), &config, &mut Rng::new(0))
            .unwrap_err()
            .to_string()
            .contains("q_proj")
    );
    model.merge_adapters(&["large"]).unwrap();
    assert!(model.delete_adapter("small").is_err() && model.set_adapters_enabled(false).is_err());
    model.unmerge_adapters().unwrap();
    model.delete_adapter("small").unwrap();
    assert_eq!((model.adapter_names(), model.active_adapters().len()), (vec!["large"], 0));
}

#[test]
fn rows_of_a_batch_have_adapters_of_their_own() {
    let mut model = CausalLm::from_dir(fixture("tiny-llama"), DType::F32).unwrap();
    model.load_adapter("tuned", fixture("tiny-llama/adapter")).unwrap();
    model.load_adapter("other", fixture("tiny-llama/adapter")).unwrap();
    model.set_scale("other", -2.0).unwrap();
    let prompts: [&[u32]; 4] = [&[5, 6, 7], &[9], &[5, 6, 7], &[100, 3, 8, 200, 12]];
    for sampling in [Sampling::greedy(10), Sampling { temperature: 0.7, top_p: 0.9, seed: 3, ..Sampling::greedy(10) }] {
        let adapters = [Some("tuned"), None, Some("other"), Some("tuned")];
        let mixed: Vec<_> = prompts.iter().copied().zip(adapters).collect();
        let got = model.generate_mixed(&mixed, &sampling).unwrap();
        assert_eq!(got, model.generate_mixed(&mixed, &sampling).unwrap());
        if sampling.temperature == 0.0 {
            for ((prompt, adapter), got) in mixed.iter().zip(&got) {
                model.set_active(adapter.as_slice()).unwrap();
                assert_eq!(&model.generate(prompt, &sampling).unwrap(), got);
            }
        }
    }
    model.set_active(&["tuned"]).unwrap();
    let mut streamed = Vec::new();
    let whole = model.generate_with(&[5, 6, 7], &Sampling::greedy(10), |token| streamed.push(token)).unwrap();
    assert_eq!(whole, streamed);
    let stops = Sampling { stops: vec![whole[4]], ..Sampling::greedy(10) };
    let first = whole.iter().position(|token| *token == whole[4]).unwrap();
    assert_eq!(model.generate(&[5, 6, 7], &stops).unwrap(), whole[..first]);
    assert!(model.generate(&[], &stops).is_err() && model.generate(&[400], &stops).is_err());
    assert!(model.generate_mixed(&[(&[1], Some("unknown"))], &stops).unwrap_err().to_string().contains("tuned, other"));
    assert!(model.generate(&[5], &Sampling::greedy(1000)).unwrap_err().to_string().contains("512"));
}
