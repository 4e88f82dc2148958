//! The custom model of `examples/attention` supports adapters in the same way as `Mlp`. Its custom operations are checked by finite
//! differences.

#![allow(dead_code, reason = "the example uses all of its modules")]
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

#[path = "../examples/attention/model.rs"]
mod model;
#[path = "../examples/attention/ops.rs"]
mod ops;
#[path = "../examples/attention/task.rs"]
mod task;

use std::collections::BTreeSet;
use std::fs;

use lowrank::adapter::{self, AdapterConfig, CONFIG_FILE, TENSORS_FILE, TargetModules};
use lowrank::autograd::{Param, Tape, Var};
use lowrank::nn::{Adaptable, Adapters, DEFAULT, Init, Layer, Linear, LoraConfig, Scaling, Targets};
use lowrank::op::WeightGrad;
use lowrank::random::Rng;
use lowrank::{Backend, Cpu, Result, Tensor, bf16};
use model::Decoder;
use ops::{Attention, rms_norm, silu_gate};
use task::{Batch, SIZES, train};

type Device = Cpu<f32>;

fn cpu() -> Device {
    Cpu::new().unwrap().with_threads(1).unwrap()
}

fn base<B: Backend>(backend: &B) -> Decoder<B> {
    Decoder::new(backend, SIZES, &mut Rng::new(0)).unwrap()
}

fn config() -> LoraConfig {
    LoraConfig::new(4, 8.0)
}

/// A model with an adapter on every layer, after a few training steps.
fn tuned<B: Backend>(backend: &B, seed: u64) -> Decoder<B> {
    let mut model = base(backend);
    model.add_adapters(backend, Targets::All, &config(), &mut Rng::new(seed)).unwrap();
    train(backend, &mut model, 10, 1e-2).unwrap();
    model
}

fn logits<B: Backend>(backend: &B, model: &Decoder<B>) -> Vec<B::Elem> {
    model.predict(backend, Batch::new(backend, 4, 1000).unwrap().x).unwrap()
}

/// The bits of the base weights and of the norms.
fn base_bits<B: Backend>(backend: &B, model: &Decoder<B>) -> Vec<Vec<u8>> {
    let params = model.layers().flat_map(|(_, layer)| layer.base().params()).chain(model.other_params());
    params.map(|param| bytemuck::cast_slice(&param.tensor().to_vec(backend).unwrap()).to_vec()).collect()
}

/// An operation on these values and parameters.
type Operation = for<'m> fn(&mut Tape<'m, Device>, &[Var], &'m [Param<Device>]) -> Result<Var>;

/// The elements of a matrix, multiples of 2⁻¹⁰ below 2 in size, so that they and their finite differences are exact in f32.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| (rng.uniform(-1.5, 1.5) * 1024.0).round() as f32 / 1024.0).collect()
}

/// The operands of an operation: values of the tape, and a parameter.
#[derive(Clone)]
struct Operands {
    values: Vec<((usize, usize), Vec<f32>)>,
    weight: Option<Vec<f32>>,
}

impl Operands {
    /// A value that needs a gradient is the product of a unit matrix and a parameter, `I·Wᵀ`, so that its gradient is a factor of `W`'s.
    fn params(&self, cpu: &Device) -> Vec<Param<Device>> {
        let transposed = |((rows, cols), x): &((usize, usize), Vec<f32>)| {
            let w: Vec<f32> = (0..*cols).flat_map(|j| (0..*rows).map(move |i| x[i * cols + j])).collect();
            Tensor::from_slice(cpu, (*cols, *rows), &w).unwrap()
        };
        let weight = self.weight.iter().map(|weight| Tensor::from_slice(cpu, (1, weight.len()), weight).unwrap());
        self.values.iter().map(transposed).chain(weight).map(Param::new).collect()
    }

