// The general engine: a block makes one 64×64 tile of `Σ lhs·rhs`, for operands of any type, orientation and size, summed in f32.
//
//     for d0 in 0..depth by PANEL_K      load the panels of both operands to shared memory, TILE×PANEL_K each
//         for d in 0..PANEL_K            each thread: 4 elements of lhs times 4 of rhs, added to its 4×4 sums
//
// A low-rank update extends the depth of the same tile: first h·Bᵀ, then x·Wᵀ, added to the same sums. Each sum belongs to one
// thread and runs over the depth from 0 up, so the same input gives the same bits. Panels are padded with zeros at edges, so the
// inner loop has no bounds checks.
#pragma once
#include "common.cuh"

constexpr int TILE = 64;        // rows, and columns, of a block's tile
constexpr int PANEL_K = 16;     // depth of a panel; both take 2·16·68 floats, 8.5 KiB
constexpr int THREAD_TILE = 4;  // rows, and columns, of a thread's sums: (64/4)² = 256 threads
static_assert((TILE / THREAD_TILE) * (TILE / THREAD_TILE) == THREADS, "a block has a thread for every 4×4 sums");

// An operand whose row `row` is a row of the stored matrix: consecutive depths are consecutive in memory (K-major).
template <class T>
struct Rows {
    static constexpr bool K_MAJOR = true;
    static constexpr int LOADS_IN_FLIGHT = 4;
    const T* data;
    int rows, depth, stride;

    __device__ bool inside(int row, int d) const { return row < rows && d < depth; }
    __device__ size_t index(int row, int d) const { return at(row, d, stride); }
    __device__ float get(int row, int d) const { return widen(data[index(row, d)]); }
};

// An operand whose row `row` is a column of the stored matrix: consecutive rows are consecutive in memory (N-major, or M-major).
template <class T>
struct Columns {
    static constexpr bool K_MAJOR = false;
    static constexpr int LOADS_IN_FLIGHT = 4;
    const T* data;
    int rows, depth, stride;

    __device__ bool inside(int row, int d) const { return row < rows && d < depth; }
    __device__ size_t index(int row, int d) const { return at(d, row, stride); }
    __device__ float get(int row, int d) const { return widen(data[index(row, d)]); }
};

// drop(x): an operand with the dropout mask applied as it is read. The mask counts elements row by row, without the gaps of a
// stride.
template <class View>
struct Dropped : View {
    static constexpr int LOADS_IN_FLIGHT = 1;  // generating the mask takes longer than the load
    Dropout dropout;
    __device__ Dropped(View view, Dropout dropout) : View(view), dropout(dropout) {}
    __device__ float get(int row, int d) const { return View::get(row, d) * dropout.factor(at(row, d, View::depth)); }
};

// `stride`: elements from one line of the stored matrix to the next; by default the length of a line.
template <class T> __device__ Rows<T> rows(const T* data, int rows, int depth, int stride) { return {data, rows, depth, stride}; }
template <class T> __device__ Rows<T> rows(const T* data, int rows, int depth) { return {data, rows, depth, depth}; }
template <class T>
__device__ Columns<T> columns(const T* data, int rows, int depth, int stride) { return {data, rows, depth, stride}; }
template <class T> __device__ Columns<T> columns(const T* data, int rows, int depth) { return {data, rows, depth, rows}; }
template <class View> __device__ Dropped<View> drop(View view, Dropout dropout) { return Dropped<View>(view, dropout); }

// TILE rows of an operand, PANEL_K deep. 4 floats of padding keep 16-byte alignment and spread the writes over the banks.
using Panel = float[PANEL_K][TILE + 4];
struct Panels { Panel lhs, rhs; };
using Sums = float[TILE][TILE + 4];  // staged for the epilogue
union TileMemory { Panels panels; Sums sums; };

__device__ inline TileMemory& tile_memory() {
    __shared__ __align__(16) TileMemory memory;
    return memory;
}

