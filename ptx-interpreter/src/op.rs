//! What a statement is once it is decoded: an operation on registers by number.

use crate::fault::Space;
use crate::product::Product;
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
    Block,
    Blocks,
    Lane,
    /// The block's number in its cluster.
    Rank,
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
    MakeBarrier {
        barrier: Address,
        count: Operand,
    },
    PublishBarriers,
    Arrive {
        barrier: Address,
        bytes: Operand,
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
        corner: [Operand; 2],
        barrier: Address,
        blocks: Option<Operand>,
    },
    StoreBox {
        map: Operand,
        corner: [Operand; 2],
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
    /// What changes nothing that an interpreter can see; the whole warp has to come.
    Together,
    /// `d = a·b + c`, 16×8×16, in fragments
    Multiply {
        half: Half,
        d: Vec<u32>,
        a: Vec<u32>,
        b: Vec<u32>,
        c: Vec<Operand>,
    },
}
