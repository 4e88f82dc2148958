// The wide engine: one tile of `Σ lhs·rhs`, 128×128, for operands whose lines start at multiples of 16 bytes.
//
//     for step in 0..depth/DEEP        panels come to shared memory by cp.async, STAGES - 1 steps ahead
//         16 bits: for d by 16         each warp: fragments by ldmatrix, onto its 32×64 sums by mma m16n8k16
//         f32: for d by 4              each thread: 4 of depth of 8 elements of lhs times 8 of rhs, onto its 8×8 sums
//
// In f32 a multiprocessor multiplies 128 times a clock, and gets 128 bytes of shared memory. 4 of depth are 64 K products of a block,
// 512 clocks. Its threads read 64 KiB for them, as long if nobody shared; but a warp is 4×8 threads, of whose reads 12 KiB differ: 96
// clocks. 256 of the 290 instructions multiply, so 88 % of the peak is the most. Two blocks share a multiprocessor: 128 registers and
// 48 KiB each; while one waits at its barrier the other goes on.
//
// The low-rank update joins the same sums, in f32 and by plain multiplications: h keeps its accuracy.
#pragma once
#include "engine.cuh"
#ifdef TENSOR
#include "mma.cuh"
#endif

constexpr int WIDE = 128;  // rows, and columns, that a block makes: 4×2 warps of 32×64, or 16×16 threads with 8×8 sums
constexpr int DEEP = 64 / sizeof(E);  // of both operands in one stage: lines of 64 bytes
constexpr int STAGES = 3;  // of 16 KiB: the 48 KiB that a block has without asking
constexpr int UPDATE = 16; // of the update's depth in shared memory, where the stages are later

struct Stage { E lhs[WIDE * DEEP], rhs[WIDE * DEEP]; };
struct Update { float lhs[UPDATE][WIDE], rhs[UPDATE][WIDE]; };
using Half = float[WIDE / 2][WIDE + 8];  // of the sums, on their way out; 8 more a line spread the writes over the banks
union Memory { Stage stages[STAGES]; Update update; Half half; };
static_assert(sizeof(Memory) <= 48 << 10, "more has to be asked for");

