//! Results as a table for people and as rows of JSON for programs.

use serde_json::{Map, Value, json};

use crate::layer::Verb;
use crate::peaks::{Peaks, Share};
use crate::shapes::Shape;

/// One verb on one layer: everyone's time.
pub struct Row {
    pub verb: Verb,
    pub dtype: String,
    pub shape: Shape,
    pub threads: usize,
    pub share: Share,
    /// Seconds of each; ours first.
    pub seconds: Vec<(&'static str, f64)>,
}

/// Who is compared, in the order of the columns.
const RIVALS: [&str; 5] = ["gemm", "faer", "rten-gemm", "matrixmultiply", "unfused"];

/// What the columns mean.
pub const LEGEND: &str =
    "time: lowrank's, a run; of peak: of what bounds it, as measured above; the others: their time over lowrank's";

pub fn print_peaks(peaks: &Peaks) {
    let Peaks { threads, fma, amx, read, copy } = *peaks;
    let plural = if threads == 1 { "" } else { "s" };
    print!("{threads} thread{plural}: FMA {:.1} GFLOP/s, read {:.1} GB/s, copy {:.1} GB/s", fma / 1e9, read / 1e9, copy / 1e9);
    match amx {
        Some(amx) => println!(", AMX {:.1} GFLOP/s", amx / 1e9),
        None => println!("; AMX not measured: this CPU or its kernel does not offer it"),
    }
}

pub fn print_head() {
    print!("| {:21} | {:4} | {:20} | {:>2} | {:>7} | {:>9} | {:>10} |", "verb", "", "shape", "r", "threads", "time", "of peak");
    RIVALS.iter().for_each(|rival| print!(" {rival:>14} |"));
    print!(
        "\n|{}|{}|{}|{}|{}|{}|{}|",
        "-".repeat(23),
        "-".repeat(6),
        "-".repeat(22),
        "-".repeat(4),
        "-".repeat(9),
        "-".repeat(11),
        "-".repeat(12)
    );
    println!("{}", format!("{}|", "-".repeat(16)).repeat(RIVALS.len()));
}

pub fn print(row: &Row) {
    let (verb, dtype, shape, seconds) = (row.verb.to_string(), &row.dtype, row.sizes(), row.ours());
    let share = format!("{:.0} % {}", 100.0 * row.share.share, row.share.peak);
    print!("| {verb:21} | {dtype:4} | {shape:20} | {:2} | {:7} | {:>9} | {share:>10} |", row.shape.r, row.threads, time(seconds));
    for rival in RIVALS {
        let found = row.seconds.iter().find(|(name, _)| *name == rival);
        let ratio = found.map_or(String::new(), |(_, theirs)| format!("{:.2}×", theirs / seconds));
        print!(" {ratio:>14} |");
    }
    println!();
}

impl Row {
    fn ours(&self) -> f64 {
        self.seconds[0].1
    }

    /// `prefill 512x4096x4096`
    fn sizes(&self) -> String {
        let Shape { name, m, k, n, .. } = self.shape;
        format!("{name} {m}x{k}x{n}")
    }

    pub fn json(&self) -> Value {
        let rivals: Map<String, Value> =
            self.seconds[1..].iter().map(|(name, seconds)| (name.to_string(), json!(seconds))).collect();
        json!({
            "verb": self.verb.to_string(),
            "backend": "cpu",
            "dtype": self.dtype,
            "shape": self.shape.name,
            "rank": self.shape.r,
            "threads": self.threads,
            "seconds": self.ours(),
            "peak_share": self.share.share,
            "peak": self.share.peak,
            "rivals": rivals,
        })
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", 1e6 * s),
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.2} s"),
    }
}
