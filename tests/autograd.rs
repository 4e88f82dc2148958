//! The tape: its gradients against the oracle's, and its errors.

mod support;

use std::fmt::Debug;

use approx::assert_abs_diff_eq;
use lowrank::autograd::{Backward, Gradients, LoraParams, Param, Tape};
use lowrank::nn::{
    Adam, Adaptable, Adapter, DEFAULT, Init, Layer, LayerAdapter, Linear, LoraConfig, LoraLinear, Mlp, Scaling, Targets,
};
use lowrank::op::{Dropout, Labels, WeightGrad};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Tensor, VectorUnit};

use support::bounds::assert_within;
use support::data::{Dims, down, mask, random, up};
use support::oracle::{Lora, Mat};

fn cpu() -> Cpu<f32> {
    Cpu::new().unwrap()
}

/// A gradient as a matrix, from dense or factored form.
fn dense(cpu: &Cpu<f32>, gradient: Option<WeightGrad<'_, Cpu<f32>>>) -> Mat {
    let mat = |rows, cols, data: Vec<f32>| Mat::from_vec(rows, cols, data.into_iter().map(f64::from).collect());
    match gradient.expect("a gradient") {
        WeightGrad::Dense(g) => mat(g.rows(), g.cols(), down(cpu, g)),
        WeightGrad::Factored { dy, x } => &mat(dy.rows(), dy.cols(), down(cpu, dy)).t() * &mat(x.rows(), x.cols(), down(cpu, x)),
    }
}

#[track_caller]
fn assert_close(what: &str, got: &Mat, want: &Mat, depth: usize) {
    let got: Vec<f32> = got.data.iter().map(|&x| x as f32).collect();
    assert_within(what, &got, want, &want.map(|x| x.abs() + want.norm()), depth);
}

/// Two layers, the first with an adapter and dropout: every gradient of the tape against the oracle's.
#[test]
fn the_tape_differentiates_two_layers_as_the_oracle_does() {
    let cpu = cpu();
    let dropout = Dropout::new(0.3, 99).unwrap();
    let first = random::<f32>(Dims { m: 6, k: 9, n: 7, r: 2 }, 0.5, 1);
    let first = Lora { mask: mask(dropout, 6, 9), ..first };
    let second = random::<f32>(Dims { m: 6, k: 7, n: 5, r: 1 }, 1.0, 2);
    let param = |mat: &Mat| Param::new(up(&cpu, mat));
    let (w, bias, a, b) = (param(&first.w), param(first.bias.as_ref().unwrap()), param(&first.a), param(&first.b));
    let top = param(&second.w);

    let mut tape = Tape::new(&cpu);
    let x = tape.input(up(&cpu, &first.x));
    let layer =
        LoraParams { w: Some((&w).into()), bias: Some(&bias), a: &a, b: &b, lora_bias: None, scale: 0.5, dropout: Some(dropout) };
    let middle = tape.lora_linear(x, layer).unwrap();
    let active = tape.relu(middle).unwrap();
    let y = tape.linear(active, &top, None).unwrap();
    tape.seed(y, up(&cpu, &second.dy)).unwrap();
    let gradients = tape.backward().unwrap();
    assert_eq!(gradients.len(), 5);

    let active = first.forward().1.map(|y| y.max(0.0));
    let dy = (&second.dy * &second.w).times(&active.map(|y| if y > 0.0 { 1.0 } else { 0.0 }));
    let want = Lora { dy: dy.clone(), ..first.clone() }.run();
    assert_close("da", &dense(&cpu, gradients.get(&a)), &want.da, 40);
    assert_close("db", &dense(&cpu, gradients.get(&b)), &want.db, 40);
    assert_close("dbias", &dense(&cpu, gradients.get(&bias)), &want.dbias, 40);
    assert_close("dw", &dense(&cpu, gradients.get(&w)), &(&dy.t() * &first.x), 40);
    assert_close("dtop", &dense(&cpu, gradients.get(&top)), &(&second.dy.t() * &active), 40);
}

