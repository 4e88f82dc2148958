//! Combining, compressing and extracting adapters, compared with PEFT's results and with dense arithmetic in f64; and errors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowrank::adapter::{CombinationType, Combine, Factors, Folder, HostMatrix, Keep, combine, compress, extract, parse_tensors};
use lowrank::random::Rng;
use lowrank::{DType, Error};
use safetensors::SafeTensors;
use serde_json::Value;

fn stored() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("combined")
}

/// `scaling·B·A` in f64, as three plain loops.
fn delta(Factors { a, b, scaling, .. }: &Factors) -> Vec<f64> {
    let (n, r, k) = (b.rows(), b.cols(), a.cols());
    let term = |i: usize, j: usize, q: usize| f64::from(b.values()[i * r + q]) * f64::from(a.values()[q * k + j]);
    (0..n * k).map(|at| f64::from(*scaling) * (0..r).map(|q| term(at / k, at % k, q)).sum::<f64>()).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn distance(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    norm(&left.iter().zip(right).map(|(left, right)| left - right).collect::<Vec<_>>())
}

fn random(rows: usize, cols: usize, rng: &mut Rng) -> HostMatrix {
    HostMatrix::new((rows, cols), (0..rows * cols).map(|_| rng.gaussian() as f32).collect()).unwrap()
}

/// An adapter of modules `m0`, `m1`, … with these shapes `(n, k, r)`.
fn adapter(shapes: &[(usize, usize, usize)], seed: u64) -> Folder {
    let rng = &mut Rng::new(seed);
    let module = |&(n, k, r): &_| Factors { a: random(r, k, rng), b: random(n, r, rng), scaling: 1.0, dtype: DType::F32 };
    let modules: Vec<Factors> = shapes.iter().map(module).collect();
    Folder::new(None, modules.into_iter().enumerate().map(|(at, module)| (format!("m{at}"), module)).collect()).unwrap()
}

#[test]
fn every_combination_type_agrees_with_peft() {
    let bytes = std::fs::read(stored().join("expected.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let expected = parse_tensors(&bytes).unwrap();
    let mut types: Vec<&str> = cases.iter().map(|case| case["type"].as_str().unwrap()).collect();
    for (at, case) in cases.iter().enumerate() {
        let names = case["adapters"].as_array().unwrap();
        let folders: Vec<Folder> =
            names.iter().map(|name| Folder::read(&stored().join(name.as_str().unwrap())).unwrap()).collect();
        let weights = case["weights"].as_array().unwrap().iter().map(|weight| weight.as_f64().unwrap());
        let text = |key: &str| case[key].as_str();
        let how = Combine {
            density: case["density"].as_f64(),
            majority_sign_method: text("majority_sign_method").map(|name| name.parse().unwrap()),
            svd_rank: case["svd_rank"].as_u64().map(|rank| rank as usize),
            seed: case["seed"].as_u64(),
            ..Combine::new(text("type").unwrap().parse().unwrap())
        };
        let combined = combine(&folders.iter().zip(weights).collect::<Vec<_>>(), &how).unwrap();
        let wanted = expected.iter().filter_map(|(name, want)| Some((name.strip_prefix(&format!("{at}."))?, want)));
        let wanted: BTreeMap<&str, Vec<f64>> =
            wanted.map(|(name, want)| (name, want.values.iter().copied().map(f64::from).collect())).collect();
        assert!(wanted.keys().eq(combined.modules().keys()), "{case}");
        for (name, want) in wanted {
            let error = distance(&delta(&combined.modules()[name]), &want) / norm(&want);
            assert!(error <= 1e-5, "{case}: {name}: {error}"); // the tolerance of the reference cases
        }
    }
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), CombinationType::ALL.len(), "a way of combining is not covered: {types:?}");
}

/// `Σ wᵢ·ΔWᵢ` in f64. The factors are rounded once, so there are two roundings for each term of an element.
#[test]
fn cat_and_svd_of_full_rank_are_the_sum() {
    let shapes = [(9, 7, 2), (4, 12, 3), (1, 5, 1)];
    let (one, two) = (adapter(&shapes, 1), adapter(&[(9, 7, 3), (4, 12, 1), (1, 5, 2)], 2));
    for how in [Combine::new(CombinationType::Cat), Combine { svd_rank: Some(99), ..Combine::new(CombinationType::Svd) }] {
        let sum = combine(&[(&one, 0.75), (&two, -1.5)], &how).unwrap();
        for (name, factors) in sum.modules() {
            let (left, right) = (delta(&one.modules()[name]), delta(&two.modules()[name]));
            let want: Vec<f64> = left.iter().zip(&right).map(|(left, right)| 0.75 * left - 1.5 * right).collect();
            let terms: f64 = factors.a.values().iter().chain(factors.b.values()).map(|v| f64::from(*v).powi(2)).sum();
            let bound = 4.0 * terms / (1u64 << 24) as f64; // ‖A‖·‖B‖ ≤ (‖A‖² + ‖B‖²) / 2, and each factor is off by u
            assert!(distance(&delta(factors), &want) <= bound, "{how:?} {name}");
        }
    }
}

#[test]
fn compression_loses_the_tail_and_says_so_in_its_settings() {
    let whole = adapter(&[(20, 15, 6), (8, 30, 4), (5, 5, 2)], 3);
    let folder = tempfile::tempdir().unwrap();
    for keep in [Keep::Rank(1), Keep::Rank(3), Keep::Rank(99), Keep::Energy(0.5), Keep::Energy(0.9), Keep::Energy(1.0)] {
        compress(&whole, keep).unwrap().write(folder.path()).unwrap();
        let less = Folder::read(folder.path()).unwrap();
        for (name, factors) in whole.modules() {
            let svd = lowrank::adapter::Svd::of_product(&factors.b, &factors.a, 1.0).unwrap();
            let (rank, want) = (less.modules()[name].rank(), delta(factors));
            assert_eq!(rank, svd.rank(keep).unwrap());
            let tail = norm(&svd.singular_values()[rank..]);
            let lost = distance(&delta(&less.modules()[name]), &want);
            assert!((lost - tail).abs() <= 16.0 * norm(&want) / (1u64 << 24) as f64, "{keep:?} {name}: {lost} {tail}");
            if let Keep::Energy(share) = keep {
                assert!(lost * lost <= (1.0 - share) * norm(&want).powi(2) + 1e-9);
            }
        }
    }
}

#[test]
fn extracting_restores_the_merged_adapter() {
    let rng = &mut Rng::new(4);
    let (w, a, b) = (random(12, 10, rng), random(2, 10, rng), random(12, 2, rng));
    let factors = Factors { a, b, scaling: 1.0, dtype: DType::F32 };
    let want = delta(&factors);
    let tuned = w.values().iter().zip(&want).map(|(w, delta)| (f64::from(*w) + delta) as f32).collect();
    let tuned = HostMatrix::new(w.shape(), tuned).unwrap();
    let (a, b) = extract(&w, &tuned, Keep::Rank(2)).unwrap();
    let got = delta(&Factors { a, b, scaling: 1.0, dtype: DType::F32 });
    let rounding = (norm(&want) + tuned.values().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()) / (1u64 << 22) as f64;
    assert!(distance(&got, &want) <= rounding);
    assert!(matches!(extract(&w, &w.transposed(), Keep::Rank(1)), Err(Error::Shape { name: "tuned", .. })));
}

#[test]
fn combining_again_gives_the_same_bits() {
    let (one, two) = (adapter(&[(9, 7, 2)], 5), adapter(&[(9, 7, 2)], 6));
    for (name, kind) in CombinationType::ALL {
        let pruning = !["linear", "cat", "svd"].contains(name);
        let how = Combine { density: pruning.then_some(0.5), ..Combine::new(*kind) };
        let run = || combine(&[(&one, 1.0), (&two, 1.0)], &how).unwrap();
        assert_eq!(run().modules(), run().modules(), "{name}");
        assert_eq!(kind.name(), *name);
    }
}

#[track_caller]
fn refused(adapters: &[(&Folder, f64)], how: Combine, words: &str) {
    let error = combine(adapters, &how).unwrap_err();
    assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(words), "{error}: no {words}");
}