__device__ inline Memory& memory() {
    __shared__ __align__(16) char memory[sizeof(Memory)];
    return *reinterpret_cast<Memory*>(memory);
}

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, later; zeros if there are none.
__device__ inline void copy_async(E* to, const E* from, bool has) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(has ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

#ifdef TENSOR
// Four 8×8 matrices; lane 8·j + i names row i of matrix j.
template <bool TRANSPOSED>
__device__ void load_matrices(unsigned (&to)[4], const E* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

#endif

// Where a chunk of 16 bytes of a panel lies, that (row, d) is in: neighbours in depth (Rows), or in row (Columns). Chunks of a line
// are permuted, so that the eight lines that one ldmatrix reads, or eight lanes, lie in different banks.
template <class View>
__device__ unsigned place(unsigned row, unsigned d) {
    if constexpr (View::DEPTH_IS_CONTIGUOUS)
        return row * DEEP + ((d / CHUNK) ^ (row / 2 % 4)) * CHUNK;
    else
        return d * WIDE + ((row / CHUNK) ^ (d % 8)) * CHUNK;
}

// A panel, from first_row and first_d on; what lies outside the operand is zero.
template <class View>
__device__ void fetch(E* panel, View view, int first_row, int first_d) {
#pragma unroll
    for (int part = 0; part < WIDE * DEEP / CHUNK / THREADS; ++part) {
        unsigned i = part * THREADS + threadIdx.x;
        int row = int(View::DEPTH_IS_CONTIGUOUS ? i / (DEEP / CHUNK) : i % (WIDE / CHUNK) * CHUNK);
        int d = int(View::DEPTH_IS_CONTIGUOUS ? i % (DEEP / CHUNK) * CHUNK : i / (WIDE / CHUNK));
        bool has = view.has(first_row + row, first_d + d);
        copy_async(&panel[place<View>(row, d)], has ? &view.data[view.index(first_row + row, first_d + d)] : view.data, has);
    }
}

// The sums of one block. Blocks are numbered along the rows of the output. What is done with them leaves shared memory free for
// what comes next: it ends with a barrier.
struct WideTile {
    int rows, cols, first_row, first_col;
#ifdef TENSOR
    float sum[2][8][4] = {};  // 2×8 products of 16×8; in each: two neighbours, and two in the row that is 8 further
#else
    float sum[2][4][8] = {};  // both halves of the rows; rows and columns 16 apart
#endif

    __device__ WideTile(int rows, int cols) : rows(rows), cols(cols) {
        unsigned across = unsigned(cols - 1) / WIDE + 1;
        first_row = int(blockIdx.x / across) * WIDE;
        first_col = int(blockIdx.x % across) * WIDE;
    }

    // sum += lhs·rhsᵀ
    template <class Lhs, class Rhs>
    __device__ void add(Lhs lhs, Rhs rhs) {
        int steps = (lhs.depth + DEEP - 1) / DEEP;
        auto fetch_stage = [&](int step) {
            if (step < steps) {
                Stage& stage = memory().stages[step % STAGES];
                fetch(stage.lhs, lhs, first_row, step * DEEP);
                fetch(stage.rhs, rhs, first_col, step * DEEP);
            }
            commit_copies();  // also of nothing, so that groups count steps
        };
#pragma unroll 1
        for (int step = 0; step < STAGES - 1; ++step) fetch_stage(step);
        for (int step = 0; step < steps; ++step) {
            wait_copies<STAGES - 2>();
            __syncthreads();  // this step's panels are there, and nobody reads those of the step before any more
            fetch_stage(step + STAGES - 1);
            add_stage<Lhs, Rhs>(memory().stages[step % STAGES]);
        }
        __syncthreads();
    }

    // sum *= factor
    __device__ void scale(float factor) {
#pragma unroll
        for (int i = 0; i < 2; ++i) place_each(i, [&](int, int, float& sum) { sum *= factor; });
    }

    // sum += lhs·rhsᵀ in f32; comes before `add`.
    template <class Lhs, class Rhs>
    __device__ void add_update(Lhs lhs, Rhs rhs) {
        Update& update = memory().update;
        for (int d0 = 0; d0 < lhs.depth; d0 += UPDATE) {
#pragma unroll 1
            for (unsigned i = threadIdx.x; i < WIDE * UPDATE; i += THREADS) {
                int row = int(i / UPDATE), d = int(i % UPDATE);
                update.lhs[d][row] = lhs.has(first_row + row, d0 + d) ? lhs.get(first_row + row, d0 + d) : 0.0f;
                update.rhs[d][row] = rhs.has(first_col + row, d0 + d) ? rhs.get(first_col + row, d0 + d) : 0.0f;
            }
            __syncthreads();
#pragma unroll 1
            for (int d = 0; d < UPDATE; ++d) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    place_each(i, [&](int row, int col, float& sum) {
                        sum += update.lhs[d][row_of(i, row)] * update.rhs[d][col];
                    });
            }
            __syncthreads();
        }
    }

    // sum = f(i, j, sum) for the sums that lie inside the output.
    template <class F>
    __device__ void change(F f) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            walk(i, [&](int i, int j, float& sum) { sum = f(i, j, sum); });
            __syncthreads();
            place_half(i, [&](int row, int col, float& sum) { sum = memory().half[row][col]; });
            __syncthreads();
        }
    }

    // Calls f(i, j, sum) for the sums that lie inside the output; comes last.
    template <class F>
    __device__ void each(F f) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            if (i > 0) __syncthreads();
            walk(i, f);
        }
    }

  private:
    // Calls f(i, j, sum) for half i of the sums. They pass through shared memory: there a loop can walk over them, neighbouring
    // threads have neighbouring columns, and what f does exists once.
    template <class F>
    __device__ void walk(int i, F f) {
        Half& half = memory().half;
        place_half(i, [&](int row, int col, float& sum) { half[row][col] = sum; });
        __syncthreads();
#pragma unroll 1
        for (unsigned e = threadIdx.x; e < WIDE / 2 * WIDE; e += THREADS) {
            int row = first_row + row_of(i, e / WIDE), col = first_col + int(e % WIDE);
            if (row < rows && col < cols) f(row, col, half[e / WIDE][e % WIDE]);
        }
    }

    // Calls f(row, col, sum) for the half that a loop is at: registers have no index.
    template <class F>
    __device__ void place_half(int i, F f) {
        if (i == 0) place_each(0, f);
        else place_each(1, f);
    }

