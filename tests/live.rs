//! Managing adapters of a model: named, several at once, activated, swapped, merged and unmerged.

mod support;

use lowrank::nn::{
    Adaptable, Adapter, Bias, DEFAULT, Init, LayerAdapter, Linear, LoraConfig, LoraLinear, Merge, Mlp, Scaling, Targets,
    UnmergeCost,
};
use lowrank::op::Rounding;
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Error, Float, Tensor, bf16, f16};
use proptest::prelude::*;
use support::adapters::{base_bits, batch, cpu, net, outputs, trained};
use support::bounds::relative_error;
use support::cases::TOLERANCE;
use support::oracle::Mat;

on_every_backend!(
    the_active_adapters_are_added_up,
    status_and_counts_are_complete,
    names_are_checked_and_nothing_changes_on_error,
    deleting_the_last_adapter_leaves_the_plain_model,
    biases_and_whole_layers_go_when_the_adapter_goes,
    a_whole_layer_cannot_be_combined,
    new_adapters_are_initialised_as_in_peft,
    each_row_uses_its_adapter,
    weights_stored_in_by_out_are_transposed_once,
    every_bit_comes_back,
);

fn config(rank: usize, alpha: f32) -> LoraConfig {
    LoraConfig::new(rank, alpha)
}

fn all(config: &LoraConfig) -> [Option<LoraConfig>; 3] {
    [Some(config.clone()), Some(config.clone()), Some(config.clone())]
}

/// Three adapters on one network: on all layers, on two, and on one with DoRA.
fn several<B: Backend>(backend: &B) -> Mlp<B> {
    let mut model = net(backend);
    let dora = LoraConfig { use_dora: true, ..config(4, 6.0) };
    let configs = [
        ("a", all(&config(3, 7.0)), 21),
        ("b", [None, Some(config(2, 5.0)), Some(config(2, 5.0))], 22),
        ("c", [Some(dora), None, None], 23),
    ];
    for (name, configs, seed) in configs {
        model.insert_adapter(name, trained(backend, configs, seed)).unwrap();
    }
    model
}

fn mat<B: Backend>(backend: &B, tensor: &Tensor<B>) -> Mat {
    let data = tensor.to_vec(backend).unwrap().into_iter().map(|x| x.to_f32().into()).collect();
    Mat::from_vec(tensor.rows(), tensor.cols(), data)
}

/// The outputs of the model with these adapters active, by the formulas, in f64.
fn oracle<B: Backend>(backend: &B, model: &Mlp<B>, active: &[&str]) -> Mat {
    let mut x = mat(backend, &batch(backend));
    for (i, (_, layer)) in model.layers().enumerate() {
        let x_in = if i > 0 { x.map(|x| x.max(0.0)) } else { x };
        let (w, bias) = (mat(backend, layer.base().weight().tensor()), mat(backend, layer.base().bias().unwrap().tensor()));
        let base = &x_in * &w.t();
        let mut y = base.plus_row(&bias);
        for adapter in active.iter().filter_map(|name| layer.adapter(name)) {
            let (a, b) = (mat(backend, adapter.a().tensor()), mat(backend, adapter.b().tensor()));
            let update = &(&b * &a) * f64::from(adapter.scaling());
            let Some(magnitude) = adapter.magnitude() else {
                y = &y + &(&x_in * &update.t());
                continue;
            };
            let (merged, magnitude) = (&w + &update, mat(backend, magnitude.tensor()));
            let norm = |i: usize| (0..merged.cols).map(|j| merged.at(i, j).powi(2)).sum::<f64>().sqrt();
            let decomposed = Mat::new(w.rows, w.cols, |i, j| magnitude.at(0, i) / norm(i) * merged.at(i, j));
            y = &(&y + &(&x_in * &decomposed.t())) + &(&base * -1.0);
        }
        x = y;
    }
    x
}

