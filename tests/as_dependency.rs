//! The crate as a dependency: the files of its package, and a separate crate that uses it without default features.

use std::path::Path;
use std::process::Command;

/// The model of the attention example and its task, which use only the public API.
const MODULES: [&str; 3] = ["model.rs", "ops.rs", "task.rs"];

const MAIN: &str = r#"
#![allow(dead_code)]
mod model;
mod ops;
mod task;

use lowrank::nn::{Adaptable, LoraConfig, Targets};
use lowrank::{Cpu, Tensor, op::LoraForward, random::Rng};

fn main() -> lowrank::Result<()> {
    let cpu = Cpu::<f32>::new()?;
    let new = |rows, cols, number: f32| Tensor::from_slice(&cpu, (rows, cols), &vec![number; rows * cols]);
    let (x, w, a, b) = (new(2, 3, 1.0)?, new(4, 3, 0.5)?, new(1, 3, 1.0)?, new(4, 1, 2.0)?);
    let (mut h, mut y) = (Tensor::zeros(&cpu, (2, 1))?, Tensor::zeros(&cpu, (2, 4))?);
    let op = LoraForward { x: x.view(), w: Some((&w).into()), bias: None, a: (&a).into(), b: (&b).into(), scale: 0.25, dropout: None, h: h.view_mut(), y: (&mut y).into() };
    op.run(&cpu)?;
    assert_eq!(y.to_vec(&cpu)?, [3.0; 8]);

    let mut model = model::Decoder::new(&cpu, task::SIZES, &mut Rng::new(0))?;
    model.add_adapters(&cpu, Targets::Names(&["q_proj", "v_proj"]), &LoraConfig::new(2, 4.0), &mut Rng::new(1))?;
    task::train(&cpu, &mut model, 2, 1e-2)?;
    let logits = |model: &model::Decoder<_>| model.predict(&cpu, task::Batch::new(&cpu, 2, 0)?.x);
    let before = logits(&model)?;
    model.merge_adapters(&cpu)?;
    model.unmerge_adapters(&cpu)?;
    assert_eq!(logits(&model)?, before);
    println!("it works on {}", lowrank::Backend::device(&cpu));
    Ok(())
}
"#;

#[test]
fn a_crate_that_depends_on_this_one_runs_without_default_features() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dependent");
    std::fs::create_dir_all(dir.join("src")).unwrap();
    let manifest = format!(
        "[package]\nname = \"dependent\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
         lowrank = {{ path = {root:?}, default-features = false }}\n"
    );
    std::fs::write(dir.join("Cargo.toml"), manifest).unwrap();
    std::fs::write(dir.join("src/main.rs"), MAIN).unwrap();
    for module in MODULES {
        std::fs::copy(root.join("examples/attention").join(module), dir.join("src").join(module)).unwrap();
    }
    std::fs::copy(root.join("Cargo.lock"), dir.join("Cargo.lock")).unwrap();

    // Offline, as all dependencies were fetched for the tests.
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--offline"]).current_dir(&dir).env("CARGO_TARGET_DIR", dir.join("target"));
    let output = cargo.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("it works on cpu"), "{out}{err}");
    let lock = std::fs::read_to_string(dir.join("Cargo.lock")).unwrap();
    for optional in ["safetensors", "flate2", "wgpu", "cudarc"] {
        assert!(!lock.contains(&format!("name = \"{optional}\"")), "{optional} came along");
    }
}

#[test]
fn the_package_contains_what_the_readme_links_to() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline", "--package", "lowrank"]).current_dir(root);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let packed: Vec<&str> = listed.lines().collect();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let links = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files: Vec<&str> = links.filter(|link| !link.starts_with('#') && !link.contains("://")).collect();
    assert!(files.contains(&"ARCHITECTURE.md"), "{files:?}");
    files.iter().for_each(|file| assert!(packed.contains(file), "{file} is not packed: {packed:?}"));
    assert_eq!(packed.iter().filter(|file| file.ends_with("README.md")).count(), 1, "{packed:?}");
}
