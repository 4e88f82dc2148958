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
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
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
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline", "--package", "lowrank"]).current_dir(root);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let packed: Vec<&str> = listed.lines().collect();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let links = readme.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let files: Vec<&str> = links.filter(|link| !link.is_empty() && !link.contains("://")).collect();
    assert!(files.contains(&"ARCHITECTURE.md"), "{files:?}");
    files.iter().for_each(|file| assert!(packed.contains(file), "{file} is not packed: {packed:?}"));
    assert_eq!(packed.iter().filter(|file| file.ends_with("README.md")).count(), 1, "{packed:?}");
}

/// docs/adding-a-verb.md lists the files of the verb `lora_row_norm`.
#[test]
fn the_list_of_files_for_a_verb_is_complete() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let page = std::fs::read_to_string(root.join("docs/adding-a-verb.md")).unwrap();
    let item =
        |line: &str| line.split_once(". `").filter(|(number, _)| number.parse::<u32>().is_ok()).map(|(_, rest)| rest.to_owned());
    let listed: Vec<String> = page.lines().filter_map(item).filter_map(|rest| Some(rest.split_once('`')?.0.to_owned())).collect();
    assert!(listed.len() > 20, "{listed:?}");
    let names_it = |path: &Path| {
        std::fs::read_to_string(path).is_ok_and(|text| text.contains("lora_row_norm") || text.contains("LoraRowNorm"))
    };
    listed.iter().for_each(|file| assert!(names_it(&root.join(file)), "{file} is listed, and does not name the verb"));
    let mut folders: Vec<_> = ["src/op", "src/backend", "kernels", "shaders"].map(|folder| root.join(folder)).into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let is_made = file.ends_with(".ptx") || file.ends_with("registers.txt");
            if path.is_dir() {
                folders.push(path);
            } else if !is_made && names_it(&path) && !MENTIONS.contains(&file.as_str()) {
                assert!(listed.contains(&file), "{file} names the verb, and is not listed");
            }
        }
    }
}

/// Files that name the verb and need not change for another.
const MENTIONS: [&str; 2] = ["src/op/magnitude.rs", "src/backend/cuda/sources.rs"];
