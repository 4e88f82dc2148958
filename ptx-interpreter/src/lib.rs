//! Runs NVIDIA PTX on the CPU, and reports errors that a GPU would not.
//!
//! ```text
//! parse     text → statements → kernels: names, decoded instructions               parse.rs names.rs decode.rs op.rs scalar.rs
//! launch    arguments → parameter bytes; runs one cluster of blocks after another  launch.rs arg.rs tensor.rs
//! schedule  runs the warps of a cluster in turn                                    schedule.rs
//! block     executes an instruction: moves, products, barriers                     block.rs access.rs bulk.rs product.rs
//! cluster   state of the threads: shared memory, copies in flight, clocks          cluster.rs flight.rs barrier.rs warp.rs
//! memory    bytes; which were written, and by whom they were accessed              memory.rs shadow.rs
//! semantics layouts of elements, counts of mbarriers, rounding of products         semantics.rs matrix.rs sums.rs
//! ```
//!
//! The lanes of a warp run in lock-step: after a branch, the group of lanes with the smallest program counter runs, and groups
//! that meet are merged. This is one of the orders that a GPU may choose. Results that depend on the order are reported instead
//! of tried: if two threads access the same bytes, one of them writing, and nothing orders them, that is a race. The order is
//! tracked by vector clocks, which every kind of barrier joins. If no thread can continue, a deadlock is reported, with the
//! barrier. Asynchronous operations happen as late as possible: `cp.async` stores when it is waited for, a TMA load completes
//! when every warp waits, and a wgmma reads its operands and accumulates when it is waited for; until then its sums are NaN.
//!
//! A launch that may start before the previous one has ended ([`Launch::run_after`]) is run after it. Accesses before
//! `griddepcontrol.wait` that may conflict with earlier launches are reported.
//!
//! Some reported errors would work on a GPU, or on all GPUs so far:
//!
//! - an mbarrier that TMA uses without `fence.mbarrier_init`, and lanes of one store that write the same value to the same
//!   address, unless
//! [`Checks`] allow them;
//! - a barrier of the whole block (`bar.sync 0`) that warps reach at different instructions, which CUDA forbids for
//!   `__syncthreads`;
//! barriers for a number of threads (`bar.sync 1, 64`) may be reached at several;
//! - lanes that name each other (`bar.warp.sync`, `elect.sync`, `shfl.sync`) at different instructions; at one instruction they
//!   wait for
//! each other;
//! - a wgmma whose operands one of its warps releases after it has waited for the wgmma itself: it is modelled as four products
//!   of single
//! warps, and the other three may still read.
//!
//! Not modelled: timing, weak memory, local memory (our kernels must not use it), blocks of threads in 2-D, clusters of more than
//! two blocks or along other axes than x, tensors that are not tiled (im2col) or whose maps a kernel makes, descriptors without
//! swizzle, the state that `mbarrier.arrive` returns, and the registers that `setmaxnreg` moves. The lanes of a warp count as
//! converged when one of them arrives at an mbarrier, and `elect.sync` elects the lowest lane.
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
//! // A third thread would access memory beyond the end.
//! let fault = Launch { grid: 1, block: 3, shared: 0 }.run(&module, "double", &mut [Arg::Write(&mut data)]).unwrap_err();
//! assert_eq!((fault.line, fault.thread), (7, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod access;
mod arg;
mod barrier;
mod block;
mod bulk;
mod cluster;
mod decode;
mod fault;
mod flight;
mod float;
mod launch;
mod matrix;
mod memory;
mod names;
mod op;
mod parse;
mod product;
mod scalar;
mod schedule;
mod semantics;
mod shadow;
mod sums;
mod tensor;
#[cfg(test)]
mod third_party;
mod warp;

pub use arg::Arg;
pub use cluster::Checks;
pub use fault::{Fault, Kind, ParseError, Space};
pub use launch::{Launch, Options, Report};
pub use memory::Global;
pub use parse::{Kernel, Module};
pub use tensor::{Axis, TensorMap};

/// Lanes of a warp.
const WARP: usize = 32;