#[track_caller]
fn assert_near(what: &str, got: &[f32], want: &Mat) {
    let error = relative_error(got, want);
    assert!(error <= TOLERANCE, "{what} is off by {error:e}");
}

fn the_active_adapters_are_added_up<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = several(backend);
    assert_eq!((model.adapter_names(), model.active_adapters()), (vec!["a", "c", "b"], vec!["a"]));
    for active in [&["a"][..], &["b"], &["c"], &["a", "b"], &["b", "a"], &["c", "a"], &["a", "c", "b"], &[]] {
        model.set_active(active).unwrap();
        assert_near(&format!("{active:?}"), &outputs(backend, &model), &oracle(backend, &model, active));
    }
    model.set_active(&["a", "b"]).unwrap();
    model.set_scale("b", -1.5).unwrap();
    assert_eq!(model.layer("linear3").unwrap().adapter("b").unwrap().scaling(), -1.5 * 2.5);
    assert_near("scaled", &outputs(backend, &model), &oracle(backend, &model, &["a", "b"]));
    model.set_adapters_enabled(false).unwrap();
    assert_eq!(outputs(backend, &model), outputs(backend, &net(backend)), "off is the base model, bit for bit");
}

fn status_and_counts_are_complete<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = several(backend);
    let before = model.parameter_report();
    let a = 3 * (13 + 11) + 3 * (11 + 9) + 3 * (9 + 7);
    let (b, c) = (2 * (11 + 9) + 2 * (9 + 7), 4 * (13 + 11) + 11);
    assert_eq!((before.introduced, before.trainable), (a + b + c, a), "only what is active may be trained");
    model.set_active(&["b", "c"]).unwrap();
    assert_eq!(model.parameter_report().trainable, b + c);
    model.merge_as(backend, &["c"], Merge::default()).unwrap();
    let status = model.status();
    let of = |layer: usize, name: &str| status[layer].adapters.iter().find(|adapter| adapter.name == name).unwrap().clone();
    assert_eq!(status.iter().map(|layer| layer.adapters.len()).collect::<Vec<_>>(), [2, 2, 2]);
    let c = of(0, "c");
    assert!(c.active && c.merged && c.trainable && status[0].enabled);
    assert_eq!((c.rank, c.scaling, c.parameters), (Some(4), Some(1.5), 4 * (13 + 11) + 11));
    assert!(!of(1, "a").active && !of(1, "a").merged && !of(1, "a").trainable && of(2, "b").active);
}

fn names_are_checked_and_nothing_changes_on_error<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = several(backend);
    let before = outputs(backend, &model);
    let unknown = model.set_active(&["a", "z"]).unwrap_err();
    assert_eq!(unknown.to_string(), "no adapter is named `z`; the adapters are a, c, b");
    for name in ["", "a.b", "a/b", "..", "../evil", "a\\b", "a\0"] {
        let part = || trained(backend, [Some(config(1, 1.0)), None, None], 24);
        let layer = model.layers_mut().next().and_then(|(_, layer)| layer.lora_mut()).unwrap();
        let alone = layer.insert(name, part().remove(0).1, false).unwrap_err();
        for error in
            [alone, model.insert_adapter(name, part()).unwrap_err(), net(backend).insert_adapter(name, part()).unwrap_err()]
        {
            assert_eq!(error.to_string(), format!("adapter: `name` is {name}, want a name without dots and slashes"));
        }
    }
    assert_eq!(net(backend).set_scale("z", 1.0).unwrap_err().to_string(), "no adapter is named `z`; there are none");
    assert!(model.delete_adapter("z").is_err() && model.set_scale("z", 1.0).is_err() && model.set_scale("a", f32::NAN).is_err());
    let bias = LoraConfig { bias: Bias::All, ..config(1, 1.0) };
    for name in ["d", "e"] {
        model.add_adapter(backend, name, Targets::Names(&["linear1"]), &bias, &mut Rng::new(1)).unwrap();
    }
    let two = model.set_active(&["d", "e"]).unwrap_err().to_string();
    assert!(two.contains("several that replace the bias"), "{two}");
    assert_eq!(model.active_adapters(), ["a"]);
    assert_eq!(outputs(backend, &model), before);

    model.merge_adapters(backend).unwrap();
    let merged = outputs(backend, &model);
    let refused = [
        model.set_active(&["b"]).unwrap_err(),
        model.delete_adapter("b").unwrap_err(),
        model.set_scale("a", 2.0).unwrap_err(),
        model.unload().unwrap_err(),
        model.set_adapters_enabled(false).unwrap_err(),
        model.reserve_rank(backend, "a", 9).unwrap_err(),
        model.insert_adapter("f", trained(backend, all(&config(1, 1.0)), 1)).unwrap_err(),
    ];
    let verbs = ["set_active", "delete_adapter", "set_scale", "unload", "set_adapters_enabled", "reserve_rank", "insert_adapter"];
    for (error, verb) in refused.into_iter().zip(verbs) {
        let want = format!("{verb}: `adapter` is `a`, merged into the weight, want unmerged first");
        assert_eq!(error.to_string(), want);
    }
    assert_eq!(outputs(backend, &model), merged);
    let weight = (11, 13).into();
    assert!(model.params_mut().all(|param| param.tensor().shape() != weight), "a merged weight is not handed out");
}

