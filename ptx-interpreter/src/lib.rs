//! Runs NVIDIA PTX on the CPU, and reports what a GPU would let pass.
//!
//! ```text
//! parse    text → statements → Kernel: resolved names, decoded instructions      parse.rs  decode.rs  op.rs  scalar.rs
//! launch   arguments → parameter bytes; clusters of blocks one after another     launch.rs
//! block    what an instruction does to a cluster, whose warps run in turn        block.rs  schedule.rs  barrier.rs
//! access   loads, stores, asynchronous copies                                    access.rs
//! warp     groups of lanes that share a program counter; the hindmost goes first warp.rs
//! bulk     boxes of tensors on their way: TMA                                    bulk.rs
//! product  of a warp (mma) and of a warpgroup (wgmma), and the layouts they need matrix.rs  product.rs
//! memory   bytes, which of them were ever written, and who touched them when     memory.rs  shadow.rs
//! ```
//!
//! Lanes of a warp run in lock-step: of the groups that a branch made, the one with the smallest program counter runs, and
//! groups that meet become one. That is one of the orders a GPU may choose. What must not depend on the order is reported
//! rather than played out: two threads that touch the same bytes, one of them writing, with nothing between that orders them, are
//! a race; what orders them is kept in vector clocks, which barriers of every kind hand on. Where no thread can go on, the barrier
//! that it waits at is named. What is asynchronous happens as late as it may: `cp.async` stores nothing until it is waited for, a
//! box lands when every warp waits, and a product of a warpgroup reads and adds up when it is waited for, its sums being NaN till
//! then.
//!
//! A launch that may begin before the one before has ended ([`Launch::run_after`]) is run after it all the same, and whatever it
//! touches before its `griddepcontrol.wait` and should not is reported.
//!
//! What it does not know: timing, weak memory, local memory (a kernel of ours that needs it is too big), grids in 2-D, tensors
//! other than matrices of 16-bit elements in lines of 128 bytes, and which registers `setmaxnreg` moves. The lanes of a warp are
//! taken to have come together when one of them arrives at an mbarrier.
//!
//! ```
//! use ptx_interpreter::{Arg, Global, Launch, Module};
//!
//! let module = Module::parse(
//!     ".visible .entry double(.param .u64 data) {
//!         .reg .b32 %r<3>; .reg .b64 %rd<3>;
//!         ld.param.u64 %rd0, [data];
//!         mov.u32 %r0, %tid.x;
//!         mul.wide.u32 %rd1, %r0, 4;
//!         add.s64 %rd2, %rd0, %rd1;
//!         ld.global.u32 %r1, [%rd2];
//!         shl.b32 %r2, %r1, 1;
//!         st.global.u32 [%rd2], %r2;
//!         ret;
//!     }",
//! )?;
//! let mut data = Global::from_bytes(&[1, 0, 0, 0, 7, 0, 0, 0]);
//! Launch { grid: 1, block: 2, shared: 0 }.run(&module, "double", &mut [Arg::Write(&mut data)])?;
//! assert_eq!(data.bytes(), [2, 0, 0, 0, 14, 0, 0, 0]);
//!
//! // A third thread would reach past the end.
//! let fault = Launch { grid: 1, block: 3, shared: 0 }.run(&module, "double", &mut [Arg::Write(&mut data)]).unwrap_err();
//! assert_eq!((fault.line, fault.thread), (7, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod access;
mod barrier;
mod block;
mod bulk;
mod decode;
mod fault;
mod float;
mod launch;
mod matrix;
mod memory;
mod op;
mod parse;
mod product;
mod scalar;
mod schedule;
mod shadow;
mod warp;

pub use fault::{Fault, Kind, ParseError, Space};
pub use launch::{Arg, Launch, Report, Tiles};
pub use memory::Global;
pub use parse::{Kernel, Module};

/// Lanes of a warp.
const WARP: usize = 32;