/// `y = relu(x·W)` and `z = x·W` share a value: its two gradients are added.
#[test]
fn gradients_of_a_value_used_twice_are_added() {
    let cpu = cpu();
    let layer = random::<f32>(Dims { m: 3, k: 4, n: 5, r: 1 }, 1.0, 3);
    let (w, one, two) = (Param::new(up(&cpu, &layer.w)), Param::new(up(&cpu, &layer.w.t())), Param::new(up(&cpu, &layer.w.t())));
    let mut tape = Tape::new(&cpu);
    let x = tape.input(up(&cpu, &layer.x));
    let shared = tape.linear(x, &w, None).unwrap();
    let dy = Mat::new(3, 4, |i, j| (i + j) as f64);
    for param in [&one, &two] {
        let y = tape.linear(shared, param, None).unwrap();
        tape.seed(y, up(&cpu, &dy)).unwrap();
    }
    let gradients = tape.backward().unwrap();
    let through = &(&dy * &layer.w.t()) * 2.0;
    assert_close("dw", &dense(&cpu, gradients.get(&w)), &(&through.t() * &layer.x), 30);
}

#[test]
fn frozen_parameters_get_no_gradient_and_do_not_move() {
    let cpu = cpu();
    let mut rng = Rng::new(5);
    let mut model = Mlp::new(&cpu, &[6, 8, 3], &mut rng).unwrap();
    let config = LoraConfig { init: Init::Gaussian { std: 1.0 }, ..LoraConfig::new(2, 4.0) };
    model.add_adapters(&cpu, Targets::Names(&["linear2"]), &config, &mut rng).unwrap();
    let weights = |model: &Mlp<Cpu<f32>>| -> Vec<Vec<f32>> {
        model.layers().flat_map(|(_, layer)| layer.base().params()).map(|param| down(&cpu, param.tensor())).collect()
    };
    let before = weights(&model);
    let mut adam = Adam::new(0.1).unwrap();
    for step in 0..3 {
        let mut tape = Tape::new(&cpu);
        let x = tape.input(Tensor::from_slice(&cpu, (2, 6), &[0.5; 12]).unwrap());
        let logits = model.forward(&mut tape, x, Some(step)).unwrap();
        tape.cross_entropy(logits, &Labels::new(&cpu, 3, &[0, 2]).unwrap()).unwrap();
        let gradients = tape.backward().unwrap();
        assert_eq!(gradients.len(), 2, "A and B, nothing else");
        adam.step(&cpu, model.params_mut(), &gradients).unwrap();
    }
    assert_eq!(weights(&model), before);
    let (_, adapter) = model.adapters(DEFAULT).next().unwrap();
    assert!(down(&cpu, adapter.b().tensor()).iter().any(|&b| b != 0.0), "B did not move");
    let report = model.parameter_report();
    assert_eq!((report.original, report.introduced), (6 * 8 + 8 + 8 * 3 + 3, 2 * (8 + 3)));
}

