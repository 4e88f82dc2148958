//! The measured shapes, by name. The table `shapes.csv` is also read by tests, and by benchmarks of other libraries, in Rust
//! and in Python.

#![allow(dead_code, reason = "each program that includes this file uses a part of it")]
#![allow(unreachable_pub, reason = "included as a module, not exported")]

use std::fmt;

/// The ranks of a sweep. Without a sweep, a shape has the rank in the table.
pub const RANKS: [usize; 4] = [1, 8, 16, 64];

/// A layer: `m` rows, `k` inputs, `n` outputs, rank `r`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "the letters are the crate's")]
pub struct Shape {
    /// `mnist1` to `mnist3`: the layers of the MNIST model with a batch of 10. `decode` and `prefill`: 1 and 512 tokens in a
    /// square layer of a 7B model; `mlp`: 512 tokens in its MLP. `square`: a square product. `decode16`, `decode64`, `large`
    /// and `huge` are for large GPUs.
    pub name: &'static str,
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
}

impl Shape {
    /// The shapes for CPUs and consumer GPUs.
    pub fn all() -> Vec<Self> {
        Self::on(&["cpu", "both"])
    }

    /// The shapes for data-centre GPUs.
    pub fn on_big_gpus() -> Vec<Self> {
        Self::on(&["gpu", "both"])
    }

    /// The shape with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::on(&["cpu", "gpu", "both"]).into_iter().find(|shape| shape.name == name)
    }

    fn on(devices: &[&str]) -> Vec<Self> {
        let rows = include_str!("shapes.csv").lines().skip(1).map(Self::parse);
        rows.filter(|(_, on)| devices.contains(on)).map(|(shape, _)| shape).collect()
    }

    /// Parses a row of the table: a shape, and the devices that it is for.
    fn parse(line: &'static str) -> (Self, &'static str) {
        let cells: Vec<&str> = line.split(',').collect();
        let [name, sizes @ .., on] = &cells[..] else { panic!("{line}: want name,m,k,n,rank,on") };
        let sizes: Vec<usize> = sizes.iter().map(|size| size.parse().expect("a whole number")).collect();
        let [m, k, n, r] = sizes[..] else { panic!("{line}: want name,m,k,n,rank,on") };
        (Self { name, m, k, n, r }, on)
    }

    /// The shape with another rank.
    pub fn with_rank(self, r: usize) -> Self {
        Self { r, ..self }
    }
}

/// For example `prefill_512x4096x4096_r16`.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, m, k, n, r } = self;
        write!(f, "{name}_{m}x{k}x{n}_r{r}")
    }
}