fn deleting_the_last_adapter_leaves_the_plain_model<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = several(backend);
    for name in ["a", "b", "c"] {
        model.delete_adapter(name).unwrap();
    }
    assert!(model.layers().all(|(_, layer)| layer.lora().is_none()));
    assert_eq!(outputs(backend, &model), outputs(backend, &net(backend)));
    let mut model = several(backend);
    model.set_active(&["b"]).unwrap();
    let on = outputs(backend, &model);
    model.merge_and_unload(backend).unwrap();
    assert!(model.layers().all(|(_, layer)| layer.lora().is_none()));
    assert!(relative_error(&outputs(backend, &model), &Mat::from_vec(5, 7, on.iter().map(|&y| y.into()).collect())) <= TOLERANCE);
}

fn biases_and_whole_layers_go_when_the_adapter_goes<B: Backend<Elem = f32>>(backend: &B) {
    let config = LoraConfig { bias: Bias::All, modules_to_save: vec!["3".into()], ..config(2, 3.0) };
    let mut model = net(backend);
    model.add_adapters(backend, Targets::Names(&["linear1"]), &config, &mut Rng::new(2)).unwrap();
    let base = outputs(backend, &net(backend));
    assert!(
        relative_error(&outputs(backend, &model), &Mat::from_vec(5, 7, base.iter().map(|&y| y.into()).collect())) <= TOLERANCE
    );
    let kinds: Vec<bool> = model.layers().map(|(_, layer)| layer.adapter(DEFAULT).is_some()).collect();
    assert_eq!(kinds, [true, false, false]);
    assert!(matches!(model.layer("linear2").unwrap().lora().unwrap().part(DEFAULT), Some(LayerAdapter::Bias(_))));
    assert!(matches!(model.layer("linear3").unwrap().lora().unwrap().part(DEFAULT), Some(LayerAdapter::Whole(_))));
    assert_eq!(model.parameter_report().trainable, 2 * (13 + 11) + 11 + 9 + 7 * 9 + 7);
    for param in model.params_mut().filter(|param| param.trainable) {
        let shifted: Vec<f32> = param.tensor().to_vec(backend).unwrap().into_iter().map(|x| x + 0.25).collect();
        param.copy_from_slice(backend, &shifted).unwrap();
    }
    assert_ne!(outputs(backend, &model), base);
    model.set_adapters_enabled(false).unwrap();
    assert_eq!(outputs(backend, &model), base);
    model.set_adapters_enabled(true).unwrap();
    model.unload().unwrap();
    assert_eq!(outputs(backend, &model), base);
    let unknown = LoraConfig { modules_to_save: vec!["head".into()], ..config };
    assert!(matches!(
        model.add_adapters(backend, Targets::All, &unknown, &mut Rng::new(2)),
        Err(Error::NoSuchLayer { name, .. }) if name == "head"
    ));
}

