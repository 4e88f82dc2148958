//! A model of SmolLM2-135M's shape with random weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use lowrank_candle::{Adaptable, CausalLm, LoraConfig, ModelConfig, PROJECTIONS, Result, Rng, TargetModules};

const VOCAB: usize = 49152;

/// Random tokens.
pub(crate) fn ids(len: usize) -> Vec<u32> {
    let mut rng = Rng::new(1);
    (0..len).map(|_| rng.below(VOCAB) as u32).collect()
}

/// SmolLM2-135M's shape with an adapter of rank 6 on all linear layers.
pub(crate) fn model(layers: usize, dtype: DType) -> Result<CausalLm> {
    let (d, ff, kv) = (576, 1536, 192);
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB}, "hidden_size": {d}, "intermediate_size": {ff}, "num_hidden_layers": {layers},
            "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "max_position_embeddings": 8192}}"#
    );
    let random = |shape: (usize, usize)| Tensor::randn(0f32, 0.02, shape, &Device::Cpu);
    let ones = || Tensor::ones(d, DType::F32, &Device::Cpu);
    let mut tensors =
        HashMap::from([("model.embed_tokens.weight".to_string(), random((VOCAB, d))?), ("model.norm.weight".into(), ones()?)]);
    for at in 0..layers {
        for (name, shape) in PROJECTIONS.iter().zip([(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]) {
            tensors.insert(format!("model.layers.{at}.{name}.weight"), random(shape)?);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(format!("model.layers.{at}.{name}.weight"), ones()?);
        }
    }
    let mut model = CausalLm::from_tensors(ModelConfig::from_json(config.as_bytes())?, tensors, dtype)?;
    model.add_adapter("default", TargetModules::AllLinear, &LoraConfig::new(6, 8.0), &mut Rng::new(0))?;
    Ok(model)
}
