// The wide engine: a block makes one 128×128 tile of `Σ lhs·rhs`, for operands whose lines start at multiples of 16 bytes.
//
//     for step in 0..depth/WIDE_K      load panels to shared memory by cp.async, STAGES - 1 steps ahead
//         16 bits: for d by 16         each warp: fragments by ldmatrix, added to its 32×64 sums by mma m16n8k16
//         f32: for d by 4              each thread: 8 elements of lhs times 8 of rhs, 4 deep, added to its 8×8 sums
//
// Bound in f32: a multiprocessor makes 128 multiply-adds a clock and reads 128 bytes of shared memory a clock. A step of 4 in
// depth is 64 K multiply-adds of the block: 512 clocks. Its threads read 64 KiB, which would take as long; but a warp is 4×8
// threads, whose reads coincide up to 12 KiB: 96 clocks. 256 of the 290 instructions are multiply-adds, so at most 88 % of the
// peak is possible. Two blocks share a multiprocessor, with 128 registers a thread and 48 KiB each: one computes while the other
// waits at its barrier.
//
// The low-rank update is accumulated into the same sums by plain f32 multiply-adds, so h keeps its accuracy.
#pragma once
#include "engine.cuh"
#ifdef TENSOR
#include "mma.cuh"
#endif

constexpr int WIDE_TILE = 128;  // rows, and columns, of a tile: 4×2 warps of 32×64, or 16×16 threads of 8×8 sums
constexpr int WIDE_K = 64 / sizeof(E);  // depth of a stage: lines of 64 bytes
constexpr int STAGES = 3;     // 16 KiB each: 48 KiB, the most that a block has without opting in
constexpr int UPDATE_K = 16;  // depth of the update in shared memory, where the stages are later

struct Stage { E lhs[WIDE_TILE * WIDE_K], rhs[WIDE_TILE * WIDE_K]; };
struct Update { float lhs[UPDATE_K][WIDE_TILE], rhs[UPDATE_K][WIDE_TILE]; };
using Half = float[WIDE_TILE / 2][WIDE_TILE + 8];  // half of the sums, staged for the epilogue; padded to use all banks
union Memory { Stage stages[STAGES]; Update update; Half half; };
static_assert(sizeof(Memory) <= 48 << 10, "more shared memory needs an opt-in");

