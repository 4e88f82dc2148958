//! Reads reference cases (tests/cases/README.md), computes them on a backend, and compares the results.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use lowrank::autograd::Tape;
use lowrank::nn::{Adam, Adaptable, Adapter, DEFAULT, LayerAdapter, Linear, LoraConfig, Mlp, Scaling};
use lowrank::op::{Labels, LoraMerge, Rounding};
use lowrank::{Backend, Error, adapter};
use safetensors::tensor::{Dtype, SafeTensors};

use super::bounds::relative_error;
use super::data::{down, up};
use super::oracle::{Lora, Mat};
use super::suite::{run_linear, run_lora};

/// `‖got − want‖ / ‖want‖` for arithmetic in `f32`.
pub const TOLERANCE: f64 = 1e-5;

/// A message that says what is wrong.
pub type Outcome<T> = Result<T, String>;

/// Tensors by name. A vector is one row; a batch of matrices is one matrix with all rows.
pub type Mats = BTreeMap<String, Mat>;

/// The outputs of a backend, by the names of the expected ones.
pub type Outputs = BTreeMap<String, Vec<f32>>;

/// A case: settings, inputs and expected outputs.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub task: Task,
    pub want: Mats,
}

#[derive(Clone, Debug)]
pub enum Task {
    LoraLinear { inputs: Mats, scale: f64 },
    MlpTrace { inputs: Mats, scale: f32, adam: [f32; 4] },
    Peft { inputs: Mats, folder: PathBuf },
    MixedBatch { inputs: Mats, scales: Vec<f32> },
    UnclaimedOp { op: String },
}

/// Every case of a folder. `Err` if there is none, or one cannot be read.
pub fn read_all(folder: &Path) -> Outcome<Vec<Case>> {
    let listing = fs::read_dir(folder).and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
    let mut paths: Vec<PathBuf> = listing.map_err(|error| format!("{}: {error}", folder.display()))?;
    paths.retain(|path| path.extension().is_none_or(|extension| extension != "md"));
    paths.sort();
    if paths.is_empty() {
        return Err(format!("{}: no cases", folder.display()));
    }
    paths.iter().map(|path| read(path)).collect()
}

/// One case: a file, or the folder of an adapter.
pub fn read(path: &Path) -> Outcome<Case> {
    let read = if path.is_dir() { read_peft(path) } else { read_file(path) };
    let (task, want) = read.map_err(|reason| format!("{}: {reason}", path.display()))?;
    Ok(Case { name: path.file_name().unwrap_or_default().to_string_lossy().into(), task, want })
}

fn read_file(path: &Path) -> Outcome<(Task, Mats)> {
    let (metadata, tensors) = read_tensors(path)?;
    let entry = |key: &str| metadata.get(key).cloned().ok_or_else(|| format!("no `{key}` in the metadata"));
    let scalar = |key: &str| entry(key)?.parse::<f64>().map_err(|error| format!("{key}: {error}"));
    let part = |prefix: &str| -> Mats {
        tensors.iter().filter_map(|(name, mat)| Some((name.strip_prefix(prefix)?.to_string(), mat.clone()))).collect()
    };
    let inputs = part("in.");
    let task = match entry("op")?.as_str() {
        "lora_linear" => Task::LoraLinear { inputs, scale: scalar("scale")? },
        "mlp_trace" => {
            let adam = [scalar("lr")?, scalar("beta1")?, scalar("beta2")?, scalar("eps")?];
            Task::MlpTrace { inputs, scale: scalar("scale")? as f32, adam: adam.map(|x| x as f32) }
        }
        "mixed_batch" => {
            let scales = serde_json::from_str(&entry("scales")?).map_err(|error| format!("scales: {error}"))?;
            Task::MixedBatch { inputs, scales }
        }
        op => Task::UnclaimedOp { op: op.into() },
    };
    Ok((task, part("out.")))
}