    fn run<'m>(&self, tape: &mut Tape<'m, Device>, params: &'m [Param<Device>], operation: Operation) -> Var {
        let unit = |n: usize| (0..n * n).map(|at| f32::from(u8::from(at % (n + 1) == 0))).collect::<Vec<_>>();
        let mut value = |(((rows, _), _), w): (&((usize, usize), _), &'m Param<Device>)| {
            let unit = tape.input(Tensor::from_slice(tape.backend(), (*rows, *rows), &unit(*rows)).unwrap());
            tape.linear(unit, w, None).unwrap()
        };
        let values: Vec<Var> = self.values.iter().zip(params).map(&mut value).collect();
        operation(tape, &values, &params[self.values.len()..]).unwrap()
    }

    /// The loss `Σ dy·y`, and a bound on its error from rounding `y` to f32.
    fn loss(&self, cpu: &Device, operation: Operation, dy: &[f32]) -> (f64, f64) {
        let params = self.params(cpu);
        let mut tape = Tape::new(cpu);
        let y = self.run(&mut tape, &params, operation);
        let y = tape.value(y).unwrap().to_vec(cpu).unwrap();
        let terms = || y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy));
        (terms().sum(), terms().map(f64::abs).sum::<f64>() * f64::from(f32::EPSILON) / 2.0)
    }

    fn number(&mut self, operand: usize, at: usize) -> &mut f32 {
        let values = self.values.len();
        if operand < values { &mut self.values[operand].1[at] } else { &mut self.weight.as_mut().unwrap()[at] }
    }

    /// Central differences, `D(h) = (L(x + h) - L(x - h)) / 2h`, against the tape.
    ///
    /// The operations are computed in f64 and rounded once, so a loss has an error of at most `e`, and `D(h)` of `e/h`. The truncation error
    /// of `D(h)` is a third of `D(2h) - D(h)` plus terms in `h⁴`: the whole difference is allowed, plus `e/h` for its own rounding. The
    /// gradient itself is rounded once.
    fn check(&self, name: &str, operation: Operation) {
        const H: f32 = 1.0 / 64.0;
        let cpu = cpu();
        let params = self.params(&cpu);
        let mut tape = Tape::new(&cpu);
        let y = self.run(&mut tape, &params, operation);
        let shape = tape.value(y).unwrap().shape();
        let dy = numbers(shape.rows * shape.cols, 77);
        tape.seed(y, Tensor::from_slice(&cpu, shape, &dy).unwrap()).unwrap();
        let gradients = tape.backward().unwrap();

        for (operand, param) in params.iter().enumerate() {
            let gradient = match gradients.get(param).unwrap() {
                WeightGrad::Dense(dw) => dw.to_vec(&cpu).unwrap(),
                WeightGrad::Factored { dy: dx, .. } => dx.to_vec(&cpu).unwrap(),
            };
            let largest = gradient.iter().fold(0.0, |most: f64, g| most.max(f64::from(g.abs())));
            for (at, &got) in gradient.iter().enumerate() {
                let loss = |step: f32| {
                    let mut moved = self.clone();
                    *moved.number(operand, at) += step;
                    moved.loss(&cpu, operation, &dy)
                };
                let difference = |h: f32| {
                    let ((above, e), (below, _)) = (loss(h), loss(-h));
                    ((above - below) / f64::from(2.0 * h), e / f64::from(h))
                };
                let ((want, rounding), (coarse, _)) = (difference(H), difference(2.0 * H));
                let got = f64::from(got);
                let allowed = (coarse - want).abs() + 2.0 * rounding + got.abs() * f64::from(f32::EPSILON);
                assert!((got - want).abs() <= allowed, "{name}, operand {operand}[{at}]: {got}, want {want} ± {allowed:e}");
                assert!(allowed <= 0.02 * largest, "{name}: ± {allowed:e} says nothing of gradients up to {largest}");
            }
        }
    }
}

#[test]
fn derivatives_agree_with_finite_differences() {
    let values = |count: u64, shape: (usize, usize)| -> Vec<_> {
        (0..count).map(|seed| (shape, numbers(shape.0 * shape.1, 5 + seed))).collect()
    };
    let norm = Operands { values: values(1, (3, 8)), weight: Some(numbers(8, 50)) };
    norm.check("rms_norm", |tape, values, params| rms_norm(tape, values[0], &params[0]));
    let gate = Operands { values: values(2, (3, 5)), weight: None };
    gate.check("silu_gate", |tape, values, _| silu_gate(tape, values[0], values[1]));
    let attention = Operands { values: values(3, (6, 4)), weight: None };
    attention
        .check("attention", |tape, values, _| Attention { heads: 2, length: 3 }.forward(tape, [values[0], values[1], values[2]]));
}

#[test]
fn only_adapters_are_trained() {
    let cpu = cpu();
    let mut model = base(&cpu);
    let (before, bits) = (logits(&cpu, &model), base_bits(&cpu, &model));
    model.add_adapters(&cpu, Targets::All, &LoraConfig { dropout: 0.05, ..config() }, &mut Rng::new(1)).unwrap();
    assert!(model.other_params().all(|norm| !norm.trainable), "the norms are frozen with the rest");

    let losses = train(&cpu, &mut model, 150, 1e-2).unwrap();
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    assert!(mean(&losses[140..]) < 0.5 * mean(&losses[..10]), "{losses:?}");
    assert_eq!(base_bits(&cpu, &model), bits);
    assert_ne!(logits(&cpu, &model), before);
    model.set_adapters_enabled(false).unwrap();
    assert_eq!(logits(&cpu, &model), before, "off is the base model, bit for bit");
}

