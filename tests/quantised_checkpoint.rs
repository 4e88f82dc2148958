//! Checkpoints that bitsandbytes quantised: read, written, merged into, and refused where they are damaged.
#![cfg(feature = "checkpoint")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use half::bf16;
use lowrank::adapter::Folder;
use lowrank::checkpoint::{Checkpoint, Merge, Quantise, dequantise, merge, quantise};
use lowrank::quant::{Blocks, QuantKind};
use lowrank::random::Rng;
use lowrank::{DType, Error};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};

fn fixture(name: &str) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let root = if root.is_dir() { root } else { Path::new(".") };
    root.join("tests/quantised").join(name)
}

fn on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let view = |(dtype, shape, bytes): &'_ (Dtype, Vec<usize>, Vec<u8>)| (*dtype, shape.clone(), bytes.clone());
    let owned: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor))).collect();
    let views = owned.iter().map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    serialize_to_file(views, None, path).unwrap();
}

#[test]
fn dequantises_to_what_bitsandbytes_does() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("plain.safetensors");
    let model = Checkpoint::open(&fixture("model.safetensors")).unwrap();
    assert_eq!(model.quantised_names().unwrap(), ["a.weight", "b.weight", "c.weight", "d.weight"]);
    let notes = dequantise(&model, None, &out, &mut on).unwrap();
    assert!(notes.iter().any(|note| note.starts_with("4 weights")), "{notes:?}");
    assert!(read(&out) == read(&fixture("plain.safetensors")));
}

/// A plain model of two layers, an embedding, a bias, and a norm.
fn plain(path: &Path, dtype: Dtype) -> Tensors {
    let mut rng = Rng::new(2);
    let mut tensor = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        let number = |_| rng.unit() as f32 - 0.5;
        let bytes = match dtype {
            Dtype::BF16 => (0..count).map(number).flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => (0..count).map(number).flat_map(f32::to_le_bytes).collect(),
        };
        (dtype, shape.to_vec(), bytes)
    };
    let names: [(&str, &[usize]); 5] = [
        ("fc1.weight", &[24, 128]),
        ("fc1.bias", &[24]),
        ("fc2.weight", &[7, 24]),
        ("lm_head.weight", &[5, 7]),
        ("norm.weight", &[7]),
    ];
    let tensors: Tensors = names.into_iter().map(|(name, shape)| (name.to_string(), tensor(shape))).collect();
    write(path, &tensors);
    tensors
}

#[test]
fn quantised_and_dequantised_is_what_the_codes_say() {
    let temporary = tempfile::tempdir().unwrap();
    let [model, small, back] = ["model", "small", "back"].map(|name| temporary.path().join(format!("{name}.safetensors")));
    let nf4 = |len, double| QuantKind::Nf4(Blocks { len, double });
    let fp4 = QuantKind::Fp4(Blocks { len: 64, double: true });
    for kind in [nf4(64, true), nf4(64, false), nf4(128, true), fp4, QuantKind::Int8] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let tensors = plain(&model, dtype);
            let base = Checkpoint::open(&model).unwrap();
            let notes = quantise(&Quantise { base: &base, kind, out: &small, skip: &[] }, &mut on).unwrap();
            assert!(notes.last().unwrap().starts_with(&format!("2 weights quantised as {kind}")), "{notes:?}");
            let quantised = Checkpoint::open(&small).unwrap();
            assert_eq!(quantised.quantised_names().unwrap(), ["fc1.weight", "fc2.weight"]);
            for name in ["fc1.weight", "fc2.weight"] {
                let numbers = base.tensor(name).unwrap().values;
                let shape = (tensors[name].1[0], tensors[name].1[1]);
                let want = lowrank::quant::HostQuantised::quantise(shape, &numbers, kind).unwrap();
                assert!(quantised.quantised(name).unwrap() == want, "{name}, {kind:?}");
            }
            dequantise(&quantised, Some(DType::F32), &back, &mut on).unwrap();
            let (dense, stored) = (read(&back), read(&small));
            for name in ["fc1.bias", "lm_head.weight", "norm.weight"] {
                assert!(dense[name] == tensors[name] && stored[name] == tensors[name], "{name}");
            }
            let got: Vec<f32> = bytemuck::pod_collect_to_vec(&dense["fc1.weight"].2);
            assert!(got == quantised.quantised("fc1.weight").unwrap().dequantise::<f32>(), "{kind:?}");
            assert!(
                quantise(&Quantise { base: &quantised, kind, out: &back, skip: &[] }, &mut on).is_err(),
                "it is quantised already"
            );
            [&small, &back].iter().for_each(|path| std::fs::remove_file(path).unwrap());
        }
    }
}

