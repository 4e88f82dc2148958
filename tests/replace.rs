//! Replacing parts of a model: a parameter, its elements, an adapter.

mod support;

use lowrank::autograd::Param;
use lowrank::nn::{Adaptable, Bias, DEFAULT, LayerAdapter, LayerStatus, Linear, LoraConfig, Mlp, Scaling, Targets};
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Tensor, adapter};
use support::adapters::{adapted, base_bits, cpu, net, outputs, trained};
use support::bounds::relative_error;
use support::cases::TOLERANCE;
use support::oracle::Mat;

on_every_backend!(a_parameter_keeps_its_shape, an_adapter_of_the_same_name_is_replaced_as_a_whole);

fn config(rank: usize, alpha: f32) -> LoraConfig {
    LoraConfig::new(rank, alpha)
}

fn all(config: &LoraConfig) -> [Option<LoraConfig>; 3] {
    [Some(config.clone()), Some(config.clone()), Some(config.clone())]
}

#[track_caller]
fn assert_near(what: &str, got: &[f32], want: &[f32]) {
    let want = Mat::from_vec(1, want.len(), want.iter().map(|&y| y.into()).collect());
    let error = relative_error(got, &want);
    assert!(error <= TOLERANCE, "{what} is off by {error:e}");
}

fn a_parameter_keeps_its_shape<B: Backend<Elem = f32>>(backend: &B) {
    let mut param = Param::new(Tensor::from_slice(backend, (2, 3), &[1.0; 6]).unwrap());
    let id = param.id();
    let error = param.set_tensor(Tensor::zeros(backend, (3, 2)).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "set_tensor: `tensor` is 3×2, want 2×3");
    assert!(matches!(param.copy_from_slice(backend, &[2.0; 5]), Err(Error::Value { name: "host", .. })));
    assert_eq!(param.tensor().to_vec(backend).unwrap(), [1.0; 6]);
    param.set_tensor(Tensor::from_slice(backend, (2, 3), &[3.0; 6]).unwrap()).unwrap();
    assert_eq!(param.tensor().to_vec(backend).unwrap(), [3.0; 6]);
    param.copy_from_slice(backend, &[4.0; 6]).unwrap();
    assert_eq!((param.tensor().to_vec(backend).unwrap(), param.id()), (vec![4.0; 6], id));
}

fn without_layer(error: Error) -> Error {
    match error {
        Error::InLayer { error, .. } => *error,
        other => other,
    }
}

