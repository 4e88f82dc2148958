//! Training against transformers' Trainer and PyTorch's AdamW, and runs that are interrupted.

mod support;

use candle_core::{DType, Device};
use lowrank_candle::chat::{Answers, Chat};
use lowrank_candle::data::{BatchSettings, Dataset, Encoding, TooLong, read_conversations};
use lowrank_candle::schedule::{Decay, Warmup};
use lowrank_candle::sft::{Sft, Step, Trainer, evaluate, plot};
use lowrank_candle::{Adaptable, CausalLm, LoraConfig, Rng, TargetModules};
use support::{fixture, json_file};

fn data() -> Dataset {
    let chat = Chat::from_dir(fixture("tiny-llama")).unwrap();
    let conversations = read_conversations(fixture("sft/data.jsonl")).unwrap();
    Dataset::encode(&chat, &conversations, &Encoding { answers: Answers::All, max_len: 512, too_long: TooLong::Refuse }).unwrap()
}

fn model() -> CausalLm {
    let mut model = CausalLm::from_dir(fixture("tiny-llama"), DType::F32).unwrap();
    model.load_adapter("default", fixture("tiny-llama/adapter")).unwrap();
    model
}

/// The settings of the fixture.
fn settings() -> Sft {
    Sft {
        lr: 5e-3,
        warmup: Warmup::Steps(1),
        decay: Decay::Cosine,
        batches: BatchSettings { rows: 1, packing: None, epochs: 1, shuffle: None },
        accumulate: 2,
        clip: Some(1.0),
        weight_decay: 0.01,
        ..Sft::default()
    }
}

fn run(trainer: &mut Trainer<'_>) -> Vec<Step> {
    std::iter::from_fn(|| trainer.step().unwrap()).collect()
}

/// Every number of an adapter, as bits.
fn bits(model: &CausalLm) -> Vec<u32> {
    let vars = model.adapters("default").flat_map(|(_, adapter)| [adapter.a(), adapter.b()]);
    vars.flat_map(|var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
}

#[test]
fn five_steps_are_those_of_transformers_trainer() {
    let (model, data, want) = (model(), data(), json_file("sft/sft.json"));
    let mut trainer = Trainer::new(&model, &data, settings()).unwrap();
    assert_eq!(trainer.steps(), 5);
    let steps = run(&mut trainer);
    for (step, want) in steps.iter().zip(want["steps"].as_array().unwrap()) {
        let close = |got: f64, name: &str, tolerance: f64| {
            let want = want[name].as_f64().unwrap();
            assert!((got - want).abs() <= tolerance * want.abs().max(1e-9), "step {} {name}: {got}, want {want}", step.index);
        };
        close(step.loss, "loss", 1e-5);
        close(step.gradient_norm, "gradient_norm", 1e-4);
        close(step.lr, "lr", 1e-9);
    }
    let after = candle_core::safetensors::load(fixture("sft/sft.safetensors"), &Device::Cpu).unwrap();
    let mut compared = 0;
    for (layer, adapter) in model.adapters("default") {
        for (var, end) in [(adapter.a(), "lora_A"), (adapter.b(), "lora_B")] {
            let want = &after[&format!("base_model.model.{layer}.{end}.weight")];
            let difference = (var.as_tensor() - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 2e-4, "{layer} {end}: {difference}"); // the rates sum to 1.3e-2
            compared += 1;
        }
    }
    assert_eq!(compared, 28);
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bits() {
    let (data, dir) = (data(), tempfile::tempdir().unwrap());
    let fresh = || {
        let mut model = CausalLm::from_dir(fixture("tiny-llama"), DType::F32).unwrap();
        let config = LoraConfig { dropout: 0.3, ..LoraConfig::new(4, 8.0) };
        model.add_adapter("default", TargetModules::AllLinear, &config, &mut Rng::new(0)).unwrap();
        model
    };
    let batches = BatchSettings { rows: 2, packing: Some(120), epochs: 2, shuffle: Some(5) };
    let sft = Sft { batches, loraplus_lr_ratio: 8.0, ..settings() };
    let whole = fresh();
    let mut trainer = Trainer::new(&whole, &data, sft.clone()).unwrap();
    let want = run(&mut trainer);
    assert_eq!(want.len(), trainer.steps());
    assert!(want.len() >= 4 && want.last().unwrap().loss < want[0].loss);

    let first = fresh();
    let mut trainer = Trainer::new(&first, &data, sft.clone()).unwrap();
    let mut got: Vec<Step> = (0..3).map(|_| trainer.step().unwrap().unwrap()).collect();
    let saved = dir.path().join("checkpoint-3");
    trainer.save(&saved).unwrap();
    assert!(trainer.save(&saved).is_err()); // there already
    let second = fresh();
    let mut trainer = Trainer::new(&second, &data, sft.clone()).unwrap();
    trainer.resume(&saved).unwrap();
    got.extend(run(&mut trainer));
    assert_eq!(got, want);
    assert_eq!(bits(&second), bits(&whole));

    let third = fresh();
    let before = bits(&third);
    let other = Trainer::new(&third, &data, Sft { seed: 1, ..sft.clone() }).unwrap().resume(&saved).unwrap_err().to_string();
    assert!(other.contains("trainer_state.json") && other.contains("other settings"), "{other}");
    std::fs::remove_file(saved.join("optimizer.safetensors")).unwrap();
    assert!(Trainer::new(&third, &data, sft).unwrap().resume(&saved).is_err());
    assert_eq!(bits(&third), before);
    plot(dir.path().join("loss.svg"), &want, &[(0, 6.0), (want.len(), 5.0)]).unwrap();
    assert!(std::fs::read_to_string(dir.path().join("loss.svg")).unwrap().contains("held back"));
}

#[test]
fn evaluation_does_not_depend_on_batches_and_16_bits_learn() {
    let data = data();
    let model = model();
    let [one, four] = [1, 4].map(|rows| evaluate(&model, &data, rows).unwrap());
    assert!((one - four).abs() < 1e-5 * one);
    for dtype in [DType::BF16, DType::F16] {
        let mut model = CausalLm::from_dir(fixture("tiny-llama"), dtype).unwrap();
        model.add_adapter("default", TargetModules::AllLinear, &LoraConfig::new(4, 8.0), &mut Rng::new(0)).unwrap();
        let before = evaluate(&model, &data, 4).unwrap();
        run(&mut Trainer::new(&model, &data, Sft { lr: 2e-2, ..settings() }).unwrap());
        assert!(evaluate(&model, &data, 4).unwrap() < 0.97 * before);
    }
}

#[test]
fn runs_that_cannot_begin_are_refused() {
    let (mut model, data) = (model(), data());
    let said = |model: &CausalLm, sft: Sft| Trainer::new(model, &data, sft).map(|_| ()).unwrap_err().to_string();
    assert!(said(&model, Sft { accumulate: 0, ..settings() }).contains("accumulate"));
    assert!(said(&model, Sft { clip: Some(0.0), ..settings() }).contains("clip"));
    assert!(said(&model, Sft { lr: f64::NAN, ..settings() }).contains("lr"));
    model.merge_adapters(&["default"]).unwrap();
    assert!(said(&model, settings()).contains("unmerged"));
    model.unmerge_adapters().unwrap();
    model.set_active(&[]).unwrap();
    assert!(said(&model, settings()).contains("active adapters"));
}
