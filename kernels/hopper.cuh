// The engine for Hopper: `Σ lhs·rhs` of 16-bit operands, in tiles of TILE_M×COLS, accumulated in f32 registers.
//
//     for tile in this block's tiles             persistent blocks; tiles in raster order share the L2 cache
//       1 producer warp        for each step     TMA loads both panels, TILE_K deep, up to STAGES steps ahead
//       3 producer warps       for each chunk    load UPDATE_K ranks of the update's right side, widened to f32
//       2 consumer warpgroups  for each step     wgmma, each onto its 64×COLS sums; chunks of the update between the steps
//                              epilogue          round to shared memory; TMA stores it while the next tile starts
//
// Synchronisation is by pairs of mbarriers: a phase of `full` ends when a panel has arrived, a phase of `empty` when it may be
// overwritten. With tiles of 256 columns two blocks form a cluster: their tiles are vertical neighbours, and each loads half of
// the right panel for both; so a stage is empty when the consumers of both blocks have released it. The stages of the pipeline
// run on from one tile to the next: the next tile's panels are loaded during the last steps of this one.
//
// The low-rank update is additional depth of the same tile, in tf32. Its right side is exact there: tf32 has 11 significant bits
// and the exponents of f32, f16 and bf16 have no more. h' = scale·h is split in two: hi = tf32(h') and lo = tf32(h' - hi), from
// registers, and |h' - hi - lo| ≤ 2⁻²³·|h'|: two units of f32's rounding, for any h' (in f16, hi and lo would overflow; in bf16
// they would keep 16 bits). One rank costs as much as 4 of depth (tf32 has half the rate, and there are two parts): 4·r/k of the
// work, 1.6 % at r = 16 and k = 4096.
//
// Expected gain of each technique, in TFLOP/s, from what others measured on 4096³ with such kernels (cuBLAS: 716): wgmma and TMA
// 317, 128×128 tiles 423, a producer warp and a ring of stages 498, 128×256 tiles by two warpgroups 610, persistent blocks in
// raster order 660, one elected lane arriving at mbarriers 704, clusters of 2 that share panels 734, registers moved to the
// consumers 747, stores by TMA 758. This kernel has not been measured.
#pragma once
#include "engine.cuh"
#include "hopper_ptx.cuh"

constexpr int WARPGROUP = 128;                // threads
constexpr int BLOCK_THREADS = 3 * WARPGROUP;  // threads of a block: one warpgroup of producers, two of consumers
constexpr int TILE_M = 128;                   // rows of a tile: 64 a warpgroup
constexpr int LINE = 64;                      // 16-bit elements in a 128-byte line of the swizzle
constexpr int TILE_K = LINE;                  // depth of a stage
constexpr int UPDATE_K = 16;                  // ranks in a chunk of the update: 64 bytes of f32, a line of its swizzle
constexpr int RASTER_TILES = 16;              // rows of tiles in a raster band: with 132 blocks about as many as columns
template <int COLS>
constexpr int CLUSTER = COLS == 256 ? 2 : 1;            // blocks that share right panels
constexpr int UPDATE_PRODUCERS = WARPGROUP - WARP;      // threads that load the update's right side
constexpr int PRODUCER_REGS = 56, CONSUMER_REGS = 224;  // per thread: 128·56 + 256·224 = 384·168

// The right side of a chunk of the update, K-major, swizzled as SWIZZLE_64.
template <int COLS>
struct alignas(1024) UpdatePanel {
    float data[COLS * UPDATE_K];
    __device__ float* place(int row, int d) { return &data[(row * UPDATE_K + d) ^ (row / 2 % 4 * 4)]; }
};

template <int COLS>
struct alignas(1024) SharedMemory {
    static constexpr int STAGES = COLS == 256 ? 3 : 5;
    struct { E lhs[TILE_M * TILE_K], rhs[COLS * TILE_K]; } stages[STAGES];
    E out[2][64 * COLS];  // of each warpgroup: boxes of 64×LINE
    UpdatePanel<COLS> chunk;
    Barrier full[STAGES], empty[STAGES], update_full, update_empty;
};
static_assert(sizeof(SharedMemory<256>) <= 227 << 10 && sizeof(SharedMemory<128>) <= 227 << 10, "the most that a block can have");

