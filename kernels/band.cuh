// The band engine: a block owns 256 columns of a big z and walks down its rows, 16 at a time. It makes narrow products of z, 16
// columns of them in one pass, so that z is read once where both are wanted:
//
//     along   Σ over the columns: z·q, for each row of z and the block's own columns, q of 256×16 stays in shared memory
//     down    Σ over the rows: zᵀ·g, a thread a column, its 16 sums in registers
//
// What other blocks add is a part of its own: `lora_backward_sum` adds them in their order, and so the bits are always the same.
#pragma once
#include "common.cuh"

constexpr int BAND = THREADS;  // columns of a block
constexpr int STEP = 16;       // rows at a time
constexpr int AT_ONCE = 8;     // loads on their way
constexpr int PASS = 16;       // columns of g and q in one pass

struct Band {
    float z[STEP][BAND + 4];   // 16·260 floats, 16 KiB; 4 more a line: eight rows lie in different banks
    float g[STEP][PASS];
};

// What a block is for. Blocks are numbered along the bands, then along the passes over r, then along the shares of the rows.
struct Place {
    int band, share, first_col, first_d, first_row, last_row;

    __device__ Place(int rows, int cols, int r, int rows_a_share) {
        unsigned bands = unsigned(cols - 1) / BAND + 1, passes = unsigned(r - 1) / PASS + 1;
        band = int(blockIdx.x % bands);
        share = int(blockIdx.x / bands / passes);
        first_col = band * BAND;
        first_d = int(blockIdx.x / bands % passes) * PASS;
        first_row = share * rows_a_share;
        last_row = rows - first_row < rows_a_share ? rows : first_row + rows_a_share;  // the sum of both need not be an int
    }
};

// STEP rows of z and g; zeros beyond the last row and the edges. `stride` is that of z. Ends with a barrier.
template <class Mask>
__device__ void load_step(Band& band, const E* z, int stride, const float* g, const Place& place, int row, int cols, int r, Mask mask) {
    int col = place.first_col + int(threadIdx.x);
    const E* from = &z[at(row, col, stride)];
#pragma unroll 1
    for (int i0 = 0; i0 < STEP; i0 += AT_ONCE) {
        float value[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i, from += stride)
            value[i] = element_or_zero(from, col < cols && row + i0 + i < place.last_row);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) band.z[i0 + i][threadIdx.x] = value[i];
    }
    mask(row, col);
    int i = int(threadIdx.x / PASS), d = int(threadIdx.x % PASS);
    bool has = row + i < place.last_row && place.first_d + d < r;
    band.g[i][d] = has ? g[at(row + i, place.first_d + d, r)] : 0.0f;
    __syncthreads();
}

// sum += zᵀ·g for this thread's column
__device__ inline void add_down(const Band& band, float (&sum)[PASS]) {
#pragma unroll 2
    for (int i = 0; i < STEP; ++i) {
        float z = band.z[i][threadIdx.x];
#pragma unroll
        for (int d = 0; d < PASS; d += 4) {
            float4 g = *reinterpret_cast<const float4*>(&band.g[i][d]);
            sum[d] += z * g.x;
            sum[d + 1] += z * g.y;
            sum[d + 2] += z * g.z;
            sum[d + 3] += z * g.w;
        }
    }
}

// Calls f(d, sum) for the sums of this thread's column, which are where its z was: there a loop can walk over them.
template <class F>
__device__ void each_down(Band& band, const float (&sum)[PASS], const Place& place, int r, F f) {
    static_assert(PASS <= STEP, "the place of z has room for the sums");
#pragma unroll
    for (int d = 0; d < PASS; ++d) band.z[d][threadIdx.x] = sum[d];
    int count = min(PASS, r - place.first_d);
#pragma unroll 1
    for (int d = 0; d < count; ++d) f(place.first_d + d, band.z[d][threadIdx.x]);
}
