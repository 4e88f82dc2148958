//! A real model: SmolLM2-135M-Instruct as transformers computes it, where `LOWRANK_SMOLLM2` names the file.

mod support;

use candle_core::DType;
use lowrank_candle::chat::{Chat, Message};
use lowrank_candle::gguf::Gguf;
use lowrank_candle::{Adaptable, CausalLm, LoraConfig, Pass, Rng, Sampling, TargetModules, Tokens};
use serde_json::Value;
use support::{json_file, smollm2};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn smollm2_answers_as_in_transformers() {
    let Some(path) = smollm2() else { return };
    let (want, gguf) = (json_file("smollm2.json"), Gguf::open(path).unwrap());
    let (mut model, chat) = (CausalLm::from_gguf(&gguf, DType::F32).unwrap(), Chat::from_gguf(&gguf).unwrap());
    model.add_adapter("default", TargetModules::AllLinear, &LoraConfig::new(6, 8.0), &mut Rng::new(0)).unwrap();
    assert_eq!(model.parameter_report().trainable, 1_831_680);

    let prompt = chat.prompt(&[Message::user("What is the capital of France?")]).unwrap();
    let pass = Pass::inference();
    let hidden = model.hidden(&Tokens::one(&prompt), &pass).unwrap().narrow(0, prompt.len() - 1, 1).unwrap();
    let logits = model.logits(&hidden, &pass).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (id, want) in ids(&want["top"]["ids"]).into_iter().zip(want["top"]["logits"].as_array().unwrap()) {
        let want = want.as_f64().unwrap() as f32;
        assert!((logits[id as usize] - want).abs() < 2e-3, "token {id}: {}, want {want}", logits[id as usize]);
    }
    let answer = ids(&want["greedy"]["ids"]);
    let (end, text) = answer.split_last().unwrap();
    assert_eq!(model.generate(&prompt, &Sampling::greedy(answer.len() + 4)).unwrap(), text); // it stops by itself
    assert!(model.config().eos.contains(end));

    let tokens = ids(&want["chats"][2]["ids"]);
    let labels: Vec<Option<u32>> = (0..tokens.len()).map(|at| tokens.get(at + 1).copied()).collect();
    let loss = model.loss(&Tokens::one(&tokens), &labels, tokens.len() as f32 - 1.0, &pass).unwrap().to_scalar::<f32>().unwrap();
    let want = want["loss_of_all_tokens_of_chat_2"].as_f64().unwrap() as f32;
    assert!((loss - want).abs() < 1e-3 * want, "{loss}, want {want}");
}