// Index of the current stage, and the parity of its phase.
template <int STAGES>
struct PipelineState {
    int stage = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The tiles of an output, those of a cluster counted as one; the last may lie outside. They are numbered down a raster band, then
// by columns of tiles, then by bands.
template <int COLS>
struct Tiles {
    static constexpr int CLUSTER_M = CLUSTER<COLS> * TILE_M, IN_RASTER = RASTER_TILES / CLUSTER<COLS>;
    int down, across;
    __device__ Tiles(int rows, int cols) : down((rows - 1) / CLUSTER_M + 1), across((cols - 1) / COLS + 1) {}

    // Calls f(first_row, first_col) for each tile of this block.
    template <class F>
    __device__ void each(F f) const {
        for (int tile = blockIdx.x / CLUSTER<COLS>; tile < down * across; tile += gridDim.x / CLUSTER<COLS>) {
            int band = tile / (IN_RASTER * across) * IN_RASTER, within = tile % (IN_RASTER * across);
            int height = min(IN_RASTER, down - band);
            f((band + within % height) * CLUSTER_M + rank() * TILE_M, within / height * COLS);
        }
    }

    // Rank of this block in its cluster.
    __device__ static int rank() { return int(blockIdx.x) % CLUSTER<COLS>; }
};

// scale·lhs·rhsᵀ, or drop(scale·lhs·rhsᵀ). No update: depth 0.
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

// The producer warp loads the panels. Lane 0 issues the TMA loads; all lanes wait, and `__syncwarp` after each step, since a lane
// two phases behind would misread the parity. N_MAJOR: rhs is N-major, and its boxes are TILE_K×LINE.
template <int COLS, bool N_MAJOR>
__device__ void panel_producer(SharedMemory<COLS>& shared, Tiles<COLS> tiles, const TensorMap& lhs, const TensorMap& rhs,
                               int steps) {
    constexpr int SHARE = COLS / CLUSTER<COLS>, BOX = N_MAJOR ? LINE : SHARE;  // columns of this block's loads, and of a box
    PipelineState<SharedMemory<COLS>::STAGES> state;
    tiles.each([&](int first_row, int first_col) {
        for (int step = 0; step < steps; ++step, state.advance()) {
            auto& stage = shared.stages[state.stage];
            Barrier* full = &shared.full[state.stage];
            wait(&shared.empty[state.stage], state.parity ^ 1);
            if (threadIdx.x == 0) {
                int d = step * TILE_K, share = tiles.rank() * SHARE;
                arrive_and_expect(full, sizeof stage);
                tma_load(stage.lhs, lhs, d, first_row, full);
#pragma unroll
                for (int col = 0; col < SHARE; col += BOX) {
                    int right = first_col + share + col;
                    E* to = stage.rhs + (share + col) * TILE_K;
                    if constexpr (CLUSTER<COLS> == 1) tma_load(to, rhs, N_MAJOR ? right : d, N_MAJOR ? d : right, full);
                    else tma_load_multicast((1 << CLUSTER<COLS>) - 1, to, rhs, N_MAJOR ? right : d, N_MAJOR ? d : right, full);
                }
            }
            __syncwarp();
        }
    });
}

// Three producer warps load the chunks of the update's right side.
template <int COLS, class Rhs>
__device__ void update_producer(SharedMemory<COLS>& shared, Tiles<COLS> tiles, Rhs rhs) {
    unsigned parity = 0;
    tiles.each([&](int, int first_col) {
        for (int d0 = 0; d0 < rhs.depth; d0 += UPDATE_K, parity ^= 1) {
            wait(&shared.update_empty, parity ^ 1);
#pragma unroll 4
            for (int i = threadIdx.x - WARP; i < COLS * UPDATE_K; i += UPDATE_PRODUCERS) {
                int row = Rhs::K_MAJOR ? i / UPDATE_K : i % COLS, d = Rhs::K_MAJOR ? i % UPDATE_K : i / COLS;
                bool has = rhs.inside(first_col + row, d0 + d);
                *shared.chunk.place(row, d) = has ? rhs.get(first_col + row, d0 + d) : 0.0f;
            }
            fence_async_proxy();
            arrive(&shared.update_full);
        }
    });
}

// 64×COLS sums in the registers of a warpgroup.
template <int COLS, bool N_MAJOR>
struct WarpgroupSums {
    SharedMemory<COLS>& shared;
    int half, first_row, first_col;
    float sum[COLS / 2];

