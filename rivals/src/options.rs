//! What to measure: the flags that every program of rivals has.

use std::error::Error;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::layer::Verb;
use crate::measure::Effort;
use crate::shapes::{RANKS, Shape};

#[derive(Args)]
pub struct Options {
    /// A few rounds instead of many: for a look, not for figures worth keeping
    #[arg(long)]
    quick: bool,
    /// Writes the rows here as well
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draws the rows as a chart (SVG): everyone's speed beside lowrank's
    #[arg(long, value_name = "FILE")]
    pub chart: Option<PathBuf>,
    /// Rows of JSON that another program wrote on this machine, as more columns: of benches/rivals/lora_layer.py, say
    #[arg(long, value_name = "FILE")]
    pub beside: Vec<PathBuf>,
    /// Only these shapes of benches/shapes/shapes.csv
    #[arg(long, value_name = "NAME", value_parser = shape, value_delimiter = ',')]
    shape: Vec<Shape>,
    /// These ranks instead of each shape's own
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..), value_delimiter = ',')]
    rank: Vec<u16>,
    /// The ranks 1, 8, 16 and 64
    #[arg(long, conflicts_with = "rank")]
    sweep: bool,
    /// Only these verbs
    #[arg(long, value_name = "V", value_delimiter = ',')]
    verb: Vec<Verb>,
    /// Only these element types
    #[arg(long, value_name = "T", value_delimiter = ',')]
    dtype: Vec<Dtype>,
    /// Only these columns of the table beside lowrank
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    rivals: Vec<String>,
    /// All columns but these: a rival that takes too long at a large shape, say
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with = "rivals")]
    without: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

fn shape(name: &str) -> Result<Shape, String> {
    let names = || Shape::all().iter().map(|shape| shape.name).collect::<Vec<_>>().join(", ");
    Shape::named(name).ok_or_else(|| format!("want one of {}", names()))
}

/// What was not named is everything.
impl Options {
    pub fn shapes(&self) -> Vec<Shape> {
        let shapes = if self.shape.is_empty() { Shape::all() } else { self.shape.clone() };
        let ranks = if self.sweep { RANKS.to_vec() } else { self.rank.iter().map(|&r| r.into()).collect() };
        if ranks.is_empty() {
            return shapes;
        }
        shapes.iter().flat_map(|shape| ranks.iter().map(|&r| shape.with_rank(r))).collect()
    }

    pub fn verbs(&self) -> &[Verb] {
        if self.verb.is_empty() { Verb::value_variants() } else { &self.verb }
    }

    pub fn dtypes(&self) -> &[Dtype] {
        if self.dtype.is_empty() { Dtype::value_variants() } else { &self.dtype }
    }

    pub fn effort(&self) -> Effort {
        if self.quick { Effort::QUICK } else { Effort::FULL }
    }

    /// Whether the rival of that name takes part.
    pub fn wants(&self, rival: &str) -> bool {
        let named = |names: &[String]| names.iter().any(|name| name == rival);
        (self.rivals.is_empty() || named(&self.rivals)) && !named(&self.without)
    }

    /// Those of the names that take part. Errors: one that was asked for, or against, and is not there.
    pub fn chosen(&self, names: &[&'static str]) -> Result<Vec<&'static str>, Box<dyn Error>> {
        let stranger = self.rivals.iter().chain(&self.without).find(|name| !names.contains(&name.as_str()));
        match stranger {
            Some(stranger) => Err(format!("no rival is `{stranger}`; there are: {}", names.join(", ")).into()),
            None => Ok(names.iter().copied().filter(|name| self.wants(name)).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: Options,
    }

    fn chosen(flags: &[&str]) -> Result<Vec<&'static str>, String> {
        let program = Program::try_parse_from([&["program"], flags].concat()).map_err(|error| error.to_string())?;
        program.options.chosen(&["naive", "unfused", "plain"]).map_err(|error| error.to_string())
    }

    #[test]
    fn rivals_are_chosen_by_name() {
        assert_eq!(chosen(&[]).unwrap(), ["naive", "unfused", "plain"]);
        assert_eq!(chosen(&["--rivals", "plain"]).unwrap(), ["plain"]);
        assert_eq!(chosen(&["--without", "naive,unfused"]).unwrap(), ["plain"]);
        assert_eq!(chosen(&["--without", "naiv"]).unwrap_err(), "no rival is `naiv`; there are: naive, unfused, plain");
        assert!(chosen(&["--rivals", "plain", "--without", "naive"]).is_err());
    }
}
