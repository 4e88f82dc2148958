// The skinny engine for an N-major matrix: 16 rows of z times a strip of columns of M, `sum = z·M`. Both are read straight from
// global memory, M only once, 64 bytes of each of its rows by a block: reading M bounds the speed.
//
//     for d0 in 0..depth by STRIP_STEP_K      8 warps one below the other along the depth, 16 rows of M each
//         a lane: 8 bytes of four rows of M, the four matching elements of z; adds their products to its sums
//     the partial sums of the slices of the depth go to shared memory and are added in the order of the slices
//
// Lane 4·g + q reads rows 4·q to 4·q + 3 of the 16, bytes 8·g of the 64. Rows start at multiples of 16 bytes, as the plan makes
// sure.
#pragma once
#include "skinny.cuh"

constexpr int LANE_COLS = 8 / sizeof(E);               // columns of M in a lane: 4 or 2
constexpr int STRIP_COLS = TILE_N * LANE_COLS;  // columns of M in a block: 32 or 16
constexpr int LANE_K = 4;                       // rows of M in a lane
constexpr int WARP_K = LANES_PER_ROW * LANE_K;  // rows of M in a warp
constexpr int STRIP_STEP_K = WARPS * WARP_K;    // rows of M in a step of the block: 128

// Loads 8 bytes of memory that no thread writes, or zeros.
__device__ inline uint2 load_8_bytes_or_zero(const E* from, bool has) {
    uint2 to;
    asm("{.reg .pred has;\nsetp.ne.b32 has, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n@has ld.global.nc.v2.u32 {%0, %1}, [%2];}"
        : "=&r"(to.x), "=&r"(to.y) : "l"(from), "r"(int(has)));
    return to;
}

struct SkinnyNMajor : SliceSums<STRIP_COLS> {
    const E *z, *matrix;
    int m, cols, depth, z_stride, stride, first_row, first_col;

    __device__ SkinnyNMajor(const E* z, const E* matrix, int m, int cols, int depth, int z_stride, int stride)
        : z(z), matrix(matrix), m(m), cols(cols), depth(matrix ? depth : 0), z_stride(z_stride), stride(stride) {
        // Blocks with the same columns of M have consecutive numbers, so that they run together and share M in the L2 cache.
        unsigned down = unsigned(m - 1) / SKINNY_ROWS + 1;
        first_row = int(blockIdx.x % down) * SKINNY_ROWS;
        first_col = int(blockIdx.x / down) * STRIP_COLS;
    }

#ifdef TENSOR
    // One mma m16n8k16 for each of a lane's four columns. Columns are permuted: column g of mma t is column t of the lanes with
    // lane_row g. So is the depth: the depths that mma calls 2q, 2q + 1, 2q + 8 and 2q + 9 are the four rows of lane q.
    __device__ void run() {
        float sum[LANE_COLS][4] = {};
        int col = first_col + lane_row() * LANE_COLS, above = first_row + lane_row(), below = above + TILE_N;
#pragma unroll 4
        for (int d0 = 0; d0 < depth; d0 += STRIP_STEP_K) {
            int d = d0 + warp() * WARP_K + lane_k() * LANE_K;
            uint2 right[LANE_K];
#pragma unroll
            for (int i = 0; i < LANE_K; ++i)
                right[i] = load_8_bytes_or_zero(&matrix[at(d + i, col, stride)], d + i < depth && col < cols);
            uint2 high = load_8_bytes_or_zero(&z[at(above, d, z_stride)], above < m && d < depth);
            uint2 low = load_8_bytes_or_zero(&z[at(below, d, z_stride)], below < m && d < depth);
            unsigned left[4] = {high.x, low.x, high.y, low.y};
#pragma unroll
            for (int t = 0; t < LANE_COLS; ++t) {
                auto word = [&](int i) { return t < 2 ? right[i].x : right[i].y; };
                unsigned half = t % 2 ? 0x7632 : 0x5410;  // selects column t of two rows
                unsigned b[2] = {__byte_perm(word(0), word(1), half), __byte_perm(word(2), word(3), half)};
                multiply(E(), sum[t], left, b);
            }
        }
#pragma unroll
        for (int t = 0; t < LANE_COLS; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                memory()[warp()][lane_row() + e / 2 * TILE_N][(lane_k() * 2 + e % 2) * LANE_COLS + t] = sum[t][e];
        }
        __syncthreads();
    }
#else
    // A lane has its two columns for all 16 rows of z; it takes four of them at a time, and stops after the last row of z. M is
    // loaded one step ahead.
    __device__ void run() {
        float sum[SKINNY_ROWS][LANE_COLS] = {};
        uint2 right[LANE_K], next[LANE_K];
        int col = first_col + lane_row() * LANE_COLS, d = warp() * WARP_K + lane_k() * LANE_K;
        auto fetch = [&](int d) {
#pragma unroll
            for (int i = 0; i < LANE_K; ++i)
                next[i] = load_8_bytes_or_zero(&matrix[at(d + i, col, stride)], d + i < depth && col < cols);
        };
        fetch(d);
#pragma unroll 1
        for (; d < depth; d += STRIP_STEP_K) {
#pragma unroll
            for (int i = 0; i < LANE_K; ++i) right[i] = next[i];
            fetch(d + STRIP_STEP_K);
#pragma unroll
            for (int row0 = 0; row0 < SKINNY_ROWS; row0 += 4) {
                if (first_row + row0 >= m) break;
#pragma unroll
                for (int row = row0; row < row0 + 4; ++row) {
                    Chunk left{load_or_zero(&z[at(first_row + row, d, z_stride)], first_row + row < m)};
#pragma unroll
                    for (int i = 0; i < LANE_K; ++i) {
                        sum[row][0] += left.get(i) * __uint_as_float(right[i].x);
                        sum[row][1] += left.get(i) * __uint_as_float(right[i].y);
                    }
                }
            }
        }
#pragma unroll
        for (int row = 0; row < SKINNY_ROWS; ++row) {
#pragma unroll
            for (int e = 0; e < LANE_COLS; ++e)
                memory()[warp() * LANES_PER_ROW + lane_k()][row][lane_row() * LANE_COLS + e] = sum[row][e];
        }
        __syncthreads();
    }
#endif
};