    // sum += lhs·rhs of a stage; asynchronous.
    __device__ void add(int stage) {
        const E *lhs = shared.stages[stage].lhs + half * 64 * TILE_K, *rhs = shared.stages[stage].rhs;
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < TILE_K; d += 16) {
            auto left = make_descriptor(lhs + d, 0, 8 * 128, SWIZZLE_128);
            auto right = N_MAJOR ? make_descriptor(rhs + d * LINE, TILE_K * 128, 8 * 128, SWIZZLE_128)
                               : make_descriptor(rhs + d, 0, 8 * 128, SWIZZLE_128);
            wgmma<N_MAJOR>(E(), sum, left, right);
        }
        wgmma_commit();
    }

    // sum += lhs·(the chunk); this thread has 4 elements of lhs for every 8 of the depth.
    __device__ void add(const float (&lhs)[UPDATE_K / 8][4]) {
        unsigned hi[UPDATE_K / 8][4], lo[UPDATE_K / 8][4];
#pragma unroll
        for (int i = 0; i < UPDATE_K / 2; ++i) {
            hi[i / 4][i % 4] = to_tf32(lhs[i / 4][i % 4]);
            lo[i / 4][i % 4] = to_tf32(lhs[i / 4][i % 4] - __uint_as_float(hi[i / 4][i % 4]));
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < UPDATE_K / 8; ++i) {
            auto right = make_descriptor(shared.chunk.data + i * 8, 0, 8 * 64, SWIZZLE_64);
            wgmma_tf32(sum, hi[i], right);
            wgmma_tf32(sum, lo[i], right);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }

    // Row and column of sum i of this thread.
    __device__ int row(int i) const { return first_row + half * 64 + warp() * 16 + lane() / 4 + i / 2 % 2 * 8; }
    __device__ int col(int i) const { return first_col + i / 4 * 8 + lane() % 4 * 2 + i % 2; }

    // sum *= dropout's factor, or 1 without dropout: were the sums changed on one path through the kernel only, ptxas would
    // serialise the wgmma.
    __device__ void drop(Dropout dropout, int cols) {
        unsigned keep_bits[COLS / 64];
#pragma unroll
        for (int word = 0; word < COLS / 64; ++word) {
            keep_bits[word] = dropout.threshold == 0 ? ~0u : 0;
#pragma unroll 1
            for (int bit = dropout.threshold == 0 ? 32 : 0; bit < 32; ++bit) {
                int i = word * 32 + bit;
                keep_bits[word] |= unsigned(dropout.factor(at(row(i), col(i), cols)) != 0.0f) << bit;
            }
        }
#pragma unroll
        for (int i = 0; i < COLS / 2; ++i) sum[i] *= keep_bits[i / 32] >> i % 32 & 1 ? dropout.keep_scale : 0.0f;
    }

    // Stores the sums: epilogue(col, sum, next sum), rounded, staged in shared memory as boxes of 64×LINE, swizzled as
    // SWIZZLE_128.
    template <class Epilogue>
    __device__ void store(const TensorMap& out, Epilogue epilogue) {
        E* boxes = shared.out[half];
        bool first = threadIdx.x % WARPGROUP == 0;
        if (first) tma_store_wait();
        named_barrier_sync(1 + half, WARPGROUP);
#pragma unroll
        for (int i = 0; i < COLS / 2; i += 2) {
            E pair[2];
            epilogue(col(i), sum[i], sum[i + 1]);
            ::store(&pair[0], sum[i]);
            ::store(&pair[1], sum[i + 1]);
            int line = warp() * 16 + lane() / 4 + i / 2 % 2 * 8, chunk = i / 4 % 8 ^ line % 8;
            *reinterpret_cast<unsigned*>(boxes + i / 32 * 64 * LINE + line * LINE + chunk * 8 + lane() % 4 * 2) =
                *reinterpret_cast<unsigned*>(pair);
        }
        fence_async_proxy();
        named_barrier_sync(1 + half, WARPGROUP);
        if (!first) return;
#pragma unroll
        for (int col = 0; col < COLS; col += LINE) tma_store(out, first_col + col, first_row + half * 64, boxes + col * 64);
        tma_store_commit();
    }

    __device__ static int lane() { return int(threadIdx.x) % WARP; }
    __device__ static int warp() { return int(threadIdx.x) % WARPGROUP / WARP; }
};

// Releases a stage that this warp has read, to every block that loads a part of it.
template <int COLS>
__device__ void release_stage(SharedMemory<COLS>& shared, int stage) {
    if constexpr (CLUSTER<COLS> == 1) {
        arrive(&shared.empty[stage]);
    } else {
#pragma unroll
        for (int block = 0; block < CLUSTER<COLS>; ++block) arrive_remote(&shared.empty[stage], block);
    }
}

// A consumer warpgroup makes its half of each tile. With dropout, whose mask applies to the update alone, the update comes first.
// Otherwise its chunks are spread evenly over the steps, so that the producers have time to load them; the next chunk's lhs is
// read meanwhile.
template <int COLS, bool N_MAJOR, class Update, class Epilogue>
__device__ void consumer(SharedMemory<COLS>& shared, Tiles<COLS> tiles, const TensorMap& out, int cols, int steps, Update update,
                       Epilogue epilogue) {
    PipelineState<SharedMemory<COLS>::STAGES> state;
    unsigned chunk_parity = 0;
    int chunks = (update.lhs.depth + UPDATE_K - 1) / UPDATE_K, half = int(threadIdx.x) / WARPGROUP - 1;
    bool elected = threadIdx.x % WARP == 0;  // arrives at barriers for its warp
    wait_for_previous_launch();               // the update's lhs is its output; the first panels are loaded meanwhile
    tiles.each([&](int first_row, int first_col) {
        WarpgroupSums<COLS, N_MAJOR> sums{shared, half, first_row, first_col, {}};
        float lhs[UPDATE_K / 8][4];
        auto read = [&](int chunk) {
#pragma unroll
            for (int i = 0; i < UPDATE_K / 2; ++i) {
                int row = sums.row(i % 2 * 2), d = chunk * UPDATE_K + i / 2 * 4 + WarpgroupSums<COLS, N_MAJOR>::lane() % 4;
                lhs[i / 4][i % 4] = update.lhs.inside(row, d) ? update.scale * update.lhs.get(row, d) : 0.0f;
            }
        };
        int chunk = 0;
        auto add_chunk = [&] {
            wait(&shared.update_full, chunk_parity);
            sums.add(lhs);
            if (elected) arrive(&shared.update_empty);
            chunk_parity ^= 1;
            if (++chunk < chunks) read(chunk);
        };
        if (chunks > 0) read(0);
        if constexpr (Update::DROPS) {
            while (chunk < chunks) add_chunk();
            fence_sums(sums.sum);
            sums.drop(update.dropout, cols);
        }
        PipelineState<SharedMemory<COLS>::STAGES> last = state;
        for (int step = 0; step < steps; ++step, state.advance()) {
            wait(&shared.full[state.stage], state.parity);
            sums.add(state.stage);
            wgmma_wait<1>();
            if (step > 0) {
                if (elected) release_stage(shared, last.stage);
                last.advance();
            }
            if constexpr (!Update::DROPS)
                while (chunk < chunks && (chunk + 1ll) * steps <= (step + 1ll) * chunks) add_chunk();
        }
        wgmma_wait<0>();
        if (elected) release_stage(shared, last.stage);
        fence_sums(sums.sum);
        sums.store(out, epilogue);
    });
    if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
}

// out = epilogue(lhs·rhsᵀ + update), for `rows`×`cols` of `out`. N_MAJOR: rhs is N-major.
template <int COLS, bool N_MAJOR, class Update, class Epilogue>
__device__ void gemm_tiles(const TensorMap& lhs, const TensorMap& rhs, const TensorMap& out, int rows, int cols, int depth,
                               Update update, Epilogue epilogue) {
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<SharedMemory<COLS>*>(memory);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < SharedMemory<COLS>::STAGES; ++stage) {
            init_barrier(&shared.full[stage], 1);
            init_barrier(&shared.empty[stage], CLUSTER<COLS> * 2 * WARPGROUP / WARP);
        }
        init_barrier(&shared.update_full, UPDATE_PRODUCERS);
        init_barrier(&shared.update_empty, 2 * WARPGROUP / WARP);
        fence_barrier_init();
    }
    if constexpr (CLUSTER<COLS> == 1) __syncthreads();
    else cluster_sync();
    Tiles<COLS> tiles(rows, cols);
    int steps = (depth + TILE_K - 1) / TILE_K;
    if (threadIdx.x < WARPGROUP) {
        release_registers<PRODUCER_REGS>();
        if (threadIdx.x < WARP) panel_producer<COLS, N_MAJOR>(shared, tiles, lhs, rhs, steps);
        else update_producer(shared, tiles, update.rhs);
    } else {
        acquire_registers<CONSUMER_REGS>();
        consumer<COLS, N_MAJOR>(shared, tiles, out, cols, steps, update, epilogue);
    }
    __syncwarp();
    if constexpr (CLUSTER<COLS> > 1) cluster_sync();  // a block must not exit while its cluster writes to it
}
