//! Layers over quantised weights: adapters train over them, and merging is undone to the bit.

use lowrank::autograd::Tape;
use lowrank::nn::{Adapter, LayerAdapter, Linear, LoraConfig, LoraLinear, Merge};
use lowrank::op::{LoraMerge, WeightGrad};
use lowrank::quant::{HostQuantised, QuantKind, Quantised};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Float, Tensor, bf16};

const SIZE: (usize, usize) = (13, 21);

fn quantised<B: Backend>(backend: &B, kind: QuantKind) -> (HostQuantised, Linear<B>) {
    let mut rng = Rng::new(5);
    let numbers: Vec<f32> = (0..SIZE.0 * SIZE.1).map(|_| rng.unit() as f32 - 0.5).collect();
    let host = HostQuantised::quantise(SIZE, &numbers, kind).unwrap();
    let bias = Tensor::zeros(backend, (1, SIZE.0)).unwrap();
    let linear = Linear::from_quantised(backend, Quantised::from_host(backend, &host).unwrap(), Some(bias)).unwrap();
    (host, linear)
}

fn adapter<B: Backend>(backend: &B, base: &Linear<B>, use_dora: bool) -> Adapter<B> {
    let mut rng = Rng::new(6);
    let config = LoraConfig { use_dora, ..LoraConfig::new(2, 4.0) };
    let mut adapter = Adapter::new(backend, base, config, &mut rng).unwrap();
    for param in adapter.params_mut().take(2) {
        let numbers: Vec<_> = (0..param.count()).map(|_| B::Elem::from_f32(rng.unit() as f32 - 0.5)).collect();
        param.copy_from_slice(backend, &numbers).unwrap();
    }
    adapter
}

fn predict<B: Backend>(backend: &B, layer: &LoraLinear<B>) -> Vec<f32> {
    let x: Vec<_> = (0..3 * SIZE.1).map(|i| B::Elem::from_f32((i % 7) as f32 - 3.0)).collect();
    let mut tape = Tape::new(backend);
    let x = tape.input(Tensor::from_slice(backend, (3, SIZE.1), &x).unwrap());
    let y = layer.forward(&mut tape, x, None).unwrap();
    tape.value(y).unwrap().to_vec(backend).unwrap().into_iter().map(Float::to_f32).collect()
}

fn merging_is_undone<B: Backend>(backend: &B, kind: QuantKind, use_dora: bool, tolerance: f32) {
    let (host, base) = quantised(backend, kind);
    let adapter = adapter(backend, &base, use_dora);
    let mut layer = LoraLinear::new(base, adapter).unwrap();
    let before = predict(backend, &layer);
    assert_eq!(layer.base().weight().count(), 0);
    for _ in 0..2 {
        layer.merge(backend).unwrap();
        assert_eq!(layer.base().weight().tensor().shape(), SIZE.into());
        let merged = predict(backend, &layer);
        let largest = before.iter().fold(0.0f32, |most, y| most.max(y.abs()));
        assert!(before.iter().zip(&merged).all(|(a, b)| (a - b).abs() <= tolerance * largest), "{kind}, DoRA: {use_dora}");
        layer.unmerge(backend).unwrap();
        assert_eq!(layer.base().weight().count(), 0, "the dense copy is gone");
        assert!(layer.base().quantised().unwrap().to_host(backend).unwrap() == host, "{kind}");
        assert!(predict(backend, &layer) == before, "{kind}, DoRA: {use_dora}");
    }
}

#[test]
fn unmerging_gives_the_quantised_weight_back() {
    for kind in ["nf4", "int8", "q8_0"].map(|name| name.parse().unwrap()) {
        for use_dora in [false, true] {
            merging_is_undone(&Cpu::<f32>::new().unwrap(), kind, use_dora, 1e-5);
            merging_is_undone(&Cpu::<bf16>::new().unwrap(), kind, use_dora, 0.02);
        }
    }
}

#[test]
fn merged_is_the_dequantised_weight_with_the_update() {
    let cpu = Cpu::<f32>::new().unwrap();
    let (host, base) = quantised(&cpu, QuantKind::NF4);
    let adapter = adapter(&cpu, &base, false);
    let (a, b) = (adapter.a().tensor().to_vec(&cpu).unwrap(), adapter.b().tensor().to_vec(&cpu).unwrap());
    let mut want = Tensor::from_slice(&cpu, SIZE, &host.dequantise::<f32>()).unwrap();
    let (a, b) = (Tensor::from_slice(&cpu, (2, SIZE.1), &a).unwrap(), Tensor::from_slice(&cpu, (SIZE.0, 2), &b).unwrap());
    let rounding = Merge::default().rounding;
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: 2.0, rounding, w: want.view_mut() }.run(&cpu).unwrap();
    let mut layer = LoraLinear::new(base, adapter).unwrap();
    layer.merge(&cpu).unwrap();
    assert!(layer.base().weight().tensor().to_vec(&cpu).unwrap() == want.to_vec(&cpu).unwrap());
    let base = layer.into_base();
    assert!(base.quantised().is_none() && base.shape() == SIZE.into(), "what is merged is the layer's own");
}

