//! The program on models and adapters as they are published: changed names, shared weights, new shapes, layers that are not linear, folders
//! with several files. Expected weights are computed here, in f64.
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

mod desk;
mod extracted;
mod folders;
mod kinds;
mod names;
mod ties;
