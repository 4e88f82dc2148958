//! Nets with adapters, and what is in a folder.

use std::fs;
use std::path::Path;

use lowrank::adapter::CONFIG_FILE;
use lowrank::nn::{Adapter, DEFAULT, Init, LoraConfig, Mlp};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor};
use serde_json::Value;

pub const SIZES: [usize; 4] = [13, 11, 9, 7];

pub fn cpu<E: Float>() -> Cpu<E> {
    Cpu::new().unwrap().with_threads(1).unwrap()
}

/// A net without adapters; always the same.
pub fn net<B: Backend>(backend: &B) -> Mlp<B> {
    Mlp::new(backend, &SIZES, &mut Rng::new(7)).unwrap()
}

/// The same with trained adapters, as far as numbers tell, beside layers 1, 2 and 3 where there is a config.
pub fn adapted<B: Backend>(backend: &B, configs: [Option<LoraConfig>; 3]) -> Mlp<B> {
    let mut rng = Rng::new(11);
    let mut adapters = Vec::new();
    for (layer, config) in configs.into_iter().enumerate() {
        let Some(config) = config else { continue };
        let mut numbers = |rows, cols| Init::Gaussian { std: 0.5 }.tensor(backend, (rows, cols), &mut rng).unwrap();
        let (a, b) = (numbers(config.rank, SIZES[layer]), numbers(SIZES[layer + 1], config.rank));
        adapters.push((format!("linear{}", layer + 1), Adapter::from_tensors(a, b, config).unwrap()));
    }
    let mut model = net(backend);
    model.set_adapters(adapters).unwrap();
    model
}

pub fn batch<B: Backend>(backend: &B) -> Tensor<B> {
    Init::Gaussian { std: 1.0 }.tensor(backend, (5, SIZES[0]), &mut Rng::new(13)).unwrap()
}

pub fn outputs<B: Backend>(backend: &B, model: &Mlp<B>) -> Vec<B::Elem> {
    model.predict(backend, batch(backend)).unwrap()
}

/// Outputs, parameters with whether they may be trained, settings of adapters.
type State<E> = (Vec<E>, Vec<(u64, bool)>, Vec<Option<LoraConfig>>);

/// All that a model is: outputs, what may be trained, the settings of its adapters.
pub fn state<B: Backend>(backend: &B, model: &mut Mlp<B>) -> State<B::Elem> {
    let configs = model.layers().map(|(_, layer)| layer.adapter(DEFAULT).map(|adapter| adapter.config().clone())).collect();
    let outputs = outputs(backend, model);
    (outputs, model.params_mut().into_iter().map(|param| (param.id(), param.trainable)).collect(), configs)
}

pub fn read(folder: &Path, file: &str) -> Vec<u8> {
    fs::read(folder.join(file)).unwrap()
}

pub fn document(folder: &Path) -> serde_json::Map<String, Value> {
    serde_json::from_slice(&read(folder, CONFIG_FILE)).unwrap()
}