// Loads rows first_row.. and depths first_d.. of an operand; consecutive threads read consecutive elements.
template <class View>
__device__ void load(Panel& panel, View view, int first_row, int first_d) {
    constexpr bool K_MAJOR = View::K_MAJOR;
    constexpr int PARTS = TILE * PANEL_K / THREADS;
    int row = int(K_MAJOR ? threadIdx.x / PANEL_K : threadIdx.x % TILE);
    int d = int(K_MAJOR ? threadIdx.x % PANEL_K : threadIdx.x / TILE);
#pragma unroll View::LOADS_IN_FLIGHT
    for (int part = 0; part < PARTS; ++part) {
        bool inside = view.inside(first_row + row, first_d + d);
        panel[d][row] = inside ? view.get(first_row + row, first_d + d) : 0.0f;
        (K_MAJOR ? row : d) += (K_MAJOR ? TILE : PANEL_K) / PARTS;
    }
}

// One block's tile of sums. Blocks are numbered row by row over the tiles of the output.
struct Tile {
    int rows, cols, first_row, first_col;
    float sum[THREAD_TILE][THREAD_TILE] = {};

    __device__ Tile(int rows, int cols) : rows(rows), cols(cols) {
        unsigned across = unsigned(cols - 1) / TILE + 1;
        first_row = int(blockIdx.x / across) * TILE;
        first_col = int(blockIdx.x % across) * TILE;
    }

    // sum += lhs·rhsᵀ
    template <class Lhs, class Rhs>
    __device__ void add(Lhs lhs, Rhs rhs) {
        for (int d0 = 0; d0 < lhs.depth; d0 += PANEL_K) {
            load(tile_memory().panels.lhs, lhs, first_row, d0);
            load(tile_memory().panels.rhs, rhs, first_col, d0);
            __syncthreads();
            micro_kernel();
            __syncthreads();
        }
    }

    // sum *= factor
    __device__ void scale(float factor) {
#pragma unroll
        for (int e = 0; e < THREAD_TILE * THREAD_TILE; ++e) sum[e / THREAD_TILE][e % THREAD_TILE] *= factor;
    }

    // sum = f(i, j, sum) for the sums inside the output.
    template <class F>
    __device__ void transform(F f) {
        each_in_shared([&](int i, int j, float& sum) { sum = f(i, j, sum); });
        __syncthreads();
        each_own_sum([&](float& slot, float& sum) { sum = slot; });
        __syncthreads();
    }

    // Calls f(i, j, sum) for the sums inside the output. Must come last.
    template <class F>
    __device__ void each(F f) { each_in_shared(f); }

  private:
    // A thread's rows are consecutive, one 16-byte read; its columns are 16 apart, so that a half-warp reads consecutive ones.
    __device__ static int lhs_lane() { return int(threadIdx.x / (TILE / THREAD_TILE)) * THREAD_TILE; }
    __device__ static int rhs_lane() { return int(threadIdx.x % (TILE / THREAD_TILE)); }

    // Calls f(slot, sum) for every sum of this thread, with its slot in shared memory.
    template <class F>
    __device__ void each_own_sum(F f) {
#pragma unroll
        for (int i = 0; i < THREAD_TILE; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD_TILE; ++j)
                f(tile_memory().sums[lhs_lane() + i][rhs_lane() + j * (TILE / THREAD_TILE)], sum[i][j]);
        }
    }

    // Calls f(i, j, sum). The sums pass through shared memory, where a loop can index them, so that f is compiled once.
    template <class F>
    __device__ void each_in_shared(F f) {
        each_own_sum([&](float& slot, float& sum) { slot = sum; });
        __syncthreads();
#pragma unroll 1
        for (unsigned e = threadIdx.x; e < TILE * TILE; e += THREADS) {
            int row = first_row + int(e / TILE), col = first_col + int(e % TILE);
            if (row < rows && col < cols) f(row, col, tile_memory().sums[e / TILE][e % TILE]);
        }
    }

    __device__ void micro_kernel() {
#pragma unroll 2
        for (int d = 0; d < PANEL_K; ++d) {
            float4 lhs = *reinterpret_cast<const float4*>(&tile_memory().panels.lhs[d][lhs_lane()]);
            const float* rhs = &tile_memory().panels.rhs[d][rhs_lane()];
#pragma unroll
            for (int j = 0; j < THREAD_TILE; ++j) {
                float right = rhs[j * (TILE / THREAD_TILE)];
                sum[0][j] += lhs.x * right;
                sum[1][j] += lhs.y * right;
                sum[2][j] += lhs.z * right;
                sum[3][j] += lhs.w * right;
            }
        }
    }
};
