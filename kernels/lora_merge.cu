#include "common.cuh"

// W += scale·B·A in place: each element of W is read, rounded and written once, by one thread.
//
//     for 4 times 32 rows              W: 4 rows of COLS columns to each warp, WIDTH columns of a row to each lane
//         for d0 in 0..r by 16         load 16 rows of A, 16 columns of B to shared memory; once, if r ≤ 16
//             for d in 0..16           4·WIDTH sums += B·A
//
// At r = 16 that is 16 multiply-adds for every 4 or 8 bytes of traffic. For 8192² elements of 16 bits: 1.1·10⁹ multiply-adds, 37
// µs on the 132·128 units of an H100 at 1.7 GHz, less than the 80 µs for 268 MB at 3.35 TB/s. So plain f32 arithmetic is fast
// enough up to about r = 32, where tensor cores would not help.
constexpr int MERGE_K = 16;
constexpr int MERGE_WARP_ROWS = 4;                                  // rows of a warp in one pass
constexpr int MERGE_PASSES = 4;
constexpr int MERGE_ROWS = MERGE_PASSES * WARPS * MERGE_WARP_ROWS;  // of a block: 128

template <int WIDTH>
struct Merge {
    static constexpr int COLS = WARP * WIDTH;
    static constexpr int VECTOR = WIDTH < 4 ? WIDTH : 4;  // of a lane's columns, in one access to shared memory
    struct Memory {
        float a[MERGE_K][WIDTH / VECTOR][WARP][VECTOR];  // a warp's accesses are contiguous; 16 KiB for 8 columns a lane
        float b[MERGE_K][MERGE_ROWS];  // 8 KiB
    };

    Factor a, b;
    float scale;
    bool is_stochastic;
    unsigned key0, key1;
    E* w;
    int n, k, r, w_stride;

    __device__ void run() const {
        __shared__ __align__(16) Memory memory;
        unsigned across = unsigned(k - 1) / COLS + 1;
        int first_row = int(blockIdx.x / across) * MERGE_ROWS, first_col = int(blockIdx.x % across) * COLS;
        int col = first_col + lane() * WIDTH;
#pragma unroll 1
        for (int pass = 0; pass < MERGE_PASSES; ++pass) {
            int warp_row = (pass * WARPS + warp()) * MERGE_WARP_ROWS;  // first row of this warp, in the block
            Chunk old[MERGE_WARP_ROWS];
#pragma unroll
            for (int i = 0; i < MERGE_WARP_ROWS; ++i) read(old[i], first_row + warp_row + i, col);
            float sum[MERGE_WARP_ROWS][WIDTH] = {};
#pragma unroll 1
            for (int d0 = 0; d0 < r; d0 += MERGE_K) {
                if (pass == 0 || r > MERGE_K) {
                    __syncthreads();
                    load(memory, first_row, first_col, d0);
                    __syncthreads();
                }
                multiply(memory, warp_row, sum);
            }
#pragma unroll 1
            for (int i = 0; i < MERGE_WARP_ROWS; ++i) {
                finish(old[0], sum[0], first_row + warp_row + i, col);
                shift_rows(old, sum);  // registers cannot be indexed; shifting lets `finish` be compiled once
            }
        }
    }

  private:
    // A lane's columns are all inside or all outside: k is a multiple of WIDTH.
    __device__ void read(Chunk& to, int row, int col) const {
        if (row >= n || col >= k) return;
        if constexpr (WIDTH == 1) to.set(0, widen(w[at(row, col, w_stride)]));
        else to.bits = *reinterpret_cast<const uint4*>(&w[at(row, col, w_stride)]);
    }

