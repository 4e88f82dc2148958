//! Results as a table for people and as rows of JSON for programs.

use std::error::Error;
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::chart;
use crate::layer::Verb;
use crate::measure::Timed;
use crate::options::Options;
use crate::peaks::{Peaks, Share};
use crate::race::OWN;
use crate::shapes::Shape;

/// One verb on one layer: everyone's time.
pub struct Row {
    pub verb: Verb,
    pub backend: &'static str,
    pub dtype: String,
    pub shape: Shape,
    /// Of the CPU.
    pub threads: Option<usize>,
    pub share: Share,
    /// Each; ours first.
    pub timed: Vec<(String, Timed)>,
}

impl Row {
    fn ours(&self) -> f64 {
        self.timed[0].1.seconds
    }

    pub fn json(&self) -> Value {
        let of_rivals = |number: fn(&Timed) -> f64| -> Map<String, Value> {
            self.timed[1..].iter().map(|(name, timed)| (name.clone(), json!(number(timed)))).collect()
        };
        json!({
            "verb": self.verb.to_string(),
            "backend": self.backend,
            "dtype": self.dtype,
            "shape": self.shape.name,
            "rank": self.shape.r,
            "threads": self.threads,
            "seconds": self.ours(),
            "peak_share": self.share.share,
            "peak": self.share.peak,
            "rivals": of_rivals(|timed| timed.seconds),
            "ratios": of_rivals(|timed| timed.ratio),
        })
    }
}

/// Rows that other programs wrote on this machine: more columns, not interleaved with ours.
#[derive(Default)]
pub struct Beside(Vec<Value>);

impl Beside {
    pub fn read(paths: &[PathBuf]) -> Result<Self, Box<dyn Error>> {
        let mut all = Vec::new();
        for path in paths {
            let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
            all.extend(rows);
        }
        Ok(Self(all))
    }

    /// Adds the times of the same verb on the same layer.
    pub fn add_to(&self, row: &mut Row) {
        let ours = row.json();
        let same = |theirs: &&Value| ["verb", "dtype", "shape", "rank", "threads"].iter().all(|key| theirs[key] == ours[key]);
        for theirs in self.0.iter().filter(same) {
            if let (Some(name), Some(seconds)) = (theirs["backend"].as_str(), theirs["seconds"].as_f64()) {
                row.timed.push((name.to_owned(), Timed { seconds, ratio: seconds / row.ours() }));
            }
        }
    }

    /// Whose they are, in the order of the columns.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.0.iter().filter_map(|row| row["backend"].as_str().map(str::to_owned)).collect();
        names.dedup();
        names
    }
}

/// Prints rows as they come, and keeps them.
pub struct Report {
    /// Who is compared: the columns.
    rivals: Vec<String>,
    beside: Beside,
    json: Option<PathBuf>,
    chart: Option<PathBuf>,
    rows: Vec<Row>,
}

impl Report {
    const LEGEND: &str =
        "time: lowrank's, a run; of peak: of what bounds it; multiply-adds as they are right before a run, memory as above
others: their time over lowrank's, the median of the rounds' ratios
unfused: lowrank's own verbs, the adapter as layers of its own; plain: lowrank's base layer without the adapter; packed: \
     the verb with the frozen weight kept packed";

    /// Prints the head: those of `others`, and of our own, that the options want; `legend` has what to know of them.
    /// Errors: options that name nobody, files that cannot be read.
    pub fn new(options: &Options, others: &[&'static str], legend: &str) -> Result<Self, Box<dyn Error>> {
        let beside = Beside::read(&options.beside)?;
        let own: Vec<String> = options.chosen(&[others, &OWN].concat())?.into_iter().map(str::to_owned).collect();
        let rivals: Vec<String> = own.into_iter().chain(beside.names()).collect();
        println!("\n{}\n{legend}\n", Self::LEGEND);
        let head = ["verb", "", "shape", "r", "threads", "time", "of peak"].map(str::to_owned);
        let cells: Vec<String> = head.into_iter().chain(rivals.iter().cloned()).collect();
        line(&cells, ' ');
        line(&vec![String::new(); cells.len()], '-');
        Ok(Self { rivals, beside, json: options.json.clone(), chart: options.chart.clone(), rows: Vec::new() })
    }

    pub fn add(&mut self, mut row: Row) {
        self.beside.add_to(&mut row);
        self.print(&row);
        self.rows.push(row);
    }

    /// Writes the files that the options name.
    pub fn finish(self) -> Result<(), Box<dyn Error>> {
        if let Some(path) = self.json {
            let rows: Vec<_> = self.rows.iter().map(Row::json).collect();
            std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
        }
        if let Some(path) = self.chart {
            std::fs::write(path, chart::svg(&self.rows, "Speed beside lowrank's: more is faster")?)?;
        }
        Ok(())
    }

    fn print(&self, row: &Row) {
        let Shape { name, m, k, n, r } = row.shape;
        let share = format!("{:.0} % {}", 100.0 * row.share.share, row.share.peak);
        let shape = format!("{name} {m}x{k}x{n}");
        let mut cells = vec![
            row.verb.to_string(),
            row.dtype.clone(),
            shape,
            r.to_string(),
            row.threads.map_or(String::new(), |threads| threads.to_string()),
        ];
        cells.extend([time(row.ours()), share]);
        cells.extend(self.rivals.iter().map(|rival| {
            let found = row.timed[1..].iter().find(|(name, _)| name == rival);
            found.map_or(String::new(), |(_, theirs)| format!("{:.2}×", theirs.ratio))
        }));
        line(&cells, ' ');
    }
}

/// One line of the table: the first three columns to the left, numbers to the right.
fn line(cells: &[String], fill: char) {
    const WIDTHS: [usize; 7] = [21, 4, 22, 2, 7, 9, 10];
    for (i, cell) in cells.iter().enumerate() {
        let width = WIDTHS.get(i).copied().unwrap_or(14); // of the longest rival's name
        let space = fill.to_string().repeat(width.saturating_sub(cell.chars().count()));
        let (before, after) = if i < 3 { ("", space.as_str()) } else { (space.as_str(), "") };
        print!("|{fill}{before}{cell}{after}{fill}");
    }
    println!("|");
}

pub fn print_peaks(peaks: &Peaks) {
    let Peaks { threads, fma, amx, read, copy } = *peaks;
    match threads {
        Some(1) => print!("1 thread"),
        Some(threads) => print!("{threads} threads"),
        None => print!("the device"),
    }
    print!(": FMA {:.1} GFLOP/s, read {:.1} GB/s, copy {:.1} GB/s", fma / 1e9, read / 1e9, copy / 1e9);
    match amx {
        Some(amx) => println!(", AMX {:.1} GFLOP/s", amx / 1e9),
        None if threads.is_none() => println!(),
        None => println!("; AMX not measured: this CPU or its kernel does not offer it"),
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", 1e6 * s),
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.2} s"),
    }
}