fn a_whole_layer_cannot_be_combined<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = net(backend);
    model.insert_adapter("update", trained(backend, all(&config(2, 3.0)), 51)).unwrap();
    let whole = LoraConfig { modules_to_save: vec!["linear3".into()], ..config(2, 3.0) };
    model.insert_adapter("whole", trained(backend, all(&whole), 52)).unwrap();
    let bits = base_bits(backend, &model);
    let both = model.set_active(&["update", "whole"]).unwrap_err().to_string();
    assert!(both.contains("replaces the layer"), "{both}");
    let both = model.merge_as(backend, &["update", "whole"], Merge::default()).unwrap_err().to_string();
    assert!(both.contains("replaces the layer") && both.contains("linear3"), "{both}");
    assert_eq!(base_bits(backend, &model), bits);
    model.set_active(&["whole"]).unwrap();
    let want = outputs(backend, &model).iter().map(|&y| y.into()).collect();
    model.set_active(&[]).unwrap();
    model.merge_as(backend, &["whole"], Merge::default()).unwrap();
    assert_near("merged, though not active", &outputs(backend, &model), &Mat::from_vec(5, 7, want));
}

fn new_adapters_are_initialised_as_in_peft<B: Backend<Elem = f32>>(backend: &B) {
    let begin = |init, rank| {
        let mut model = net(backend);
        let config = LoraConfig { init, ..config(rank, 4.0) };
        model.add_adapters(backend, Targets::Names(&["linear1"]), &config, &mut Rng::new(3)).map(|()| {
            let adapter = model.layer("linear1").unwrap().adapter(DEFAULT).unwrap();
            (mat(backend, adapter.a().tensor()), mat(backend, adapter.b().tensor()))
        })
    };
    let (a, b) = begin(Init::NonZero, 4).unwrap();
    assert!(a.data.iter().all(|x| x.abs() <= 1.0 / 13f64.sqrt()) && b.data.iter().all(|x| x.abs() <= 0.5 && *x != 0.0));
    let (a, b) = begin(Init::Orthogonal, 6).unwrap();
    let size = (&b.abs() * &a.abs()).data.into_iter().fold(0.0, f64::max);
    let update = (&b * &a).data.into_iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    assert!(size > 1e-3 && update <= 8.0 * f64::from(f32::EPSILON) * size, "B·A = {update}, of {size}");
    let odd = begin(Init::Orthogonal, 3).unwrap_err();
    assert_eq!(odd.to_string(), "lora: `rank` is 3, want even, for orthogonal factors");
    assert!(begin(Init::Gaussian { std: f32::NAN }, 3).is_err());
    for init in [Init::KaimingUniform, Init::NonZero, Init::Orthogonal] {
        let error = begin(init, 1 << 50).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. } | Error::OutOfMemory { .. }), "{error}");
    }

    let mut model = net(backend);
    let dora = LoraConfig { use_dora: true, ..config(2, 4.0) };
    model.add_adapters(backend, Targets::All, &dora, &mut Rng::new(3)).unwrap();
    assert_near("a new DoRA", &outputs(backend, &model), &oracle(backend, &net(backend), &[]));
    let both = LoraConfig { lora_bias: true, ..dora };
    assert!(model.add_adapters(backend, Targets::All, &both, &mut Rng::new(3)).is_err());
}

