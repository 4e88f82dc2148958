//! Quantised weights: bit for bit as bitsandbytes and GGUF have them (tests/quantised, made by scripts/make-quantised.py), and products
//! with them against the oracle in `f64`.

use std::path::Path;

use half::{bf16, f16};
use lowrank::quant::{Blocks, HostQuantised, QuantKind, Scales};
use lowrank::{DType, Error, Float};
use safetensors::SafeTensors;

/// A weight of the file, and what became of it.
struct Case<'f> {
    name: String,
    file: &'f SafeTensors<'f>,
    rows: usize,
    cols: usize,
    kind: QuantKind,
}

impl Case<'_> {
    fn bytes(&self, part: &str) -> &[u8] {
        self.file.tensor(&format!("{}.{part}", self.name)).unwrap().data()
    }

    fn numbers<T: bytemuck::Pod>(&self, part: &str) -> Vec<T> {
        bytemuck::pod_collect_to_vec(self.bytes(part))
    }

    fn scales(&self) -> Scales {
        match self.kind {
            QuantKind::Q8_0 => Scales::F16(self.numbers("absmax")),
            QuantKind::Nf4(Blocks { double: true, .. }) => Scales::Double {
                codes: self.bytes("absmax").to_vec(),
                absmax: self.numbers("nested_absmax"),
                map: Box::new(self.numbers("nested_map").try_into().unwrap()),
                offset: self.numbers("offset")[0],
            },
            _ => Scales::F32(self.numbers("absmax")),
        }
    }

    fn quantised(&self) -> HostQuantised {
        HostQuantised::new((self.rows, self.cols), self.kind, self.bytes("codes").to_vec(), self.scales()).unwrap()
    }
}

