//! Checkpoints on disk, with the library: merging, unmerging, errors, and interrupting.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lowrank::adapter::{Factors, Folder, HostMatrix, HostTensor};
use lowrank::checkpoint::{self, Checkpoint, Merge, Unmerge};
use lowrank::nn::Linear;
use lowrank::random::Rng;
use lowrank::{Cpu, DType, Error, bf16, f16};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};

fn keep_going(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn numbers(len: usize, size: f64, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| (size * rng.gaussian()) as f32).collect()
}

fn stored(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

fn spelled(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

type Stored<'n> = (&'n str, Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &[Stored<'_>]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    fs::write(path, serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// One module `layer` of shape `n×k`, and other tensors of a model.
fn model(path: &Path, dtype: DType, [n, k]: [usize; 2], w: &[f32]) {
    let others = [("ids", Dtype::I64, vec![2], vec![7; 16]), ("mask", Dtype::BOOL, vec![3], vec![1, 0, 1])];
    let bias = ("layer.bias", spelled(dtype), vec![n], stored(dtype, &numbers(n, 1.0, 9)));
    let weight = ("layer.weight", spelled(dtype), vec![n, k], stored(dtype, w));
    write(path, &[others.as_slice(), &[bias, weight]].concat());
}

fn adapter([n, k, r]: [usize; 3], size: f64, seed: u64) -> Folder {
    let a = HostMatrix::new((r, k), numbers(r * k, size, seed)).unwrap();
    let b = HostMatrix::new((n, r), numbers(n * r, 1.0, seed + 1)).unwrap();
    let factors = Factors { a, b, scaling: 1.0, dtype: DType::F32 };
    Folder::new(None, BTreeMap::from([("layer".to_string(), factors)])).unwrap()
}

fn merge_into(base: &Path, adapter: &Folder, out: &Path, residue: Option<&Path>) -> lowrank::Result<()> {
    let base = Checkpoint::open(base)?;
    let request = Merge { keep_residue: residue, ..Merge::new(&base, adapter, out) };
    checkpoint::merge(&request, &mut keep_going).map(drop)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn paths(folder: &Path) -> [PathBuf; 4] {
    ["base", "merged", "back", "residue"].map(|name| folder.join(format!("{name}.safetensors")))
}

/// `W + B·A` in f64, rounded once; `(depth + 2)·u` of the magnitudes for the sums in f32, and half a unit for the rounding.
#[test]
fn merging_is_the_sum_rounded_once_and_leaves_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let [base, merged, ..] = paths(folder.path());
    let [n, k, r] = [37, 53, 5];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let w = numbers(n * k, 1.0, 1);
        model(&base, dtype, [n, k], &w);
        let adapter = adapter([n, k, r], 0.5, 2);
        merge_into(&base, &adapter, &merged, None).unwrap();
        let (before, after) = (fs::read(&base).unwrap(), fs::read(&merged).unwrap());
        let (before, after) = (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&after).unwrap());
        assert_eq!(before.len(), after.len());
        for (name, view) in before.iter().filter(|(name, _)| *name != "layer.weight") {
            assert_eq!((view.dtype(), view.data()), (after.tensor(name).unwrap().dtype(), after.tensor(name).unwrap().data()));
        }
        let wide = |view: TensorView<'_>| -> Vec<f64> {
            let bytes = view.data();
            match dtype {
                DType::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
                DType::F16 => bytes.as_chunks().0.iter().map(|&b| f64::from(f16::from_le_bytes(b).to_f32())).collect(),
                DType::BF16 => bytes.as_chunks().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b).to_f32())).collect(),
            }
        };
        let (old, new) = (wide(before.tensor("layer.weight").unwrap()), wide(after.tensor("layer.weight").unwrap()));
        let Factors { a, b, .. } = &adapter.modules()["layer"];
        for at in 0..n * k {
            let term = |q: usize| f64::from(b.values()[at / k * r + q]) * f64::from(a.values()[q * k + at % k]);
            let want = old[at] + (0..r).map(term).sum::<f64>();
            let magnitude = old[at].abs() + (0..r).map(|q| term(q).abs()).sum::<f64>();
            let sums = (r + 2) as f64 * DType::F32.unit_roundoff() * magnitude;
            let bound = sums + (want.abs() + sums) * dtype.unit_roundoff() + f64::from(f32::MIN_POSITIVE);
            assert!((new[at] - want).abs() <= bound, "{dtype} {at}: {} {want}", new[at]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The residue restores everything that rounding loses.
    #[test]
    fn a_kept_residue_restores_every_bit(
        n in 1usize..70, k in 1usize..70, r in 1usize..5, size in -12i32..6, dtype in 0usize..3, seed in 0u64..1000,
    ) {
        let dtype = [DType::F32, DType::F16, DType::BF16][dtype];
        let folder = tempfile::tempdir().unwrap();
        let [base, merged, back, residue] = paths(folder.path());
        model(&base, dtype, [n, k], &numbers(n * k, 1.0, seed));
        let adapter = adapter([n, k, r], 2f64.powi(size), seed + 1);
        merge_into(&base, &adapter, &merged, Some(&residue)).unwrap();
        let opened = Checkpoint::open(&merged).unwrap();
        let request = Unmerge { residue: Some(&residue), ..Unmerge::new(&opened, &adapter, &back) };
        checkpoint::unmerge(&request, &mut keep_going).unwrap();
        prop_assert!(fs::read(&base).unwrap() == fs::read(&back).unwrap());
        SafeTensors::deserialize(&fs::read(&residue).unwrap()).unwrap();
    }
}

/// A tensor is read exactly, from a file or from shards; a missing one, or one that is not float, is refused by name.
#[test]
fn tensors_are_read_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let [base, ..] = paths(folder.path());
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let w = numbers(30, 1.0, 1);
        model(&base, dtype, [6, 5], &w);
        let checkpoint = Checkpoint::open(&base).unwrap();
        let weight = checkpoint.tensor("layer.weight").unwrap();
        assert_eq!((&weight.shape[..], weight.dtype), (&[6, 5][..], dtype));
        assert_eq!(stored(dtype, &weight.values), stored(dtype, &w), "{dtype}");
        let cpu = Cpu::<bf16>::new().unwrap();
        let [weight, bias] = ["layer.weight", "layer.bias"].map(|name| checkpoint.tensor(name).unwrap().to_device(&cpu).unwrap());
        let linear = Linear::from_tensors(weight, Some(bias)).unwrap();
        assert_eq!(linear.weight().tensor().shape(), (6, 5).into());
        for (name, words) in [("ids", "base.safetensors: `ids` holds I64, want F32"), ("layer.w", "has no tensor `layer.w`")] {
            let error = checkpoint.tensor(name).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
    let cpu = Cpu::<f16>::new().unwrap();
    let tensor = |shape: &[usize], value| HostTensor { shape: shape.into(), dtype: DType::F32, values: vec![value; 8] };
    for (tensor, words) in [
        (tensor(&[2, 2, 2], 1.0), "`shape` is 2×2×2, want one or two dimensions"),
        (tensor(&[8], 1e6), "`values` is 1000000"),
        (tensor(&[3, 3], 1.0), "elements"),
    ] {
        let error = tensor.to_device(&cpu).unwrap_err();
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(words), "{error}");
    }
    assert!(tensor(&[8], f32::INFINITY).to_device(&cpu).is_ok(), "what is not finite stays so");
}

