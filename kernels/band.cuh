// The band engine: a block owns 256 columns of a large matrix z and walks down its rows, 16 at a time. It multiplies z by
// matrices of at most 16 columns (the rank) and makes two kinds of products from one reading of z:
//
//     row sums      Σ over the columns: z·q, for each row of z and the block's columns; q, 256×16, stays in shared memory
//     column sums   Σ over the rows: zᵀ·g; each thread has a column, and its 16 sums in registers
//
// Each block writes its partial sums to memory of its own; `lora_backward_sum` adds them in a fixed order, so the bits are always
// the same.
#pragma once
#include "common.cuh"

constexpr int BAND_COLS = THREADS;  // columns of a block
constexpr int BAND_ROWS = 16;       // rows of a step
constexpr int LOADS_IN_FLIGHT = 8;
constexpr int BAND_RANKS = 16;      // columns of g and q in one pass

struct Band {
    float z[BAND_ROWS][BAND_COLS + 4];  // 16·260 floats, 16 KiB; with 4 of padding, eight rows lie in different banks
    float g[BAND_ROWS][BAND_RANKS];
};

// The part of z that a block owns. Blocks are numbered along the bands, then along the passes over r, then along the shares of
// the rows.
struct BandBlock {
    int band, share, first_col, first_d, first_row, last_row;

    __device__ BandBlock(int rows, int cols, int r, int rows_per_share) {
        unsigned bands = unsigned(cols - 1) / BAND_COLS + 1, passes = unsigned(r - 1) / BAND_RANKS + 1;
        band = int(blockIdx.x % bands);
        share = int(blockIdx.x / bands / passes);
        first_col = band * BAND_COLS;
        first_d = int(blockIdx.x / bands % passes) * BAND_RANKS;
        first_row = share * rows_per_share;
        last_row = rows - first_row < rows_per_share ? rows : first_row + rows_per_share;  // the sum could overflow an int
    }
};

// Loads BAND_ROWS rows of z and g, with zeros beyond the last row and the edges. `stride` is z's. Ends with a barrier.
template <class Mask>
__device__ void load_step(Band& band, const E* z, int stride, const float* g, const BandBlock& block, int row, int cols, int r,
                          Mask mask) {
    int col = block.first_col + int(threadIdx.x);
    const E* from = &z[at(row, col, stride)];
#pragma unroll 1
    for (int i0 = 0; i0 < BAND_ROWS; i0 += LOADS_IN_FLIGHT) {
        float value[LOADS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < LOADS_IN_FLIGHT; ++i, from += stride)
            value[i] = element_or_zero(from, col < cols && row + i0 + i < block.last_row);
#pragma unroll
        for (int i = 0; i < LOADS_IN_FLIGHT; ++i) band.z[i0 + i][threadIdx.x] = value[i];
    }
    mask(row, col);
    int i = int(threadIdx.x / BAND_RANKS), d = int(threadIdx.x % BAND_RANKS);
    bool has = row + i < block.last_row && block.first_d + d < r;
    band.g[i][d] = has ? g[at(row + i, block.first_d + d, r)] : 0.0f;
    __syncthreads();
}

// sum += zᵀ·g, for this thread's column
__device__ inline void add_column_products(const Band& band, float (&sum)[BAND_RANKS]) {
#pragma unroll 2
    for (int i = 0; i < BAND_ROWS; ++i) {
        float z = band.z[i][threadIdx.x];
#pragma unroll
        for (int d = 0; d < BAND_RANKS; d += 4) {
            float4 g = *reinterpret_cast<const float4*>(&band.g[i][d]);
            sum[d] += z * g.x;
            sum[d + 1] += z * g.y;
            sum[d + 2] += z * g.z;
            sum[d + 3] += z * g.w;
        }
    }
}

// Calls f(d, sum) for the sums of this thread's column. They are staged where z was, so that a loop can index them.
template <class F>
__device__ void each_column_sum(Band& band, const float (&sum)[BAND_RANKS], const BandBlock& block, int r, F f) {
    static_assert(BAND_RANKS <= BAND_ROWS, "the block of z has room for the sums");
#pragma unroll
    for (int d = 0; d < BAND_RANKS; ++d) band.z[d][threadIdx.x] = sum[d];
    int count = min(BAND_RANKS, r - block.first_d);
#pragma unroll 1
    for (int d = 0; d < count; ++d) f(block.first_d + d, band.z[d][threadIdx.x]);
}
