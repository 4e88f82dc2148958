//! What every reader of files must do with any bytes: each function takes some, and panics if a promise is broken.
//!
//! `fuzz_targets/` gives them to libFuzzer. `tests/fuzz_corpus.rs` of the crate runs them on the files in `corpus/`.

mod idx;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub use idx::idx;
use lowrank::adapter::formats::{Base, Hints, Modules, by_first_bytes, by_tensors, outline, recognise};
use lowrank::adapter::{AdapterConfig, parse_tensors};
use lowrank::checkpoint::{Checkpoint, convert, dequantise};
use lowrank::distributed::Sampler;
use lowrank::nn::{Adam, Adaptable, LoraConfig, Mlp, Targets};
use lowrank::random::Rng;
use lowrank::training::{Progress, resume_from_bytes, save};
use lowrank::{Cpu, DType, Error};

/// A reader, given any bytes.
pub type Target = fn(&[u8]);

/// The targets by name, which is also the name of their folder in `corpus/`.
pub const TARGETS: [(&str, Target); 7] = [
    ("adapter_config", adapter_config),
    ("adapter_tensors", adapter_tensors),
    ("base", base),
    ("checkpoint", checkpoint),
    ("formats", formats),
    ("idx", idx),
    ("resume", resume),
];

/// A folder of this process, which is removed when dropped.
struct Desk(PathBuf);

impl Desk {
    fn new(target: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("lowrank-fuzz-{target}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for temporary files");
        Self(folder)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).expect("a file in it");
        path
    }

    fn names(&self) -> usize {
        fs::read_dir(&self.0).expect("the folder").count()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Any bytes are a config or an error; a config that was read is written and read again as the same.
pub fn adapter_config(bytes: &[u8]) {
    let Ok(config) = AdapterConfig::from_json(bytes) else { return };
    let json = config.to_json();
    let again = AdapterConfig::from_json(json.as_bytes()).expect("what was written is read");
    assert_eq!(json, again.to_json());
    for layer in ["linear1", "linear2", "model.layers.0.q_proj"] {
        assert_eq!(config.lora_config(layer), again.lora_config(layer));
    }
}

/// Any bytes are tensors or an error; what is read fits into its own shape and is no larger than the file.
pub fn adapter_tensors(bytes: &[u8]) {
    let Ok(tensors) = parse_tensors(bytes) else { return };
    for (name, tensor) in &tensors {
        assert_eq!(tensor.values.len(), tensor.shape.iter().product::<usize>(), "{name}");
    }
    let elements: usize = tensors.values().map(|tensor| tensor.values.len()).sum();
    assert!(2 * elements <= bytes.len());
}

/// Any bytes are the config of a model or an error.
pub fn base(bytes: &[u8]) {
    let desk = Desk::new("base");
    desk.write("config.json", bytes);
    let _ = Base::read(&desk.0);
}

/// Any bytes are a checkpoint or an error; what is read lies within the file, and is written again whole or not at all: converted,
/// and dequantised.
pub fn checkpoint(bytes: &[u8]) {
    let desk = Desk::new("checkpoint");
    let path = desk.write("base.safetensors", bytes);
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    assert!(checkpoint.entries().all(|entry| entry.start + entry.bytes as u64 <= bytes.len() as u64));
    for name in checkpoint.quantised_names().unwrap_or_default() {
        let _ = checkpoint.quantised(&name);
    }
    let mut on = |_| ControlFlow::Continue(());
    let whole_or_not = |out: &Path, written: Result<(), Error>| {
        assert_eq!(written.is_ok(), out.exists());
        assert_eq!(desk.names(), 1 + usize::from(written.is_ok()), "nothing else is left");
        match written {
            Ok(()) => fs::remove_file(out).expect("the file is there"),
            Err(error) => assert!(matches!(error, Error::File { .. } | Error::Value { .. } | Error::TooLarge { .. }), "{error}"),
        }
    };
    let out = desk.0.join("out.safetensors");
    whole_or_not(&out, convert(&checkpoint, DType::BF16, &out, &mut on));
    whole_or_not(&out, dequantise(&checkpoint, None, &out, &mut on).map(drop));
}

/// Any bytes are an adapter, something else that is named, or an error; an adapter that was read is written, whole or not at all.
pub fn formats(bytes: &[u8]) {
    let _ = (by_first_bytes(bytes), outline(bytes).map(|tensors| by_tensors(&tensors)));
    let desk = Desk::new("formats");
    let (path, out) = (desk.write("adapter.safetensors", bytes), desk.0.join("out"));
    let _ = recognise(&path);
    for hints in [Hints::default(), Hints { alpha: Some(1.0), ..Hints::default() }] {
        if let Ok(modules) = Modules::read(&path, &hints) {
            let _ =
                (modules.write_peft(&out), modules.write_mlx_lm(&out), modules.write_kohya(&out.join("kohya"), Some("lora_te")));
        }
    }
}

/// Any bytes are a checkpoint of this run or an error, which leaves the model as it was; one that was read is written with the same
/// bytes.
pub fn resume(bytes: &[u8]) {
    let path = Path::new("training.safetensors");
    let (cpu, mut rng) = (Cpu::<f32>::new().expect("a CPU"), Rng::new(0));
    let mut model = Mlp::new(&cpu, &[3, 2], &mut rng).expect("a model");
    model.add_adapters(&cpu, Targets::All, &LoraConfig::new(1, 2.0), &mut rng).expect("adapters");
    let (mut adam, sampler) = (Adam::new(1e-3).expect("a rate"), Sampler::new(10, 2, 0).expect("batches"));
    let numbers = |model: &mut Mlp<Cpu<f32>>| -> Vec<u32> {
        let host = |param: &mut lowrank::autograd::Param<Cpu<f32>>| param.tensor().to_vec(&cpu).expect("numbers");
        model.params_mut().flat_map(host).map(f32::to_bits).collect()
    };
    let before = numbers(&mut model);
    match resume_from_bytes(bytes, path, &cpu, &mut model, &mut adam, "rank 1") {
        Ok(progress) => {
            let mut position = sampler;
            let _ = position.seek(progress.position);
            let desk = Desk::new("resume");
            let out = desk.0.join("training.safetensors");
            save(&out, &cpu, &mut model, &adam, &progress).expect("what was read is written");
            let again = fs::read(&out).expect("the file is there");
            let Progress { step, .. } =
                resume_from_bytes(&again, path, &cpu, &mut model, &mut adam, "rank 1").expect("what was written is read");
            assert_eq!(step, progress.step);
        }
        Err(_) => assert!(numbers(&mut model) == before, "a refused file changes nothing"),
    }
}
