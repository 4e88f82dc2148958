//! The program `lowrank`, as a process: each subcommand, PEFT's merged weights, shards, and errors that name the problem and
//! leave no partial output.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lowrank::adapter::{Folder, parse_tensors};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

/// A folder to work in.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn run(&self, line: &str) -> Output {
        let words: Vec<&str> = line.split_whitespace().collect();
        Command::new(env!("CARGO_BIN_EXE_lowrank")).args(words).current_dir(self.0.path()).output().unwrap()
    }

    /// Asserts that the program succeeds, and returns its output.
    #[track_caller]
    fn good(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "lowrank {line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asserts that the program fails with a message that contains these words, and creates no files.
    #[track_caller]
    fn refused(&self, line: &str, words: &[&str]) {
        let before = self.names();
        let output = self.run(line);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "lowrank {line}: {message}");
        assert!(message.starts_with("lowrank: ") && !message.contains("panicked"), "{message}");
        words.iter().for_each(|word| assert!(message.contains(word), "lowrank {line}: {message}: no {word}"));
        assert_eq!(self.names(), before, "lowrank {line}");
    }

    /// Writes the base weights and the adapter of a case from PEFT, and returns its expected tensors.
    fn case(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let case = tests().join("cases").join(name);
        fs::create_dir(self.path("adapter")).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(case.join(file), self.path("adapter").join(file)).unwrap();
        }
        let expected = fs::read(case.join("expected.safetensors")).unwrap();
        fs::write(self.path("base.safetensors"), part(&expected, "base.")).unwrap();
        expected
    }
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// The tensors of a file whose names have this prefix, without it.
fn part(bytes: &[u8], prefix: &str) -> Vec<u8> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensors = file.iter().filter_map(|(name, view)| Some((name.strip_prefix(prefix)?.to_string(), view)));
    serialize(tensors, None).unwrap()
}

#[track_caller]
fn same(got: &[u8], want: &[u8], tolerance: f64, what: &str) {
    let (got, want) = (parse_tensors(got).unwrap(), parse_tensors(want).unwrap());
    assert!(got.keys().eq(want.keys()), "{what}");
    for (name, want) in want {
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let off = square(&mut got[&name].values.iter().zip(&want.values).map(|(got, want)| f64::from(*got) - f64::from(*want)));
        let norm = square(&mut want.values.iter().map(|want| f64::from(*want)));
        assert!(off <= tolerance * norm, "{what}: {name}: {}", off / norm);
    }
}

#[test]
fn merging_gives_pefts_merged_weights() {
    let paths = ["cases", "principal"].map(|folder| fs::read_dir(tests().join(folder)).unwrap());
    let folders: Vec<_> = paths.into_iter().flatten().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    assert!(folders.len() >= 16);
    for folder in folders {
        let (desk, name) = (Desk::new(), folder.display().to_string());
        let expected = desk.case(&folder);
        desk.good("merge --base base.safetensors --adapter adapter --out merged.safetensors");
        same(&fs::read(desk.path("merged.safetensors")).unwrap(), &part(&expected, "merged."), 1e-5, &name);
        assert_eq!(desk.names(), ["adapter", "base.safetensors", "merged.safetensors"]);
    }
}

#[test]
fn unmerging_restores_within_rounding_or_bit_for_bit() {
    let desk = Desk::new();
    desk.case("peft_plain");
    desk.good("merge --base base.safetensors --adapter adapter --out merged.safetensors --keep-residue residue.safetensors");
    let said = desk.good("unmerge --base merged.safetensors --adapter adapter --out near.safetensors");
    assert!(said.contains("within rounding"));
    let said =
        desk.good("unmerge --base merged.safetensors --adapter adapter --out back.safetensors --residue residue.safetensors");
    assert!(said.contains("bit for bit"));
    let read = |name: &str| fs::read(desk.path(name)).unwrap();
    assert_eq!(read("back.safetensors"), read("base.safetensors"));
    assert_ne!(read("merged.safetensors"), read("base.safetensors"));
    same(&read("near.safetensors"), &read("base.safetensors"), 1e-6, "unmerged");
    desk.good("unmerge --merged merged.safetensors --adapter adapter --out same.safetensors");
    assert_eq!(read("same.safetensors"), read("near.safetensors"));
    assert!(desk.good("unmerge --help").contains("--merged"));
}