#[test]
fn adapters_switch_merge_and_are_refused_by_name() {
    let cpu = cpu();
    let mut rng = Rng::new(6);
    let mut model = Mlp::new(&cpu, &[5, 7, 4], &mut rng).unwrap();
    let x = || Tensor::from_slice(&cpu, (2, 5), &[0.1, -0.4, 0.9, 0.3, -0.2, 0.7, 0.5, -0.6, 0.8, 0.2]).unwrap();
    let base = model.predict(&cpu, x()).unwrap();
    let wrong = model.add_adapters(&cpu, Targets::Names(&["linear1", "head"]), &LoraConfig::new(1, 1.0), &mut rng);
    assert_eq!(wrong.unwrap_err().to_string(), "no layer is named `head`; the layers are linear1, linear2");
    assert!(model.layers().all(|(_, layer)| layer.lora().is_none() && layer.base().weight().trainable), "nothing was changed");

    let config = LoraConfig { scaling: Scaling::AlphaOverSqrtRank, ..LoraConfig::new(4, 3.0) };
    model.add_adapters(&cpu, Targets::All, &config, &mut rng).unwrap();
    assert_eq!(model.predict(&cpu, x()).unwrap(), base, "B begins with zeros");
    for (_, layer) in model.layers_mut() {
        let lora = layer.lora_mut().unwrap();
        assert_eq!(lora.adapter(DEFAULT).unwrap().scaling(), 1.5);
        let b = lora.params_mut().last().unwrap();
        let host: Vec<f32> = (0..b.count()).map(|e| (e as f32).sin()).collect();
        b.copy_from_slice(&cpu, &host).unwrap();
    }
    let on = model.predict(&cpu, x()).unwrap();
    assert_ne!(on, base);
    model.set_adapters_enabled(false).unwrap();
    assert_eq!(model.predict(&cpu, x()).unwrap(), base, "off is the base model, bit for bit");
    model.set_adapters_enabled(true).unwrap();
    for _ in 0..2 {
        model.merge_adapters(&cpu).unwrap(); // the second time it does nothing
    }
    let merged = model.predict(&cpu, x()).unwrap();
    assert_abs_diff_eq!(merged[..], on[..], epsilon = 1e-5);
    let refused = model.set_adapters_enabled(false).unwrap_err();
    assert_eq!(refused.to_string(), "set_adapters_enabled: `adapter` is `default`, merged into the weight, want unmerged first");
    model.unmerge_adapters(&cpu).unwrap();
    assert_abs_diff_eq!(model.predict(&cpu, x()).unwrap()[..], on[..], epsilon = 1e-5);
}

/// Tied weights: whole numbers, so that every sum is exact.
#[test]
fn a_parameter_used_twice_gets_the_sum_of_both_gradients() {
    let cpu = cpu();
    let whole = |rows, cols, seed: usize| Mat::new(rows, cols, |i, j| ((i * 5 + j * 3 + seed) % 7) as f64 - 3.0);
    let (x, dy) = (whole(3, 4, 0), whole(3, 4, 5));
    let (w, bias, a, b) = (whole(4, 4, 1), whole(1, 4, 2), whole(2, 4, 3), whole(4, 2, 4));
    let param = |mat: &Mat| Param::new(up(&cpu, mat));
    let params = [&w, &bias, &a, &b].map(param);
    let [tied_w, tied_bias, tied_a, tied_b] = &params;

    let mut tape = Tape::new(&cpu);
    let input = tape.input(up(&cpu, &x));
    let layer = || LoraParams {
        w: Some(tied_w.into()),
        bias: Some(tied_bias),
        a: tied_a,
        b: tied_b,
        lora_bias: None,
        scale: 1.0,
        dropout: None,
    };
    let first = tape.lora_linear(input, layer()).unwrap();
    let second = tape.lora_linear(first, layer()).unwrap();
    let third = tape.linear(second, tied_w, Some(tied_bias)).unwrap();
    tape.seed(third, up(&cpu, &dy)).unwrap();
    let gradients = tape.backward().unwrap();
    assert_eq!(gradients.len(), 4);

    let ones = Mat::new(3, 1, |_, _| 1.0);
    let plus_bias = |y: Mat| &y + &(&ones * &bias);
    let merged = &w + &(&b * &a);
    let y1 = plus_bias(&x * &merged.t());
    let y2 = plus_bias(&y1 * &merged.t());
    let dy2 = &dy * &w;
    let dy1 = &dy2 * &merged;
    let sum = |of: &dyn Fn(&Mat, &Mat) -> Mat| &of(&dy1, &x) + &of(&dy2, &y1);
    let exact = |what, param: &Param<_>, want: Mat| assert_eq!(dense(&cpu, gradients.get(param)).data, want.data, "{what}");
    exact("w", tied_w, &sum(&|dy, x| &dy.t() * x) + &(&dy.t() * &y2));
    exact("bias", tied_bias, &sum(&|dy, _| &ones.t() * dy) + &(&ones.t() * &dy));
    exact("a", tied_a, sum(&|dy, x| &(dy * &b).t() * x));
    exact("b", tied_b, sum(&|dy, x| &dy.t() * &(x * &a.t())));
}

