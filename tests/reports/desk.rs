//! A folder with tiny models and adapters, the program run on them, and sums in f64 to compare with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lowrank::random::Rng;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// Random elements that depend only on the seed.
    pub fn random(seed: u64, shape: &[usize]) -> Self {
        let mut rng = Rng::new(seed);
        let values = (0..shape.iter().product::<usize>()).map(|_| rng.gaussian() as f32).collect();
        Self { shape: shape.into(), values }
    }

    /// Rows as columns.
    pub fn transposed(&self) -> Self {
        let (rows, cols) = (self.shape[0], self.shape[1]);
        let values = (0..rows * cols).map(|at| self.values[at % rows * cols + at / rows]).collect();
        Self { shape: vec![cols, rows], values }
    }

    /// The element in row i and column j; the first dimension is that of rows.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        f64::from(self.values[i * (self.values.len() / self.shape[0]) + j])
    }
}

/// Tensors of these names and shapes.
pub fn tensors(named: &[(&str, &[usize])]) -> Tensors {
    let numbered = named.iter().enumerate();
    numbered.map(|(at, (name, shape))| (name.to_string(), Tensor::random(at as u64 + 1, shape))).collect()
}

/// Two layers of a language model, its embedding, and optionally a separate head.
pub fn language_model(prefix: &str, head: Option<&str>) -> Tensors {
    let mut named: Vec<(String, Vec<usize>)> = vec![(format!("{prefix}embed_tokens.weight"), vec![10, 6])];
    for layer in 0..2 {
        let modules = [("self_attn.q_proj", [6, 6]), ("self_attn.v_proj", [4, 6]), ("mlp.up_proj", [8, 6])];
        named.extend(modules.map(|(module, shape)| (format!("{prefix}layers.{layer}.{module}.weight"), shape.to_vec())));
        named.push((format!("{prefix}layers.{layer}.norm.weight"), vec![6]));
    }
    named.extend(head.map(|head| (format!("{head}.weight"), vec![10, 6])));
    tensors(&named.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect::<Vec<_>>())
}

/// The factors of modules with n outputs and k inputs, of rank 2.
pub fn factors(modules: &[(&str, [usize; 2])]) -> Tensors {
    let mut made = Tensors::new();
    for (at, (module, [n, k])) in modules.iter().enumerate() {
        made.insert(format!("{module}.lora_A.weight"), Tensor::random(100 + at as u64, &[2, *k]));
        made.insert(format!("{module}.lora_B.weight"), Tensor::random(200 + at as u64, &[*n, 2]));
    }
    made
}

/// PEFT's prefix of names.
pub fn prefixed(tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(name, tensor)| (format!("base_model.model.{name}"), tensor.clone())).collect()
}

/// `scale·B·A`, as n rows, and the sums of the magnitudes of its terms.
pub fn product(a: &Tensor, b: &Tensor, scale: f64) -> Vec<[f64; 2]> {
    let (r, k) = (a.shape[0], a.values.len() / a.shape[0]);
    let element = |i: usize, j: usize| {
        let terms = (0..r).map(|q| scale * b.at(i, q) * a.at(q, j));
        terms.fold([0.0; 2], |[sum, size], term| [sum + term, size + term.abs()])
    };
    (0..b.shape[0]).flat_map(|i| (0..k).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
}

/// Rows as columns.
pub fn turned<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    let rows = values.len() / cols;
    (0..values.len()).map(|at| values[at % rows * cols + at / rows]).collect()
}

/// Asserts that each element is `base + delta`, within the rounding error of sums of `depth` terms in f32 and one rounding.
#[track_caller]
pub fn is_sum(got: &Tensor, base: &Tensor, delta: &[[f64; 2]], depth: usize) {
    const UNIT: f64 = 1.0 / (1 << 24) as f64;
    assert_eq!((&got.shape, got.values.len()), (&base.shape, delta.len()));
    for ((got, base), [delta, size]) in got.values.iter().zip(&base.values).zip(delta) {
        let (want, bound) = (f64::from(*base) + delta, (depth + 3) as f64 * UNIT * (f64::from(base.abs()) + size));
        assert!((f64::from(*got) - want).abs() <= bound, "{got} {want}");
    }
}

