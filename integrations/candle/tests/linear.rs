//! `LoraLinear` against the plain formulas on candle's own autograd, and by differences.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use lowrank::{nn::LoraConfig, random::Rng};
use lowrank_candle::{Chosen, LoraLinear, Pass};

const CPU: Device = Device::Cpu;

/// Numbers in ±1, a function of the seed.
fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(seed);
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| rng.uniform(-1.0, 1.0) as f32).collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap()
}

/// The largest difference, over the largest number of the second.
fn difference(got: &Tensor, want: &Tensor) -> f32 {
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let [got, want] = [got, want].map(|t| t.to_dtype(DType::F32).unwrap());
    assert_eq!(got.dims(), want.dims());
    largest(&(&got - &want).unwrap()) / largest(&want).max(1e-6)
}

/// A layer with 40 inputs, 24 outputs and adapters that change it.
fn layer(dtype: DType, bias: bool, adapters: &[(&str, usize, f32)]) -> LoraLinear {
    let bias = bias.then(|| random(2, &[24]).to_dtype(dtype).unwrap());
    let mut layer = LoraLinear::new(random(1, &[24, 40]).to_dtype(dtype).unwrap(), bias).unwrap();
    for (at, &(name, rank, alpha)) in adapters.iter().enumerate() {
        layer.add(name, &LoraConfig::new(rank, alpha), &mut Rng::new(7)).unwrap();
        let adapter = layer.adapter(name).unwrap();
        adapter.b().set(&random(10 + at as u64, &[24, rank])).unwrap();
    }
    layer
}

/// `x·Wᵀ + bias + Σ scaling·(x·Aᵀ)·Bᵀ` in candle's operations, in f32.
fn plain(layer: &LoraLinear, x: &Tensor) -> Result<Tensor> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let x = wide(x)?;
    let linear = candle_nn::Linear::new(wide(layer.weight())?, layer.bias().map(wide).transpose()?);
    let mut y = linear.forward(&x)?;
    for (_, adapter) in layer.adapters() {
        let h = candle_nn::Linear::new(adapter.a().as_tensor().clone(), None).forward(&x)?;
        let update = candle_nn::Linear::new(adapter.b().as_tensor().clone(), None).forward(&h)?;
        y = (y + (update * f64::from(adapter.scaling()))?)?;
    }
    Ok(y)
}

#[test]
fn gradients_are_those_of_candle() {
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        for (bias, adapters) in [(false, &[][..]), (true, &[("a", 3, 6.0)]), (true, &[("a", 4, 2.0), ("b", 1, -3.0)])] {
            let layer = layer(dtype, bias, adapters);
            let x = Var::from_tensor(&random(3, &[2, 5, 40]).to_dtype(dtype).unwrap()).unwrap();
            let dy = random(4, &[2, 5, 24]);
            let loss = |y: &Tensor| (y.to_dtype(DType::F32)? * &dy)?.sum_all();
            let (y, want) = (layer.forward(&x).unwrap(), plain(&layer, &x).unwrap());
            assert_eq!(y.dtype(), dtype);
            assert!(difference(&y, &want) < tolerance, "{dtype:?} {bias} y");
            let (got, want) = (loss(&y).unwrap().backward().unwrap(), loss(&want).unwrap().backward().unwrap());
            let factors = layer.adapters().flat_map(|(_, adapter)| [adapter.a(), adapter.b()]);
            for (at, var) in [&x].into_iter().chain(factors).enumerate() {
                let (got, want) = (got.get(var.as_tensor()).unwrap(), want.get(var.as_tensor()).unwrap());
                assert_eq!(got.dtype(), var.dtype());
                assert!(difference(got, want) < tolerance, "{dtype:?} gradient {at}: {}", difference(got, want));
            }
            assert!(got.get(layer.weight()).is_none());
        }
    }
}