/// Two forward passes of a model on one tape give the sum of the gradients of two tapes, bit for bit.
#[test]
fn a_model_may_go_over_a_tape_twice() {
    let (cpu, rng) = (cpu(), &mut Rng::new(3));
    let mut model = Mlp::new(&cpu, &[5, 6, 3], rng).unwrap();
    model.add_adapters(&cpu, Targets::All, &LoraConfig { init: Init::NonZero, ..LoraConfig::new(2, 4.0) }, rng).unwrap();
    model.params_mut().for_each(|param| param.trainable = true);
    let gradients = |seeds: &[u64]| {
        let mut tape = Tape::new(&cpu);
        for &seed in seeds {
            let x = tape.input(Init::Gaussian { std: 1.0 }.tensor(&cpu, (4, 5), &mut Rng::new(seed)).unwrap());
            let logits = model.forward(&mut tape, x, None).unwrap();
            tape.cross_entropy(logits, &Labels::new(&cpu, 3, &[0, 2, 1, 1]).unwrap()).unwrap();
        }
        tape.backward().unwrap()
    };
    let (both, mut sum) = (gradients(&[1, 2]), gradients(&[1]));
    sum.add(&cpu, gradients(&[2])).unwrap();
    assert_eq!((both.len(), sum.len()), (8, 8));
    for param in model.layers().flat_map(|(_, layer)| layer.params()) {
        assert_eq!(dense(&cpu, both.get(param)).data, dense(&cpu, sum.get(param)).data);
    }
}

#[test]
fn the_derivative_of_a_custom_operation_is_the_callers() {
    let cpu = cpu();
    let tensor = |numbers: &[f32]| Tensor::from_slice(&cpu, (1, numbers.len()), numbers).unwrap();
    let (mut factor, w) = (Param::new(tensor(&[2.0, 3.0])), Param::new(Tensor::zeros(&cpu, (2, 2)).unwrap()));
    // y = factor·a - b
    let run = |factor: &Param<_>, da: &[f32], dfactor: &[f32]| {
        let mut tape = Tape::new(&cpu);
        let a = tape.input(tensor(&[5.0, 7.0]));
        let b = tape.linear(a, &w, None).unwrap();
        let y = tape
            .custom("scaled", [a, b], [factor], tensor(&[10.0, 21.0]), |Backward { backend, inputs: [a, b], wanted, y, dy }| {
                assert_eq!((down(backend, a), down(backend, b)), (vec![5.0, 7.0], vec![0.0, 0.0]));
                assert_eq!((wanted, down(backend, y)), ([false, true], vec![10.0, 21.0]));
                let minus: Vec<f32> = down(backend, dy).iter().map(|dy| -dy).collect();
                Ok(([Some(tensor(da)), Some(tensor(&minus))], [Some(tensor(dfactor))]))
            })
            .unwrap();
        tape.seed(y, tensor(&[1.0, 10.0])).unwrap();
        tape.backward()
    };
    let gradients = run(&factor, &[0.0; 2], &[5.0, 70.0]).unwrap();
    assert_eq!(dense(&cpu, gradients.get(&factor)).data, [5.0, 70.0]);
    assert_eq!(dense(&cpu, gradients.get(&w)).data, [-5.0, -7.0, -50.0, -70.0]);
    let error = run(&factor, &[0.0; 2], &[5.0]).unwrap_err().to_string();
    assert_eq!(error, "scaled: `gradient` is 1×1 for parameter 0, want 1×2, the shape of its value");
    factor.trainable = false;
    let gradients = run(&factor, &[0.0; 3], &[5.0]).unwrap(); // neither is wanted, and both are dropped
    assert!(gradients.get(&factor).is_none() && gradients.get(&w).is_some());

    let (mut one, mut two) = (Tape::new(&cpu), Tape::new(&cpu));
    let x = one.input(tensor(&[1.0]));
    assert!(two.custom("copy", [x], [], tensor(&[1.0]), |Backward { .. }| Ok(([None], []))).is_err());
}