#[test]
fn a_merge_that_is_refused_leaves_the_weight_quantised() {
    let cpu = Cpu::<f32>::new().unwrap();
    let (_, base) = quantised(&cpu, QuantKind::NF4);
    let mut adapter = adapter(&cpu, &base, false);
    let count = adapter.params_mut().next().unwrap().count();
    adapter.params_mut().next().unwrap().copy_from_slice(&cpu, &vec![f32::MAX; count]).unwrap();
    let mut layer = LoraLinear::new(base, adapter).unwrap();
    assert!(layer.merge(&cpu).is_err());
    assert!(layer.base().weight().count() == 0 && layer.base().quantised().is_some());
}

#[test]
fn adapters_get_the_gradients_of_the_dequantised_weight() {
    let cpu = Cpu::<f32>::new().unwrap();
    let (host, base) = quantised(&cpu, QuantKind::NF4);
    let dense = Tensor::from_slice(&cpu, SIZE, &host.dequantise::<f32>()).unwrap();
    let bias = Tensor::zeros(&cpu, (1, SIZE.0)).unwrap();
    let dense = Linear::from_tensors(dense, Some(bias)).unwrap();
    let gradients = [base, dense].map(|base| {
        let adapter = adapter(&cpu, &base, false);
        let layer = LoraLinear::new(base, adapter).unwrap();
        let mut tape = Tape::new(&cpu);
        let x: Vec<f32> = (0..40 * SIZE.1).map(|i| ((i % 11) as f32 - 5.0) / 7.0).collect();
        let x = tape.input(Tensor::from_slice(&cpu, (40, SIZE.1), &x).unwrap());
        let h = layer.forward(&mut tape, x, None).unwrap();
        let y = tape.relu(h).unwrap();
        tape.seed(y, Tensor::from_slice(&cpu, (40, SIZE.0), &vec![0.5; 40 * SIZE.0]).unwrap()).unwrap();
        let gradients = tape.backward().unwrap();
        let adapter = layer.adapter("default").unwrap();
        let dense = |gradient| match gradient {
            WeightGrad::Dense(gradient) => gradient.to_vec(&cpu).unwrap(),
            WeightGrad::Factored { .. } => panic!("a factor of the update has a dense gradient"),
        };
        adapter.params().take(2).map(|param| dense(gradients.get(param).unwrap())).collect::<Vec<_>>()
    });
    for (quantised, dense) in gradients[0].iter().zip(&gradients[1]) {
        let largest = dense.iter().fold(0.0f32, |most, g| most.max(g.abs()));
        assert!(quantised.iter().zip(dense).all(|(a, b)| (a - b).abs() <= 1e-5 * largest) && largest > 0.0);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let cpu = Cpu::<f32>::new().unwrap();
    let (host, mut base) = quantised(&cpu, QuantKind::NF4);
    assert!(matches!(base.quantise(&cpu, QuantKind::Int8), Err(Error::Value { verb: "quantise", name: "weight", .. })));
    let bias = Some(Tensor::zeros(&cpu, (1, SIZE.0 + 1)).unwrap());
    let weight = Quantised::from_host(&cpu, &host).unwrap();
    assert!(matches!(Linear::from_quantised(&cpu, weight, bias), Err(Error::Shape { name: "bias", .. })));
    let other = Linear::new(&cpu, SIZE.1 + 1, SIZE.0, &mut Rng::new(0)).unwrap();
    let adapter = adapter(&cpu, &other, false);
    assert!(matches!(LoraLinear::new(base, adapter), Err(Error::Shape { .. })));
    let (_, base) = quantised(&cpu, QuantKind::NF4);
    let mut layer = lowrank::nn::Layer::from(base);
    assert!(layer.quantise(&cpu, QuantKind::NF4).is_err());
    assert!(
        LayerAdapter::Bias(lowrank::autograd::Param::new(Tensor::<Cpu<f32>>::zeros(&cpu, (1, 1)).unwrap())).adapter().is_none()
    );
}