/// Asserts that each row of `base + delta` is scaled to a norm, within the rounding errors of the sums, the norm and two more roundings.
#[track_caller]
pub fn has_lengths(got: &[f32], base: &[f32], delta: &[[f64; 2]], lengths: &[f32], depth: usize) {
    const UNIT: f64 = 1.0 / (1 << 24) as f64;
    let cols = got.len() / lengths.len();
    for (row, length) in lengths.iter().enumerate() {
        let at = row * cols..(row + 1) * cols;
        let sums: Vec<[f64; 2]> = base[at.clone()]
            .iter()
            .zip(&delta[at.clone()])
            .map(|(base, [delta, size])| [f64::from(*base) + delta, (depth + 3) as f64 * UNIT * (f64::from(base.abs()) + size)])
            .collect();
        let norm = sums.iter().map(|[sum, _]| sum * sum).sum::<f64>().sqrt();
        let off = sums.iter().map(|[_, off]| off * off).sum::<f64>().sqrt() / norm;
        for (got, [sum, bound]) in got[at].iter().zip(&sums) {
            let (gain, slack) = (f64::from(*length) / norm, off / (1.0 - off) + 4.0 * UNIT);
            assert!(
                (f64::from(*got) - sum * gain).abs() <= gain.abs() * (bound + (sum.abs() + bound) * slack),
                "{got} {}",
                sum * gain
            );
        }
    }
}

pub struct Desk(tempfile::TempDir);

impl Desk {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub fn store(&self, name: &str, tensors: &Tensors) {
        let bytes: Vec<_> =
            tensors.values().map(|t| t.values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).collect();
        let views = tensors.iter().zip(&bytes);
        let views = views.map(|((name, t), bytes)| (name, TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap()));
        self.write(name, serialize(views, None).unwrap());
    }

    /// Writes a model's folder.
    pub fn model(&self, name: &str, tensors: &Tensors, config: &Value) {
        self.store(&format!("{name}/model.safetensors"), tensors);
        self.write(&format!("{name}/config.json"), config.to_string());
    }

    /// Writes the adapter's folder `adapter`: rank 2, scaling 2, unless the settings differ.
    pub fn adapter(&self, tensors: &Tensors, settings: Value) {
        let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []});
        let settings = settings.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(settings);
        self.write("adapter/adapter_config.json", config.to_string());
        self.store("adapter/adapter_model.safetensors", tensors);
    }

    pub fn load(&self, name: &str) -> Tensors {
        let path = self.path(name);
        let inside = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let files: Vec<PathBuf> = if path.is_dir() { inside(&path) } else { vec![path] };
        let mut tensors = Tensors::new();
        for path in files.iter().filter(|path| path.extension().is_some_and(|end| end == "safetensors")) {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let values = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                let twice = tensors.insert(name.to_string(), Tensor { shape: view.shape().to_vec(), values });
                assert!(twice.is_none(), "{name} is there twice");
            }
        }
        tensors
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    pub fn run(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lowrank")).args(line.split_whitespace()).current_dir(self.0.path()).output().unwrap()
    }

    /// Asserts that the program succeeds, and returns its output.
    #[track_caller]
    pub fn good(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "lowrank {line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asserts that the program fails with a message that contains these words.
    #[track_caller]
    pub fn refused(&self, line: &str, words: &[&str]) {
        let output = self.run(line);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "lowrank {line}: {message}");
        words.iter().for_each(|word| assert!(message.contains(word), "lowrank {line}: {message}: no {word}"));
    }

    /// Merges `adapter` into `base`, and returns the merged tensors and the output.
    #[track_caller]
    pub fn merged(&self) -> (Tensors, String) {
        let said = self.good("merge --base base --adapter adapter --out merged --overwrite");
        (self.load("merged"), said)
    }

    /// Asserts that unmerging with a residue restores `base` bit for bit, in every element type.
    #[track_caller]
    pub fn comes_back(&self) {
        for dtype in ["f32", "f16", "bf16"] {
            self.good(&format!("convert base --dtype {dtype} --out half-{dtype}"));
            self.good(&format!(
                "merge --base half-{dtype} --adapter adapter --out merged-{dtype} --keep-residue {dtype}.residue"
            ));
            self.good(&format!("unmerge --base merged-{dtype} --adapter adapter --out back-{dtype} --residue {dtype}.residue"));
            let read = |folder: &str| fs::read(self.path(&format!("{folder}-{dtype}/model.safetensors"))).unwrap();
            assert!(read("back") == read("half") && read("merged") != read("half"), "{dtype}");
        }
    }
}
