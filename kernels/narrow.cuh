// The narrow engine: 16 rows of x times a few rows of a matrix of the same depth, `sum = x·Mᵀ`. Both come straight from memory,
// 16 bytes a lane, and M only once: what bounds it is the reading of M.
//
//     for d0 in 0..depth by SPAN       8 warps side by side along the depth, each of them 64 bytes of every line
//         a lane: 16 bytes of one row of M in each tile of 8 rows; 16 bytes of x; their products onto its sums
//     the sums of all parts of the depth meet in shared memory, and are added in the order of the parts
//
// Lane 4·g + q has row g of every tile, and bytes 16·q of the 64. Lines start at multiples of 16 bytes: the plan sees to it.
#pragma once
#include "mma.cuh"

constexpr int ROWS = 16;                          // of x, in a block
constexpr int GROUP = 8;                          // rows of M in a tile
constexpr int QUARTERS = WARP / GROUP;            // lanes that share a row
constexpr int SPAN = WARPS * QUARTERS * CHUNK;    // of the depth, in a step of the block: 256 elements of 16 bits, or 128
#ifdef TENSOR
constexpr int PARTS = WARPS;                      // of the depth, that end in sums of their own
#else
constexpr int PARTS = WARPS * QUARTERS;
#endif

// The sums of all parts of the depth, in shared memory.
template <int COLS>
struct PartSums {
    using Memory = float[PARTS][ROWS][COLS];  // up to 8·16·48 or 32·16·16 floats: 24 or 32 KiB

    __device__ static Memory& memory() {
        __shared__ Memory memory;
        return memory;
    }

    // Sum (i, j): what the parts made, in their order.
    __device__ static float sum(int i, int j) {
        float sum = 0.0f;
#pragma unroll 8
        for (int part = 0; part < PARTS; ++part) sum += memory()[part][i][j];
        return sum;
    }

    __device__ static int group() { return int(threadIdx.x % WARP / QUARTERS); }
    __device__ static int quarter() { return int(threadIdx.x % QUARTERS); }
};

// AT_ONCE: steps whose loads are on their way together.
template <int TILES, int AT_ONCE>
struct Narrow : PartSums<TILES * GROUP> {
    using Sums = PartSums<TILES * GROUP>;
    using Sums::group, Sums::memory, Sums::quarter;

    const E* x;
    int m, depth, stride, first_row;
    const E* line[TILES];  // of M: this lane's row of each tile; null if there is none

    __device__ Narrow(const E* x, int m, int depth, int stride, int first_row)
        : x(x), m(m), depth(depth), stride(stride), first_row(first_row) {}

    // The sums, in shared memory; `masked(chunk, i, d)` changes what is read of x.
    template <class F>
    __device__ void multiply_all(F masked) {
        float sum[TILES][ROWS * GROUP * PARTS / THREADS] = {};
#pragma unroll AT_ONCE
        for (int d0 = 0; d0 < depth; d0 += SPAN) {
            int d = d0 + int(threadIdx.x / WARP * QUARTERS + threadIdx.x % QUARTERS) * CHUNK;
            uint4 right[TILES];
#pragma unroll
            for (int t = 0; t < TILES; ++t) right[t] = load_or_zero(line[t] + d, line[t] && d < depth);
            const E* row = &x[at(first_row, d, stride)];
            add(sum, right, [&](int i) {
                uint4 left = load_or_zero(row + size_t(i) * stride, first_row + i < m && d < depth);
                masked(left, first_row + i, d);
                return left;
            });
        }
        place(sum);
        __syncthreads();
    }

  private:
#ifdef TENSOR
    // Depth is permuted: what the product of 16×8×16 calls depths 2q, 2q + 1, 2q + 8 and 2q + 9 are four neighbours of lane q. So
    // that 16 bytes of a line are its part of two products. In x they are permuted in the same way, and a sum does not mind.
    template <class Left>
    __device__ void add(float (&sum)[TILES][4], const uint4 (&right)[TILES], Left left) {
        uint4 above = left(group()), below = left(group() + GROUP);
        unsigned first[4] = {above.x, below.x, above.y, below.y}, second[4] = {above.z, below.z, above.w, below.w};
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            unsigned b[4] = {right[t].x, right[t].y, right[t].z, right[t].w};
            multiply(E(), sum[t], first, &b[0]);
            multiply(E(), sum[t], second, &b[2]);
        }
    }

    __device__ static void place(const float (&sum)[TILES][4]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                memory()[warp()][group() + e / 2 * GROUP][t * GROUP + quarter() * 2 + e % 2] = sum[t][e];
        }
    }
#else
    // A lane has its row of M for all 16 rows of x; four of them at a time, if x has as many.
    template <class Left>
    __device__ void add(float (&sum)[TILES][ROWS], const uint4 (&right)[TILES], Left left) {
#pragma unroll
        for (int i0 = 0; i0 < ROWS; i0 += 4) {
            if (first_row + i0 >= m) break;
#pragma unroll
            for (int i = i0; i < i0 + 4; ++i) {
                Chunk a{left(i)};
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    Chunk b{right[t]};
#pragma unroll
                    for (int e = 0; e < CHUNK; ++e) sum[t][i] += a.get(e) * b.get(e);
                }
            }
        }
    }

    __device__ static void place(const float (&sum)[TILES][ROWS]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) memory()[warp() * QUARTERS + quarter()][i][t * GROUP + group()] = sum[t][i];
        }
    }
#endif
};