fn read_peft(folder: &Path) -> Outcome<(Task, Mats)> {
    let (_, tensors) = read_tensors(&folder.join("expected.safetensors"))?;
    let (inputs, want) = tensors.into_iter().partition(|(name, _)| name.starts_with("base.") || name == "x");
    Ok((Task::Peft { inputs, folder: folder.into() }, want))
}

fn read_tensors(path: &Path) -> Outcome<(HashMap<String, String>, Mats)> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| error.to_string())?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
    let mut mats = Mats::new();
    for (name, view) in file.iter() {
        let cols = view.shape().last().copied().unwrap_or(1);
        let rows = view.shape().iter().rev().skip(1).product();
        let data = match view.dtype() {
            Dtype::F32 => view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes).into()).collect(),
            Dtype::F64 => view.data().as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect(),
            Dtype::I32 => view.data().as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect(),
            other => return Err(format!("{name} holds {other:?}")),
        };
        mats.insert(name.into(), Mat::from_vec(rows, cols, data));
    }
    Ok((header.metadata().clone().unwrap_or_default(), mats))
}

impl Case {
    /// The reason why the crate does not support it, if so.
    pub fn unclaimed(&self) -> Option<String> {
        match &self.task {
            Task::UnclaimedOp { op } => Some(format!("op {op}")),
            Task::LoraLinear { .. } | Task::MlpTrace { .. } | Task::Peft { .. } | Task::MixedBatch { .. } => None,
        }
    }

    /// The outputs of a backend; none for a case that is not supported, after checking that it is refused.
    pub fn run<B: Backend<Elem = f32>>(&self, backend: &B) -> Outcome<Outputs> {
        let outputs = match &self.task {
            Task::LoraLinear { inputs, scale } => lora_linear(backend, inputs, *scale),
            Task::MlpTrace { inputs, scale, adam } => mlp_trace(backend, inputs, *scale, *adam),
            Task::Peft { inputs, folder } => peft(backend, inputs, folder),
            Task::MixedBatch { inputs, scales } => mixed_batch(backend, inputs, scales),
            Task::UnclaimedOp { .. } => Ok(Outputs::new()),
        };
        outputs.map_err(|reason| format!("{}: {reason}", self.name))
    }

    /// The expected outputs that are missing or wrong.
    pub fn failures(&self, outputs: &Outputs) -> Vec<String> {
        let fails = |name: &str, want: &Mat| match outputs.get(name) {
            None => Some("was not put out".to_string()),
            Some(got) if got.len() != want.data.len() => Some(format!("has {} elements, want {}", got.len(), want.data.len())),
            Some(got) => {
                let error = relative_error(got, want);
                // Written so that NaN fails.
                if error <= TOLERANCE { None } else { Some(format!("is off by {error:e}")) }
            }
        };
        let wanted = self.want.iter().filter(|_| self.unclaimed().is_none());
        wanted.filter_map(|(name, want)| Some(format!("{}: {name} {}", self.name, fails(name, want)?))).collect()
    }
}

fn get<'m>(mats: &'m Mats, name: &str) -> Outcome<&'m Mat> {
    mats.get(name).ok_or_else(|| format!("no tensor {name}"))
}

fn said(error: Error) -> String {
    error.to_string()
}