#[test]
fn a_sharded_folder_keeps_its_index_and_its_config_says_what_it_is() {
    let temporary = tempfile::tempdir().unwrap();
    let [folder, out, back] = ["model", "out", "back"].map(|name| temporary.path().join(name));
    std::fs::create_dir(&folder).unwrap();
    let tensors = plain(&folder.join("one.safetensors"), Dtype::BF16);
    let (one, two): (Tensors, Tensors) = tensors.clone().into_iter().partition(|(name, _)| name.starts_with("fc1"));
    write(&folder.join("one.safetensors"), &one);
    write(&folder.join("two.safetensors"), &two);
    let file = |name: &String| if one.contains_key(name) { "one.safetensors" } else { "two.safetensors" };
    let map: BTreeMap<_, _> = tensors.keys().map(|name| (name.clone(), file(name))).collect();
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"model_type": "llama", "torch_dtype": "bfloat16"}"#).unwrap();
    let base = Checkpoint::open(&folder).unwrap();
    quantise(&Quantise { base: &base, kind: QuantKind::NF4, out: &out, skip: &["fc2".into()] }, &mut on).unwrap();
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("\"bnb_4bit_quant_type\": \"nf4\"") && config.contains("\"fc2\""), "{config}");
    let quantised = Checkpoint::open(&out).unwrap();
    assert_eq!(quantised.quantised_names().unwrap(), ["fc1.weight"]);
    dequantise(&quantised, None, &back, &mut on).unwrap();
    assert!(!std::fs::read_to_string(back.join("config.json")).unwrap().contains("quantization_config"));
    let back = Checkpoint::open(&back).unwrap();
    assert_eq!(back.entries().count(), tensors.len());
    assert_eq!(back.tensor("fc1.weight").unwrap().dtype, DType::BF16);
}

fn adapter(folder: &Path) -> Folder {
    std::fs::create_dir_all(folder).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc1"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let numbers = |count: usize| (0..count).flat_map(|i| (((i % 13) as f32 - 6.0) / 20.0).to_le_bytes()).collect::<Vec<u8>>();
    let tensors = [("A", vec![2, 128]), ("B", vec![24, 2])].map(|(factor, shape)| {
        let bytes = numbers(shape.iter().product());
        (format!("base_model.model.fc1.lora_{factor}.weight"), (Dtype::F32, shape, bytes))
    });
    write(&folder.join("adapter_model.safetensors"), &tensors.into_iter().collect());
    Folder::read(folder).unwrap()
}

#[test]
fn merging_into_a_quantised_model_is_merging_into_what_it_stands_for() {
    let temporary = tempfile::tempdir().unwrap();
    let path = |name: &str| temporary.path().join(name);
    plain(&path("model.safetensors"), Dtype::BF16);
    let base = Checkpoint::open(&path("model.safetensors")).unwrap();
    quantise(&Quantise { base: &base, kind: QuantKind::NF4, out: &path("small.safetensors"), skip: &[] }, &mut on).unwrap();
    let small = Checkpoint::open(&path("small.safetensors")).unwrap();
    dequantise(&small, Some(DType::F32), &path("dense.safetensors"), &mut on).unwrap();
    let (dense, adapter) = (Checkpoint::open(&path("dense.safetensors")).unwrap(), adapter(&path("adapter")));
    let want = path("want.safetensors");
    merge(&Merge { dtype: Some(DType::BF16), ..Merge::new(&dense, &adapter, &want) }, &mut on).unwrap();
    let got = path("got.safetensors");
    merge(&Merge::new(&small, &adapter, &got), &mut on).unwrap();
    assert!(read(&got) == read(&want));

    let again = path("again.safetensors");
    let notes = merge(&Merge { requantise: Some(QuantKind::NF4), ..Merge::new(&small, &adapter, &again) }, &mut on).unwrap();
    assert!(notes.iter().any(|note| note.contains("times the update itself")), "{notes:?}");
    assert_eq!(Checkpoint::open(&again).unwrap().quantised_names().unwrap(), ["fc1.weight", "fc2.weight"]);

    let (never, residue) = (path("never.safetensors"), path("residue"));
    let kept = Merge { keep_residue: Some(&residue), ..Merge::new(&small, &adapter, &never) };
    assert!(matches!(merge(&kept, &mut on), Err(Error::Value { name: "keep_residue", .. })));
    let plain = Merge { requantise: Some(QuantKind::NF4), ..Merge::new(&base, &adapter, &never) };
    assert!(matches!(merge(&plain, &mut on), Err(Error::Value { name: "requantise", .. })));
    let mut left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.retain(|name| name.to_string_lossy().contains("dequantised") || name.to_string_lossy().contains("never"));
    assert!(left.is_empty(), "{left:?}");
}

