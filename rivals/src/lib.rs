//! lowrank's verbs beside the same verbs of others: inputs, the check before the clock, interleaved runs, peaks, tables.
//!
//! ```text
//! options.rs layer.rs      what to measure, on what; whoever computes it is a `Contender`
//!   └─ check.rs            everyone against the f64 oracle of the tests
//!   └─ measure.rs peaks/   everyone's time, in interleaved runs; what the machine can do
//!   └─ race.rs table.rs    all of it, row by row; chart.rs draws it
//! rivals/                  lowrank itself, and the products of crates that are quickly built
//! ```
//!
//! The program of this package races against those. Frameworks that bring hundreds of crates have programs, and workspaces, of their
//! own: `rivals/burn` and `rivals/candle` are built on this library, and so is nothing that ships.

#[path = "../../tests/support/bounds.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod bounds;
pub mod chart;
pub mod check;
pub mod layer;
pub mod measure;
pub mod options;
#[path = "../../tests/support/oracle.rs"]
#[allow(dead_code, reason = "a part of it is enough")]
mod oracle;
pub mod peaks;
pub mod race;
pub mod rivals;
#[path = "../../benches/shapes/mod.rs"]
pub mod shapes;
pub mod table;
