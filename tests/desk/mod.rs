//! A folder in which the program runs, and the small files that go into it.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use lowrank::adapter::{Folder, HostTensor, HostTensors, parse_tensors};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

/// A folder to work in.
pub struct Desk(tempfile::TempDir);

/// A name and a shape.
pub type Tensor<'t> = (&'t str, &'t [usize]);

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

    /// A safetensors file of numbers that are all different.
    pub fn tensors(&self, name: &str, tensors: &[Tensor<'_>]) {
        self.typed(name, tensors, Dtype::F32, None);
    }

    pub fn typed(&self, name: &str, tensors: &[Tensor<'_>], dtype: Dtype, metadata: Option<(&str, String)>) {
        let (mut at, mut data) = (0, Vec::new());
        for (_, shape) in tensors {
            let len: usize = shape.iter().product();
            let bytes: Vec<u8> = (at..at + len).flat_map(|i| (0.25 + i as f32 / 8.0).to_le_bytes()).collect();
            data.push(bytes[..len * dtype.bitsize() / 8].to_vec());
            at += len;
        }
        let view =
            |((name, shape), data): (&Tensor<'_>, _)| (name.to_string(), TensorView::new(dtype, shape.to_vec(), data).unwrap());
        let metadata = metadata.map(|(key, text)| [(key.to_string(), text)].into());
        self.write(name, serialize(tensors.iter().zip(&data).map(|(tensor, data)| view((tensor, data))), metadata).unwrap());
    }

    pub fn json(&self, name: &str, value: &Value) {
        self.write(name, value.to_string());
    }

    /// A PEFT folder of modules n×k.
    pub fn adapter(&self, dir: &str, modules: &[(&str, [usize; 3])], settings: &Value) {
        let names: Vec<_> =
            modules.iter().map(|(name, _)| ["A", "B"].map(|f| format!("base_model.model.{name}.lora_{f}.weight"))).collect();
        let shapes: Vec<_> = modules.iter().map(|(_, [n, k, r])| [[*r, *k], [*n, *r]]).collect();
        let tensors: Vec<Tensor<'_>> =
            (0..2 * names.len()).map(|i| (names[i / 2][i % 2].as_str(), &shapes[i / 2][i % 2][..])).collect();
        self.tensors(&format!("{dir}/adapter_model.safetensors"), &tensors);
        let targets: Vec<&str> = modules.iter().map(|(name, _)| *name).collect();
        let mut config = json!({"peft_type": "LORA", "r": modules[0].1[2], "lora_alpha": 6, "target_modules": targets});
        config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        self.json(&format!("{dir}/adapter_config.json"), &config);
    }

    /// The names of everything in the folder, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn run(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lowrank")).args(line.split_whitespace()).current_dir(self.0.path()).output().unwrap()
    }

    #[track_caller]
    pub fn good(&self, line: &str, words: &[&str]) {
        let output = self.run(line);
        assert!(output.status.success(), "lowrank {line}: {}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8(output.stdout).unwrap();
        words.iter().for_each(|word| assert!(said.contains(word), "lowrank {line}: {said}: no {word}"));
    }

    #[track_caller]
    pub fn refused(&self, line: &str, words: &[&str]) {
        let output = self.run(line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "lowrank {line}: {said}");
        assert!(!said.contains("panicked") && !said.contains("header"), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "lowrank {line}: {said}: no {word}"));
        assert!(!self.path("out").exists());
    }

    pub fn read(&self, name: &str) -> HostTensors {
        parse_tensors(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// The same bits, ranks and scalings.
    #[track_caller]
    pub fn same(&self, one: &str, other: &str) {
        assert_eq!(
            self.read(&format!("{one}/adapter_model.safetensors")),
            self.read(&format!("{other}/adapter_model.safetensors"))
        );
        let read = |dir: &str| Folder::read(&self.path(dir)).unwrap();
        assert_eq!(read(one).modules(), read(other).modules());
    }

    /// The file with the tensors in a folder.
    pub fn tensors_of(&self, dir: &str) -> &'static str {
        let names = ["adapters.safetensors", "adapter_model.safetensors"];
        names.into_iter().find(|name| self.path(dir).join(name).exists()).unwrap()
    }

    /// Writes tensors back as f32, under PEFT's prefix.
    pub fn store(&self, name: &str, tensors: &HostTensors) {
        let bytes = |tensor: &HostTensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let data: Vec<_> = tensors.iter().map(|(name, tensor)| (name, tensor, bytes(tensor))).collect();
        let views = data.iter().map(|(name, tensor, data)| {
            (format!("base_model.model.{name}"), TensorView::new(Dtype::F32, tensor.shape.clone(), data).unwrap())
        });
        self.write(name, serialize(views, None).unwrap());
    }
}