/// Each way in which the tensors of a quantised weight may not fit one another is an error that names the tensor.
#[test]
fn damaged_checkpoints_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let (path, out) = (temporary.path().join("bad.safetensors"), temporary.path().join("out.safetensors"));
    let good = read(&fixture("model.safetensors"));
    let state = "a.weight.quant_state.bitsandbytes__nf4";
    let text = String::from_utf8(good[state].2.clone()).unwrap();
    let refused = |names: &str, damage: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        damage(&mut tensors);
        write(&path, &tensors);
        let opened = Checkpoint::open(&path).unwrap();
        match dequantise(&opened, None, &out, &mut on) {
            Err(error @ (Error::File { .. } | Error::TooLarge { .. })) => assert!(error.to_string().contains(names), "{error}"),
            other => panic!("{names}: {other:?}"),
        }
        assert!(!out.exists());
    };
    let json = |from: &'static str, to: &'static str| {
        assert!(text.contains(from), "{from} in {text}");
        let new = text.replacen(from, to, 1).into_bytes();
        move |tensors: &mut Tensors| drop(tensors.insert(state.into(), (Dtype::U8, vec![new.len()], new.clone())))
    };
    refused("blocksize", &json("\"blocksize\": 64", "\"blocksize\": 63"));
    refused("blocksize", &json("\"blocksize\": 64", "\"blocksize\": -1"));
    refused("quant_type", &json("\"nf4\"", "\"fp4\""));
    refused("quant_type", &json("\"nf4\"", "null"));
    refused("shape", &json("[9, 70]", "[9, 70, 1]"));
    refused("shape", &json("[9, 70]", "\"9x70\""));
    refused("a.weight", &json("[9, 70]", "[9, 71]"));
    refused("elements", &json("[9, 70]", "[9223372036854775807, 70]"));
    refused("dtype", &json("\"bfloat16\"", "\"int4\""));
    refused("nested_blocksize", &json("\"nested_blocksize\": 256", "\"nested_blocksize\": 128"));
    refused("nested_offset", &json("\"nested_offset\"", "\"other\""));
    refused("no JSON", &json("{", "{{"));
    for part in ["a.weight", "a.weight.absmax", "a.weight.quant_map", "a.weight.nested_quant_map", "b.weight.absmax"] {
        refused(part, &|tensors| drop(tensors.remove(part)));
        refused(part.split(".absmax").next().unwrap(), &|tensors| {
            let (dtype, _, bytes) = tensors[part].clone();
            let size = if dtype == Dtype::F32 { 4 } else { 1 };
            tensors.insert(part.into(), (dtype, vec![bytes.len() / size - 1], bytes[size..].to_vec()));
        });
    }
    refused("a.weight", &|tensors| drop(tensors.remove("a.weight.nested_absmax")));
    refused("a.weight", &|tensors| drop(tensors.remove(state)));
    refused("d.SCB", &|tensors| drop(tensors.remove("d.weight")));
    let fill = |name: &'static str, number: f32| {
        move |tensors: &mut Tensors| {
            let count = tensors[name].2.len() / 4;
            let bytes = (0..count).flat_map(|_| number.to_le_bytes()).collect();
            tensors.insert(name.into(), (Dtype::F32, vec![count], bytes));
        }
    };
    refused("b.weight", &fill("b.weight.absmax", f32::INFINITY));
    refused("a.weight", &fill("a.weight.nested_absmax", f32::NAN));
    refused("quant_map", &fill("a.weight.quant_map", 0.5));
    refused("d.weight", &fill("d.SCB", f32::NAN));
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let (path, out) = (temporary.path().join("model.safetensors"), temporary.path().join("out.safetensors"));
    plain(&path, Dtype::F32);
    let base = Checkpoint::open(&path).unwrap();
    let refused = |base: &Checkpoint, kind, skip: &[String]| {
        let error = quantise(&Quantise { base, kind, out: &out, skip }, &mut on).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    assert!(refused(&base, QuantKind::Q8_0, &[]).contains("Q8_0"));
    assert!(refused(&base, QuantKind::NF4, &["fc1".into(), "fc2".into()]).contains("no weight to quantise"));
    let mut tensors = read(&path);
    tensors.get_mut("fc1.weight").unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write(&path, &tensors);
    assert!(refused(&Checkpoint::open(&path).unwrap(), QuantKind::NF4, &[]).contains("`fc1.weight`"));
    let plain = dequantise(&base, None, &out, &mut on).unwrap_err().to_string();
    assert!(plain.contains("is not quantised"), "{plain}");
}