#[test]
fn adapters_that_cannot_be_combined_are_refused_by_name() {
    let (one, two, wide) = (adapter(&[(9, 7, 2)], 5), adapter(&[(9, 7, 3)], 6), adapter(&[(9, 8, 2)], 7));
    let pair = [(&one, 1.0), (&two, 1.0)];
    let how = Combine::new;
    use CombinationType::*;
    refused(&[], how(Linear), "adapters");
    refused(&pair, how(Linear), "ranks {2, 3} in `m0`");
    refused(&[(&one, 1.0), (&wide, 1.0)], how(Cat), "9×7 and 9×8 in `m0`");
    refused(&[(&one, f64::NAN)], how(Cat), "weight");
    refused(&pair, how(Ties), "`density` is missing");
    refused(&pair, Combine { density: Some(1.5), ..how(Ties) }, "density");
    refused(&pair, Combine { density: Some(f64::NAN), ..how(Ties) }, "density");
    refused(&pair, Combine { density: Some(0.0), ..how(DareLinear) }, "density");
    refused(&pair, Combine { density: Some(0.5), ..how(Cat) }, "density");
    refused(&pair, Combine { svd_rank: Some(0), ..how(Svd) }, "svd_rank");
    refused(&pair, Combine { svd_rank: Some(2), ..how(Linear) }, "svd_rank");
    refused(&pair, Combine { seed: Some(2), density: Some(0.5), ..how(Ties) }, "seed");
    refused(&pair, Combine { majority_sign_method: Some(Default::default()), ..how(Svd) }, "majority_sign_method");
    assert!("tie".parse::<CombinationType>().unwrap_err().to_string().contains("`combination_type` is tie"));

    let nan = Factors {
        a: HostMatrix::new((1, 2), vec![f32::NAN, 1.0]).unwrap(),
        b: HostMatrix::new((2, 1), vec![1.0; 2]).unwrap(),
        scaling: 1.0,
        dtype: DType::F32,
    };
    let nan = Folder::new(None, BTreeMap::from([("m0".into(), nan)])).unwrap();
    refused(&[(&nan, 1.0)], how(Linear), "not finite in `m0`");
    assert!(compress(&nan, Keep::Rank(1)).unwrap_err().to_string().contains("in `m0`"));
    for keep in [Keep::Rank(0), Keep::Energy(f64::NAN), Keep::Energy(-0.5)] {
        assert!(matches!(compress(&one, keep), Err(Error::Value { .. })));
    }
}