/// A damaged file is either refused or read, never beyond its end, and written completely.
fn damaged(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let [base, merged, ..] = paths(folder.path());
    fs::write(&base, bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(&base) else { return };
    let within = |entry: &checkpoint::Entry| entry.start + entry.bytes as u64 <= bytes.len() as u64;
    assert!(checkpoint.entries().all(within) && checkpoint.bytes() <= bytes.len() as u64);
    let written = [
        merge_into(&base, &adapter([6, 5, 2], 1.0, 2), &merged, None),
        checkpoint::convert(&checkpoint, DType::BF16, &merged, &mut keep_going),
    ];
    for written in written {
        assert!(written.is_ok() || matches!(written, Err(Error::File { .. })), "{written:?}");
    }
    let left = names(folder.path());
    assert!(left == ["base.safetensors"] || left == ["base.safetensors", "merged.safetensors"], "{left:?}");
    if left.len() == 2 {
        SafeTensors::deserialize(&fs::read(&merged).unwrap()).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Mostly in the header, where a byte can change the meaning of all others.
    #[test]
    fn flipped_and_missing_bytes_are_refused_or_read_within_the_file(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 0..4),
        (cut, cuts) in (any::<prop::sample::Index>(), any::<bool>()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let [base, ..] = paths(folder.path());
        model(&base, DType::F16, [6, 5], &numbers(30, 1.0, 1));
        let mut bytes = fs::read(&base).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value, anywhere) in flips {
            let at = at.index(if anywhere { bytes.len() } else { header });
            bytes[at] ^= value;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        damaged(&bytes);
    }

    #[test]
    fn any_bytes_are_refused_or_read_within_the_file(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        damaged(&bytes);
        let header = [&(bytes.len() as u64).to_le_bytes(), &bytes[..], &[0; 16]].concat();
        damaged(&header);
    }
}

#[test]
fn a_truncated_checkpoint_is_reported_with_both_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let [base, ..] = paths(folder.path());
    model(&base, DType::F32, [6, 5], &numbers(30, 1.0, 1));
    let whole = fs::read(&base).unwrap();
    for (cut, want) in [(0, "at least 8".to_string()), (7, "at least 8".into()), (whole.len() - 4, whole.len().to_string())] {
        fs::write(&base, &whole[..cut]).unwrap();
        let error = Checkpoint::open(&base).unwrap_err().to_string();
        assert!(error.contains(&format!("base.safetensors: is truncated: {cut} bytes, want {want}")), "{error}");
    }
}

#[test]
fn a_residue_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [base, merged, back, residue] = paths(folder.path());
    model(&base, DType::BF16, [30, 20], &numbers(600, 1.0, 1));
    let (first, second) = (adapter([30, 20, 2], 1.0, 2), adapter([30, 20, 2], 1.0, 4));
    merge_into(&base, &first, &merged, Some(&residue)).unwrap();
    let unmerge = |of: &Path, adapter: &Folder, residue: &Path| {
        let opened = Checkpoint::open(of).unwrap();
        let request = Unmerge { residue: Some(residue), ..Unmerge::new(&opened, adapter, &back) };
        checkpoint::unmerge(&request, &mut keep_going).unwrap_err().to_string()
    };
    assert!(unmerge(&merged, &second, &residue).contains("would not be restored exactly"));
    assert!(unmerge(&base, &first, &residue).contains("would not be restored exactly"));
    assert!(unmerge(&merged, &first, &base).contains("is not a residue"));
    let whole = fs::read(&residue).unwrap();
    fs::write(&residue, &whole[..whole.len() - 1]).unwrap();
    assert!(unmerge(&merged, &first, &residue).contains("residue.safetensors"));
    assert!(!back.exists());
}