#[test]
fn dropout_is_differentiated_with_the_mask_it_had() {
    let mut layer = LoraLinear::new(random(1, &[6, 8]), None).unwrap();
    layer.add("default", &LoraConfig { dropout: 0.4, ..LoraConfig::new(2, 3.0) }, &mut Rng::new(1)).unwrap();
    let (a, b) = {
        let adapter = layer.adapter("default").unwrap();
        (adapter.a().clone(), adapter.b().clone())
    };
    b.set(&random(2, &[6, 2])).unwrap();
    let (x, dy) = (Var::from_tensor(&random(3, &[3, 8])).unwrap(), random(4, &[3, 6]));
    let pass = Pass::training(5);
    let loss = || (layer.forward_with(&x, &pass).unwrap() * &dy).unwrap().sum_all().unwrap();
    let gradients = loss().backward().unwrap();
    for var in [&x, &a, &b] {
        let gradient = gradients.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let numbers = var.as_detached_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for at in 0..numbers.len() {
            let moved = |by: f32| {
                let mut numbers = numbers.clone();
                numbers[at] += by;
                var.set(&Tensor::from_vec(numbers, var.shape(), &CPU).unwrap()).unwrap();
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            let difference = (moved(0.25) - moved(-0.25)) / 0.5; // the loss is linear in each of them
            assert!((difference - f64::from(gradient[at])).abs() < 2e-4, "{difference} {}", gradient[at]);
        }
        var.set(&Tensor::from_vec(numbers, var.shape(), &CPU).unwrap()).unwrap();
    }
    let without = layer.forward(&x).unwrap();
    assert!(difference(&layer.forward_with(&x, &pass).unwrap(), &without) > 0.01);
    assert!(difference(&layer.forward_with(&x, &Pass::training(6)).unwrap(), &layer.forward_with(&x, &pass).unwrap()) > 0.01);
}

#[test]
fn rows_go_through_the_adapters_named_for_them() {
    for dtype in [DType::F32, DType::BF16] {
        let layer = layer(dtype, true, &[("a", 3, 6.0), ("b", 2, 5.0)]);
        let x = random(3, &[7, 40]).to_dtype(dtype).unwrap();
        let rows = [(0..2, "a"), (4..6, "b"), (6..7, "none of its")];
        let y = layer.forward_with(&x, &Pass { adapters: Chosen::Rows(&rows), ..Pass::inference() }).unwrap();
        for (rows, names) in [(0..2, &["a"][..]), (2..4, &[]), (4..6, &["b"]), (6..7, &[])] {
            let part = x.narrow(0, rows.start, rows.len()).unwrap();
            let want = layer.forward_with(&part, &Pass { adapters: Chosen::Named(names), ..Pass::inference() }).unwrap();
            let got = y.narrow(0, rows.start, rows.len()).unwrap();
            assert!(difference(&got, &want) < if dtype == DType::F32 { 1e-6 } else { 1e-2 });
        }
        let beyond = [(5..8, "a")];
        assert!(layer.forward_with(&x, &Pass { adapters: Chosen::Rows(&beyond), ..Pass::inference() }).is_err());
    }
}

#[test]
fn merging_is_adding_and_unmerging_gives_every_bit_back() {
    let bits = |t: &Tensor| {
        t.to_dtype(DType::F32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let mut layer = layer(dtype, true, &[("a", 3, 6.0), ("b", 2, 5.0)]);
        let x = random(3, &[5, 40]).to_dtype(dtype).unwrap();
        let (before, want) = (bits(layer.weight()), plain(&layer, &x).unwrap());
        layer.merge(&["a", "b", "a", "unknown"]).unwrap();
        assert_eq!(layer.merged().collect::<Vec<_>>(), ["a", "b"]);
        assert!(difference(&layer.forward(&x).unwrap(), &want) < tolerance);
        assert!(layer.set_scale("a", 2.0).is_err() && layer.remove("a").is_err() && layer.set_active(&[]).is_err());
        layer.unmerge().unwrap();
        assert_eq!(bits(layer.weight()), before);
        let huge = random(1, &[24, 3]).affine(3e38, 3e38).unwrap();
        layer.adapter("a").unwrap().b().set(&huge).unwrap();
        layer
            .adapter("a")
            .unwrap()
            .a()
            .set(&huge.flatten_all().unwrap().repeat(2).unwrap().narrow(0, 0, 120).unwrap().reshape((3, 40)).unwrap())
            .unwrap();
        assert!(layer.merge(&["b", "a"]).unwrap_err().to_string().contains("not finite"));
        assert_eq!((bits(layer.weight()), layer.merged().count()), (before, 0));
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut layer = layer(DType::F32, false, &[("a", 3, 6.0)]);
    let said = |error: lowrank_candle::Error| error.to_string();
    assert_eq!(
        said(layer.forward_with(&random(1, &[2, 39]), &Pass::inference()).unwrap_err()),
        "`x` is [2, 39] of f32, want […, 40] of f32"
    );
    assert!(said(layer.add("a/b", &LoraConfig::new(2, 1.0), &mut Rng::new(0)).unwrap_err()).contains("without a dot or a slash"));
    assert!(layer.add("b", &LoraConfig::new(0, 1.0), &mut Rng::new(0)).is_err());
    assert!(layer.add("b", &LoraConfig { use_dora: true, ..LoraConfig::new(2, 1.0) }, &mut Rng::new(0)).is_err());
    assert!(layer.set_scale("a", f32::NAN).is_err());
    assert!(LoraLinear::new(random(1, &[3, 4]), Some(random(1, &[4]))).is_err());
    assert!(LoraLinear::new(random(1, &[3, 4]).to_dtype(DType::F64).unwrap(), None).is_err());
}
