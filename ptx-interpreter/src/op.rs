//! What a statement is once it is decoded: an operation on registers by number.

use crate::fault::Space;
use crate::scalar::Function;

/// What runs: an operation, for the lanes whose guard holds.
pub(crate) struct Instruction {
    pub(crate) line: usize,
    /// The register, and the value it must have.
    pub(crate) guard: Option<(u32, bool)>,
    pub(crate) op: Op,
}

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Register(u32),
    Constant(u64),
    Special(Special),
}

/// What a lane knows about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Thread,
    Threads,
    /// The block's place along an axis of the grid, and how many there are.
    Block(usize),
    Blocks(usize),
    Lane,
    /// The block's number in its cluster.
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

/// The most registers that one access fills.
pub(crate) const MAX_VECTOR: usize = 4;

/// How an operand of a matrix product is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    F16,
    BF16,
}

/// `d += lhs·rhs`, 64×cols×(32 bytes)
pub(crate) struct Product {
    /// None: tf32.
    pub(crate) half: Option<Half>,
    pub(crate) cols: usize,
    pub(crate) d: Vec<u32>,
    pub(crate) lhs: Side,
    /// A descriptor.
    pub(crate) rhs: u32,
    /// Neighbours of the side are neighbours in row, not in depth.
    pub(crate) lhs_along: bool,
    pub(crate) rhs_along: bool,
    /// False: `d = lhs·rhs`.
    pub(crate) adds: Operand,
}

/// Where the left side of a product is.
pub(crate) enum Side {
    /// Where a descriptor says.
    Shared(u32),
    Registers(Vec<u32>),
}

impl Product {
    /// Elements in 32 bits.
    pub(crate) fn parts(&self) -> usize {
        if self.half.is_some() { 2 } else { 1 }
    }

    /// Elements of depth: 32 bytes.
    pub(crate) fn depth(&self) -> usize {
        8 * self.parts()
    }
}

/// What a thread does when it arrives at an mbarrier.
#[derive(Clone, Copy)]
pub(crate) enum Arrivals {
    /// Counts as so many.
    Count(Operand),
    /// Counts as one, and so many bytes will come.
    Expecting(Operand),
}

/// How a lane of a shuffle finds its partner.
#[derive(Clone, Copy)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Xor,
    Index,
}

/// The operations, with registers by number.
pub(crate) enum Op {
    /// `to = f(from)`, lane by lane
    Scalar {
        f: Function,
        to: u32,
        from: [Operand; 4],
    },
    /// Parts of `bits` each side by side in one register.
    Pack {
        to: u32,
        parts: Vec<Operand>,
        bits: u32,
    },
    /// The other way round.
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
    /// Waits for as many threads as come to the same barrier; None: for all.
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
    /// Waits until so many groups are on their way; None: until no copy is, not even one of the open group.
    WaitCopies {
        pending: Option<usize>,
    },
    /// 8×8 matrices of 16-bit elements from shared memory into fragments.
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
    /// Which of these lanes is chosen, and to each whether it is.
    Elect {
        to: Option<u32>,
        chosen: u32,
        lanes: Operand,
    },
    MakeBarrier {
        barrier: Address,
        count: Operand,
    },
    UnmakeBarrier {
        barrier: Address,
    },
    PublishBarriers,
    Arrive {
        barrier: Address,
        by: Arrivals,
    },
    WaitPhase {
        to: u32,
        barrier: Address,
        parity: Operand,
    },
    /// What the thread has seen written by plain stores, TMA and wgmma see too.
    PublishStores,
    /// A box of a tensor into shared memory; `to` and `barrier` in each of `blocks` of the cluster.
    LoadBox {
        to: Address,
        map: Operand,
        corner: Vec<Operand>,
        barrier: Address,
        blocks: Option<Operand>,
    },
    StoreBox {
        map: Operand,
        corner: Vec<Operand>,
        from: Address,
    },
    CommitStores,
    WaitStores {
        pending: usize,
    },
    /// Registers that were written are there for the products that follow.
    BeginProducts,
    Product(Product),
    CommitProducts,
    WaitProducts {
        pending: usize,
    },
    /// All threads of the cluster; between the two each goes on.
    ArriveInCluster,
    WaitInCluster,
    /// Until the launches before this one have ended, and what they wrote is there.
    WaitForLaunch,
    /// The next launch may begin.
    LetNextBegin,
    /// What changes nothing that an interpreter can see.
    Nothing,
    /// The same, but the whole warp has to come.
    Together,
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
