//! Decoded instructions: operations on registers by number.

use crate::fault::Space;
use crate::scalar::Function;

/// An instruction: an operation, for the lanes whose guard holds.
pub(crate) struct Instruction {
    pub(crate) line: usize,
    /// The guard's register, and the value that it must have.
    pub(crate) guard: Option<(u32, bool)>,
    pub(crate) op: Op,
}

/// A source operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Register(u32),
    Constant(u64),
    Special(Special),
}

/// Special registers of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Thread,
    Threads,
    /// The block's index along an axis of the grid, and the number of blocks.
    Block(usize),
    Blocks(usize),
    Lane,
    /// The block's rank in its cluster.
    Rank,
    /// Blocks of a cluster.
    Ranks,
}

/// `[base + offset]`
#[derive(Clone, Copy)]
pub(crate) struct Address {
    pub(crate) base: Operand,
    pub(crate) offset: i64,
}

/// The largest number of registers in one access.
pub(crate) const MAX_VECTOR: usize = 4;

/// Element types of matrix products.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    F16,
    BF16,
}

/// `d += lhs·rhs`, 64×cols×(32 bytes)
pub(crate) struct Product {
    /// `None`: tf32.
    pub(crate) half: Option<Half>,
    pub(crate) cols: usize,
    pub(crate) d: Vec<u32>,
    pub(crate) lhs: Side,
    /// A descriptor.
    pub(crate) rhs: u32,
    /// True if the right side is MN-major.
    pub(crate) lhs_along: bool,
    pub(crate) rhs_along: bool,
    /// False: `d = lhs·rhs`, without accumulating.
    pub(crate) adds: Operand,
}

/// The location of the left side.
pub(crate) enum Side {
    /// In shared memory, by a descriptor.
    Shared(u32),
    Registers(Vec<u32>),
}

impl Product {
    /// Elements in 32 bits.
    pub(crate) fn parts(&self) -> usize {
        if self.half.is_some() { 2 } else { 1 }
    }

    /// Depth of a product, in elements: 32 bytes.
    pub(crate) fn depth(&self) -> usize {
        8 * self.parts()
    }
}

/// Kinds of arrivals at an mbarrier.
#[derive(Clone, Copy)]
pub(crate) enum Arrivals {
    /// This number of arrivals.
    Count(Operand),
    /// One arrival, which expects this many bytes.
    Expecting(Operand),
}

/// Modes of shuffles.
#[derive(Clone, Copy)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Xor,
    Index,
}

/// Operations, with registers by number.
pub(crate) enum Op {
    /// `to = f(from)`, in each lane
    Scalar {
        f: Function,
        to: u32,
        from: [Operand; 4],
    },
    /// Packs parts of `bits` bits into one register.
    Pack {
        to: u32,
        parts: Vec<Operand>,
        bits: u32,
    },
    /// Unpacks a register into parts of `bits` bits.
    Unpack {
        to: Vec<Option<u32>>,
        from: Operand,
        bits: u32,
    },
    Load {
        space: Option<Space>,
        to: Vec<u32>,
        address: Address,
        width: usize,
        signed: bool,
    },
    Store {
        space: Option<Space>,
        address: Address,
        from: Vec<Operand>,
        width: usize,
    },
    Branch {
        to: usize,
    },
    Return,
    /// Waits at a barrier for this many threads; `None`: for all.
    Barrier {
        number: Operand,
        threads: Option<Operand>,
    },
    WarpBarrier {
        lanes: Operand,
    },
    Shuffle {
        kind: Shuffle,
        to: u32,
        inside: Option<u32>,
        from: Operand,
        by: Operand,
        clamp: Operand,
        lanes: Operand,
    },
    CopyAsync {
        to: Address,
        from: Address,
        width: usize,
        filled: Option<Operand>,
    },
    CommitCopies,
    /// Waits until at most this many groups are in flight; `None`: until no copy is, not even one of the open group.
    WaitCopies {
        pending: Option<usize>,
    },
    /// ldmatrix: 8×8 matrices of 16-bit elements from shared memory to fragments.
    LoadMatrix {
        to: Vec<u32>,
        address: Address,
        transposed: bool,
    },
    /// The other way round.
    StoreMatrix {
        from: Vec<u32>,
        address: Address,
        transposed: bool,
    },
    /// elect.sync: the elected lane, and a predicate that is true in it.
    Elect {
        to: Option<u32>,
        chosen: u32,
        lanes: Operand,
    },
    InitBarrier {
        barrier: Address,
        count: Operand,
    },
    InvalidateBarrier {
        barrier: Address,
    },
    BarrierInitFence,
    Arrive {
        barrier: Address,
        by: Arrivals,
    },
    WaitPhase {
        to: u32,
        barrier: Address,
        parity: Operand,
    },
    /// fence.proxy.async: makes ordinary writes that the thread has seen visible to TMA and wgmma.
    ProxyFence,
    /// TMA load: a box of a tensor to shared memory; `to` and `barrier` in each block of the cluster in `blocks`.
    TmaLoad {
        to: Address,
        map: Operand,
        corner: Vec<Operand>,
        barrier: Address,
        blocks: Option<Operand>,
    },
    TmaStore {
        map: Operand,
        corner: Vec<Operand>,
        from: Address,
    },
    TmaStoreCommit,
    TmaStoreWait {
        pending: usize,
    },
    /// wgmma.fence: orders earlier writes to registers before later wgmma.
    WgmmaFence,
    Product(Product),
    WgmmaCommit,
    WgmmaWait {
        pending: usize,
    },
    /// A barrier of the cluster, in two halves: arriving and waiting.
    ArriveInCluster,
    WaitInCluster,
    /// griddepcontrol.wait: waits until earlier launches have ended and their writes are visible.
    WaitForPreviousLaunch,
    /// griddepcontrol.launch_dependents: the next launch may start.
    LaunchDependents,
    /// No effect that the interpreter models.
    NoEffect,
    /// No effect, but the whole warp must be converged.
    ConvergedNoEffect,
    Trap,
    /// `d = a·b + c`, 16×8×16, in fragments
    Multiply {
        half: Half,
        d: Vec<u32>,
        a: Vec<u32>,
        b: Vec<u32>,
        c: Vec<Operand>,
    },
}