#[test]
fn interrupting_leaves_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let [base, merged, _, residue] = paths(folder.path());
    model(&base, DType::F32, [64, 64], &numbers(4096, 1.0, 1));
    let (base, adapter) = (Checkpoint::open(&base).unwrap(), adapter([64, 64, 2], 1.0, 2));
    let mut calls = 0;
    for after in 0..5 {
        let mut seen = 0;
        let mut watch = |_: u64| {
            seen += 1;
            calls += 1;
            if seen > after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let keep_residue = (after % 2 == 0).then_some(residue.as_path());
        let request = Merge { keep_residue, ..Merge::new(&base, &adapter, &merged) };
        let error = checkpoint::merge(&request, &mut watch).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{after}: {error}");
        assert_eq!(names(folder.path()), ["base.safetensors"], "{after}");
    }
    let mut bytes = 0;
    let request = Merge::new(&base, &adapter, &merged);
    let mut watch = |more| {
        bytes += more;
        ControlFlow::Continue(())
    };
    checkpoint::merge(&request, &mut watch).unwrap();
    assert_eq!(bytes, base.bytes());
}

/// Metadata, the order of keys and every byte that is not a merged weight are kept.
#[test]
fn the_header_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let [base, merged, ..] = paths(folder.path());
    let header = r#"{"z.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]},"__metadata__":{"note":"ours","a":"b"},"layer.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}   "#;
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &1f32.to_le_bytes(), &5f32.to_le_bytes()].concat();
    fs::write(&base, &bytes).unwrap();
    let one = |value| HostMatrix::new((1, 1), vec![value]).unwrap();
    let factors = Factors { a: one(2.0), b: one(3.0), scaling: 1.0, dtype: DType::F32 };
    let adapter = Folder::new(None, BTreeMap::from([("layer".to_string(), factors)])).unwrap();
    merge_into(&base, &adapter, &merged, None).unwrap();
    let mut want = bytes.clone();
    want[8 + header.len()..][..4].copy_from_slice(&7f32.to_le_bytes());
    assert_eq!(fs::read(&merged).unwrap(), want);

    checkpoint::convert(&Checkpoint::open(&base).unwrap(), DType::BF16, &merged, &mut keep_going).unwrap();
    let converted = fs::read(&merged).unwrap();
    let text = String::from_utf8_lossy(&converted);
    let at = |key: &str| text.find(key).unwrap();
    assert!(at("z.weight") < at("__metadata__") && at("note") < at("\"a\"") && at("__metadata__") < at("layer.weight"));
    assert_eq!(converted[converted.len() - 4..], [1f32, 5.0].map(|v| bf16::from_f32(v).to_le_bytes()).concat());
}
