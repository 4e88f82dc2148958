//! Errors and faults that the interpreter reports.

use std::fmt;

/// PTX that the interpreter cannot read, or an instruction that it does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The line of the PTX text, from 1.
    pub line: usize,
    /// The error.
    pub reason: String,
}

pub(crate) fn error(line: usize, reason: impl Into<String>) -> ParseError {
    ParseError { line, reason: reason.into() }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.reason)
    }
}

impl std::error::Error for ParseError {}

/// An error of a kernel, and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The entry's name.
    pub kernel: String,
    /// The line of the PTX text, from 1; 0 if the launch itself is wrong.
    pub line: usize,
    /// The block's index in the grid.
    pub block: u32,
    /// The thread's index in its block.
    pub thread: u32,
    /// The error.
    pub kind: Kind,
}

/// Errors of kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// An access outside the memory that an address belongs to.
    OutOfBounds {
        /// The memory space.
        space: Space,
        /// The offset, in bytes.
        at: u64,
        /// The width of the access, in bytes.
        width: usize,
        /// The length of the memory, in bytes.
        len: usize,
    },
    /// An access at an address that is not a multiple of its width.
    Misaligned {
        /// The memory space.
        space: Space,
        /// The offset, in bytes.
        at: u64,
        /// The width of the access, in bytes.
        width: usize,
    },
    /// A read of bytes that nothing wrote.
    Uninitialised {
        /// The memory space.
        space: Space,
        /// The offset, in bytes.
        at: u64,
    },
    /// A write to memory that the launch passed as read-only.
    ReadOnly,
    /// An access to shared memory that an asynchronous copy may still be writing.
    InFlight {
        /// The address in shared memory.
        at: u64,
    },
    /// Two threads accessed the same bytes, at least one of them writing, and no barrier orders them.
    Race {
        /// The memory space.
        space: Space,
        /// The offset, in bytes.
        at: u64,
        /// The block of the other thread.
        other_block: u32,
        /// The other thread, if it was only one.
        other_thread: Option<u32>,
    },
    /// TMA or wgmma reads what threads wrote without `fence.proxy.async`, or TMA or another block uses an mbarrier without
    /// `fence.mbarrier_init`.
    Unpublished {
        /// The address in shared memory.
        at: u64,
    },
    /// A read of bytes that an earlier launch wrote and may still be writing: this thread has not executed `griddepcontrol.wait`.
    ReadsEarly {
        /// The offset in global memory, in bytes.
        at: u64,
    },
    /// A write that an earlier launch may not expect: this thread has not executed `griddepcontrol.wait`.
    WritesEarly {
        /// The offset in global memory, in bytes.
        at: u64,
    },
    /// Deadlock: no thread can continue.
    Deadlock {
        /// The barrier that the reported thread waits for.
        barrier: String,
        /// Block and first thread of each waiting warp.
        waiting: Vec<(u32, u32)>,
    },
    /// An mbarrier that is not initialised, or used inconsistently.
    BadBarrier {
        /// The address in shared memory.
        at: u64,
        /// The error.
        reason: &'static str,
    },
    /// A wgmma on registers that were written after the last `wgmma.fence`.
    MissingFence,
    /// A write to the sums of a wgmma that was not waited for.
    SumsInFlight,
    /// An operand of TMA or wgmma that the hardware would reject or misinterpret.
    Misuse(String),
    /// A barrier that not every living thread of the warp or block reaches.
    DivergedBarrier,
    /// An instruction for the whole warp, or for named lanes, that only some of them reach.
    DivergedWarp,
    /// A `trap` or a `brkpt` in the kernel.
    Trap,
    /// A shuffle from a lane that does not take part.
    AbsentLane,
    /// The limit of instructions is exceeded: an endless loop.
    Runaway,
    /// The launch does not fit the kernel.
    BadLaunch(String),
}

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The kernel's arguments.
    Param,
    /// An allocation of the device.
    Global,
    /// Shared memory of a block.
    Shared,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, line, block, thread, kind } = self;
        write!(f, "{kernel}, PTX line {line}, block {block}, thread {thread}: {kind}")
    }
}

impl std::error::Error for Fault {}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { space, at, width, len } => {
                write!(f, "{width} bytes at {at:#x} are outside the {len} bytes of {space} memory")
            }
            Self::Misaligned { space, at, width } => write!(f, "{width} bytes at {at:#x} of {space} memory are misaligned"),
            Self::Uninitialised { space, at } => write!(f, "nothing wrote {at:#x} of {space} memory, which is read"),
            Self::ReadOnly => write!(f, "writes to a read-only argument"),
            Self::InFlight { at } => write!(f, "an asynchronous copy may still be writing {at:#x} of shared memory"),
            Self::Race { space, at, other_block, other_thread } => {
                let other = other_thread.map_or("several threads".into(), |thread| format!("thread {thread}"));
                write!(f, "race on {at:#x} of {space} memory with {other} of block {other_block}")
            }
            Self::Unpublished { at } => write!(f, "no proxy fence since threads wrote {at:#x} of shared memory"),
            Self::ReadsEarly { at } => {
                write!(f, "reads {at:#x} of global memory too early: the previous launch may be writing it")
            }
            Self::WritesEarly { at } => {
                write!(f, "writes {at:#x} of global memory too early: the previous launch may be using it")
            }
            Self::Deadlock { barrier, waiting } => {
                let threads: Vec<_> = waiting.iter().map(|(block, thread)| format!("{block}:{thread}")).collect();
                write!(f, "waits for ever at {barrier}; warps that wait (block:thread): {}", threads.join(" "))
            }
            Self::BadBarrier { at, reason } => write!(f, "the mbarrier at {at:#x} of shared memory {reason}"),
            Self::MissingFence => write!(f, "no wgmma.fence since registers of this product were written"),
            Self::SumsInFlight => write!(f, "sums were touched before the product was waited for"),
            Self::Misuse(reason) => write!(f, "{reason}"),
            Self::DivergedBarrier => write!(f, "not every thread reaches this barrier"),
            Self::DivergedWarp => write!(f, "not every lane of the warp reaches this instruction"),
            Self::Trap => write!(f, "the kernel executes a trap"),
            Self::AbsentLane => write!(f, "shuffles with a lane that does not take part"),
            Self::Runaway => write!(f, "the kernel does not end"),
            Self::BadLaunch(reason) => write!(f, "{reason}"),
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Param => "parameter",
            Self::Global => "global",
            Self::Shared => "shared",
        })
    }
}