/// Runs single verbs. A given dropout mask cannot be produced from a seed, so the adapter then runs on `x ⊙ mask`, separately from the
/// base layer; the suite covers masks from seeds.
fn lora_linear<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats, scale: f64) -> Outcome<Outputs> {
    let input = |name| get(inputs, name).cloned();
    let (x, w, bias) = (input("x")?, input("weight")?, inputs.get("bias").cloned());
    let (a, b, dy) = (input("lora_a")?, input("lora_b")?, input("grad_y")?);
    let layer = Lora { mask: x.map(|_| 1.0), x, w, bias, a, b, dy, scale };
    let mut got = match inputs.get("dropout_mask") {
        None => run_lora(backend, &layer, None),
        Some(mask) => {
            let masked = Lora { x: layer.x.times(mask), w: layer.w.map(|_| 0.0), bias: None, ..layer.clone() };
            let mut update = run_lora(backend, &masked, None);
            let (y, dx, _, _) = run_linear(backend, &layer);
            update.y.iter_mut().zip(y).for_each(|(update, base)| *update += base);
            let dropped = update.dx.iter_mut().zip(&mask.data);
            dropped.zip(dx).for_each(|((update, &mask), base)| *update = *update * mask as f32 + base);
            update
        }
    };
    let (a, b, mut merged) = (up(backend, &layer.a), up(backend, &layer.b), up(backend, &layer.w));
    LoraMerge { a: (&a).into(), b: (&b).into(), scale: scale as f32, rounding: Rounding::Nearest, w: merged.view_mut() }
        .run(backend)
        .map_err(said)?;
    let outputs = [
        ("y", std::mem::take(&mut got.y)),
        ("grad_x", got.dx),
        ("grad_lora_a", got.da),
        ("grad_lora_b", got.db),
        ("grad_bias", got.dbias),
        ("merged_weight", down(backend, &merged)),
    ];
    Ok(outputs.map(|(name, output)| (name.to_string(), output)).into())
}

/// Layers `prefix(0)`, `prefix(1)`, … as long as they exist.
fn mlp<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats, prefix: impl Fn(usize) -> String) -> Outcome<Mlp<B>> {
    let mut layers = Vec::new();
    while let Some(weight) = inputs.get(&format!("{}.weight", prefix(layers.len()))) {
        let bias = inputs.get(&format!("{}.bias", prefix(layers.len()))).map(|bias| up(backend, bias));
        layers.push(Linear::from_tensors(up(backend, weight), bias).map_err(said)?);
    }
    Mlp::from_layers(layers).map_err(said)
}

/// Runs training steps with the tape, the layers and the optimizer.
fn mlp_trace<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats, scale: f32, adam: [f32; 4]) -> Outcome<Outputs> {
    let mut model = mlp(backend, inputs, |layer| format!("layer.{layer}"))?;
    let names: Vec<String> = model.layers().map(|(name, _)| name.to_string()).collect();
    let mut adapters = Vec::new();
    for (layer, name) in names.into_iter().enumerate() {
        let (a, b) = (get(inputs, &format!("layer.{layer}.lora_a"))?, get(inputs, &format!("layer.{layer}.lora_b"))?);
        let config = LoraConfig { scaling: Scaling::Raw, ..LoraConfig::new(a.rows, scale) };
        adapters.push((name, Adapter::from_tensors(up(backend, a), up(backend, b), config).map_err(said)?));
    }
    model.set_adapters(adapters).map_err(said)?;

    let [lr, beta1, beta2, eps] = adam;
    let mut adam = Adam::new(lr).map_err(said)?;
    (adam.beta1, adam.beta2, adam.eps) = (beta1, beta2, eps);
    let (batches, labels) = (get(inputs, "batches")?, get(inputs, "labels")?);
    let mut losses = Vec::new();
    for step in 0..labels.rows {
        let rows = step * labels.cols;
        let x = Mat::new(labels.cols, batches.cols, |i, j| batches.at(rows + i, j));
        let labels: Vec<u32> = (0..labels.cols).map(|i| labels.at(step, i) as u32).collect();
        losses.push(train_step(backend, &mut model, &mut adam, &x, &labels).map_err(said)?);
    }
    let mut outputs = Outputs::from([("losses".to_string(), losses)]);
    for (layer, (_, adapter)) in model.adapters(DEFAULT).enumerate() {
        outputs.insert(format!("layer.{layer}.lora_a"), down(backend, adapter.a().tensor()));
        outputs.insert(format!("layer.{layer}.lora_b"), down(backend, adapter.b().tensor()));
    }
    Ok(outputs)
}

fn train_step<B: Backend<Elem = f32>>(
    backend: &B,
    model: &mut Mlp<B>,
    adam: &mut Adam<B>,
    x: &Mat,
    labels: &[u32],
) -> lowrank::Result<f32> {
    let mut tape = Tape::new(backend);
    let x = tape.input(up(backend, x));
    let logits = model.forward(&mut tape, x, None)?;
    let classes = tape.value(logits).unwrap().cols();
    let loss = tape.cross_entropy(logits, &Labels::new(backend, classes, labels)?)?;
    let gradients = tape.backward()?;
    adam.step(backend, model.params_mut(), &gradients)?;
    Ok(down(backend, &loss)[0])
}

