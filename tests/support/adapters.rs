//! Networks with adapters, and the content of their folders.

use std::fs;
use std::path::Path;

use lowrank::adapter::CONFIG_FILE;
use lowrank::autograd::Param;
use lowrank::nn::{Adaptable, Adapter, Bias, DEFAULT, Init, LayerAdapter, Linear, LoraConfig, Mlp};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Float, Tensor};
use serde_json::Value;

pub const SIZES: [usize; 4] = [13, 11, 9, 7];

pub fn cpu<E: Float>() -> Cpu<E> {
    Cpu::new().unwrap().with_threads(1).unwrap()
}

/// A network without adapters; always the same.
pub fn net<B: Backend>(backend: &B) -> Mlp<B> {
    Mlp::new(backend, &SIZES, &mut Rng::new(7)).unwrap()
}

/// The network with an adapter of random factors on those of the layers 1, 2 and 3 that have a config.
pub fn adapted<B: Backend>(backend: &B, configs: [Option<LoraConfig>; 3]) -> Mlp<B> {
    let mut model = net(backend);
    let parts = trained(backend, configs, 11);
    if !parts.is_empty() {
        model.insert_adapter(DEFAULT, parts).unwrap();
    }
    model
}

/// The parts of an adapter for each layer, with random elements, as the configs describe it.
pub fn trained<B: Backend>(backend: &B, configs: [Option<LoraConfig>; 3], seed: u64) -> Vec<(String, LayerAdapter<B>)> {
    let mut rng = Rng::new(seed);
    let settings = configs.iter().flatten().next().cloned();
    let (bias, saved) = settings.map_or((Bias::None, Vec::new()), |config| (config.bias, config.modules_to_save));
    let mut parts = Vec::new();
    for (layer, config) in configs.into_iter().enumerate() {
        let ((k, n), name) = ((SIZES[layer], SIZES[layer + 1]), format!("linear{}", layer + 1));
        let mut numbers = |rows, cols| Init::Gaussian { std: 0.5 }.tensor(backend, (rows, cols), &mut rng).unwrap();
        let part = if saved.contains(&name) {
            LayerAdapter::Whole(Linear::from_tensors(numbers(n, k), Some(numbers(1, n))).unwrap())
        } else if let Some(config) = config {
            let (a, b) = (numbers(config.rank, k), numbers(n, config.rank));
            let LoraConfig { use_dora, lora_bias, bias, .. } = config;
            let mut adapter = Adapter::from_tensors(a, b, config).unwrap();
            if use_dora {
                adapter = adapter.with_magnitude(numbers(1, n));
            }
            if lora_bias {
                adapter = adapter.with_lora_bias(numbers(1, n));
            }
            if bias != Bias::None {
                adapter = adapter.with_bias(numbers(1, n));
            }
            LayerAdapter::Lora(adapter)
        } else if bias == Bias::All {
            LayerAdapter::Bias(Param::new(numbers(1, n)))
        } else {
            continue;
        };
        parts.push((name, part));
    }
    parts
}

pub fn batch<B: Backend>(backend: &B) -> Tensor<B> {
    Init::Gaussian { std: 1.0 }.tensor(backend, (5, SIZES[0]), &mut Rng::new(13)).unwrap()
}

pub fn outputs<B: Backend>(backend: &B, model: &Mlp<B>) -> Vec<B::Elem> {
    model.predict(backend, batch(backend)).unwrap()
}

/// Outputs, parameters with whether they may be trained, settings of adapters.
type State<E> = (Vec<E>, Vec<(u64, bool)>, Vec<Option<LoraConfig>>);

/// The observable state of a model: outputs, which parameters are trainable, the settings of its adapters.
pub fn state<B: Backend>(backend: &B, model: &mut Mlp<B>) -> State<B::Elem> {
    let configs = model.layers().map(|(_, layer)| layer.adapter(DEFAULT).map(|adapter| adapter.config().clone())).collect();
    let outputs = outputs(backend, model);
    (outputs, model.params_mut().map(|param| (param.id(), param.trainable)).collect(), configs)
}

/// The bits of the base weights and biases.
pub fn base_bits<B: Backend>(backend: &B, model: &Mlp<B>) -> Vec<Vec<u8>> {
    let params = model.layers().flat_map(|(_, layer)| layer.base().params());
    params.map(|param| bytemuck::cast_slice(&param.tensor().to_vec(backend).unwrap()).to_vec()).collect()
}

pub fn read(folder: &Path, file: &str) -> Vec<u8> {
    fs::read(folder.join(file)).unwrap()
}

pub fn document(folder: &Path) -> serde_json::Map<String, Value> {
    serde_json::from_slice(&read(folder, CONFIG_FILE)).unwrap()
}