/// Gradients are `Send`.
#[test]
fn gradients_can_be_sent_to_other_threads() {
    fn check<T: Send + Sync>() {}
    check::<Gradients<Cpu<f32>>>();
}

#[test]
fn learning_rates_and_settings_are_checked_before_anything_moves() {
    assert!(Adam::<Cpu<f32>>::new(f32::NAN).is_err());
    let (cpu, mut rng) = (cpu(), Rng::new(1));
    let mut model = Mlp::new(&cpu, &[2, 2], &mut rng).unwrap();
    for config in
        [LoraConfig::new(0, 1.0), LoraConfig::new(1, f32::INFINITY), LoraConfig { dropout: 1.0, ..LoraConfig::new(1, 1.0) }]
    {
        assert!(model.add_adapters(&cpu, Targets::All, &config, &mut rng).is_err(), "{config:?}");
    }
    let dropout = LoraConfig { dropout: 1.5, ..LoraConfig::new(1, 1.0) }.check().unwrap_err();
    assert_eq!(dropout.to_string(), "lora: `lora_dropout` is 1.5, want at least 0 and below 1");
    assert!(Mlp::new(&cpu, &[3], &mut rng).is_err() && Mlp::<Cpu<f32>>::from_layers(Vec::new()).is_err());
    assert!(model.layers().all(|(_, layer)| layer.lora().is_none()));
}

/// Requests that would do nothing are errors.
#[test]
fn empty_requests_are_errors() {
    let (cpu, mut rng) = (cpu(), Rng::new(1));
    let mut model = Mlp::new(&cpu, &[2, 2, 2], &mut rng).unwrap();
    let config = LoraConfig::new(1, 1.0);
    let none = model.add_adapters(&cpu, Targets::Names(&[]), &config, &mut rng).unwrap_err();
    assert_eq!(none.to_string(), "add_adapter: `targets` is none, want at least one layer");
    let none = model.insert_adapter("a", Vec::new()).unwrap_err();
    assert_eq!(none.to_string(), "insert_adapter: `parts` is none, want at least one");
    assert!(model.set_adapters(Vec::new()).is_err());
    let config = LoraConfig { modules_to_save: vec!["linear2".into(), "head".into()], ..config };
    let unknown = model.add_adapters(&cpu, Targets::All, &config, &mut rng).unwrap_err();
    assert_eq!(unknown.to_string(), "no layer is named `head`; the layers are linear1, linear2");
    assert!(model.layers().all(|(_, layer)| layer.lora().is_none() && layer.base().weight().trainable));

    let mut tape = Tape::new(&cpu);
    let x = tape.input(Tensor::from_slice(&cpu, (1, 2), &[1.0, 2.0]).unwrap());
    model.forward(&mut tape, x, None).unwrap();
    let error = tape.backward().unwrap_err();
    assert_eq!(error.to_string(), "backward: `loss` is missing, want a cross_entropy or a seed on the tape");
}

