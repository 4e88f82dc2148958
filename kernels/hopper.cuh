// The engine for Hopper: `Σ lhs·rhs` of 16-bit operands, in tiles of TALL×COLS, added up in f32 registers.
//
//     for tile in this block's tiles               as many blocks as multiprocessors; bands of tiles share what L2 holds
//       one warp         for step in the depth     TMA brings both panels, DEEP of the depth, up to STAGES steps ahead
//       three warps      for chunk in the rank     bring the update's right side, widened
//       two warpgroups   for step in the depth     wgmma, each onto its 64×COLS sums; between the steps, chunks of the update
//                        round, to shared memory   TMA stores it while the next tile begins
//
// Who waits for whom is said by mbarriers, in pairs: `full` ends a phase when a panel has come, `empty` when it may be written
// over. Two blocks with wide tiles are a cluster: they make neighbours down a column, and each brings half of the right panel, to
// both; so a stage is empty when the warpgroups of both blocks say so. All barriers turn with the stages, whatever tile a stage
// belongs to: the next tile's panels come during the last steps.
//
// The low-rank update is more depth of the same tile, in tf32. Its right side is exact there: f16 and bf16 have no more than 11
// significant bits, and no more exponents. h' = scale·h goes in twice: hi = tf32(h') and lo = tf32(h' - hi), from registers,
// and |h' - hi - lo| ≤ 2⁻²³·|h'|: two units of f32's rounding, for any h' (hi and lo in f16 would overflow, in bf16 keep only
// 16 bits). A rank costs four of depth (tf32 is half as fast, and twice): 4·r/k of the work, 1.6 % at r = 16 and k = 4096.
//
// What each idea should gain, from what others measured on 4096³ with such kernels (cuBLAS 716 TFLOP/s): wgmma and TMA 317,
// 128×128 tiles 423, a producer and a ring of stages 498, 128×256 tiles by two warpgroups 610, persistent blocks in bands 660,
// mbarriers where one lane arrives for many 704, clusters of 2 that share panels 734, registers moved to the warpgroups that add
// up 747, stores by TMA 758. What this kernel reaches has not been measured.
#pragma once
#include "engine.cuh"
#include "hopper_ptx.cuh"

constexpr int GROUP = 128;           // threads of a warpgroup
constexpr int HOPPER = 3 * GROUP;    // threads of a block: who brings, and two that add up
constexpr int TALL = 128;            // rows of a tile: 64 a warpgroup
constexpr int LINE = 64;             // 16-bit elements in the 128 bytes of a line of the swizzle
constexpr int DEEP = LINE;           // of both operands in a stage
constexpr int THIN = 16;             // of the rank in a chunk of the update: 64 bytes of f32, a line of its swizzle
constexpr int BAND = 16;             // tiles down in a band: with 132 blocks about as many columns as rows
template <int COLS>
constexpr int CLUSTER = COLS == 256 ? 2 : 1;  // blocks that share right panels
constexpr int WIDENERS = GROUP - WARP;  // threads that bring the update's right side
constexpr int FEW = 56, MANY = 224;     // registers of a thread that brings, and that adds up: 128·56 + 256·224 = 384·168

// A chunk of the rank of one tile; depth in a line, exchanged as SWIZZLE_64 says.
template <int COLS>
struct alignas(1024) ChunkPanel {
    float data[COLS * THIN];
    __device__ float* place(int row, int d) { return &data[(row * THIN + d) ^ (row / 2 % 4 * 4)]; }
};

template <int COLS>
struct alignas(1024) Shared {
    static constexpr int STAGES = COLS == 256 ? 3 : 5;
    struct { E lhs[TALL * DEEP], rhs[COLS * DEEP]; } stages[STAGES];
    E out[2][64 * COLS];  // of each warpgroup: boxes of 64×LINE
    ChunkPanel<COLS> chunk;
    Barrier full[STAGES], empty[STAGES], chunk_full, chunk_empty;
};
static_assert(sizeof(Shared<256>) <= 227 << 10 && sizeof(Shared<128>) <= 227 << 10, "a block has no more");