fn each_row_uses_its_adapter<B: Backend<Elem = f32>>(backend: &B) {
    let mut model = several(backend);
    let names = [Some("c"), None, Some("a"), Some("c"), Some("b")];
    let mixed = model.predict_mixed(backend, &batch(backend), &names).unwrap();
    for (row, name) in names.into_iter().enumerate() {
        let want = oracle(backend, &model, name.as_slice());
        let want = Mat::new(1, 7, |_, j| want.at(row, j));
        assert_near(&format!("{name:?}"), &mixed[row * 7..][..7], &want);
    }
    assert!(model.predict_mixed(backend, &batch(backend), &names[1..]).is_err());
    assert!(model.predict_mixed(backend, &batch(backend), &[Some("z"); 5]).is_err());
    model.merge_adapters(backend).unwrap();
    assert!(model.predict_mixed(backend, &batch(backend), &names).is_err());
}

/// Weights and updates that overflow the element type: refused with `safe`; without it, unmerging is still exact.
#[test]
fn a_merge_that_is_not_finite_is_refused_by_layer_and_adapter() {
    let cpu = cpu::<f16>();
    let mut model = net(&cpu);
    model.insert_adapter("small", trained(&cpu, all(&config(3, 7.0)), 41)).unwrap();
    model.insert_adapter("huge", trained(&cpu, [None, Some(config(3, 1e6)), None], 42)).unwrap();
    let (bits, safe) = (base_bits(&cpu, &model), Merge::default());
    let error = model.merge_as(&cpu, &["small", "huge"], safe).unwrap_err().to_string();
    assert!(error.contains("huge") && error.contains("linear2") && error.contains("finite"), "{error}");
    assert_eq!(base_bits(&cpu, &model), bits);
    assert!(model.status().iter().flat_map(|layer| &layer.adapters).all(|adapter| !adapter.merged));
    model.merge_as(&cpu, &["huge", "small"], Merge { safe: false, ..safe }).unwrap();
    assert!(outputs(&cpu, &model).iter().any(|y| !y.is_finite()));
    model.unmerge_adapter(&cpu, "huge").unwrap();
    model.unmerge_adapters(&cpu).unwrap();
    assert_eq!(base_bits(&cpu, &model), bits);
    model.set_adapters_enabled(false).unwrap();
    assert!(model.merge_adapters(&cpu).is_err(), "off and merged contradict each other");
}

/// A step of a random sequence: merging with some rounding, or unmerging.
#[derive(Clone, Debug)]
enum Step {
    Merge(Vec<usize>, Merge),
    Unmerge(usize),
    UnmergeAll,
}

fn step() -> impl Strategy<Value = Step> {
    let rounding = prop_oneof![Just(Rounding::Nearest), any::<u64>().prop_map(|seed| Rounding::Stochastic { seed })];
    let how = (any::<bool>(), rounding).prop_map(|(safe, rounding)| Merge { safe, rounding });
    let names = proptest::collection::vec(0..3usize, 1..4);
    prop_oneof![3 => (names, how).prop_map(|(names, how)| Step::Merge(names, how)), 2 => (0..3usize).prop_map(Step::Unmerge), 1 => Just(Step::UnmergeAll)]
}

/// Adapters of every kind with these settings, whose factors are scaled by `10^magnitude`.
fn every_kind<B: Backend>(backend: &B, seed: u64, magnitude: f64) -> Mlp<B> {
    let mut model = net(backend);
    let alpha = (7.0 * 10f64.powf(magnitude)) as f32;
    let kinds = [
        ("a", all(&LoraConfig { lora_bias: true, ..config(3, alpha) })),
        (
            "b",
            [
                Some(LoraConfig { bias: Bias::All, ..config(2, alpha) }),
                None,
                Some(LoraConfig { bias: Bias::All, ..config(2, -alpha) }),
            ],
        ),
        ("c", all(&LoraConfig { use_dora: true, ..config(4, alpha) })),
    ];
    for (name, configs) in kinds {
        model.insert_adapter(name, trained(backend, configs, seed)).unwrap();
    }
    model
}

