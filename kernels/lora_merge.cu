#include "common.cuh"

// W += scale·B·A in place: each element of W is read once, written once, and rounded once, by one thread.
//
//     for 4 times 32 rows              W: 4 rows of COLS columns to each warp, WIDTH of a row to each lane
//         for d0 in 0..r by 16         16 rows of A, 16 columns of B in shared memory; they stay there if these are all
//             for d in 0..16           4·WIDTH sums += B·A
//
// At r = 16 that is 16 multiplications for every 4 or 8 bytes of traffic: for 8192² elements of 16 bits, 1.1·10⁹ of them, 37 µs
// on the 132·128 units of an H100 at 1.7 GHz, under 268 MB, 80 µs at 3.35 TB/s. So plain f32 arithmetic is fast enough up to
// r = 32 or so, and tensor cores would change nothing below.
constexpr int MERGE_DEPTH = 16;
constexpr int MERGE_LANES = 4;   // rows of a warp at a time
constexpr int MERGE_TURNS = 4;
constexpr int MERGE_ROWS = MERGE_TURNS * WARPS * MERGE_LANES;  // of a block: 128

template <int WIDTH>
struct Merge {
    static constexpr int COLS = WARP * WIDTH;
    static constexpr int PIECE = WIDTH < 4 ? WIDTH : 4;  // of a lane's columns, as one access to shared memory has them
    struct Memory {
        float a[MERGE_DEPTH][WIDTH / PIECE][WARP][PIECE];  // a warp's accesses are contiguous; 16 KiB for 8 columns a lane
        float b[MERGE_DEPTH][MERGE_ROWS];                  // 8 KiB
    };

    Factor a, b;
    float scale;
    bool by_chance_;
    unsigned key0, key1;
    E* w;
    int n, k, r, w_stride;

    __device__ void run() const {
        __shared__ __align__(16) Memory memory;
        unsigned across = unsigned(k - 1) / COLS + 1;
        int first_row = int(blockIdx.x / across) * MERGE_ROWS, first_col = int(blockIdx.x % across) * COLS;
        int col = first_col + lane() * WIDTH;
#pragma unroll 1
        for (int turn = 0; turn < MERGE_TURNS; ++turn) {
            int band = (turn * WARPS + warp()) * MERGE_LANES;  // of this warp's rows in the block
            Chunk old[MERGE_LANES];
#pragma unroll
            for (int i = 0; i < MERGE_LANES; ++i) read(old[i], first_row + band + i, col);
            float sum[MERGE_LANES][WIDTH] = {};
#pragma unroll 1
            for (int d0 = 0; d0 < r; d0 += MERGE_DEPTH) {
                if (turn == 0 || r > MERGE_DEPTH) {
                    __syncthreads();
                    load(memory, first_row, first_col, d0);
                    __syncthreads();
                }
                multiply(memory, band, sum);
            }
#pragma unroll 1
            for (int i = 0; i < MERGE_LANES; ++i) {
                finish(old[0], sum[0], first_row + band + i, col);
                move_up(old, sum);  // registers have no index: so what `finish` does exists once
            }
        }
    }

  private:
    // If a lane has several columns, all of them are inside or none: k is a multiple of WIDTH.
    __device__ void read(Chunk& to, int row, int col) const {
        if (row >= n || col >= k) return;
        if constexpr (WIDTH == 1) to.set(0, widen(w[at(row, col, w_stride)]));
        else to.bits = *reinterpret_cast<const uint4*>(&w[at(row, col, w_stride)]);
    }