#[test]
fn status_and_counts_are_complete() {
    let cpu = cpu();
    let mut model = base(&cpu);
    model.add_adapters(&cpu, Targets::All, &config(), &mut Rng::new(1)).unwrap();
    model
        .add_adapter(&cpu, "attention", Targets::Names(&["q_proj", "v_proj"]), &LoraConfig::new(2, 2.0), &mut Rng::new(2))
        .unwrap();

    let (attention, mlp, norms) = (4 * 16 * 16, 3 * 16 * 24, 2 * 16);
    let report = model.parameter_report();
    assert_eq!(report.original, 2 * (attention + mlp + norms) + 16 + 4 * 16);
    let all = 2 * (4 * 4 * (16 + 16) + 3 * 4 * (16 + 24)) + 4 * (16 + 4);
    assert_eq!(report.introduced, all + 2 * 2 * 2 * (16 + 16));
    assert_eq!(report.trainable, all, "the first is active, and trained");

    let status = model.status();
    assert_eq!((status.len(), model.adapter_names(), model.active_adapters()), (15, vec![DEFAULT, "attention"], vec![DEFAULT]));
    let both: Vec<&str> = status.iter().filter(|layer| layer.adapters.len() == 2).map(|layer| layer.name.as_str()).collect();
    let projections = [0, 1].map(|i| ["q_proj", "v_proj"].map(|name| format!("model.layers.{i}.self_attn.{name}")));
    assert_eq!(both, projections.concat());
    let unknown = model.add_adapters(&cpu, Targets::Names(&["q_proj", "proj"]), &config(), &mut Rng::new(1)).unwrap_err();
    assert!(
        unknown.to_string().starts_with("no layer is named `proj`; the layers are model.layers.0.self_attn.q_proj, "),
        "{unknown}"
    );

    model.set_active(&["attention"]).unwrap();
    assert_eq!(model.parameter_report().trainable, 2 * 2 * 2 * (16 + 16));
    model.delete_adapter("attention").unwrap();
    model.unload().unwrap();
    assert_eq!((model.status().len(), logits(&cpu, &model)), (0, logits(&cpu, &base(&cpu))));
}

#[test]
fn a_folder_has_the_names_that_peft_has_for_such_a_model() {
    let (cpu, folder) = (cpu(), tempfile::tempdir().unwrap());
    let model = tuned(&cpu, 1);
    adapter::save(&cpu, &model, folder.path()).unwrap();

    let file = fs::read(folder.path().join(TENSORS_FILE)).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"].into_iter();
    let names = names.chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
    let layers = names.flat_map(|name| [0, 1].map(|i| format!("model.layers.{i}.{name}"))).chain(["lm_head".to_string()]);
    let factors = layers.flat_map(|layer| ["A", "B"].map(|factor| format!("base_model.model.{layer}.lora_{factor}.weight")));
    let want: BTreeSet<String> = factors.chain(["__metadata__".to_string()]).collect();
    assert_eq!(header.keys().cloned().collect::<BTreeSet<_>>(), want);

    let mut loaded = base(&cpu);
    adapter::load(&cpu, &mut loaded, folder.path()).unwrap();
    assert_eq!(logits(&cpu, &loaded), logits(&cpu, &model));
    assert_eq!(loaded.parameter_report(), model.parameter_report());

    // Loaded under a name beside another adapter, and swapped for an existing one.
    let mut other = tuned(&cpu, 2);
    adapter::load_as(&cpu, &mut other, "first", folder.path()).unwrap();
    other.set_active(&["first"]).unwrap();
    assert_eq!(logits(&cpu, &other), logits(&cpu, &model));
    other.set_active(&[DEFAULT]).unwrap();
    assert_ne!(logits(&cpu, &other), logits(&cpu, &model));
    adapter::swap(&cpu, &mut other, DEFAULT, folder.path()).unwrap();
    assert_eq!(logits(&cpu, &other), logits(&cpu, &model));
}

/// The error of a layer's output is at most `(depth + 2)·u` of its size, where the depth counts the inputs, the rank, and the rounding of
/// the merged weight. The norms keep the inputs of the next layers at that size. For all 15 layers it is 15 times that.
const MERGED_WITHIN: f64 = 15.0 * (24.0 + 4.0 + 1.0 + 2.0) * (f32::EPSILON / 2.0) as f64;

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], within: f64) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    let error = difference / norm(&mut want.iter().map(|&x| x.into()));
    assert!(error <= within, "{error:e}, at most {within:e}");
}

