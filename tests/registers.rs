//! The results of ptxas for the shipped PTX, in `kernels/ptx/registers.txt`: registers, shared memory, spills.
#![cfg(feature = "cuda")]

#[path = "../kernels/ptx.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod compiler;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use compiler::{MODULES, Module, Target, fnv1a, shipped};
use lowrank::cuda::from_hopper_on;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// Every module and its PTX.
fn modules() -> Vec<(Module, String)> {
    let mut modules: Vec<_> = MODULES.map(|module| (module, shipped(&kernels(), module).unwrap())).into();
    modules.sort_by_key(|(module, _)| module.name);
    modules
}

/// The targets that a module is assembled for: the oldest GPUs that it runs on, and Hopper.
fn targets(module: Module) -> &'static [&'static str] {
    match module.target {
        Target::Every => &["sm_80", "sm_90"],
        Target::Hopper => &["sm_90a"],
    }
}

fn entries(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.lines().filter_map(|line| Some(line.split_once(".entry ")?.1.trim_end_matches('(').trim()))
}

/// The first line of the table, for the current PTX.
fn stamp() -> String {
    let text: String = modules().into_iter().map(|(_, ptx)| ptx).collect();
    format!("# ptxas 13.0 on PTX with hash {:016x}; made by scripts/build-ptx", fnv1a(text.bytes()))
}

/// One kernel on one kind of GPU.
#[derive(Debug, PartialEq)]
struct Row {
    entry: String,
    target: String,
    registers: u32,
    shared: u32,
    spilled: u32,
}

impl Row {
    fn line(&self) -> String {
        let Self { entry, target, registers, shared, spilled } = self;
        format!("{entry:34} {target:7} {registers:4} {shared:7} {spilled:4}")
    }

    fn parse(line: &str) -> Self {
        let [entry, target, numbers @ ..] = &line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
        let [registers, shared, spilled] = numbers else { panic!("{line}") };
        let [registers, shared, spilled] = [registers, shared, spilled].map(|number| number.parse().expect("a number"));
        Self { entry: (*entry).to_owned(), target: (*target).to_owned(), registers, shared, spilled }
    }
}

/// The number that stands before `unit` in a line such as `Used 26 registers, used 1 barriers, 1024 bytes smem`.
fn number(line: &str, unit: &str) -> Option<u32> {
    line.split_once(unit)?.0.split_whitespace().last()?.parse().ok()
}

/// Next to `LOWRANK_NVCC`, or on PATH.
fn ptxas() -> Option<PathBuf> {
    let path = std::env::var_os("LOWRANK_NVCC").map_or("ptxas".into(), |nvcc| PathBuf::from(nvcc).with_file_name("ptxas"));
    Command::new(&path).arg("--version").output().ok().map(|_| path)
}

/// Assembles every module for each of its targets.
fn assemble(ptxas: &Path, targets: impl Fn(Module) -> &'static [&'static str]) -> Vec<Row> {
    let scratch = tempfile::tempdir().unwrap();
    let mut rows = Vec::new();
    for (module, text) in modules() {
        let name = module.name;
        let ptx = scratch.path().join(format!("{name}.ptx"));
        for target in targets(module) {
            fs::write(&ptx, if *target == "sm_80" { text.clone() } else { from_hopper_on(&text) }).unwrap();
            let cubin = scratch.path().join("out.cubin");
            let output = Command::new(ptxas).args(["-v", "-arch", target]).arg(&ptx).arg("-o").arg(cubin).output().unwrap();
            let report = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name} for {target}: {report}");
            // ptxas warns that it serialised the WGMMA instructions.
            assert!(!report.contains("Potential Performance Loss"), "{name} for {target}: {report}");
            let before = rows.len();
            rows.extend(read_report(&report, target));
            assert_eq!(rows.len() - before, entries(&text).count(), "{name} for {target}: {report}");
        }
    }
    rows.sort_by(|a, b| (&a.entry, &a.target).cmp(&(&b.entry, &b.target)));
    rows
}