fn comes_back<B: Backend>(backend: &B, seed: u64, magnitude: f64, steps: &[Step]) {
    let names = ["a", "b", "c"];
    let mut model = every_kind(backend, seed, magnitude);
    let bits = base_bits(backend, &model);
    for step in steps {
        let before = base_bits(backend, &model);
        match step {
            Step::Merge(which, how) => {
                let which: Vec<&str> = which.iter().map(|&at| names[at]).collect();
                if model.merge_as(backend, &which, *how).is_err() {
                    assert_eq!(base_bits(backend, &model), before, "a refused merge changed the weights");
                }
            }
            Step::Unmerge(at) => model.unmerge_adapter(backend, names[*at]).unwrap(),
            Step::UnmergeAll => model.unmerge_adapters(backend).unwrap(),
        }
    }
    model.unmerge_adapters(backend).unwrap();
    assert_eq!(base_bits(backend, &model), bits);
    assert_eq!(model.kept(), UnmergeCost::default());
}

/// A few fixed orders; the properties below try random ones on the CPU.
fn every_bit_comes_back<B: Backend<Elem = f32>>(backend: &B) {
    let (nearest, stochastic) = (Merge::default(), Merge { rounding: Rounding::Stochastic { seed: 7 }, ..Merge::default() });
    let merge = |which: &[usize], how| Step::Merge(which.to_vec(), how);
    for (seed, magnitude) in [(1, -3.0), (2, 0.0), (3, 2.5)] {
        comes_back(backend, seed, magnitude, &[merge(&[0, 1, 2], nearest), Step::Unmerge(1), merge(&[1], stochastic)]);
        comes_back(backend, seed, magnitude, &[merge(&[2], nearest), merge(&[0], nearest), Step::Unmerge(2), Step::UnmergeAll]);
    }
}

proptest! {
    #[test]
    fn unmerging_restores_every_bit(
        dtype in 0..3u8,
        seed in any::<u64>(),
        magnitude in -6.0..6.0f64,
        steps in proptest::collection::vec(step(), 1..8),
    ) {
        match dtype {
            0 => comes_back(&cpu::<f32>(), seed, magnitude, &steps),
            1 => comes_back(&cpu::<f16>(), seed, magnitude, &steps),
            _ => comes_back(&cpu::<bf16>(), seed, magnitude, &steps),
        }
    }

    /// For every setting that affects merging, with a scaling other than 1.
    #[test]
    fn merged_equals_unmerged(
        seed in any::<u64>(),
        rank in 1..9usize,
        alpha in prop_oneof![-9.0..-0.1f32, 0.1..9.0f32],
        (use_dora, lora_bias, rslora) in (any::<bool>(), any::<bool>(), any::<bool>()),
        bias in prop_oneof![Just(Bias::None), Just(Bias::All), Just(Bias::LoraOnly)],
        (whole, second) in (any::<bool>(), any::<bool>()),
    ) {
        let cpu = cpu::<f32>();
        let scaling = if rslora { Scaling::AlphaOverSqrtRank } else { Scaling::AlphaOverRank };
        let modules_to_save = if whole { vec!["linear3".to_string()] } else { Vec::new() };
        let settings = LoraConfig { scaling, use_dora, lora_bias: lora_bias && !use_dora, bias, modules_to_save, ..config(rank, alpha) };
        let mut model = net(&cpu);
        model.insert_adapter("one", trained(&cpu, [Some(settings.clone()), None, Some(settings)], seed)).unwrap();
        if second && !use_dora && !whole {
            model.insert_adapter("two", trained(&cpu, all(&config(2, 3.0)), seed + 1)).unwrap();
            model.set_active(&["one", "two"]).unwrap();
        }
        let on = outputs(&cpu, &model).iter().map(|&y| y.into()).collect();
        let on = Mat::from_vec(5, 7, on);
        model.merge_adapters(&cpu).unwrap();
        let error = relative_error(&outputs(&cpu, &model), &on);
        prop_assert!(error <= TOLERANCE, "merged is off by {error:e}");
        model.merge_and_unload(&cpu).unwrap();
        let error = relative_error(&outputs(&cpu, &model), &on);
        prop_assert!(error <= TOLERANCE, "unloaded is off by {error:e}");
    }
}