#[test]
fn merged_equals_unmerged_and_unmerging_is_exact() {
    let cpu = cpu();
    let mut model = tuned(&cpu, 1);
    model.add_adapter(&cpu, "attention", Targets::Names(&["self_attn.o_proj"]), &config(), &mut Rng::new(2)).unwrap();
    let (on, bits) = (logits(&cpu, &model), base_bits(&cpu, &model));
    model.merge_adapters(&cpu).unwrap();
    assert_ne!(base_bits(&cpu, &model), bits);
    assert_close(&logits(&cpu, &model), &on, MERGED_WITHIN);
    model.merge_as(&cpu, &["attention"], lowrank::nn::Merge::default()).unwrap();
    assert!(model.kept().bytes > 0);
    model.unmerge_adapter(&cpu, DEFAULT).unwrap();
    model.unmerge_adapters(&cpu).unwrap();
    assert_eq!((base_bits(&cpu, &model), logits(&cpu, &model)), (bits, on.clone()));
    model.merge_and_unload(&cpu).unwrap();
    assert!(model.status().is_empty());
    assert_close(&logits(&cpu, &model), &on, MERGED_WITHIN);
}

#[test]
fn sixteen_bit_weights_are_restored_too() {
    let cpu = Cpu::<bf16>::new().unwrap();
    let mut model = tuned(&cpu, 1);
    let (on, bits) = (logits(&cpu, &model), base_bits(&cpu, &model));
    model.merge_adapters(&cpu).unwrap();
    model.unmerge_adapters(&cpu).unwrap();
    assert_eq!((base_bits(&cpu, &model), logits(&cpu, &model)), (bits, on));
}

/// A batch whose sequences name their adapters gives the same as one batch for each adapter.
#[test]
fn each_sequence_uses_its_adapter() {
    let cpu = cpu();
    let mut model = tuned(&cpu, 1);
    let other = LoraConfig { init: Init::NonZero, scaling: Scaling::Raw, ..config() };
    model.add_adapter(&cpu, "other", Targets::All, &other, &mut Rng::new(3)).unwrap();
    let x = Batch::new(&cpu, 4, 5).unwrap().x;
    let adapters = [Some("other"), None, Some("other"), Some(DEFAULT)];
    let forward = |tape: &mut _, x, adapters: Adapters<'_>| Decoder::forward(&model, tape, x, None, adapters);
    let mixed = model.predict_mixed_with(&cpu, &x, &adapters, forward).unwrap();

    let (host, size, outputs) = (x.to_vec(&cpu).unwrap(), 6 * 16, 6 * 4);
    for (active, sequences) in [(vec!["other"], vec![0, 2]), (vec![], vec![1]), (vec![DEFAULT], vec![3])] {
        let rows: Vec<f32> = sequences.iter().flat_map(|&at| host[at * size..][..size].to_vec()).collect();
        model.set_active(&active).unwrap();
        let alone = model.predict(&cpu, Tensor::from_slice(&cpu, (6 * sequences.len(), 16), &rows).unwrap()).unwrap();
        let together: Vec<f32> = sequences.iter().flat_map(|&at| mixed[at * outputs..][..outputs].to_vec()).collect();
        assert_eq!(together, alone, "{active:?}");
    }

    let forward = |tape: &mut _, x, adapters: Adapters<'_>| Decoder::forward(&model, tape, x, None, adapters);
    let wrong = |adapters: &[Option<&str>]| model.predict_mixed_with(&cpu, &x, adapters, forward).unwrap_err().to_string();
    let parts = "predict_mixed: `adapters` is 5 for 24 rows, want one for each row, or for each of as many equal parts";
    assert_eq!(wrong(&[None; 5]), parts);
    assert_eq!(wrong(&[None, Some("third")]), "no adapter is named `third`; the adapters are default, other");
    let mut rows = [None; 24];
    rows[0] = Some("other");
    assert_eq!(wrong(&rows), "attention: `q` is 1×16, want rows of whole sequences, and columns for every head");
}