/// DoRA, biases and whole modules can be unmerged only with a residue; without it, the error says so.
#[test]
fn dora_biases_and_whole_modules_are_unmerged_with_a_residue() {
    for (name, hidden) in [
        ("peft_dora", Some("`linear1.weight`")),
        ("peft_lora_bias", None),
        ("peft_bias_all", Some("`linear1.bias`")),
        ("peft_bias_lora_only", Some("`linear1.bias`")),
        ("peft_modules_to_save", Some("`linear3.bias`")),
    ] {
        let desk = Desk::new();
        desk.case(name);
        for dtype in ["f32", "f16", "bf16"] {
            let file = |what: &str| format!("{what}-{dtype}.safetensors");
            let [base, merged, back, residue] = ["half", "merged", "back", "residue"].map(file);
            desk.good(&format!("convert base.safetensors --dtype {dtype} --out {base}"));
            desk.good(&format!("merge --base {base} --adapter adapter --out {merged} --keep-residue {residue}"));
            desk.good(&format!("unmerge --base {merged} --adapter adapter --out {back} --residue {residue}"));
            let read = |name: &str| fs::read(desk.path(name)).unwrap();
            assert!(read(&back) == read(&base) && read(&merged) != read(&base), "{name} {dtype}");
            let without = format!("unmerge --base {merged} --adapter adapter --out {}", file("near"));
            match hidden {
                Some(tensor) => desk.refused(&without, &[tensor, "without the residue"]),
                None => drop(desk.good(&without)),
            }
        }
        assert!(desk.good("info adapter --all").contains("adapter of"));
        desk.good("convert adapter --dtype bf16 --out narrow");
        Folder::read(&desk.path("narrow")).unwrap();
    }
    let desk = Desk::new();
    desk.case(tests().join("principal/peft_pissa"));
    let keep = "merge --base base.safetensors --adapter adapter --out x.safetensors --keep-residue y.safetensors";
    desk.refused(keep, &["init_lora_weights", "pissa"]);
    desk.refused("unmerge --base base.safetensors --adapter adapter --out x.safetensors", &["init_lora_weights", "pissa"]);
}

