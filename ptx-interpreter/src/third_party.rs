//! Tests the interpreter with third-party code: PTX that Triton generated for matrix products (`scripts/check-interpreter`), on
//! whole numbers, so that every element must be equal. Then each statement of `semantics.rs` is made wrong, and a kernel must
//! fail: so a misreading that our kernels and this interpreter share cannot be one of these.
//!
//! `PTX_INTERPRETER_FIXTURES` names a folder with other kernels.

mod matrices;
mod wrong;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::semantics::Semantics;
use crate::{Arg, Checks, Global, Launch, Module, Options, TensorMap};
use matrices::{Matrix, from_bytes, to_bytes};

/// The reason why a kernel failed: a fault, or a wrong element.
type Outcome = Result<(), String>;

/// A kernel, and its expected result.
struct Case {
    name: String,
    module: Module,
    says: Value,
}

fn folder() -> (PathBuf, bool) {
    let other = std::env::var_os("PTX_INTERPRETER_FIXTURES");
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let is_ours = other.is_none();
    (other.map_or(ours, PathBuf::from), is_ours)
}

fn cases() -> Vec<Case> {
    let (folder, _) = folder();
    let list = std::fs::read_to_string(folder.join("kernels.json")).unwrap();
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    let case = |says: Value| {
        let name = says["name"].as_str().unwrap().to_owned();
        let text = std::fs::read_to_string(folder.join(format!("{name}.ptx"))).unwrap();
        let module = Module::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        Case { name, module, says }
    };
    list.into_iter().map(case).collect()
}

impl Case {
    fn size(&self, key: &str) -> usize {
        self.says[key].as_u64().unwrap() as usize
    }

    fn flag(&self, key: &str) -> bool {
        self.says[key].as_bool().unwrap()
    }

    fn text(&self, key: &str) -> &str {
        self.says[key].as_str().unwrap()
    }

    /// Rows and columns of tiles, and of the boxes of tensor maps.
    fn pair(value: &Value) -> [u32; 2] {
        [0, 1].map(|i| value[i].as_u64().unwrap() as u32)
    }

    fn launch(&self) -> Launch {
        let tile = Self::pair(&self.says["tile"]);
        let grid = self.size("m").div_ceil(tile[0] as usize) * self.size("n").div_ceil(tile[1] as usize);
        Launch { grid: grid as u32, block: self.size("threads") as u32, shared: self.size("shared") }
    }

    /// Runs the kernel with these semantics, and compares the result.
    fn run(&self, semantics: &'static Semantics) -> Outcome {
        let [m, n, k] = ["m", "n", "k"].map(|key| self.size(key));
        // The numbers stay whole in the output's type and in partial sums.
        let span = match (self.text("kind"), self.text("out")) {
            ("chain", _) => 3,
            (_, "fp32") => 17,
            _ => 5,
        };
        let [a, b, e] = [(m, k, 1), (k, n, 2), (n, n, 3)].map(|(rows, cols, seed)| Matrix::random(rows, cols, span, seed));
        let got = self.computed(semantics, &a, &b, &e)?;
        let want = match self.text("kind") {
            "copy" => a,
            "chain" => a.times(&b).times(&e),
            _ if self.flag("doubled") => a.times(&b).map(|value| 2.0 * value),
            _ => a.times(&b),
        };
        match got.iter().zip(&want.values).position(|(got, want)| got != want) {
            None => Ok(()),
            Some(at) => Err(format!("({}, {}) is {}, not {}", at / n, at % n, got[at], want.values[at])),
        }
    }

    fn computed(&self, semantics: &'static Semantics, a: &Matrix, b: &Matrix, e: &Matrix) -> Result<Vec<f32>, String> {
        let stored = |matrix: &Matrix, transposed: bool| if transposed { matrix.transposed() } else { matrix.clone() };
        let (a, b) = (stored(a, self.flag("at")), stored(b, self.flag("bt")));
        let c = Matrix::zeros(self.size("m"), self.size("n"));
        let memory = |matrix: &Matrix| Global::from_bytes(&to_bytes(self.text("element"), &matrix.values));
        let (x, y, z) = (memory(&a), memory(&b), memory(e));
        let mut out = Global::uninitialised(to_bytes(self.text("out"), &c.values).len());
        let map = |i: usize, matrix: &Matrix| {
            TensorMap::matrix(matrix.rows as u64, matrix.cols as u64, Self::pair(&self.says["boxes"][i]))
        };
        // After a tensor map Triton passes sizes and strides of the tensor, and after all arguments two pointers to scratch
        // memory.
        let sizes = |matrix: &Matrix| {
            let [rows, cols] = [matrix.rows, matrix.cols].map(|size| size as u32);
            [Arg::U32(rows), Arg::U32(cols), Arg::U64(cols.into()), Arg::U64(1)]
        };
        let k = Arg::U32(self.size("k") as u32);
        let mut args = Vec::new();
        match self.text("kind") {
            "product" => args.extend([Arg::Read(&x), Arg::Read(&y), Arg::Write(&mut out), k]),
            "chain" => args.extend([Arg::Read(&x), Arg::Read(&y), Arg::Read(&z), Arg::Write(&mut out)]),
            "copy" => {
                args.push(Arg::ReadTiles(&x, map(0, &a)));
                args.extend(sizes(&a));
                args.push(Arg::Write(&mut out));
            }
            "boxes" => {
                args.push(Arg::ReadTiles(&x, map(0, &a)));
                args.extend(sizes(&a));
                args.push(Arg::ReadTiles(&y, map(1, &b)));
                args.extend(sizes(&b));
                args.push(Arg::WriteTiles(&mut out, map(2, &c)));
                args.extend(sizes(&c));
                args.push(k);
            }
            kind => return Err(format!("unknown kind of kernel: {kind}")),
        }
        args.extend([Arg::Null, Arg::Null]);
        let checks = Checks { barriers_are_published: false, stores_are_apart: false };
        let options = Options { checks, ..Options::default() };
        let report = self.launch().run_as(semantics, options, &self.module, self.text("entry"), &mut args);
        report.map_err(|fault| fault.to_string())?;
        Ok(from_bytes(self.text("out"), out.bytes()))
    }
}

#[test]
fn third_party_kernels_compute_what_they_should() {
    let cases = cases();
    let failed: Vec<_> = cases.iter().filter_map(|case| Some((&case.name, case.run(&Semantics::PTX).err()?))).collect();
    assert!(!cases.is_empty() && failed.is_empty(), "{failed:#?}");
}

#[test]
fn third_party_kernels_notice_each_wrong_reading() {
    let (cases, (_, complete)) = (cases(), folder());
    for (reading, by, semantics) in &wrong::READINGS {
        let mut able = cases.iter().filter(|case| case.name.starts_with(by)).peekable();
        if able.peek().is_none() && !complete {
            println!("nothing here can notice: {reading}");
            continue;
        }
        assert!(able.any(|case| case.run(semantics).is_err()), "no kernel `{by}..` notices: {reading}");
    }
}

/// Without this, any change would be noticed.
#[test]
fn third_party_kernels_do_not_notice_another_order_of_the_sum() {
    for case in cases().iter().filter(|case| case.name.starts_with("sm80")) {
        assert_eq!(case.run(&wrong::REVERSED), Ok(()), "{}", case.name);
    }
}