__device__ inline Memory& memory() {
    __shared__ __align__(16) char memory[sizeof(Memory)];
    return *reinterpret_cast<Memory*>(memory);
}

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory asynchronously, or fills them with zeros.
__device__ inline void copy_async(E* to, const E* from, bool has) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(has ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

#ifdef TENSOR
// Loads four 8×8 matrices; lane 8·j + i holds the address of row i of matrix j.
template <bool TRANSPOSED>
__device__ void ldmatrix(unsigned (&to)[4], const E* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

#endif

// Index in a panel of the 16-byte chunk with (row, d): K-major (Rows) or N-major (Columns). Chunks of a line are permuted
// (swizzled), so that the eight lines of one ldmatrix, or of eight lanes, lie in different banks.
template <class View>
__device__ unsigned panel_index(unsigned row, unsigned d) {
    if constexpr (View::K_MAJOR)
        return row * WIDE_K + ((d / CHUNK) ^ (row / 2 % 4)) * CHUNK;
    else
        return d * WIDE_TILE + ((row / CHUNK) ^ (d % 8)) * CHUNK;
}

// Copies a panel from first_row and first_d on, with zeros outside the operand.
template <class View>
__device__ void load_panel_async(E* panel, View view, int first_row, int first_d) {
#pragma unroll
    for (int part = 0; part < WIDE_TILE * WIDE_K / CHUNK / THREADS; ++part) {
        unsigned i = part * THREADS + threadIdx.x;
        int row = int(View::K_MAJOR ? i / (WIDE_K / CHUNK) : i % (WIDE_TILE / CHUNK) * CHUNK);
        int d = int(View::K_MAJOR ? i % (WIDE_K / CHUNK) * CHUNK : i / (WIDE_TILE / CHUNK));
        bool has = view.inside(first_row + row, first_d + d);
        copy_async(&panel[panel_index<View>(row, d)],
                   has ? &view.data[view.index(first_row + row, first_d + d)] : view.data, has);
    }
}

// One block's tile of sums. Blocks are numbered row by row over the tiles of the output. Each function ends with a barrier, so
// that the next may reuse shared memory.
struct WideTile {
    int rows, cols, first_row, first_col;
#ifdef TENSOR
    float sum[2][8][4] = {};  // 2×8 mma of 16×8, each: two adjacent sums, and two 8 rows below
#else
    float sum[2][4][8] = {};  // two halves of the rows; rows and columns 16 apart
#endif

    __device__ WideTile(int rows, int cols) : rows(rows), cols(cols) {
        unsigned across = unsigned(cols - 1) / WIDE_TILE + 1;
        first_row = int(blockIdx.x / across) * WIDE_TILE;
        first_col = int(blockIdx.x % across) * WIDE_TILE;
    }

    // sum += lhs·rhsᵀ
    template <class Lhs, class Rhs>
    __device__ void add(Lhs lhs, Rhs rhs) {
        int steps = (lhs.depth + WIDE_K - 1) / WIDE_K;
        auto load_stage = [&](int step) {
            if (step < steps) {
                Stage& stage = memory().stages[step % STAGES];
                load_panel_async(stage.lhs, lhs, first_row, step * WIDE_K);
                load_panel_async(stage.rhs, rhs, first_col, step * WIDE_K);
            }
            commit_copies();  // also if empty, so that groups count steps
        };
#pragma unroll 1
        for (int step = 0; step < STAGES - 1; ++step) load_stage(step);
        for (int step = 0; step < steps; ++step) {
            wait_copies<STAGES - 2>();
            __syncthreads();  // this step's panels have arrived, and the previous step's are no longer read
            load_stage(step + STAGES - 1);
            micro_kernel<Lhs, Rhs>(memory().stages[step % STAGES]);
        }
        __syncthreads();
    }

    // sum *= factor
    __device__ void scale(float factor) {
#pragma unroll
        for (int i = 0; i < 2; ++i) each_own_sum(i, [&](int, int, float& sum) { sum *= factor; });
    }

    // sum += lhs·rhsᵀ in f32; must come before `add`.
    template <class Lhs, class Rhs>
    __device__ void add_update(Lhs lhs, Rhs rhs) {
        Update& update = memory().update;
        for (int d0 = 0; d0 < lhs.depth; d0 += UPDATE_K) {
#pragma unroll 1
            for (unsigned i = threadIdx.x; i < WIDE_TILE * UPDATE_K; i += THREADS) {
                int row = int(i / UPDATE_K), d = int(i % UPDATE_K);
                update.lhs[d][row] = lhs.inside(first_row + row, d0 + d) ? lhs.get(first_row + row, d0 + d) : 0.0f;
                update.rhs[d][row] = rhs.inside(first_col + row, d0 + d) ? rhs.get(first_col + row, d0 + d) : 0.0f;
            }
            __syncthreads();
#pragma unroll 1
            for (int d = 0; d < UPDATE_K; ++d) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    each_own_sum(i, [&](int row, int col, float& sum) {
                        sum += update.lhs[d][row_of(i, row)] * update.rhs[d][col];
                    });
            }
            __syncthreads();
        }
    }

    // sum = f(i, j, sum) for the sums inside the output.
    template <class F>
    __device__ void transform(F f) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            each_in_shared(i, [&](int i, int j, float& sum) { sum = f(i, j, sum); });
            __syncthreads();
            each_own_sum_of(i, [&](int row, int col, float& sum) { sum = memory().half[row][col]; });
            __syncthreads();
        }
    }

    // Calls f(i, j, sum) for the sums inside the output. Must come last.
    template <class F>
    __device__ void each(F f) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            if (i > 0) __syncthreads();
            each_in_shared(i, f);
        }
    }

  private:
    // Calls f(i, j, sum) for half i of the sums. They pass through shared memory, where a loop can index them: so consecutive
    // threads have consecutive columns, and f is compiled once.
    template <class F>
    __device__ void each_in_shared(int i, F f) {
        Half& half = memory().half;
        each_own_sum_of(i, [&](int row, int col, float& sum) { half[row][col] = sum; });
        __syncthreads();
#pragma unroll 1
        for (unsigned e = threadIdx.x; e < WIDE_TILE / 2 * WIDE_TILE; e += THREADS) {
            int row = first_row + row_of(i, e / WIDE_TILE), col = first_col + int(e % WIDE_TILE);
            if (row < rows && col < cols) f(row, col, half[e / WIDE_TILE][e % WIDE_TILE]);
        }
    }

    // Calls f(row, col, sum) for every sum of half i, where i is a variable: registers cannot be indexed.
    template <class F>
    __device__ void each_own_sum_of(int i, F f) {
        if (i == 0) each_own_sum(0, f);
        else each_own_sum(1, f);
    }

