//! Seeded bugs: the shipped PTX with one place changed, and whether the change is detected.

use lowrank::op::Dropout;
use lowrank::{Cuda, DType, Error, Float};

use super::data::{Dims, mask, whole};
use super::emulator::Emulator;
use super::oracle::{Lora, Mat};
use super::passes::{backward, forward, merge};

/// The PTX of one module in which the `nth` occurrence of `from`, counted inside one kernel, is replaced; None: there is none.
pub fn mutant(dtype: DType, kernel: &str, from: &str, to: &str, nth: usize) -> Option<String> {
    let ptx = lowrank::cuda::ptx(dtype);
    let start = ptx.find(&format!(".entry {kernel}_{dtype}("))?;
    let end = ptx[start..].find("\n}").map_or(ptx.len(), |end| start + end);
    let (at, _) = ptx[start..end].match_indices(from).nth(nth)?;
    let at = start + at;
    Some([&ptx[..at], to, &ptx[at + from.len()..]].concat())
}

/// The PTX of one module in which each `from` of one kernel is replaced; None: there is none.
pub fn replaced(dtype: DType, kernel: &str, from: &str, to: &str) -> Option<String> {
    let ptx = lowrank::cuda::ptx(dtype);
    let start = ptx.find(&format!(".entry {kernel}_{dtype}("))?;
    let end = ptx[start..].find("\n}").map_or(ptx.len(), |end| start + end);
    let text = &ptx[start..end];
    text.contains(from).then(|| [&ptx[..start], &text.replace(from, to), &ptx[end..]].concat())
}

/// The PTX of one module in which each `from` of one kernel is moved to before its last `ret`.
pub fn belated(dtype: DType, kernel: &str, from: &str) -> String {
    let ptx = mutant(dtype, kernel, from, "", 0).unwrap_or_else(|| panic!("{kernel} has no `{from}`"));
    let start = ptx.find(&format!(".entry {kernel}_{dtype}(")).expect("it is there");
    let end = start + ptx[start..].find("\n}").expect("a kernel ends");
    let ret = start + ptx[start..end].rfind("ret;").expect("a kernel returns");
    [&ptx[..ret], from, "\n", &ptx[ret..]].concat()
}

/// The outcome of a mutant.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Fault(String),
    WrongResult,
    Survives,
}

/// The pass of a layer that a kernel belongs to.
#[derive(Clone, Copy)]
pub enum Pass {
    Forward,
    Backward,
    Merge,
}

/// Runs a layer on whole numbers, for which every result is exact, and returns the outcome.
pub fn verdict<E: Float>(backend: &Cuda<E, Emulator>, pass: Pass, dims: Dims, dropout: Option<Dropout>) -> Verdict {
    let ones = dropout.map_or_else(|| whole(dims, 1).mask, |dropout| mask(dropout, dims.m, dims.k));
    let layer = Lora { mask: ones, ..whole(dims, 1) };
    let want = layer.run();
    let right = match pass {
        Pass::Forward => forward(backend, &layer, dropout).map(|(h, y)| equal(&h, &want.h) && equal(&y, &want.y)),
        Pass::Backward => backward(backend, &layer, dropout).map(|(da, db, dbias, dx)| {
            equal(&da, &want.da) && equal(&db, &want.db) && equal(&dbias, &want.dbias) && equal(&dx, &want.dx)
        }),
        Pass::Merge => merge(backend, &layer).map(|w| equal(&w, &layer.merged())),
    };
    match right {
        Ok(true) => Verdict::Survives,
        Ok(false) => Verdict::WrongResult,
        Err(Error::Device { reason, .. }) => Verdict::Fault(reason),
        Err(error) => panic!("{error}"),
    }
}

fn equal<T: Float>(got: &[T], want: &Mat) -> bool {
    got.iter().zip(&want.data).all(|(got, want)| *got == T::from_f32(*want as f32))
}

/// The outcome of each mutant in the first shape that detects it, without and with dropout.
pub fn verdicts<E: Float>(kernel: &str, from: &str, to: &str, pass: Pass, shapes: &[Dims]) -> Vec<Verdict> {
    let halves = Dropout::new(0.5, 7).unwrap(); // keeps whole numbers whole
    let mutants = (0..).map_while(|nth| mutant(E::DTYPE, kernel, from, to, nth));
    let judge = |ptx: String| {
        let backend = Cuda::on(Emulator::with_ptx(E::DTYPE, &ptx));
        let cases = [None, Some(halves)].into_iter().flat_map(|dropout| shapes.iter().map(move |&dims| (dims, dropout)));
        let mut verdicts = cases.map(|(dims, dropout)| verdict::<E>(&backend, pass, dims, dropout));
        verdicts.find(|verdict| *verdict != Verdict::Survives).unwrap_or(Verdict::Survives)
    };
    let verdicts: Vec<_> = mutants.map(judge).collect();
    assert!(!verdicts.is_empty(), "{kernel} has no `{from}`");
    verdicts
}

/// Asserts that every mutant ends in a fault that names one of `reasons`.
pub fn assert_faults<E: Float>(kernel: &str, [from, to]: [&str; 2], pass: Pass, dims: Dims, reasons: &[&str]) {
    for verdict in verdicts::<E>(kernel, from, to, pass, &[dims]) {
        let named = |fault: &str| reasons.iter().any(|reason| fault.contains(reason));
        assert!(matches!(&verdict, Verdict::Fault(fault) if named(fault)), "{kernel}: `{to}` for `{from}`: {verdict:?}");
    }
}