/// `params_mut` lets a caller replace a parameter by one of another shape: every use of it is an error that names it.
#[test]
fn a_parameter_replaced_by_one_of_another_shape_is_named() {
    let (cpu, folder) = (cpu::<f32>(), tempfile::tempdir().unwrap());
    let dora = LoraConfig { use_dora: true, ..config(2, 4.0) };
    for (at, name) in [(0, "a"), (1, "b"), (2, "magnitude")] {
        for shape in [(0, 0), (1, 1)] {
            let mut model = adapted(&cpu, all(&dora));
            let bits = base_bits(&cpu, &model);
            let there = model.params_mut().filter(|param| param.trainable).nth(at).unwrap();
            *there = Param::new(Tensor::zeros(&cpu, shape).unwrap());
            let refused = [
                without_layer(model.merge_adapters(&cpu).unwrap_err()),
                model.swap_adapter(&cpu, DEFAULT, trained(&cpu, all(&dora), 3)).unwrap_err(),
                adapter::save(&cpu, &model, folder.path()).unwrap_err(),
                adapter::save_as(&cpu, &model, DEFAULT, folder.path()).unwrap_err(),
            ];
            for error in refused {
                assert!(matches!(error, Error::Shape { name: named, .. } if named == name), "{name}: {error}");
            }
            assert!(name == "magnitude" || model.reserve_rank(&cpu, DEFAULT, 9).is_err());
            assert_eq!(base_bits(&cpu, &model), bits);
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");
}

/// A whole layer with a bias is not swapped for one without.
#[test]
fn a_swap_between_layers_with_and_without_a_bias_is_refused() {
    let cpu = cpu::<f32>();
    let config = LoraConfig { modules_to_save: vec!["linear3".into()], ..config(2, 4.0) };
    let mut model = net(&cpu);
    model.insert_adapter("a", trained(&cpu, all(&config), 4)).unwrap();
    let (before, mut parts) = (outputs(&cpu, &model), trained(&cpu, all(&config), 5));
    let without_bias = Linear::from_tensors(Tensor::zeros(&cpu, (7, 9)).unwrap(), None).unwrap();
    parts[2].1 = LayerAdapter::Whole(without_bias);
    assert!(matches!(model.swap_adapter(&cpu, "a", parts), Err(Error::Value { name: "bias", .. })));
    assert_eq!(outputs(&cpu, &model), before);
}

fn an_adapter_of_the_same_name_is_replaced_as_a_whole<B: Backend<Elem = f32>>(backend: &B) {
    let rng = &mut Rng::new(25);
    let wide = LoraConfig { bias: Bias::All, ..config(2, 3.0) };
    let add = |model: &mut Mlp<B>, rng: &mut Rng| {
        model.add_adapters(backend, Targets::Names(&["linear2"]), &config(1, 3.0), rng).unwrap();
    };
    let set = |model: &mut Mlp<B>, _: &mut Rng| {
        let parts = trained(backend, [None, Some(config(1, 3.0)), None], 26).into_iter();
        let adapters =
            parts.filter_map(|(layer, part)| if let LayerAdapter::Lora(adapter) = part { Some((layer, adapter)) } else { None });
        model.set_adapters(adapters.collect()).unwrap();
    };
    let insert = |model: &mut Mlp<B>, _: &mut Rng| {
        model.insert_adapter(DEFAULT, trained(backend, [None, Some(config(1, 3.0)), None], 26)).unwrap();
    };
    for replace in [&add as &dyn Fn(&mut Mlp<B>, &mut Rng), &set, &insert] {
        let mut model = net(backend);
        model.add_adapters(backend, Targets::Names(&["linear1", "linear2"]), &wide, rng).unwrap(); // a bias in linear3
        model.insert_adapter("other", trained(backend, [Some(config(3, 3.0)), None, None], 27)).unwrap();
        replace(&mut model, rng);
        let layers = model.status();
        let ranks = |layer: &LayerStatus| layer.adapters.iter().map(|a| (a.name.clone(), a.rank)).collect::<Vec<_>>();
        let want = [("linear1", "other", 3), ("linear2", DEFAULT, 1)];
        let want = want.map(|(layer, name, rank)| (layer.to_string(), vec![(name.to_string(), Some(rank))]));
        assert_eq!(layers.iter().map(|layer| (layer.name.clone(), ranks(layer))).collect::<Vec<_>>(), want);
        assert_eq!(model.active_adapters(), [DEFAULT]);
        assert_eq!(model.parameter_report().trainable, 11 + 9, "what is left frozen stays frozen");
    }
}

/// Refused while the old adapter is merged, also in layers that the new one does not name.
#[test]
fn a_merged_adapter_is_not_replaced() {
    let cpu = cpu::<f32>();
    let mut model = net(&cpu);
    model.insert_adapter("a", trained(&cpu, [Some(config(2, 3.0)), None, None], 28)).unwrap();
    model.merge_adapters(&cpu).unwrap();
    let before = (model.status(), outputs(&cpu, &model));
    let new = trained(&cpu, [None, Some(config(2, 3.0)), None], 29);
    assert!(matches!(model.insert_adapter("a", new), Err(Error::Value { name: "adapter", .. })));
    assert_eq!((model.status(), outputs(&cpu, &model)), before);
}

#[test]
fn a_swap_writes_into_the_existing_tensors() {
    let cpu = cpu::<f32>();
    let places = |model: &Mlp<Cpu<f32>>| -> Vec<*const f32> {
        model.adapters("a").flat_map(|(_, a)| a.params()).map(|param| param.tensor().buffer().as_ptr()).collect()
    };
    let mut model = net(&cpu);
    model.insert_adapter("a", trained(&cpu, all(&config(3, 7.0)), 31)).unwrap();
    let small = outputs(&cpu, &model);
    model.reserve_rank(&cpu, "a", 6).unwrap();
    assert_near("padded", &outputs(&cpu, &model), &small);
    let before = places(&model);

    let new = || {
        trained(
            &cpu,
            [Some(config(6, 2.0)), None, Some(LoraConfig { scaling: Scaling::AlphaOverSqrtRank, ..config(1, 2.0) })],
            32,
        )
    };
    model.set_scale("a", 0.5).unwrap();
    model.swap_adapter(&cpu, "a", new()).unwrap(); // brings its own scaling
    let mut fresh = net(&cpu);
    fresh.insert_adapter("a", new()).unwrap();
    assert_near("swapped", &outputs(&cpu, &model), &outputs(&cpu, &fresh));
    let scalings = |model: &Mlp<_>, at: usize| model.status()[at].adapters[0].scaling;
    assert_eq!([0, 2].map(|at| scalings(&model, at)), [Some(2.0 / 6.0), Some(2.0)]);
    assert_eq!(places(&model), before, "nothing was allocated");

    let (got, bits) = (outputs(&cpu, &model), base_bits(&cpu, &model));
    for rank in [usize::MAX, 1 << 60, 1 << 50] {
        let error = model.reserve_rank(&cpu, "a", rank).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. } | Error::OutOfMemory { .. }), "{rank}: {error}");
    }
    assert_eq!(places(&model), before, "a refused reserve_rank changed the model");
    let refused =
        |model: &mut Mlp<_>, configs| model.swap_adapter(&cpu, "a", trained(&cpu, configs, 33)).unwrap_err().to_string();
    assert!(refused(&mut model, all(&config(7, 2.0))).contains("`rank` is 7"));
    assert!(refused(&mut model, all(&LoraConfig { use_dora: true, ..config(2, 2.0) })).contains("magnitude"));
    let extra = LoraConfig { bias: Bias::All, ..config(2, 2.0) };
    assert!(refused(&mut model, [Some(extra.clone()), Some(extra.clone()), Some(extra)]).contains("bias"));
    let mut narrow = net(&cpu);
    narrow.insert_adapter("a", trained(&cpu, [Some(config(2, 2.0)), None, None], 34)).unwrap();
    assert!(matches!(narrow.swap_adapter(&cpu, "a", new()), Err(Error::NoSuchLayer { .. })));
    model.merge_adapters(&cpu).unwrap();
    assert!(refused(&mut model, all(&config(1, 2.0))).contains("merged"));
    model.unmerge_adapters(&cpu).unwrap();
    assert_eq!((outputs(&cpu, &model), base_bits(&cpu, &model)), (got, bits));
}
