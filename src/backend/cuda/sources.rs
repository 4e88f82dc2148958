//! Checks that Rust agrees with the sources in `kernels/`: signatures of kernels, and constants.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::kernel::{Kernel, signatures};
use super::{hopper, plan};
use crate::element::DType;

fn source(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(file)).unwrap()
}

/// Names and types of the parameters in a list such as `const E* x, int m`, with the words of [`signatures`].
fn parameters(list: &str) -> Vec<(String, &'static str)> {
    let parameter = |text: &str| {
        let (kind, name) = text.trim().rsplit_once(char::is_whitespace).unwrap_or_else(|| panic!("{text}"));
        let kind = match kind {
            "int" | "unsigned" => "u32",
            "size_t" => "u64",
            "float" => "f32",
            "MAP" => "operand",
            kind if kind.ends_with('*') => "operand",
            kind => panic!("type {kind} of {name}"),
        };
        (name.to_owned(), kind)
    };
    list.split(',').map(parameter).collect()
}

/// The parameters of every kernel in the sources, by its name.
fn declared() -> BTreeMap<String, Vec<(String, &'static str)>> {
    let mut all = BTreeMap::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for kernel in text.split("\nKERNEL(").skip(1) {
            let (name, rest) = kernel.split_once(")(").unwrap();
            all.insert(name.to_owned(), parameters(rest.split_once(')').unwrap().0));
        }
        for kernel in text.split("\nENTRIES(").skip(1) {
            let (name, rest) = kernel.split_once(',').unwrap();
            let list = rest.trim().trim_start_matches('(').split_once(')').unwrap().0;
            for cols in [128, 256] {
                all.insert(format!("{name}_hopper_{cols}"), parameters(list));
            }
        }
    }
    all
}

#[test]
fn parameters_have_the_order_names_and_types_of_the_sources() {
    let declared = declared();
    let mut described = BTreeSet::new();
    for (kernels, parameters) in signatures::<()>() {
        for kernel in kernels {
            assert_eq!(declared.get(kernel.name()), Some(&parameters), "{kernel}");
            assert!(described.insert(kernel.name()), "{kernel} has two signatures");
        }
    }
    let names = |kernels: &mut dyn Iterator<Item = &str>| kernels.map(str::to_owned).collect::<BTreeSet<_>>();
    let all = names(&mut Kernel::ALL.iter().map(|kernel| kernel.name()));
    assert_eq!(all, names(&mut described.into_iter()));
    assert_eq!(all, names(&mut declared.keys().map(String::as_str)));
}

/// The constants of a group of files for one element type, as text.
struct Constants {
    texts: BTreeMap<String, String>,
    dtype: DType,
}

impl Constants {
    fn read(files: &[&str], dtype: DType) -> Self {
        let mut texts = BTreeMap::new();
        for file in files {
            let mut included = vec![true];
            for line in source(file).lines() {
                let line = line.split("//").next().unwrap_or_default().trim();
                match line {
                    "#ifdef TENSOR" => included.push(dtype != DType::F32),
                    "#else" => *included.last_mut().unwrap() ^= true,
                    "#endif" => drop(included.pop()),
                    _ if line.starts_with("#if") => included.push(true),
                    _ => {}
                }
                let declaration = line.strip_prefix("constexpr int ").filter(|_| included.iter().all(|&is| is));
                for part in declaration.into_iter().flat_map(|line| line.trim_end_matches(';').split(',')) {
                    let (name, value) = part.split_once('=').unwrap_or_else(|| panic!("{line}"));
                    texts.insert(name.trim().to_owned(), value.trim().to_owned());
                }
            }
        }
        Self { texts, dtype }
    }

    /// The value of an expression of numbers, names and `* / + -`, from left to right.
    fn value(&self, text: &str) -> u32 {
        let mut words = text.split_whitespace();
        let mut value = self.term(words.next().unwrap());
        while let Some(operator) = words.next() {
            let right = self.term(words.next().unwrap());
            value = match operator {
                "*" => value * right,
                "/" => value / right,
                "+" => value + right,
                "-" => value - right,
                _ => panic!("{text}"),
            };
        }
        value
    }

    fn term(&self, word: &str) -> u32 {
        match word {
            "sizeof(E)" => self.dtype.size() as u32,
            _ => word.parse().unwrap_or_else(|_| self.get(word)),
        }
    }

    fn get(&self, name: &str) -> u32 {
        self.value(self.texts.get(name).unwrap_or_else(|| panic!("there is no {name}")))
    }
}

#[test]
fn constants_have_the_values_of_the_sources() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let files = ["common.cuh", "engine.cuh", "skinny.cuh", "skinny_n_major.cuh", "band.cuh", "wide.cuh"];
        let kernels = ["lora_forward.cu", "lora_merge.cu", "lora_row_norm.cu", "magnitude.cu"];
        let constants = Constants::read(&[&files[..], &kernels[..]].concat(), dtype);
        let expected = [
            ("THREADS", plan::THREADS),
            ("WARP", plan::WARP),
            ("CHUNK", plan::chunk(dtype)),
            ("TILE", plan::TILE),
            ("WIDE_TILE", plan::WIDE_TILE),
            ("SKINNY_ROWS", plan::SKINNY_ROWS),
            ("RANK_TILE", plan::RANK_TILE),
            ("W_ROWS", plan::strip_cols(dtype)),
            ("STRIP_COLS", plan::strip_cols(dtype)),
            ("BAND_COLS", plan::BAND_COLS),
            ("BAND_ROWS", plan::BAND_ROWS),
            ("BAND_RANKS", plan::BAND_RANKS),
            ("MERGE_ROWS", plan::MERGE_ROWS),
            ("MAGNITUDE_ROWS", plan::MAGNITUDE_ROWS),
            ("NORM_ROWS", plan::NORM_ROWS),
        ];
        for (name, value) in expected {
            assert_eq!(constants.get(name), value, "{name} for {dtype}");
        }
    }
    let constants = Constants::read(&["common.cuh", "hopper.cuh"], DType::BF16);
    let expected = [
        ("BLOCK_THREADS", hopper::THREADS),
        ("TILE_M", hopper::TILE_M),
        ("LINE", hopper::LINE),
        ("TILE_K", hopper::LINE),
        ("UPDATE_K", hopper::UPDATE_K),
        ("CHUNK", hopper::CHUNK),
    ];
    for (name, value) in expected {
        assert_eq!(constants.get(name), value, "{name}");
    }
}
