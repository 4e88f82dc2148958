//! The shapes that are measured, by name: one table, `shapes.csv`, for tests, benches and rivals, those in Python too.

#![allow(dead_code, reason = "each program that includes this file uses a part")]
#![allow(unreachable_pub, reason = "nobody exports it")]

use std::fmt;

/// The ranks to sweep over; a shape alone is measured at the rank that the table gives it.
pub const RANKS: [usize; 4] = [1, 8, 16, 64];

/// A layer: `m` rows, `k` inputs, `n` outputs, rank `r`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "the letters are the crate's")]
pub struct Shape {
    /// The MNIST model's layers at batch 10; one token through a 7B model's square layer; a cube; 512 tokens through that
    /// layer and through its MLP. Big GPUs are asked for other numbers of tokens through that layer, and for a larger one.
    pub name: &'static str,
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
}

impl Shape {
    /// What is measured on a CPU, and on a GPU that anyone has.
    pub fn all() -> Vec<Self> {
        Self::on(&["cpu", "both"])
    }

    /// What is measured on a GPU of a data centre.
    pub fn on_big_gpus() -> Vec<Self> {
        Self::on(&["gpu", "both"])
    }

    /// The row of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::on(&["cpu", "gpu", "both"]).into_iter().find(|shape| shape.name == name)
    }

    fn on(devices: &[&str]) -> Vec<Self> {
        let rows = include_str!("shapes.csv").lines().skip(1).map(Self::parse);
        rows.filter(|(_, on)| devices.contains(on)).map(|(shape, _)| shape).collect()
    }

    /// A row, and what it is measured on.
    fn parse(line: &'static str) -> (Self, &'static str) {
        let cells: Vec<&str> = line.split(',').collect();
        let [name, sizes @ .., on] = &cells[..] else { panic!("{line}: want name,m,k,n,rank,on") };
        let sizes: Vec<usize> = sizes.iter().map(|size| size.parse().expect("a whole number")).collect();
        let [m, k, n, r] = sizes[..] else { panic!("{line}: want name,m,k,n,rank,on") };
        (Self { name, m, k, n, r }, on)
    }

    /// With another rank.
    pub fn with_rank(self, r: usize) -> Self {
        Self { r, ..self }
    }
}

/// `prefill_512x4096x4096_r16`
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, m, k, n, r } = self;
        write!(f, "{name}_{m}x{k}x{n}_r{r}")
    }
}