/// After any sequence of merges and unmerges, the weights are those of a model into which only the remaining adapters were merged.
#[test]
fn unmerging_one_of_several_leaves_the_others_as_if_merged_without_it() {
    let cpu = cpu::<bf16>();
    let (mut model, mut alone) = (every_kind(&cpu, 5, 0.0), every_kind(&cpu, 5, 0.0));
    let bits = base_bits(&cpu, &model);
    for _ in 0..1000 {
        model.merge_as(&cpu, &["a", "b", "c"], Merge::default()).unwrap();
        model.unmerge_adapter(&cpu, "b").unwrap();
        model.unmerge_adapters(&cpu).unwrap();
    }
    assert_eq!(base_bits(&cpu, &model), bits, "after a thousand cycles");
    model.merge_as(&cpu, &["b", "a", "c"], Merge::default()).unwrap();
    model.unmerge_adapter(&cpu, "b").unwrap();
    alone.merge_as(&cpu, &["a", "c"], Merge::default()).unwrap();
    assert_eq!(base_bits(&cpu, &model), base_bits(&cpu, &alone));
    assert_eq!(model.kept(), alone.kept());
}

/// The table of the README: `cargo test --release --test live what_exact -- --nocapture`.
#[test]
fn what_exact_unmerging_costs() {
    println!("| |ΔW|/|W| | dtype | weights kept | bytes a weight |");
    // Twice what was measured: a few per cent of the weights, not a copy.
    for (ratio, most) in [(1e-3, [0.02, 0.004, 0.004]), (1e-2, [0.05, 0.04, 0.04]), (0.1, [0.2, 0.2, 0.2])] {
        let kept = [cost::<f32>(ratio), cost::<f16>(ratio), cost::<bf16>(ratio)];
        for ((kept, dtype), most) in kept.into_iter().zip(["f32", "f16", "bf16"]).zip(most) {
            println!("| {ratio} | {dtype} | {:.2} % | {:.3} |", 100.0 * kept.0, kept.1);
            assert!(kept.0 <= most, "{ratio} {dtype}: {} of the weights", kept.0);
        }
    }
}

/// The fraction of weights in the residue, and its bytes per weight: 512×512, normally distributed with deviation 0.02, rank 16.
fn cost<E: Float>(ratio: f64) -> (f64, f64) {
    let (cpu, mut rng) = (Cpu::<E>::new().unwrap(), Rng::new(9));
    let numbers = |rows, cols, std, rng: &mut Rng| Init::Gaussian { std }.tensor(&cpu, (rows, cols), rng).unwrap();
    let weight = numbers(512, 512, 0.02, &mut rng);
    let base = Linear::from_tensors(weight, None).unwrap();
    // An element of B·A has deviation √r·0.1·0.1.
    let config = LoraConfig { scaling: Scaling::Raw, ..config(16, (ratio * 0.02 / (4.0 * 0.01)) as f32) };
    let (a, b) = (numbers(16, 512, 0.1, &mut rng), numbers(512, 16, 0.1, &mut rng));
    let adapter = Adapter::from_tensors(a, b, config).unwrap();
    let mut layer = LoraLinear::new(base, adapter).unwrap();
    layer.merge(&cpu).unwrap();
    let (kept, all) = (layer.kept(), 512.0 * 512.0);
    (kept.weights as f64 / all, kept.bytes as f64 / all)
}

fn weights_stored_in_by_out_are_transposed_once<B: Backend<Elem = f32>>(backend: &B) {
    let weight = Tensor::from_slice(backend, (2, 3), &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
    let linear = Linear::from_fan_in_fan_out(backend, &weight, None).unwrap();
    assert_eq!(linear.weight().tensor().to_vec(backend).unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    assert_eq!(linear.weight().tensor().shape(), (3, 2).into());
}
