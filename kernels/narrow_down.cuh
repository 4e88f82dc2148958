// The narrow engine down the rows: 16 rows of z times a strip of columns of a matrix, `sum = z·M`. Both come straight from memory,
// M only once, 64 bytes of each of its rows to a block: what bounds it is the reading of M.
//
//     for d0 in 0..depth by SPAN_DOWN      8 warps below each other along the depth, each of them 16 rows of M
//         a lane: 8 bytes of four rows of M; the four elements of z that meet them; their products onto its sums
//     the sums of all parts of the depth meet in shared memory, and are added in the order of the parts
//
// Lane 4·g + q has rows 4·q to 4·q + 3 of the 16, and bytes 8·g of the 64. Lines start at multiples of 16 bytes: the plan sees to it.
#pragma once
#include "narrow.cuh"

constexpr int PAIR = 8 / sizeof(E);               // columns of M in a lane: 4 or 2
constexpr int STRIP = GROUP * PAIR;               // in a block: 32 or 16
constexpr int FOUR = 4;                           // rows of M in a lane
constexpr int WARP_DOWN = QUARTERS * FOUR;        // in a warp
constexpr int SPAN_DOWN = WARPS * WARP_DOWN;      // in a step of the block: 128

// 8 bytes of what no thread writes, or zeros where there are none.
__device__ inline uint2 pair_or_zero(const E* from, bool has) {
    uint2 to;
    asm("{.reg .pred has;\nsetp.ne.b32 has, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n@has ld.global.nc.v2.u32 {%0, %1}, [%2];}"
        : "=&r"(to.x), "=&r"(to.y) : "l"(from), "r"(int(has)));
    return to;
}

struct NarrowDown : PartSums<STRIP> {
    const E *z, *matrix;
    int m, cols, depth, z_stride, stride, first_row, first_col;

    __device__ NarrowDown(const E* z, const E* matrix, int m, int cols, int depth, int z_stride, int stride)
        : z(z), matrix(matrix), m(m), cols(cols), depth(matrix ? depth : 0), z_stride(z_stride), stride(stride) {
        // Blocks are numbered along the rows of the output, so that those with the same columns of M run together.
        unsigned down = unsigned(m - 1) / ROWS + 1;
        first_row = int(blockIdx.x % down) * ROWS;
        first_col = int(blockIdx.x / down) * STRIP;
    }

#ifdef TENSOR
    // A product of 16×8×16 for each of a lane's four columns. Columns are permuted: column g of product t is column t of the lanes of
    // group g. So is the depth: what the product calls depths 2q, 2q + 1, 2q + 8 and 2q + 9 are the four rows of lane q.
    __device__ void multiply_all() {
        float sum[PAIR][4] = {};
        int col = first_col + group() * PAIR, above = first_row + group(), below = above + GROUP;
#pragma unroll 4
        for (int d0 = 0; d0 < depth; d0 += SPAN_DOWN) {
            int d = d0 + warp() * WARP_DOWN + quarter() * FOUR;
            uint2 right[FOUR];
#pragma unroll
            for (int i = 0; i < FOUR; ++i) right[i] = pair_or_zero(&matrix[at(d + i, col, stride)], d + i < depth && col < cols);
            uint2 high = pair_or_zero(&z[at(above, d, z_stride)], above < m && d < depth);
            uint2 low = pair_or_zero(&z[at(below, d, z_stride)], below < m && d < depth);
            unsigned left[4] = {high.x, low.x, high.y, low.y};
#pragma unroll
            for (int t = 0; t < PAIR; ++t) {
                auto word = [&](int i) { return t < 2 ? right[i].x : right[i].y; };
                unsigned half = t % 2 ? 0x7632 : 0x5410;  // column t of two rows in one word
                unsigned b[2] = {__byte_perm(word(0), word(1), half), __byte_perm(word(2), word(3), half)};
                multiply(E(), sum[t], left, b);
            }
        }
#pragma unroll
        for (int t = 0; t < PAIR; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                memory()[warp()][group() + e / 2 * GROUP][(quarter() * 2 + e % 2) * PAIR + t] = sum[t][e];
        }
        __syncthreads();
    }
#else
    // A lane has its two columns for all 16 rows of z; four of them at a time, if z has as many. M comes a step ahead.
    __device__ void multiply_all() {
        float sum[ROWS][PAIR] = {};
        uint2 right[FOUR], next[FOUR];
        int col = first_col + group() * PAIR, d = warp() * WARP_DOWN + quarter() * FOUR;
        auto fetch = [&](int d) {
#pragma unroll
            for (int i = 0; i < FOUR; ++i) next[i] = pair_or_zero(&matrix[at(d + i, col, stride)], d + i < depth && col < cols);
        };
        fetch(d);
#pragma unroll 1
        for (; d < depth; d += SPAN_DOWN) {
#pragma unroll
            for (int i = 0; i < FOUR; ++i) right[i] = next[i];
            fetch(d + SPAN_DOWN);
#pragma unroll
            for (int row0 = 0; row0 < ROWS; row0 += 4) {
                if (first_row + row0 >= m) break;
#pragma unroll
                for (int row = row0; row < row0 + 4; ++row) {
                    Chunk left{load_or_zero(&z[at(first_row + row, d, z_stride)], first_row + row < m)};
#pragma unroll
                    for (int i = 0; i < FOUR; ++i) {
                        sum[row][0] += left.get(i) * __uint_as_float(right[i].x);
                        sum[row][1] += left.get(i) * __uint_as_float(right[i].y);
                    }
                }
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
            for (int e = 0; e < PAIR; ++e) memory()[warp() * QUARTERS + quarter()][row][group() * PAIR + e] = sum[row][e];
        }
        __syncthreads();
    }
#endif
};