    __device__ void load(Memory& memory, int first_row, int first_col, int d0) const {
        if constexpr (WIDTH == 1) {
#pragma unroll
            for (int part = 0; part < MERGE_DEPTH * COLS / THREADS; ++part) {
                unsigned e = part * THREADS + threadIdx.x;
                int d = int(e / COLS), col = int(e % COLS);
                bool has = d0 + d < r && first_col + col < k;
                memory.a[d][0][col][0] = a.get_or_zero(d0 + d, first_col + col, has);
            }
        } else {
#pragma unroll
            for (int part = 0; part < MERGE_DEPTH * WARP / THREADS; ++part) {
                unsigned e = part * THREADS + threadIdx.x;
                int d = int(e / WARP), to = int(e % WARP), col = first_col + to * WIDTH;
                Chunk chunk{load_or_zero(static_cast<const E*>(a.data) + at(d0 + d, col, a.stride), d0 + d < r && col < k)};
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) memory.a[d][j / PIECE][to][j % PIECE] = chunk.get(j);
            }
        }
#pragma unroll
        for (int part = 0; part < MERGE_DEPTH * MERGE_ROWS / THREADS; ++part) {
            unsigned e = part * THREADS + threadIdx.x;
            int d = int(e % MERGE_DEPTH), row = int(e / MERGE_DEPTH);
            bool has = d0 + d < r && first_row + row < n;
            memory.b[d][row] = b.get_or_zero(first_row + row, d0 + d, has);
        }
    }

    __device__ static void multiply(const Memory& memory, int band, float (&sum)[MERGE_LANES][WIDTH]) {
#pragma unroll 2
        for (int d = 0; d < MERGE_DEPTH; ++d) {
            float4 left = *reinterpret_cast<const float4*>(&memory.b[d][band]);
#pragma unroll
            for (int piece = 0; piece < WIDTH / PIECE; ++piece) {
                float right[PIECE];
                if constexpr (PIECE == 4) *reinterpret_cast<float4*>(right) = *reinterpret_cast<const float4*>(memory.a[d][piece][lane()]);
                else right[0] = memory.a[d][0][lane()][0];
#pragma unroll
                for (int e = 0; e < PIECE; ++e) {
                    int j = piece * PIECE + e;
                    sum[0][j] += left.x * right[e], sum[1][j] += left.y * right[e];
                    sum[2][j] += left.z * right[e], sum[3][j] += left.w * right[e];
                }
            }
        }
    }

    __device__ static void move_up(Chunk (&old)[MERGE_LANES], float (&sum)[MERGE_LANES][WIDTH]) {
#pragma unroll
        for (int i = 1; i < MERGE_LANES; ++i) {
            old[i - 1] = old[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum[i - 1][j] = sum[i][j];
        }
    }

    __device__ void finish(Chunk& old, const float (&sum)[WIDTH], int row, int col) const {
        if (row >= n || col >= k) return;
        size_t index = at(row, col, k), to = at(row, col, w_stride);  // by chance: the same whatever lies between rows
        float merged[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) merged[j] = old.get(j) + scale * sum[j];
#ifdef TENSOR  // f32 has nothing to round
        if (by_chance_) {
            Format format = ::format(E());
            if constexpr (WIDTH == 1) {
                merged[0] = by_chance(format, merged[0], word_of(key0, key1, index, ROUNDING));
            } else {
#pragma unroll
                for (int j = 0; j < WIDTH; j += 4) {
                    uint4 words = philox(key0, key1, (index + j) / 4, ROUNDING);
                    merged[j] = by_chance(format, merged[j], words.x);
                    merged[j + 1] = by_chance(format, merged[j + 1], words.y);
                    merged[j + 2] = by_chance(format, merged[j + 2], words.z);
                    merged[j + 3] = by_chance(format, merged[j + 3], words.w);
                }
            }
        }
#endif
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) old.set(j, merged[j]);
        if constexpr (WIDTH == 1) store(&w[to], merged[0]);
        else *reinterpret_cast<uint4*>(&w[to]) = old.bits;
    }
};

// For any shape, and factors in f32 too.
KERNEL(lora_merge)(const void* a, const void* b, float scale, unsigned by_chance, unsigned key0, unsigned key1, E* w,
                   int n, int k, int r, int a_stride, int b_stride, int w_stride, unsigned a_is_f32, unsigned b_is_f32) {
    Factor factor_a{a, a_stride, a_is_f32 != 0}, factor_b{b, b_stride, b_is_f32 != 0};
    Merge<1>{factor_a, factor_b, scale, by_chance != 0, key0, key1, w, n, k, r, w_stride}.run();
}

// 16 bytes of W, and of A, at a time: lines must start at multiples of that.
KERNEL(lora_merge_wide)(const E* a, const E* b, float scale, unsigned by_chance, unsigned key0, unsigned key1, E* w,
                        int n, int k, int r, int a_stride, int b_stride, int w_stride) {
    Factor factor_a{a, a_stride, false}, factor_b{b, b_stride, false};
    Merge<CHUNK>{factor_a, factor_b, scale, by_chance != 0, key0, key1, w, n, k, r, w_stride}.run();
}
