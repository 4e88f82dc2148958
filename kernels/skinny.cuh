// The skinny engine: 16 rows of x times some rows of a matrix of the same depth, `sum = x·Mᵀ`. Both are read straight from global
// memory, 16 bytes a lane, and M only once: reading M bounds the speed.
//
//     for d0 in 0..depth by STEP_K       8 warps side by side along the depth, 64 bytes of every row each
//         a lane: 16 bytes of one row of M in each tile of 8 rows, 16 bytes of x; adds their products to its sums
//     the partial sums of the slices of the depth go to shared memory and are added in the order of the slices
//
// Lane 4·g + q reads row g of every tile, bytes 16·q of the 64. Rows start at multiples of 16 bytes, as the plan makes sure.
#pragma once
#include "mma.cuh"

constexpr int SKINNY_ROWS = 16;  // rows of x in a block
constexpr int TILE_N = 8;        // rows of M in a tile
constexpr int LANES_PER_ROW = WARP / TILE_N;            // lanes that share a row
constexpr int STEP_K = WARPS * LANES_PER_ROW * CHUNK;  // depth of a step: 256 elements of 16 bits, or 128
#ifdef TENSOR
constexpr int SLICES = WARPS;  // slices of the depth, each with partial sums
#else
constexpr int SLICES = WARPS * LANES_PER_ROW;
#endif

// The partial sums of all slices of the depth, in shared memory.
template <int COLS>
struct SliceSums {
    using Memory = float[SLICES][SKINNY_ROWS][COLS];  // up to 8·16·48 or 32·16·16 floats: 24 or 32 KiB

    __device__ static Memory& memory() {
        __shared__ Memory memory;
        return memory;
    }

    // Sum (i, j): the partial sums, added in order.
    __device__ static float sum(int i, int j) {
        float sum = 0.0f;
#pragma unroll 8
        for (int slice = 0; slice < SLICES; ++slice) sum += memory()[slice][i][j];
        return sum;
    }

    __device__ static int lane_row() { return int(threadIdx.x % WARP / LANES_PER_ROW); }
    __device__ static int lane_k() { return int(threadIdx.x % LANES_PER_ROW); }
};

// STEPS_IN_FLIGHT: steps of the loop whose loads are in flight together.
template <int TILES, int STEPS_IN_FLIGHT>
struct Skinny : SliceSums<TILES * TILE_N> {
    using Sums = SliceSums<TILES * TILE_N>;
    using Sums::lane_row, Sums::memory, Sums::lane_k;

    const E* x;
    int m, depth, stride, first_row;
    const E* matrix_row[TILES];  // of M: this lane's row in each tile, or null

    __device__ Skinny(const E* x, int m, int depth, int stride, int first_row)
        : x(x), m(m), depth(depth), stride(stride), first_row(first_row) {}

    // Leaves the partial sums in shared memory; `mask(chunk, i, d)` may change what is read of x.
    template <class F>
    __device__ void run(F mask) {
        float sum[TILES][SKINNY_ROWS * TILE_N * SLICES / THREADS] = {};
#pragma unroll STEPS_IN_FLIGHT
        for (int d0 = 0; d0 < depth; d0 += STEP_K) {
            int d = d0 + int(threadIdx.x / WARP * LANES_PER_ROW + threadIdx.x % LANES_PER_ROW) * CHUNK;
            uint4 right[TILES];
#pragma unroll
            for (int t = 0; t < TILES; ++t) right[t] = load_or_zero(matrix_row[t] + d, matrix_row[t] && d < depth);
            const E* row = &x[at(first_row, d, stride)];
            multiply_add(sum, right, [&](int i) {
                uint4 left = load_or_zero(row + size_t(i) * stride, first_row + i < m && d < depth);
                mask(left, first_row + i, d);
                return left;
            });
        }
        store_sums(sum);
        __syncthreads();
    }

  private:
#ifdef TENSOR
    // The depth is permuted: the depths that mma m16n8k16 calls 2q, 2q + 1, 2q + 8 and 2q + 9 are four consecutive ones of lane
    // q, so that 16 bytes of a row are its share of two mma. x is permuted in the same way, so the sums are the same.
    template <class Left>
    __device__ void multiply_add(float (&sum)[TILES][4], const uint4 (&right)[TILES], Left left) {
        uint4 above = left(lane_row()), below = left(lane_row() + TILE_N);
        unsigned first[4] = {above.x, below.x, above.y, below.y}, second[4] = {above.z, below.z, above.w, below.w};
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            unsigned b[4] = {right[t].x, right[t].y, right[t].z, right[t].w};
            multiply(E(), sum[t], first, &b[0]);
            multiply(E(), sum[t], second, &b[2]);
        }
    }

    __device__ static void store_sums(const float (&sum)[TILES][4]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                memory()[warp()][lane_row() + e / 2 * TILE_N][t * TILE_N + lane_k() * 2 + e % 2] = sum[t][e];
        }
    }
#else
    // A lane has its row of M for all 16 rows of x; it takes four of them at a time, and stops after the last row of x.
    template <class Left>
    __device__ void multiply_add(float (&sum)[TILES][SKINNY_ROWS], const uint4 (&right)[TILES], Left left) {
#pragma unroll
        for (int i0 = 0; i0 < SKINNY_ROWS; i0 += 4) {
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

    __device__ static void store_sums(const float (&sum)[TILES][SKINNY_ROWS]) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int i = 0; i < SKINNY_ROWS; ++i)
                memory()[warp() * LANES_PER_ROW + lane_k()][i][t * TILE_N + lane_row()] = sum[t][i];
        }
    }
#endif
};