/// A model that stores its weights as `in × out`, like GPT-2.
#[test]
fn weights_stored_in_by_out_are_merged() {
    let desk = Desk::new();
    let expected = desk.case("peft_plain");
    let turned = |bytes: &[u8]| {
        let file = SafeTensors::deserialize(bytes).unwrap();
        let turn = |(name, view): (&str, TensorView<'_>)| {
            let (shape, words) = (view.shape().to_vec(), view.data().as_chunks::<4>().0.to_vec());
            let &[n, k] = &shape[..] else { return (name.to_string(), shape, words.concat()) };
            (name.to_string(), vec![k, n], (0..k * n).flat_map(|at| words[at % n * k + at / n]).collect())
        };
        let data: Vec<_> = file.iter().map(turn).collect();
        let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        serialize(views, None).unwrap()
    };
    let base = turned(&fs::read(desk.path("base.safetensors")).unwrap());
    fs::write(desk.path("base.safetensors"), base).unwrap();
    let merge = "merge --base base.safetensors --adapter adapter --out merged.safetensors";
    desk.refused(merge, &["is 13×11, want 11×13"]);
    let path = desk.path("adapter/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["fan_in_fan_out"] = json!(true);
    fs::write(path, config.to_string()).unwrap();
    desk.good(merge);
    same(&fs::read(desk.path("merged.safetensors")).unwrap(), &turned(&part(&expected, "merged.")), 1e-5, "turned");
}

/// The base in two shards, with other files in the folder.
fn shard(desk: &Desk, folder: &str) {
    let bytes = fs::read(desk.path("base.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    fs::create_dir(desk.path(folder)).unwrap();
    let name = |last: bool| format!("model-0000{}-of-00002.safetensors", 1 + usize::from(last));
    let mut map = serde_json::Map::new();
    for last in [false, true] {
        let of = |tensor: &str| tensor.starts_with("linear3") == last;
        file.iter().filter(|(tensor, _)| of(tensor)).for_each(|(tensor, _)| drop(map.insert(tensor.into(), name(last).into())));
        let tensors = file.iter().filter(|(tensor, _)| of(tensor));
        fs::write(desk.path(folder).join(name(last)), serialize(tensors, None).unwrap()).unwrap();
    }
    let index = json!({"metadata": {"total_size": bytes.len()}, "weight_map": map});
    fs::write(desk.path(folder).join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(desk.path(folder).join("config.json"), "{}").unwrap();
    fs::write(desk.path(folder).join("pytorch_model.bin"), "not copied").unwrap();
}

/// The copied config.json has the new element type and is otherwise unchanged; without `--dtype` it is copied byte for byte.
#[test]
fn a_copied_config_has_the_new_element_type() {
    let desk = Desk::new();
    desk.case("peft_plain");
    shard(&desk, "base");
    let theirs = r#"{"torch_dtype":"float32","eps":1e-05,"text_config":{"dtype":"float32","vocab":5},
        "quantization_config":{"dtype":"float32"},"dtype":"auto","a":null}"#;
    fs::write(desk.path("base/config.json"), theirs).unwrap();
    let config = |folder: &str| fs::read_to_string(desk.path(folder).join("config.json")).unwrap();
    desk.good("merge --base base --adapter adapter --out same");
    assert_eq!(config("same"), theirs);
    desk.good("convert base --dtype f32 --out wide");
    assert_eq!(config("wide"), theirs);
    desk.good("merge --base base --adapter adapter --out merged --dtype bf16");
    desk.good("convert base --dtype f16 --out half");
    for (folder, name) in [("merged", "bfloat16"), ("half", "float16")] {
        let mut want: Value = serde_json::from_str(theirs).unwrap();
        (want["torch_dtype"], want["text_config"]["dtype"]) = (json!(name), json!(name));
        assert_eq!(config(folder), format!("{want:#}\n"), "{folder}"); // the order of keys as well
    }
    fs::write(desk.path("base/config.json"), "no JSON").unwrap();
    desk.good("convert base --dtype f16 --out other");
    assert_eq!(config("other"), "no JSON");
}

#[test]
fn shards_are_merged_into_a_folder_of_shards() {
    let desk = Desk::new();
    let expected = desk.case("peft_plain");
    shard(&desk, "base");
    let files =
        ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"];
    for base in ["base", "base/model.safetensors.index.json"] {
        desk.good(&format!("merge --base {base} --adapter adapter --out merged"));
        let mut names: Vec<_> = fs::read_dir(desk.path("merged")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, files);
        let mut tensors = Vec::new();
        for file in &files[1..3] {
            let bytes = fs::read(desk.path("merged").join(file)).unwrap();
            let wanted = SafeTensors::deserialize(&fs::read(desk.path("base").join(file)).unwrap()).unwrap().names().len();
            assert_eq!(SafeTensors::deserialize(&bytes).unwrap().names().len(), wanted);
            tensors.extend(parse_tensors(&bytes).unwrap());
        }
        let want = parse_tensors(&part(&expected, "merged.")).unwrap();
        assert_eq!(tensors.len(), want.len());
        for (name, tensor) in tensors {
            let worst = tensor.values.iter().zip(&want[&name].values).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-5, "{name}: {worst}");
        }
        desk.refused(&format!("merge --base {base} --adapter adapter --out merged"), &["merged", "already"]);
        fs::remove_dir_all(desk.path("merged")).unwrap();
    }
    desk.good("convert base --dtype bf16 --out half");
    let index: Value = serde_json::from_slice(&fs::read(desk.path("half/model.safetensors.index.json")).unwrap()).unwrap();
    let elements: usize = parse_tensors(&part(&expected, "base.")).unwrap().values().map(|tensor| tensor.values.len()).sum();
    assert_eq!(index["metadata"]["total_size"], 2 * elements);
}

#[test]
fn an_inconsistent_index_is_refused() {
    let desk = Desk::new();
    desk.case("peft_plain");
    shard(&desk, "base");
    let index = desk.path("base/model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    for (file, words) in [
        (json!("../base.safetensors"), "want the name of a file beside the index"),
        (json!("/etc/passwd"), "want the name of a file beside the index"),
        (json!(7), "want the name of a file beside the index"),
        (json!("missing.safetensors"), "missing.safetensors"),
        (json!("model-00002-of-00002.safetensors"), "`linear1.weight` is not in model-00002-of-00002.safetensors"),
    ] {
        let mut bad = good.clone();
        bad["weight_map"]["linear1.weight"] = file;
        fs::write(&index, bad.to_string()).unwrap();
        desk.refused("merge --base base --adapter adapter --out merged", &[words]);
    }
    for bad in ["", "{}", "[]", r#"{"weight_map": {}}"#] {
        fs::write(&index, bad).unwrap();
        desk.refused("info base", &["index.json"]);
    }
}

#[test]
fn damaged_and_hostile_files_are_refused() {
    let desk = Desk::new();
    desk.case("peft_plain");
    let whole = fs::read(desk.path("base.safetensors")).unwrap();
    let merge = "merge --base bad.safetensors --adapter adapter --out merged.safetensors";
    let hostile = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat();
    let bad = [
        Vec::new(),
        vec![0; 7],
        whole[..whole.len() - 1].to_vec(),
        whole[..40].to_vec(),
        [whole.as_slice(), &[0]].concat(),
        u64::MAX.to_le_bytes().to_vec(),
        [&u64::MAX.to_le_bytes(), whole.as_slice()].concat(),
        hostile("{"),
        hostile(r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#),
        hostile(r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#),
        hostile(r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#),
        hostile(r#"{"x":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#),
        hostile(r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#),
        hostile(r#"{"x":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#),
    ];
    for bytes in bad {
        fs::write(desk.path("bad.safetensors"), bytes).unwrap();
        desk.refused(merge, &["bad.safetensors"]);
        desk.refused("convert bad.safetensors --dtype f16 --out half.safetensors", &["bad.safetensors"]);
    }
    desk.refused("info nowhere", &["nowhere"]);
    desk.refused("merge --base base.safetensors --adapter nowhere --out x", &["nowhere"]);
    desk.refused("merge --base base.safetensors --adapter adapter --out no/such/folder", &["no/such/folder"]);
    fs::write(desk.path("adapter/adapter_model.safetensors"), &whole).unwrap();
    desk.refused("merge --base base.safetensors --adapter adapter --out x", &["`linear1.bias` is not part of an adapter"]);
}

fn write(path: &Path, tensors: &[(&str, Dtype, &[usize])]) {
    let zeros = [0; 4096];
    let view = |&(name, dtype, shape): &(_, Dtype, &[usize])| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorView::new(dtype, shape.into(), &zeros[..bytes]).unwrap())
    };
    fs::write(path, serialize(tensors.iter().map(view), None).unwrap()).unwrap();
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_with_names_and_shapes() {
    let desk = Desk::new();
    desk.case("peft_plain");
    let merge = "merge --base model.safetensors --adapter adapter --out merged.safetensors";
    let model = desk.path("model.safetensors");
    let fits: [(&str, Dtype, &[usize]); 3] = [
        ("linear1.weight", Dtype::F32, &[11, 13]),
        ("linear2.weight", Dtype::F32, &[9, 11]),
        ("linear3.weight", Dtype::F32, &[7, 9]),
    ];
    write(&model, &fits);
    desk.good(merge);
    fs::remove_file(desk.path("merged.safetensors")).unwrap();
    write(&model, &fits[..2]);
    desk.refused(merge, &["model.safetensors", "`linear3.weight`"]);
    write(&model, &[fits[0], fits[1], ("linear3.weight", Dtype::F32, &[9, 7])]);
    desk.refused(merge, &["`linear3.weight` is 9×7, want 7×9"]);
    write(&model, &[fits[0], fits[1], ("linear3.weight", Dtype::I32, &[7, 9])]);
    desk.refused(merge, &["`linear3.weight` holds I32"]);
}

#[test]
fn non_finite_results_are_refused_unless_allowed() {
    let desk = Desk::new();
    desk.case("peft_plain");
    let mut bytes = fs::read(desk.path("base.safetensors")).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(desk.path("base.safetensors"), bytes).unwrap();
    let merge = "merge --base base.safetensors --adapter adapter --out merged.safetensors";
    desk.refused(merge, &["weight` is not finite after merging"]);
    desk.refused(&format!("{merge} --keep-residue residue"), &["weight` is not finite after merging"]);
    desk.good(&format!("{merge} --allow-non-finite"));
}

#[test]
fn another_element_type_is_rounded_once_and_overflow_is_refused() {
    let desk = Desk::new();
    let expected = desk.case("peft_plain");
    for (dtype, unit) in [("f32", 1e-5), ("f16", 1.0 / 2048.0), ("bf16", 1.0 / 256.0)] {
        desk.good(&format!("merge --base base.safetensors --adapter adapter --out {dtype}.safetensors --dtype {dtype}"));
        let merged = fs::read(desk.path(&format!("{dtype}.safetensors"))).unwrap();
        let spelled = dtype.to_uppercase();
        let file = SafeTensors::deserialize(&merged).unwrap();
        assert!(file.iter().all(|(_, view)| format!("{:?}", view.dtype()) == spelled));
        same(&merged, &part(&expected, "merged."), unit + 1e-5, dtype);
        desk.good(&format!("convert base.safetensors --dtype {dtype} --out half-{dtype}.safetensors"));
        same(&fs::read(desk.path(&format!("half-{dtype}.safetensors"))).unwrap(), &part(&expected, "base."), unit, dtype);
    }
    desk.refused("merge --base base.safetensors --adapter adapter --out x --dtype f16 --keep-residue y", &["dtype", "residue"]);
    let large = 1e6f32.to_le_bytes();
    let view = TensorView::new(Dtype::F32, vec![1], &large).unwrap();
    fs::write(desk.path("large.safetensors"), serialize([("x", view)], None).unwrap()).unwrap();
    desk.refused("convert large.safetensors --dtype f16 --out x.safetensors", &["`x` holds 1000000, more than f16 can"]);
    desk.good("convert adapter --dtype bf16 --out narrow");
    let narrow = Folder::read(&desk.path("narrow")).unwrap();
    assert_eq!((narrow.dtype(), narrow.modules().len()), (lowrank::DType::BF16, 3));
}

#[test]
fn a_merged_adapter_can_be_extracted_compressed_and_combined() {
    let desk = Desk::new();
    let expected = desk.case("peft_plain");
    desk.good("merge --base base.safetensors --adapter adapter --out tuned.safetensors");
    desk.good("extract --base base.safetensors --tuned tuned.safetensors --rank 3 --out extracted");
    desk.good("merge --base base.safetensors --adapter extracted --out again.safetensors --overwrite");
    same(&fs::read(desk.path("again.safetensors")).unwrap(), &part(&expected, "merged."), 1e-5, "extracted");

    desk.good("combine adapter extracted --weights 0.5,0.5 --type svd --out mean");
    desk.good("merge --base base.safetensors --adapter mean --out again.safetensors --overwrite");
    same(&fs::read(desk.path("again.safetensors")).unwrap(), &part(&expected, "merged."), 1e-5, "combined");
    desk.good("combine adapter extracted --weights 1,-1 --type cat --out nothing");
    desk.good("merge --base base.safetensors --adapter nothing --out again.safetensors --overwrite");
    same(&fs::read(desk.path("again.safetensors")).unwrap(), &part(&expected, "base."), 1e-5, "combined");

    desk.good("compress adapter --rank 1 --out small");
    assert!(Folder::read(&desk.path("small")).unwrap().modules().values().all(|factors| factors.rank() == 1));
    desk.good("compress adapter --energy 0.9 --out smaller");
    assert!(desk.good("info small --all").contains("linear1  A 1×13  B 11×1  scaling 1"));
    assert!(desk.good("info base.safetensors").contains("checkpoint of 6 tensors in 1 file,"));

    desk.refused("extract --base base.safetensors --tuned base.safetensors --rank 1 --out x", &["no weight differs"]);
    desk.refused("extract --base base.safetensors --tuned tuned.safetensors --rank 0 --out x", &["rank"]);
    desk.refused("compress adapter --energy 2 --out x", &["energy"]);
    desk.refused("combine adapter extracted --weights 1 --out x", &["`weights` is 1 numbers"]);
    desk.refused("combine adapter extracted --type ties --out x", &["`density` is missing"]);
    let biased = fs::read(desk.path("base.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&biased).unwrap();
    let ones = 1f32.to_le_bytes().repeat(11);
    let tensors = file.iter().map(|(name, view)| {
        (name, if name == "linear1.bias" { TensorView::new(Dtype::F32, vec![11], &ones).unwrap() } else { view })
    });
    fs::write(desk.path("biased.safetensors"), serialize(tensors, None).unwrap()).unwrap();
    desk.refused(
        "extract --base base.safetensors --tuned biased.safetensors --rank 1 --out x",
        &["other values than in the base: `linear1.bias`"],
    );
}

/// Every command of docs/program.md, in its order.
#[test]
fn the_commands_of_the_programs_page_run() {
    let desk = Desk::new();
    desk.case("peft_plain");
    fs::create_dir(desk.path("model")).unwrap();
    fs::copy(desk.path("base.safetensors"), desk.path("model/model.safetensors")).unwrap();
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/program.md")).unwrap();
    let commands: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("lowrank ")).collect();
    for verb in ["info", "merge", "unmerge", "extract", "combine", "compress", "convert", "quantise", "dequantise"] {
        assert!(commands.iter().any(|line| line.starts_with(verb)), "docs/program.md does not show `lowrank {verb}`");
    }
    for line in commands {
        desk.good(line.split('#').next().unwrap_or_default());
    }
}