/// Runs an adapter that PEFT saved: enabled, disabled and merged; the base weights are restored by unmerging, bit for bit.
fn peft<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats, folder: &Path) -> Outcome<Outputs> {
    let mut model = base_net(backend, inputs)?;
    let before = base(backend, &model, "base");
    let x = get(inputs, "x")?;
    let predict = |model: &Mlp<B>| model.predict(backend, up(backend, x));
    let mut run = || -> lowrank::Result<Outputs> {
        adapter::load(backend, &mut model, folder)?;
        let mut outputs = Outputs::from([("y_adapter".to_string(), predict(&model)?)]);
        model.set_adapters_enabled(false)?;
        outputs.insert("y_base".into(), predict(&model)?);
        model.set_adapters_enabled(true)?;
        model.merge_adapters(backend)?;
        outputs.insert("y_merged".into(), predict(&model)?);
        model.unmerge_adapters(backend)?;
        outputs.extend(base(backend, &model, "unmerged"));
        model.merge_and_unload(backend)?;
        outputs.extend(base(backend, &model, "merged"));
        Ok(outputs)
    };
    let outputs = run().map_err(said)?;
    let bits = |outputs: &Outputs, what: &str| -> Vec<u32> {
        let base = outputs.iter().filter(|(name, _)| name.starts_with(what));
        base.flat_map(|(_, values)| values).map(|x| x.to_bits()).collect()
    };
    let restored = bits(&outputs, "unmerged.") == bits(&before, "base.");
    if restored { Ok(outputs) } else { Err("unmerging does not restore the base weights".into()) }
}

/// The network that an adapter of PEFT is for.
pub fn base_net<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats) -> Outcome<Mlp<B>> {
    mlp(backend, inputs, |layer| format!("base.linear{}", layer + 1))
}

/// The current weights and biases of the base layers.
fn base<B: Backend<Elem = f32>>(backend: &B, model: &Mlp<B>, what: &str) -> Outputs {
    let mut outputs = Outputs::new();
    for (name, layer) in model.layers() {
        outputs.insert(format!("{what}.{name}.weight"), down(backend, layer.base().weight().tensor()));
        let bias = layer.base().bias().map(|bias| down(backend, bias.tensor()));
        outputs.extend(bias.map(|bias| (format!("{what}.{name}.bias"), bias)));
    }
    outputs
}

/// Runs a layer with several adapters on a batch whose rows name their adapters.
fn mixed_batch<B: Backend<Elem = f32>>(backend: &B, inputs: &Mats, scales: &[f32]) -> Outcome<Outputs> {
    let bias = inputs.get("bias").map(|bias| up(backend, bias));
    let base = Linear::from_tensors(up(backend, get(inputs, "weight")?), bias).map_err(said)?;
    let mut model = Mlp::from_layers(vec![base]).map_err(said)?;
    for (i, &scale) in scales.iter().enumerate() {
        let (a, b) = (get(inputs, &format!("adapter.{i}.lora_a"))?, get(inputs, &format!("adapter.{i}.lora_b"))?);
        let config = LoraConfig { scaling: Scaling::Raw, ..LoraConfig::new(a.rows, scale) };
        let adapter = Adapter::from_tensors(up(backend, a), up(backend, b), config).map_err(said)?;
        model.insert_adapter(&format!("a{i}"), vec![("linear1".into(), LayerAdapter::Lora(adapter))]).map_err(said)?;
    }
    let names: Vec<Option<String>> =
        get(inputs, "adapter_index")?.data.iter().map(|&i| (i >= 0.0).then(|| format!("a{i}"))).collect();
    let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
    let y = model.predict_mixed(backend, &up(backend, get(inputs, "x")?), &names).map_err(said)?;
    Ok(Outputs::from([("y".into(), y)]))
}