#ifdef TENSOR
    __device__ static int warp_row() { return int(threadIdx.x / WARP / 2 * 32); }
    __device__ static int warp_col() { return int(threadIdx.x / WARP % 2 * 64); }

    // Row of the tile for row `row` of half i: a half is 16 of each warp's 32 rows.
    __device__ static int row_of(int i, unsigned row) { return int(row / 16 * 32 + i * 16 + row % 16); }

    // Calls f(row, col, sum) for every sum of half i.
    template <class F>
    __device__ void each_own_sum(int i, F f) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int part = 0; part < 4; ++part)
                f(int(threadIdx.x / WARP / 2 * 16 + threadIdx.x % WARP / 4) + part / 2 * 8,
                  warp_col() + j * 8 + int(threadIdx.x % 4 * 2) + part % 2, sum[i][j][part]);
        }
    }

    // Lanes 0-7, 8-15, 16-23 and 24-31 address the lines of four 8×8 matrices. Of lhs: upper rows, lower rows, then both 8
    // deeper. Of rhs: the first 8 columns, the same 8 deeper, then both for the next 8 columns.
    template <class Lhs, class Rhs>
    __device__ void micro_kernel(const Stage& stage) {
        int line = int(threadIdx.x % 8), odd = int(threadIdx.x / 8 % 2), upper = int(threadIdx.x % WARP / 16);
#pragma unroll
        for (int d = 0; d < WIDE_K; d += 16) {
            unsigned lhs[2][4], rhs[4][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int row = warp_row() + i * 16 + odd * 8, depth = d + upper * 8;
                load<Lhs>(lhs[i], stage.lhs, row, depth, line);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int col = warp_col() + j * 16 + upper * 8, depth = d + odd * 8;
                load<Rhs>(rhs[j], stage.rhs, col, depth, line);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) multiply(E(), sum[i][j], lhs[i], &rhs[j / 2][j % 2 * 2]);
            }
        }
    }

    // Line `line` of the 8×8 matrix at (row, d): one of its rows, or, if it is transposed, one of its columns.
    template <class View>
    __device__ static void load(unsigned (&to)[4], const E* panel, int row, int d, int line) {
        if constexpr (View::K_MAJOR)
            ldmatrix<false>(to, &panel[panel_index<View>(row + line, d)]);
        else
            ldmatrix<true>(to, &panel[panel_index<View>(row, d + line)]);
    }
#else
    // A warp is 4×8 threads, a block 4×2 warps.
    __device__ static int thread_row() { return warp() / 2 * 4 + lane() / 8; }
    __device__ static int thread_col() { return warp() % 2 * 8 + lane() % 8; }

    // Row of the tile for row `row` of half i: the upper or lower half.
    __device__ static int row_of(int i, unsigned row) { return int(i * (WIDE_TILE / 2) + row); }

    // Calls f(row, col, sum) for every sum of half i.
    template <class F>
    __device__ void each_own_sum(int i, F f) {
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
            for (int b = 0; b < 8; ++b) f(thread_row() + a * 16, thread_col() + b * 16, sum[i][a][b]);
        }
    }

    // Consecutive lanes have consecutive columns, so eight of them read from different banks.
    template <class Lhs, class Rhs>
    __device__ void micro_kernel(const Stage& stage) {
#pragma unroll 1
        for (int d = 0; d < WIDE_K; d += 4) {
            float4 right[8];
#pragma unroll
            for (int b = 0; b < 8; ++b) right[b] = load<Rhs>(stage.rhs, thread_col() + b * 16, d);
#pragma unroll
            for (int a = 0; a < 8; ++a) {
                float4 left = load<Lhs>(stage.lhs, thread_row() + a * 16, d);
#pragma unroll
                for (int b = 0; b < 8; ++b) {
                    float& sum = this->sum[a / 4][a % 4][b];
                    sum += left.x * right[b].x;
                    sum += left.y * right[b].y;
                    sum += left.z * right[b].z;
                    sum += left.w * right[b].w;
                }
            }
        }
    }

    // Depths d to d + 3 of a row of a panel.
    template <class View>
    __device__ static float4 load(const E* panel, int row, int d) {
        if constexpr (View::K_MAJOR) return *reinterpret_cast<const float4*>(&panel[panel_index<View>(row, d)]);
        auto get = [&](int d) { return panel[panel_index<View>(row, d) + unsigned(row) % CHUNK]; };
        return make_float4(get(d), get(d + 1), get(d + 2), get(d + 3));
    }
#endif
};
