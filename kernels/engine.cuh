// The engine: one tile of `Σ lhs·rhs`, for operands of any type, orientation and size, summed in f32.
//
//     for d0 in 0..depth by DEPTH      both panels come to shared memory: TILE×DEPTH of lhs, DEPTH×TILE of rhs
//         for d in 0..DEPTH            each thread: 4 elements of lhs times 4 of rhs, onto its 4×4 sums
//
// A low-rank update is more depth of the same tile: h·Bᵀ, then x·Wᵀ, on the same sums. Each sum is one thread's and runs over
// the depth from 0 up, so that the same input gives the same bits. Edges are zeros in the panels: the inner loop has none.
#pragma once
#include "common.cuh"

constexpr int TILE = 64;   // rows, and columns, that a block makes
constexpr int DEPTH = 16;  // of both operands in shared memory: 2·16·68 floats, 8.5 KiB
constexpr int SIDE = 4;    // rows, and columns, of sums in a thread: (64/4)² = 256 threads
static_assert((TILE / SIDE) * (TILE / SIDE) == THREADS, "a block has a thread for every 4×4 sums");

// Index (row, d) of an operand whose rows are the rows of the stored matrix: neighbours in depth are neighbours in memory.
template <class T>
struct Rows {
    static constexpr bool DEPTH_IS_CONTIGUOUS = true;
    static constexpr int AT_ONCE = 4;  // loads on their way
    const T* data;
    int rows, depth, stride;

    __device__ bool has(int row, int d) const { return row < rows && d < depth; }
    __device__ size_t index(int row, int d) const { return at(row, d, stride); }
    __device__ float get(int row, int d) const { return widen(data[index(row, d)]); }
};

// Index (row, d) of an operand whose rows are the columns of the stored matrix: neighbours in row are neighbours in memory.
template <class T>
struct Columns {
    static constexpr bool DEPTH_IS_CONTIGUOUS = false;
    static constexpr int AT_ONCE = 4;
    const T* data;
    int rows, depth, stride;

    __device__ bool has(int row, int d) const { return row < rows && d < depth; }
    __device__ size_t index(int row, int d) const { return at(d, row, stride); }
    __device__ float get(int row, int d) const { return widen(data[index(row, d)]); }
};

// drop(x): the operand with the dropout mask applied to what is stored. The mask counts elements, whatever lies between rows.
template <class View>
struct Dropped : View {
    static constexpr int AT_ONCE = 1;  // the words of a mask take longer than a load
    Dropout dropout;
    __device__ Dropped(View view, Dropout dropout) : View(view), dropout(dropout) {}
    __device__ float get(int row, int d) const { return View::get(row, d) * dropout.factor(at(row, d, View::depth)); }
};

// `stride` elements from one line of the stored matrix to the next; without it, as many as a line has.
template <class T> __device__ Rows<T> rows(const T* data, int rows, int depth, int stride) { return {data, rows, depth, stride}; }
template <class T> __device__ Rows<T> rows(const T* data, int rows, int depth) { return {data, rows, depth, depth}; }
template <class T> __device__ Columns<T> columns(const T* data, int rows, int depth, int stride) { return {data, rows, depth, stride}; }
template <class T> __device__ Columns<T> columns(const T* data, int rows, int depth) { return {data, rows, depth, rows}; }
template <class View> __device__ Dropped<View> drop(View view, Dropout dropout) { return Dropped<View>(view, dropout); }

// TILE rows of an operand, DEPTH deep. 4 more floats a line keep 16-byte alignment and spread the writes over the banks.
using Panel = float[DEPTH][TILE + 4];
struct Panels { Panel lhs, rhs; };
using Sums = float[TILE][TILE + 4];  // on their way out
union TileMemory { Panels panels; Sums sums; };

__device__ inline TileMemory& tile_memory() {
    __shared__ __align__(16) TileMemory memory;
    return memory;
}