/// Models that lend layers of one name, or in different orders.
struct Pair {
    layers: [(&'static str, Layer<Device>); 2],
    reversed: bool,
}

impl Adaptable<Device> for Pair {
    fn layers(&self) -> impl Iterator<Item = (&str, &Layer<Device>)> {
        self.layers.iter().map(|(name, layer)| (*name, layer))
    }

    fn layers_mut(&mut self) -> impl Iterator<Item = (&str, &mut Layer<Device>)> {
        if self.reversed {
            self.layers.reverse();
        }
        self.layers.iter_mut().map(|(name, layer)| (*name, layer))
    }
}

#[test]
fn layers_of_one_name_or_in_another_order_are_refused() {
    let (cpu, folder) = (cpu(), tempfile::tempdir().unwrap());
    let pair = |names: [&'static str; 2], reversed| {
        let linear = |name| (name, Layer::from(Linear::new(&cpu, 3, 3, &mut Rng::new(1)).unwrap()));
        Pair { layers: names.map(linear), reversed }
    };
    let added = |mut pair: Pair| pair.add_adapters(&cpu, Targets::All, &config(), &mut Rng::new(1)).map(|()| pair);
    let error = |pair| added(pair).err().unwrap().to_string();
    assert_eq!(error(pair(["a", "a"], false)), "add_adapter: `layers` is two of the name `a`, want a name of its own for each");
    let order = "add_adapter: `layers_mut` is not the layers of `layers`, want the same layers in the same order";
    assert_eq!(error(pair(["a", "b"], true)), order);

    let mut fine = added(pair(["a", "b"], false)).ok().unwrap();
    adapter::save(&cpu, &fine, folder.path()).unwrap();
    fine.layers[1].0 = "a";
    let error = adapter::save(&cpu, &fine, folder.path()).unwrap_err().to_string();
    assert!(error.starts_with("save: `layers` is two of the name `a`"), "{error}");
    let mut twice = pair(["a", "a"], false);
    let error = adapter::load(&cpu, &mut twice, folder.path()).unwrap_err().to_string();
    assert!(error.starts_with("load: `layers` is two of the name `a`"), "{error}");
}

#[test]
fn a_config_is_made_without_a_model() {
    let (cpu, folder) = (cpu(), tempfile::tempdir().unwrap());
    let mut model = base(&cpu);
    let settings = LoraConfig { scaling: Scaling::AlphaOverSqrtRank, dropout: 0.1, ..LoraConfig::new(2, 3.0) };
    model.add_adapters(&cpu, Targets::Names(&["q_proj", "down_proj"]), &settings, &mut Rng::new(1)).unwrap();
    let names = ["q_proj", "down_proj"].map(String::from);
    let new = |targets| AdapterConfig::new(&settings, targets).unwrap();
    let config = new(TargetModules::Names(&names)).with_task_type("CAUSAL_LM");
    for (layer, _) in model.layers() {
        let has = model.layer(layer).unwrap().adapter(DEFAULT).map(|adapter| adapter.config().clone());
        assert_eq!(config.lora_config(layer), has, "{layer}");
    }
    adapter::save_with(&cpu, &model, &config, folder.path()).unwrap();
    assert_eq!(fs::read_to_string(folder.path().join(CONFIG_FILE)).unwrap(), config.to_json(), "it tells what the model has");
    assert_eq!(new(TargetModules::AllLinear).target_modules(), TargetModules::AllLinear);
    let pattern = TargetModules::Matching(r".*\.[qk]_proj");
    assert!(new(pattern).lora_config("model.layers.1.self_attn.k_proj").is_some());

    let error = |settings: &LoraConfig, targets| AdapterConfig::new(settings, targets).unwrap_err().to_string();
    let none = error(&settings, TargetModules::Names(&[]));
    assert_eq!(none, "adapter_config: `target_modules` is none, want at least one name");
    let word = error(&settings, TargetModules::Matching("all-linear"));
    assert_eq!(word, "adapter_config: `target_modules` is the pattern `all-linear`, want `TargetModules::AllLinear`");
    assert!(error(&settings, TargetModules::Matching("(")).contains("want a regular expression"));
    assert!(error(&LoraConfig { rank: 0, ..settings.clone() }, TargetModules::AllLinear).contains("`rank` is 0"));
}

/// Moving the principal part of each weight into an adapter keeps the logits.
#[cfg(feature = "svd")]
#[test]
fn an_adapter_is_initialised_with_a_part_of_the_weights() {
    let cpu = cpu();
    let mut model = base(&cpu);
    let (before, bits) = (logits(&cpu, &model), base_bits(&cpu, &model));
    model.add_adapters(&cpu, Targets::Names(&["q_proj", "up_proj"]), &config(), &mut Rng::new(1)).unwrap();
    adapter::init_from_weight(&cpu, &mut model, DEFAULT, "start", adapter::Principal::Pissa).unwrap();
    assert_ne!(base_bits(&cpu, &model), bits);
    assert_close(&logits(&cpu, &model), &before, 2.0 * MERGED_WITHIN); // the factors are rounded as well
    model.unmerge_adapters(&cpu).unwrap();
    assert_eq!(base_bits(&cpu, &model), bits);
}