// Which stage comes next, and the parity of its phase.
template <int STAGES>
struct Turn {
    int stage = 0;
    unsigned parity = 0;
    __device__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The tiles of an output; those of a cluster are one here, and the last may lie outside. Their numbers run down a band, then to
// the next column of tiles, then to the next band.
template <int COLS>
struct Tiles {
    static constexpr int HEIGHT = CLUSTER<COLS> * TALL, IN_BAND = BAND / CLUSTER<COLS>;
    int down, across;
    __device__ Tiles(int rows, int cols) : down((rows - 1) / HEIGHT + 1), across((cols - 1) / COLS + 1) {}

    // Calls f(first_row, first_col) for each tile of this block.
    template <class F>
    __device__ void each(F f) const {
        for (int tile = blockIdx.x / CLUSTER<COLS>; tile < down * across; tile += gridDim.x / CLUSTER<COLS>) {
            int band = tile / (IN_BAND * across) * IN_BAND, within = tile % (IN_BAND * across), height = min(IN_BAND, down - band);
            f((band + within % height) * HEIGHT + rank() * TALL, within / height * COLS);
        }
    }

    // This block's number in its cluster.
    __device__ static int rank() { return int(blockIdx.x) % CLUSTER<COLS>; }
};

// scale·lhs·rhsᵀ, or drop(..) of it; there is none if the depth is 0.
template <class View>
struct Update {
    using Rhs = View;
    static constexpr bool DROPS = false;
    Rows<float> lhs;
    Rhs rhs;
    float scale;
};
template <class View>
struct DroppedUpdate : Update<View> {
    static constexpr bool DROPS = true;
    Dropout dropout;
};

// One warp brings the panels: its first lane, but all of them wait, and meet after each step. Else a lane could fall two phases of a
// stage behind, where a parity that is right looks wrong. ALONG: neighbours of rhs are neighbours in row, and its boxes are DEEP×LINE.
template <int COLS, bool ALONG>
__device__ void bring_panels(Shared<COLS>& shared, Tiles<COLS> tiles, const TensorMap& lhs, const TensorMap& rhs, int steps) {
    constexpr int SHARE = COLS / CLUSTER<COLS>, BOX = ALONG ? LINE : SHARE;  // columns that this block brings, and at once
    Turn<Shared<COLS>::STAGES> turn;
    tiles.each([&](int first_row, int first_col) {
        for (int step = 0; step < steps; ++step, turn.next()) {
            auto& stage = shared.stages[turn.stage];
            Barrier* full = &shared.full[turn.stage];
            wait(&shared.empty[turn.stage], turn.parity ^ 1);
            if (threadIdx.x == 0) {
                int d = step * DEEP, share = tiles.rank() * SHARE;
                arrive_and_expect(full, sizeof stage);
                load_box(stage.lhs, lhs, d, first_row, full);
#pragma unroll
                for (int col = 0; col < SHARE; col += BOX) {
                    int right = first_col + share + col;
                    E* to = stage.rhs + (share + col) * DEEP;
                    if constexpr (CLUSTER<COLS> == 1) load_box(to, rhs, ALONG ? right : d, ALONG ? d : right, full);
                    else load_box_for((1 << CLUSTER<COLS>) - 1, to, rhs, ALONG ? right : d, ALONG ? d : right, full);
                }
            }
            __syncwarp();
        }
    });
}

// Three warps bring the chunks of the update's right side.
template <int COLS, class Rhs>
__device__ void bring_chunks(Shared<COLS>& shared, Tiles<COLS> tiles, Rhs rhs) {
    unsigned parity = 0;
    tiles.each([&](int, int first_col) {
        for (int d0 = 0; d0 < rhs.depth; d0 += THIN, parity ^= 1) {
            wait(&shared.chunk_empty, parity ^ 1);
#pragma unroll 4
            for (int i = threadIdx.x - WARP; i < COLS * THIN; i += WIDENERS) {
                int row = Rhs::DEPTH_IS_CONTIGUOUS ? i / THIN : i % COLS, d = Rhs::DEPTH_IS_CONTIGUOUS ? i % THIN : i / COLS;
                bool has = rhs.has(first_col + row, d0 + d);
                *shared.chunk.place(row, d) = has ? rhs.get(first_col + row, d0 + d) : 0.0f;
            }
            publish_stores();
            arrive(&shared.chunk_full);
        }
    });
}

// 64×COLS sums in the registers of a warpgroup.
template <int COLS, bool ALONG>
struct GroupSums {
    Shared<COLS>& shared;
    int half, first_row, first_col;
    float sum[COLS / 2];