/// Calls `check` with each case of the file.
fn each_case(mut check: impl FnMut(&Case<'_>)) {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let root = if root.is_dir() { root } else { Path::new(".") };
    let bytes = std::fs::read(root.join("tests/quantised/cases.safetensors")).unwrap();
    let (file, (_, header)) = (SafeTensors::deserialize(&bytes).unwrap(), SafeTensors::read_metadata(&bytes).unwrap());
    let cases: serde_json::Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
    let cases = cases.as_object().unwrap();
    assert!(cases.len() >= 16);
    for (name, info) in cases {
        let size = |key: &str| info[key].as_u64().unwrap() as usize;
        let blocks = || Blocks { len: size("block"), double: info["double"].as_bool().unwrap() };
        let kind = match info["kind"].as_str().unwrap() {
            "nf4" => QuantKind::Nf4(blocks()),
            "fp4" => QuantKind::Fp4(blocks()),
            other => other.parse().unwrap(),
        };
        check(&Case { name: name.clone(), file: &file, rows: size("rows"), cols: size("cols"), kind });
    }
}

fn same_bits<T: Float>(case: &Case<'_>, part: &str) {
    if case.file.tensor(&format!("{}.{part}", case.name)).is_err() {
        return assert!(T::DTYPE != DType::F32, "{}", case.name);
    }
    let (got, want) = (case.quantised().dequantise::<T>(), case.numbers::<T>(part));
    assert!(bytemuck::cast_slice::<T, u8>(&got) == bytemuck::cast_slice::<T, u8>(&want), "{}, {part}", case.name);
}

#[test]
fn dequantises_to_the_bits_of_the_reference() {
    each_case(|case| {
        same_bits::<f32>(case, "out_float32");
        same_bits::<bf16>(case, "out_bfloat16");
        same_bits::<f16>(case, "out_float16");
    });
}

#[test]
fn quantises_to_the_bits_of_the_reference() {
    each_case(|case| {
        let got = HostQuantised::quantise((case.rows, case.cols), &case.numbers::<f32>("weight"), case.kind).unwrap();
        assert!(got.codes() == case.bytes("codes"), "{}", case.name);
        match (got.scales(), case.scales()) {
            // The reference's mean is of sums in `f32`, whose order is its own.
            (Scales::Double { map, offset, .. }, Scales::Double { map: want, offset: near, .. }) => {
                assert!(map.map(f32::to_bits) == want.map(f32::to_bits), "{}", case.name);
                assert!((offset - near).abs() <= 1e-6 * near, "{}", case.name);
            }
            (got, want) => assert!(*got == want, "{}", case.name),
        }
    });
}

/// Scales of 8 bits lose at most half of the widest step of their map, as the reference's do.
#[test]
fn scales_in_8_bits_are_near_those_in_32() {
    let mut seen = 0;
    each_case(|case| {
        let QuantKind::Nf4(Blocks { len, double: true }) = case.kind else { return };
        seen += 1;
        let (shape, numbers) = ((case.rows, case.cols), case.numbers::<f32>("weight"));
        let double = HostQuantised::quantise(shape, &numbers, case.kind).unwrap();
        let single = HostQuantised::quantise(shape, &numbers, QuantKind::Nf4(Blocks { len, double: false })).unwrap();
        let error = |numbers: &[f32], w: &[f32]| -> f64 {
            numbers.iter().zip(w).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        let (ours, theirs) = (error(&numbers, &double.dequantise()), error(&numbers, &case.numbers("out_float32")));
        assert!(ours <= 1.001 * theirs, "{}: {ours}, {theirs}", case.name);
        assert!(ours <= 1.05 * error(&numbers, &single.dequantise()), "{}", case.name);
    });
    assert_eq!(seen, 3);
}

fn refused(numbers: &[f32], shape: (usize, usize), kind: QuantKind) -> String {
    match HostQuantised::quantise(shape, numbers, kind) {
        Err(error @ Error::Value { verb: "quantise", .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_no_code_stands_for_is_refused() {
    for kind in ["nf4", "fp4", "int8", "q8_0"].map(|name| name.parse().unwrap()) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(refused(&[0.0, 1.0, 2.0, bad], (2, 2), kind).contains("at (1, 1)"));
        }
        assert!(refused(&[0.0; 3], (2, 2), kind).contains("`numbers` is 3"));
    }
    assert!(refused(&[1e30; 4], (2, 2), QuantKind::Q8_0).contains("f16"));
    for len in [0, 16, 48, 8192] {
        assert!(refused(&[0.0; 4], (2, 2), QuantKind::Nf4(Blocks { len, double: false })).contains("power of two"));
    }
    assert!("int4".parse::<QuantKind>().is_err());
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let nf4 = QuantKind::Nf4(Blocks { len: 64, double: false });
    let new = |kind, codes: usize, scales| HostQuantised::new((3, 43), kind, vec![0; codes], scales).map(|_| ());
    assert!(new(nf4, 65, Scales::F32(vec![1.0; 3])).is_ok());
    assert!(new(nf4, 64, Scales::F32(vec![1.0; 3])).is_err());
    assert!(new(nf4, 65, Scales::F32(vec![1.0; 2])).is_err());
    assert!(new(nf4, 65, Scales::F32(vec![1.0, f32::NAN, 1.0])).is_err());
    assert!(new(nf4, 65, Scales::F16(vec![f16::ONE; 3])).is_err());
    assert!(new(QuantKind::NF4, 65, Scales::F32(vec![1.0; 3])).is_err());
    assert!(new(QuantKind::Q8_0, 129, Scales::F16(vec![f16::INFINITY; 6])).is_err());
    let double = |absmax, offset| Scales::Double { codes: vec![0; 3], absmax, map: Box::new([0.0; 256]), offset };
    assert!(new(QuantKind::NF4, 65, double(vec![1.0], 0.0)).is_ok());
    assert!(new(QuantKind::NF4, 65, double(vec![1.0; 2], 0.0)).is_err());
    assert!(new(QuantKind::NF4, 65, double(vec![1.0], f32::INFINITY)).is_err());
    assert!(HostQuantised::new((usize::MAX, 2), nf4, Vec::new(), Scales::F32(Vec::new())).is_err());
}

#[test]
fn any_side_may_be_zero() {
    for kind in ["nf4", "fp4", "int8", "q8_0"].map(|name| name.parse().unwrap()) {
        for shape in [(0, 0), (0, 5), (5, 0)] {
            assert!(HostQuantised::quantise::<f32>(shape, &[], kind).unwrap().dequantise::<f32>().is_empty());
        }
    }
}
