//! Models and adapters as they are found in the world, through the program: names that moved, shared weights, new shapes, layers that
//! are not linear, folders that hold more than one thing. Expected weights are summed here, in f64.
#![allow(unreachable_pub, reason = "a test binary exports nothing")]

mod desk;
mod extracted;
mod folders;
mod kinds;
mod names;
mod ties;