    // sum += the panels of a stage; the products are on their way.
    __device__ void add(int stage) {
        const E *lhs = shared.stages[stage].lhs + half * 64 * DEEP, *rhs = shared.stages[stage].rhs;
        begin_products();
#pragma unroll
        for (int d = 0; d < DEEP; d += 16) {
            auto left = describe(lhs + d, 0, 8 * 128, SWIZZLE_128);
            auto right = ALONG ? describe(rhs + d * LINE, DEEP * 128, 8 * 128, SWIZZLE_128)
                               : describe(rhs + d, 0, 8 * 128, SWIZZLE_128);
            multiply<ALONG>(E(), sum, left, right);
        }
        commit_products();
    }

    // sum += lhs·(the chunk), of which this thread has 4 elements for every 8 of the depth
    __device__ void add(const float (&lhs)[THIN / 8][4]) {
        unsigned hi[THIN / 8][4], lo[THIN / 8][4];
#pragma unroll
        for (int i = 0; i < THIN / 2; ++i) {
            hi[i / 4][i % 4] = to_tf32(lhs[i / 4][i % 4]);
            lo[i / 4][i % 4] = to_tf32(lhs[i / 4][i % 4] - __uint_as_float(hi[i / 4][i % 4]));
        }
        begin_products();
#pragma unroll
        for (int i = 0; i < THIN / 8; ++i) {
            auto right = describe(shared.chunk.data + i * 8, 0, 8 * 64, SWIZZLE_64);
            multiply_tf32(sum, hi[i], right);
            multiply_tf32(sum, lo[i], right);
        }
        commit_products();
        wait_products<0>();
    }

    // Where sum i of this thread belongs.
    __device__ int row(int i) const { return first_row + half * 64 + warp() * 16 + lane() / 4 + i / 2 % 2 * 8; }
    __device__ int col(int i) const { return first_col + i / 4 * 8 + lane() % 4 * 2 + i % 2; }

    // sum *= dropout's factor. Without dropout too, by 1: sums that only some ways through the kernel change would keep ptxas
    // from letting products overlap.
    __device__ void drop(Dropout dropout, int cols) {
        unsigned kept[COLS / 64];
#pragma unroll
        for (int word = 0; word < COLS / 64; ++word) {
            kept[word] = dropout.threshold == 0 ? ~0u : 0;
#pragma unroll 1
            for (int bit = dropout.threshold == 0 ? 32 : 0; bit < 32; ++bit) {
                int i = word * 32 + bit;
                kept[word] |= unsigned(dropout.factor(at(row(i), col(i), cols)) != 0.0f) << bit;
            }
        }
#pragma unroll
        for (int i = 0; i < COLS / 2; ++i) sum[i] *= kept[i / 32] >> i % 32 & 1 ? dropout.keep_scale : 0.0f;
    }

    // out = the sums after finish(col, sum, its neighbour), rounded, through shared memory: boxes of 64×LINE, exchanged as
    // SWIZZLE_128 says.
    template <class Finish>
    __device__ void store(const TensorMap& out, Finish finish) {
        E* boxes = shared.out[half];
        bool first = threadIdx.x % GROUP == 0;
        if (first) wait_stores();
        meet(1 + half, GROUP);
#pragma unroll
        for (int i = 0; i < COLS / 2; i += 2) {
            E pair[2];
            finish(col(i), sum[i], sum[i + 1]);
            ::store(&pair[0], sum[i]);
            ::store(&pair[1], sum[i + 1]);
            int line = warp() * 16 + lane() / 4 + i / 2 % 2 * 8, chunk = i / 4 % 8 ^ line % 8;
            *reinterpret_cast<unsigned*>(boxes + i / 32 * 64 * LINE + line * LINE + chunk * 8 + lane() % 4 * 2) =
                *reinterpret_cast<unsigned*>(pair);
        }
        publish_stores();
        meet(1 + half, GROUP);
        if (!first) return;
#pragma unroll
        for (int col = 0; col < COLS; col += LINE) store_box(out, first_col + col, first_row + half * 64, boxes + col * 64);
        commit_stores();
    }