/// Each kind of content other than factors is refused by name, not dropped.
#[test]
fn adapters_with_more_than_factors_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let good = adapter(&[(3, 2, 1)], 8);
    good.write(folder.path()).unwrap();
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let (config, tensors) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    assert_eq!(Folder::parse(&config, &tensors).unwrap().modules(), good.modules());
    let document: Value = serde_json::from_slice(&config).unwrap();
    for (key, value) in [
        ("use_dora", Value::Bool(true)),
        ("lora_bias", Value::Bool(true)),
        ("bias", "all".into()),
        ("modules_to_save", vec!["head"].into()),
        ("init_lora_weights", "pissa".into()),
    ] {
        let mut document = document.clone();
        document[key] = value;
        let more = match Folder::parse(document.to_string().as_bytes(), &tensors) {
            Ok(more) => more,
            Err(error) => {
                assert!(error.to_string().contains("is missing, want 3"), "{error}");
                continue;
            }
        };
        let combined = combine(&[(&good, 1.0), (&more, 1.0)], &Combine::new(CombinationType::Cat)).unwrap_err();
        // Compressing keeps biases and whole modules.
        let compressed = match compress(&more, Keep::Rank(1)) {
            Ok(small) => {
                assert!(["bias", "modules_to_save"].contains(&key) && small.extras() == more.extras(), "{key}");
                None
            }
            Err(error) => Some(error),
        };
        for error in [Some(combined), compressed].into_iter().flatten() {
            assert!(matches!(&error, Error::Unsupported { field, .. } if *field == key), "{error}");
        }
    }
    for name in ["m0.lora_magnitude_vector", "m0.lora_B.bias", "head.weight", "m0.lora_embedding_A"] {
        let stray = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
        let bytes = safetensors::serialize([(name, stray)], None).unwrap();
        let error = Folder::parse(&config, &bytes).unwrap_err().to_string();
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module); // of a factor, the other one may be named
        assert!(error.contains(module), "{error}: no {name}");
    }
}