// Rows first_row.. and depth first_d.. of an operand; neighbouring threads read neighbouring elements.
template <class View>
__device__ void load(Panel& panel, View view, int first_row, int first_d) {
    constexpr bool ALONG = View::DEPTH_IS_CONTIGUOUS;
    constexpr int PARTS = TILE * DEPTH / THREADS;
    int row = int(ALONG ? threadIdx.x / DEPTH : threadIdx.x % TILE), d = int(ALONG ? threadIdx.x % DEPTH : threadIdx.x / TILE);
#pragma unroll View::AT_ONCE
    for (int part = 0; part < PARTS; ++part) {
        bool has = view.has(first_row + row, first_d + d);
        panel[d][row] = has ? view.get(first_row + row, first_d + d) : 0.0f;
        (ALONG ? row : d) += (ALONG ? TILE : DEPTH) / PARTS;
    }
}

// The sums of one block. Blocks are numbered along the rows of the output.
struct Tile {
    int rows, cols, first_row, first_col;
    float sum[SIDE][SIDE] = {};

    __device__ Tile(int rows, int cols) : rows(rows), cols(cols) {
        unsigned across = unsigned(cols - 1) / TILE + 1;
        first_row = int(blockIdx.x / across) * TILE;
        first_col = int(blockIdx.x % across) * TILE;
    }

    // sum += lhs·rhsᵀ
    template <class Lhs, class Rhs>
    __device__ void add(Lhs lhs, Rhs rhs) {
        for (int d0 = 0; d0 < lhs.depth; d0 += DEPTH) {
            load(tile_memory().panels.lhs, lhs, first_row, d0);
            load(tile_memory().panels.rhs, rhs, first_col, d0);
            __syncthreads();
            add_panels();
            __syncthreads();
        }
    }

    // sum *= factor
    __device__ void scale(float factor) {
#pragma unroll
        for (int e = 0; e < SIDE * SIDE; ++e) sum[e / SIDE][e % SIDE] *= factor;
    }

    // sum = f(i, j, sum) for the sums that lie inside the output.
    template <class F>
    __device__ void change(F f) {
        walk([&](int i, int j, float& sum) { sum = f(i, j, sum); });
        __syncthreads();
        place_each([&](float& place, float& sum) { sum = place; });
        __syncthreads();
    }

    // Calls f(i, j, sum) for the sums that lie inside the output; comes last.
    template <class F>
    __device__ void each(F f) { walk(f); }

  private:
    // A thread's rows are neighbours, one 16-byte read; its columns lie 16 apart, so that a half-warp has neighbours.
    __device__ static int lhs_lane() { return int(threadIdx.x / (TILE / SIDE)) * SIDE; }
    __device__ static int rhs_lane() { return int(threadIdx.x % (TILE / SIDE)); }

    // Calls f(place, sum) for every sum of this thread, and its place in shared memory.
    template <class F>
    __device__ void place_each(F f) {
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
#pragma unroll
            for (int j = 0; j < SIDE; ++j)
                f(tile_memory().sums[lhs_lane() + i][rhs_lane() + j * (TILE / SIDE)], sum[i][j]);
        }
    }

    // Calls f(i, j, sum). The sums pass through shared memory: there a loop can walk over them, and what f does exists once.
    template <class F>
    __device__ void walk(F f) {
        place_each([&](float& place, float& sum) { place = sum; });
        __syncthreads();
#pragma unroll 1
        for (unsigned e = threadIdx.x; e < TILE * TILE; e += THREADS) {
            int row = first_row + int(e / TILE), col = first_col + int(e % TILE);
            if (row < rows && col < cols) f(row, col, tile_memory().sums[e / TILE][e % TILE]);
        }
    }

    __device__ void add_panels() {
#pragma unroll 2
        for (int d = 0; d < DEPTH; ++d) {
            float4 lhs = *reinterpret_cast<const float4*>(&tile_memory().panels.lhs[d][lhs_lane()]);
            const float* rhs = &tile_memory().panels.rhs[d][rhs_lane()];
#pragma unroll
            for (int j = 0; j < SIDE; ++j) {
                float right = rhs[j * (TILE / SIDE)];
                sum[0][j] += lhs.x * right;
                sum[1][j] += lhs.y * right;
                sum[2][j] += lhs.z * right;
                sum[3][j] += lhs.w * right;
            }
        }
    }
};