#[test]
fn a_clone_has_the_same_bits_and_memory_of_its_own() {
    let cpu = cpu();
    let mut tensor = Tensor::from_slice(&cpu, (2, 2), &[0.0, -0.0, f32::MIN_POSITIVE / 8.0, f32::NAN]).unwrap();
    let clone = tensor.try_clone(&cpu).unwrap();
    tensor.copy_from_slice(&cpu, &[1.0; 4]).unwrap();
    let bits: Vec<u32> = down(&cpu, &clone).into_iter().map(f32::to_bits).collect();
    assert_eq!(bits, [0.0, -0.0, f32::MIN_POSITIVE / 8.0, f32::NAN].map(f32::to_bits));
    assert_eq!(clone.shape(), (2, 2).into());
    let linear = Linear::new(&cpu, 3, 2, &mut Rng::new(1)).unwrap();
    let same = linear.try_clone(&cpu).unwrap();
    for (one, two) in linear.params().zip(same.params()) {
        assert_eq!(down(&cpu, one.tensor()), down(&cpu, two.tensor()));
        assert_ne!(one.id(), two.id());
    }
}

#[test]
fn a_value_of_another_tape_is_refused() {
    let (cpu, mut rng) = (cpu(), Rng::new(1));
    let model = Mlp::new(&cpu, &[2, 2], &mut rng).unwrap();
    let input = || Tensor::from_slice(&cpu, (1, 2), &[1.0, 2.0]).unwrap();
    let (mut one, mut two) = (Tape::new(&cpu), Tape::new(&cpu));
    let (x, _) = (one.input(input()), two.input(input()));
    let error = model.forward(&mut two, x, None).unwrap_err();
    assert_eq!(error.to_string(), "tape: `value` is of another tape, want of this one");
    assert!(two.relu(x).is_err() && two.value(x).is_err() && two.seed(x, input()).is_err());
    assert!(one.value(x).is_ok());
}

/// `Debug` is needed to derive it for a struct that holds them, and for `Result::unwrap_err`.
#[test]
fn all_public_types_implement_debug() {
    fn held<B: Backend + Debug>() {
        fn debug<T: Debug>() {}
        debug::<(B, Tensor<B>, Param<B>, Gradients<B>, Labels<B>)>();
        debug::<(Linear<B>, Adapter<B>, LayerAdapter<B>, LoraLinear<B>, Layer<B>, Mlp<B>, Adam<B>)>();
    }
    held::<Cpu<f32>>();
    #[cfg(feature = "webgpu")]
    held::<lowrank::WebGpu<f32>>();
    #[cfg(feature = "cuda")]
    held::<lowrank::Cuda<f32>>();
    let cpu = cpu().with_unit(VectorUnit::Scalar).unwrap().with_threads(2).unwrap();
    assert_eq!(format!("{cpu:?}"), "Cpu<f32>(scalar, 2 threads)");
    assert_eq!(Mlp::new(&cpu, &[3], &mut Rng::new(1)).unwrap_err().to_string(), "mlp: `sizes` is [3], want at least two");
}

#[test]
fn an_input_that_does_not_fit_is_named_with_the_layer() {
    let (cpu, rng) = (cpu(), &mut Rng::new(1));
    let mut model = Mlp::new(&cpu, &[4, 8, 3], rng).unwrap();
    let wrong = || Tensor::zeros(&cpu, (2, 5)).unwrap();
    let error = model.predict(&cpu, wrong()).unwrap_err();
    assert_eq!(error.to_string(), "linear_forward: `x` is 2×5, want 2×4, in `linear1`");
    assert!(matches!(error, Error::InLayer { error, .. } if matches!(*error, Error::Shape { name: "x", .. })));
    model.add_adapters(&cpu, Targets::All, &LoraConfig::new(2, 4.0), rng).unwrap();
    let error = model.predict(&cpu, wrong()).unwrap_err();
    assert_eq!(error.to_string(), "lora_forward: `x` is 2×5, want 2×4, in `linear1`");
    // Rows with adapters of their own are one batch.
    let error = model.predict_mixed(&cpu, &wrong(), &[None, Some(DEFAULT)]).unwrap_err();
    assert_eq!(error.to_string(), "lora_forward: `x` is 2×5, want 2×4, in `linear1`");
}

#[test]
fn a_model_too_large_for_memory_is_an_error() {
    let error = Mlp::new(&cpu(), &[1 << 30, 1 << 20], &mut Rng::new(1)).err().unwrap();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
}