fn read_report(report: &str, target: &str) -> Vec<Row> {
    let (mut rows, mut entry, mut spilled) = (Vec::new(), "", 0);
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            entry = rest.split('\'').next().unwrap_or_default();
        } else if line.contains("spill") {
            spilled = number(line, " bytes spill stores").unwrap() + number(line, " bytes spill loads").unwrap();
        } else if let Some(registers) = number(line, " registers") {
            let shared = number(line, " bytes smem").unwrap_or(0);
            rows.push(Row { entry: entry.to_owned(), target: target.to_owned(), registers, shared, spilled });
        }
    }
    rows
}

/// With ptxas of the same release the table must be reproduced; `LOWRANK_WRITE_PTX`, which `scripts/build-ptx` sets, writes it.
/// Without ptxas, the table must belong to this PTX. No kernel may spill registers, because spills cost more than any kernel
/// gains.
#[test]
fn the_table_of_registers_is_true_and_nothing_spills() {
    let path = kernels().join("ptx").join("registers.txt");
    let assembled = ptxas().map(|ptxas| (assemble(&ptxas, targets), ptxas));
    if std::env::var_os("LOWRANK_WRITE_PTX").is_some() {
        let (rows, _) = assembled.as_ref().expect("scripts/build-ptx sets LOWRANK_NVCC");
        let head = format!("{}\n# {:32} {:7} {:>4} {:>7} {:>4}", stamp(), "entry", "target", "regs", "shared", "spilled");
        let lines: Vec<_> = rows.iter().map(Row::line).collect();
        fs::write(&path, format!("{head}\n{}\n", lines.join("\n"))).unwrap();
    }
    let table = fs::read_to_string(&path).unwrap();
    assert_eq!(table.lines().next(), Some(&*stamp()), "registers.txt is stale: run scripts/build-ptx");
    let kept: Vec<_> = table.lines().filter(|line| !line.starts_with('#')).map(Row::parse).collect();
    let spilled = |rows: &[Row]| rows.iter().filter(|row| row.spilled > 0).map(Row::line).collect::<Vec<_>>();
    assert!(spilled(&kept).is_empty(), "{:?}", spilled(&kept));
    match assembled {
        None => println!("not run: there is no ptxas"),
        Some((rows, ptxas)) => {
            assert!(spilled(&rows).is_empty(), "{:?}", spilled(&rows));
            let version = Command::new(ptxas).arg("--version").output().unwrap();
            if String::from_utf8_lossy(&version.stdout).contains("release 13.0") {
                assert_eq!(rows, kept, "registers.txt is stale: run scripts/build-ptx");
            }
        }
    }
}

/// GPUs that are newer than the target of the PTX run it too.
#[test]
fn newer_gpus_run_it_without_spills() {
    let Some(ptxas) = ptxas() else {
        println!("not run: there is no ptxas");
        return;
    };
    let younger = |module: Module| match module.target {
        Target::Every => &["sm_100", "sm_120"][..],
        Target::Hopper => &[],
    };
    let spilled: Vec<_> = assemble(&ptxas, younger).into_iter().filter(|row| row.spilled > 0).collect();
    assert!(spilled.is_empty(), "{spilled:?}");
}

/// The table has every kernel, and none needs more shared memory than a block of an Ampere GPU has by default.
#[test]
fn the_table_has_every_kernel() {
    let table = fs::read_to_string(kernels().join("ptx").join("registers.txt")).unwrap();
    let rows: Vec<_> = table.lines().filter(|line| !line.starts_with('#')).map(Row::parse).collect();
    let got: BTreeSet<_> = rows.iter().map(|row| (row.entry.clone(), row.target.clone())).collect();
    let want = modules().into_iter().flat_map(|(module, ptx)| {
        let rows = entries(&ptx).flat_map(|entry| targets(module).iter().map(|target| (entry.to_owned(), (*target).to_owned())));
        rows.collect::<Vec<_>>()
    });
    assert_eq!(got, want.collect());
    for row in rows {
        assert!(row.registers <= 255 && row.shared <= 48 << 10, "{}", row.line());
    }
}