    __device__ static int lane() { return int(threadIdx.x) % WARP; }
    __device__ static int warp() { return int(threadIdx.x) % GROUP / WARP; }
};

// A warp has read the panels of a stage: all who bring a part of them may write over it.
template <int COLS>
__device__ void leave(Shared<COLS>& shared, int stage) {
    if constexpr (CLUSTER<COLS> == 1) {
        arrive(&shared.empty[stage]);
    } else {
#pragma unroll
        for (int block = 0; block < CLUSTER<COLS>; ++block) arrive_at(&shared.empty[stage], block);
    }
}

// A warpgroup adds up its half of the tiles. A mask is for the update alone: then it comes first. Else its chunks come between
// the steps, evenly, so that there is time to bring them; the elements of lhs of the next chunk are read meanwhile.
template <int COLS, bool ALONG, class Update, class Finish>
__device__ void add_up(Shared<COLS>& shared, Tiles<COLS> tiles, const TensorMap& out, int cols, int steps, Update update,
                       Finish finish) {
    Turn<Shared<COLS>::STAGES> turn;
    unsigned chunk_parity = 0;
    int chunks = (update.lhs.depth + THIN - 1) / THIN, half = int(threadIdx.x) / GROUP - 1;
    bool speaks = threadIdx.x % WARP == 0;  // for its warp, which has read what may be written over
    wait_for_launch_before();               // for lhs of the update; the first panels come meanwhile
    tiles.each([&](int first_row, int first_col) {
        GroupSums<COLS, ALONG> sums{shared, half, first_row, first_col, {}};
        float lhs[THIN / 8][4];
        auto read = [&](int chunk) {
#pragma unroll
            for (int i = 0; i < THIN / 2; ++i) {
                int row = sums.row(i % 2 * 2), d = chunk * THIN + i / 2 * 4 + GroupSums<COLS, ALONG>::lane() % 4;
                lhs[i / 4][i % 4] = update.lhs.has(row, d) ? update.scale * update.lhs.get(row, d) : 0.0f;
            }
        };
        int chunk = 0;
        auto add_chunk = [&] {
            wait(&shared.chunk_full, chunk_parity);
            sums.add(lhs);
            if (speaks) arrive(&shared.chunk_empty);
            chunk_parity ^= 1;
            if (++chunk < chunks) read(chunk);
        };
        if (chunks > 0) read(0);
        if constexpr (Update::DROPS) {
            while (chunk < chunks) add_chunk();
            settle(sums.sum);
            sums.drop(update.dropout, cols);
        }
        Turn<Shared<COLS>::STAGES> last = turn;
        for (int step = 0; step < steps; ++step, turn.next()) {
            wait(&shared.full[turn.stage], turn.parity);
            sums.add(turn.stage);
            wait_products<1>();
            if (step > 0) {
                if (speaks) leave(shared, last.stage);
                last.next();
            }
            if constexpr (!Update::DROPS)
                while (chunk < chunks && (chunk + 1ll) * steps <= (step + 1ll) * chunks) add_chunk();
        }
        wait_products<0>();
        if (speaks) leave(shared, last.stage);
        settle(sums.sum);
        sums.store(out, finish);
    });
    if (threadIdx.x % GROUP == 0) wait_stores();
}

// out = lhs·rhsᵀ + update, finished, for `rows`×`cols` of `out`. ALONG: rhs is stored as its transpose is.
template <int COLS, bool ALONG, class Update, class Finish>
__device__ void multiply_tiles(const TensorMap& lhs, const TensorMap& rhs, const TensorMap& out, int rows, int cols, int depth,
                               Update update, Finish finish) {
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<Shared<COLS>*>(memory);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shared<COLS>::STAGES; ++stage) {
            init(&shared.full[stage], 1);
            init(&shared.empty[stage], CLUSTER<COLS> * 2 * GROUP / WARP);
        }
        init(&shared.chunk_full, WIDENERS);
        init(&shared.chunk_empty, 2 * GROUP / WARP);
        publish_barriers();
    }
    if constexpr (CLUSTER<COLS> == 1) __syncthreads();
    else meet_cluster();
    Tiles<COLS> tiles(rows, cols);
    int steps = (depth + DEEP - 1) / DEEP;
    if (threadIdx.x < GROUP) {
        give_registers<FEW>();
        if (threadIdx.x < WARP) bring_panels<COLS, ALONG>(shared, tiles, lhs, rhs, steps);
        else bring_chunks(shared, tiles, update.rhs);
    } else {
        take_registers<MANY>();
        add_up<COLS, ALONG>(shared, tiles, out, cols, steps, update, finish);
    }
    __syncwarp();
    if constexpr (CLUSTER<COLS> > 1) meet_cluster();  // nobody writes to a block that has left
}