    __device__ void load(Memory& memory, int first_row, int first_col, int d0) const {
        if constexpr (WIDTH == 1) {
#pragma unroll
            for (int part = 0; part < MERGE_K * COLS / THREADS; ++part) {
                unsigned e = part * THREADS + threadIdx.x;
                int d = int(e / COLS), col = int(e % COLS);
                bool has = d0 + d < r && first_col + col < k;
                memory.a[d][0][col][0] = a.get_or_zero(d0 + d, first_col + col, has);
            }
        } else {
#pragma unroll
            for (int part = 0; part < MERGE_K * WARP / THREADS; ++part) {
                unsigned e = part * THREADS + threadIdx.x;
                int d = int(e / WARP), to = int(e % WARP), col = first_col + to * WIDTH;
                Chunk chunk{load_or_zero(static_cast<const E*>(a.data) + at(d0 + d, col, a.stride), d0 + d < r && col < k)};
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) memory.a[d][j / VECTOR][to][j % VECTOR] = chunk.get(j);
            }
        }
#pragma unroll
        for (int part = 0; part < MERGE_K * MERGE_ROWS / THREADS; ++part) {
            unsigned e = part * THREADS + threadIdx.x;
            int d = int(e % MERGE_K), row = int(e / MERGE_K);
            bool has = d0 + d < r && first_row + row < n;
            memory.b[d][row] = b.get_or_zero(first_row + row, d0 + d, has);
        }
    }

    __device__ static void multiply(const Memory& memory, int warp_row, float (&sum)[MERGE_WARP_ROWS][WIDTH]) {
#pragma unroll 2
        for (int d = 0; d < MERGE_K; ++d) {
            float4 left = *reinterpret_cast<const float4*>(&memory.b[d][warp_row]);
#pragma unroll
            for (int piece = 0; piece < WIDTH / VECTOR; ++piece) {
                float right[VECTOR];
                if constexpr (VECTOR == 4)
                    *reinterpret_cast<float4*>(right) = *reinterpret_cast<const float4*>(memory.a[d][piece][lane()]);
                else
                    right[0] = memory.a[d][0][lane()][0];
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) {
                    int j = piece * VECTOR + e;
                    sum[0][j] += left.x * right[e], sum[1][j] += left.y * right[e];
                    sum[2][j] += left.z * right[e], sum[3][j] += left.w * right[e];
                }
            }
        }
    }

    __device__ static void shift_rows(Chunk (&old)[MERGE_WARP_ROWS], float (&sum)[MERGE_WARP_ROWS][WIDTH]) {
#pragma unroll
        for (int i = 1; i < MERGE_WARP_ROWS; ++i) {
            old[i - 1] = old[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum[i - 1][j] = sum[i][j];
        }
    }

    __device__ void finish(Chunk& old, const float (&sum)[WIDTH], int row, int col) const {
        if (row >= n || col >= k) return;
        size_t index = at(row, col, k), to = at(row, col, w_stride);  // the random word does not depend on the stride
        float merged[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) merged[j] = old.get(j) + scale * sum[j];
#ifdef TENSOR  // f32 is not rounded
        if (is_stochastic) {
            Format format = ::format(E());
            if constexpr (WIDTH == 1) {
                merged[0] = stochastic_round(format, merged[0], word_of(key0, key1, index, ROUNDING));
            } else {
#pragma unroll
                for (int j = 0; j < WIDTH; j += 4) {
                    uint4 words = philox(key0, key1, (index + j) / 4, ROUNDING);
                    merged[j] = stochastic_round(format, merged[j], words.x);
                    merged[j + 1] = stochastic_round(format, merged[j + 1], words.y);
                    merged[j + 2] = stochastic_round(format, merged[j + 2], words.z);
                    merged[j + 3] = stochastic_round(format, merged[j + 3], words.w);
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

// For any shape, and for f32 factors.
KERNEL(lora_merge)(const void* a, const void* b, float scale, unsigned stochastic, unsigned key0, unsigned key1, E* w,
                   int n, int k, int r, int a_stride, int b_stride, int w_stride, unsigned a_is_f32, unsigned b_is_f32) {
    Factor factor_a{a, a_stride, a_is_f32 != 0}, factor_b{b, b_stride, b_is_f32 != 0};
    Merge<1>{factor_a, factor_b, scale, stochastic != 0, key0, key1, w, n, k, r, w_stride}.run();
}

// Reads 16 bytes of W, and of A, at once: lines must start at multiples of that.
KERNEL(lora_merge_wide)(const E* a, const E* b, float scale, unsigned stochastic, unsigned key0, unsigned key1, E* w,
                        int n, int k, int r, int a_stride, int b_stride, int w_stride) {
    Factor factor_a{a, a_stride, false}, factor_b{b, b_stride, false};
    Merge<CHUNK>{factor_a, factor_b, scale, stochastic != 0, key0, key1, w, n, k, r, w_stride}.run();
}