#ifdef TENSOR
    __device__ static int warp_row() { return int(threadIdx.x / WARP / 2 * 32); }
    __device__ static int warp_col() { return int(threadIdx.x / WARP % 2 * 64); }

    // The row of the tile that is row `row` of half i: the halves are 16 of each warp's 32 rows.
    __device__ static int row_of(int i, unsigned row) { return int(row / 16 * 32 + i * 16 + row % 16); }

    // Calls f(row, col, sum) for every sum of half i.
    template <class F>
    __device__ void place_each(int i, F f) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int part = 0; part < 4; ++part)
                f(int(threadIdx.x / WARP / 2 * 16 + threadIdx.x % WARP / 4) + part / 2 * 8,
                  warp_col() + j * 8 + int(threadIdx.x % 4 * 2) + part % 2, sum[i][j][part]);
        }
    }

    // Lanes 0-7, 8-15, 16-23 and 24-31 name the lines of four 8×8 matrices. Of lhs these are: above, below, and both again 8
    // deeper; of rhs: first 8 columns, the same 8 deeper, then both of the next 8 columns.
    template <class Lhs, class Rhs>
    __device__ void add_stage(const Stage& stage) {
        int line = int(threadIdx.x % 8), odd = int(threadIdx.x / 8 % 2), upper = int(threadIdx.x % WARP / 16);
#pragma unroll
        for (int d = 0; d < DEEP; d += 16) {
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

    // Line `line` of the 8×8 matrix at (row, d): a row of it, or, to be transposed, a column.
    template <class View>
    __device__ static void load(unsigned (&to)[4], const E* panel, int row, int d, int line) {
        if constexpr (View::DEPTH_IS_CONTIGUOUS)
            load_matrices<false>(to, &panel[place<View>(row + line, d)]);
        else
            load_matrices<true>(to, &panel[place<View>(row, d + line)]);
    }
#else
    // A warp is 4×8 threads, a block 4×2 warps.
    __device__ static int thread_row() { return warp() / 2 * 4 + lane() / 8; }
    __device__ static int thread_col() { return warp() % 2 * 8 + lane() % 8; }

    // The row of the tile that is row `row` of half i: the halves are above each other.
    __device__ static int row_of(int i, unsigned row) { return int(i * (WIDE / 2) + row); }

    // Calls f(row, col, sum) for every sum of half i.
    template <class F>
    __device__ void place_each(int i, F f) {
#pragma unroll
        for (int a = 0; a < 4; ++a) {
#pragma unroll
            for (int b = 0; b < 8; ++b) f(thread_row() + a * 16, thread_col() + b * 16, sum[i][a][b]);
        }
    }

    // Neighbouring lanes have neighbouring columns, so that eight of them read from different banks.
    template <class Lhs, class Rhs>
    __device__ void add_stage(const Stage& stage) {
#pragma unroll 1
        for (int d = 0; d < DEEP; d += 4) {
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
        if constexpr (View::DEPTH_IS_CONTIGUOUS) return *reinterpret_cast<const float4*>(&panel[place<View>(row, d)]);
        auto get = [&](int d) { return panel[place<View>(row, d) + unsigned(row) % CHUNK]; };
        return make_float4(get(d), get(d + 1), get(d + 2), get(d + 3));
    }
#endif
};
