// Hopper's instructions, one function each, and the layout of their operands. Section titles are those of the PTX ISA, 8.0 on.
#pragma once
#include "common.cuh"

using Barrier = unsigned long long;

// CUtensorMap, encoded by the driver: 128 opaque bytes, so that cuda.h is not needed.
struct alignas(64) TensorMap { unsigned long long opaque[16]; };

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// --- mbarriers: "Parallel Synchronization: mbarrier". A phase ends when `count` threads have arrived and all expected bytes
// came.

__device__ inline void init_barrier(Barrier* barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes initialised barriers visible to the other blocks of the cluster, and to TMA.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the corresponding barrier of another block of the cluster.
__device__ inline void arrive_remote(Barrier* barrier, unsigned block) {
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}"
                 ::"r"(shared_address(barrier)), "r"(block) : "memory");
}
__device__ inline void arrive_and_expect(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase with this parity. The phase before the first counts as ended, with parity 1.
__device__ inline void wait(Barrier* barrier, unsigned parity) {
    unsigned ended;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(ended) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!ended);
}

// --- TMA: "cp.async.bulk.tensor". Moves a box of a tensor at (col, row); elements outside are read as zero, and not stored.

__device__ inline void tma_load(void* to, const TensorMap& from, int col, int row, Barrier* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&from), "r"(col), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// Loads to the same address in each block of the cluster whose bit is set in `blocks`; each one's barrier counts its bytes.
__device__ inline void tma_load_multicast(unsigned short blocks, void* to, const TensorMap& from, int col, int row,
                                          Barrier* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared_address(to)), "l"(&from), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}
__device__ inline void tma_store(const TensorMap& to, int col, int row, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&to), "r"(col), "r"(row), "r"(shared_address(from)) : "memory");
}
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the stores have read shared memory, which may then be overwritten.
__device__ inline void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Makes ordinary writes to shared memory visible to TMA and wgmma (the "async proxy").
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Threads

// A barrier for `threads` threads of the block; number 0 is __syncthreads.
__device__ inline void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// A barrier for every thread of the cluster.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <int COUNT>
__device__ void release_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ void acquire_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// --- wgmma: "Asynchronous Warpgroup Level Matrix Instructions"

// Orders earlier writes to registers before the wgmma that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Keeps the compiler from using the sums before they were waited for.
template <int COUNT>
__device__ void fence_sums(float (&sum)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// "Matrix descriptor format": where a matrix lies in shared memory, in units of 16 bytes. Bits 0-13 are the address, 16-29 the
// leading offset, 32-45 the stride offset, 62-63 the swizzle: 1 is 128 bytes, 2 is 64.
//
// "Strides", for swizzled layouts. K-major: a row of the matrix is one line of 128 or 64 bytes, eight rows are an atom; `stride`
// leads from one atom to the next, `leading_offset` is not used. MN-major: a line is 64 elements of one depth, eight depths are
// an atom; `stride` leads to the next eight depths, `leading_offset` to the next 64 rows.
//
// "Swizzling modes": TMA and wgmma both permute the 16-byte chunks of a line: bits 4-6 of the address ^= bits 7-9, or for 64
// bytes bits 4-5 ^= bits 7-8. These are bits of the address, not of an offset: so atoms lie at multiples of 1024 or 512 bytes,
// and a step along the depth within a line adds to the address.
constexpr unsigned long long SWIZZLE_128 = 1, SWIZZLE_64 = 2;
__device__ inline unsigned long long make_descriptor(const void* from, unsigned leading_offset, unsigned stride,
                                                     unsigned long long swizzle) {
    unsigned long long address = (shared_address(from) & 0x3ffff) >> 4;
    return address | (unsigned long long)(leading_offset >> 4) << 16 | (unsigned long long)(stride >> 4) << 32 | swizzle << 62;
}

// "wgmma.mma_async", sums of 64×256 and 64×128: register i of lane l of warp w is row 16·w + l/4 + (i/2 % 2)·8 and column i/4·8 +
// l%4·2 + i%2 ("Register Fragments", matrix D). `n_major`: 1 if rhs is MN-major.
#define FIVE(tens, a, b, c, d, e) "%" #tens a ", %" #tens b ", %" #tens c ", %" #tens d ", %" #tens e ", "
#define TEN(tens) FIVE(tens, "0", "1", "2", "3", "4") FIVE(tens, "5", "6", "7", "8", "9")
#define NAMES_64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define NAMES_128 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
    FIVE(12, "0", "1", "2", "3", "4") "%125, %126, %127"
#define SUM_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUM_8(i) SUM_4(i), SUM_4(i + 4)
#define SUMS_64(i) SUM_8(i), SUM_8(i + 8), SUM_8(i + 16), SUM_8(i + 24), SUM_8(i + 32), SUM_8(i + 40), SUM_8(i + 48), SUM_8(i + 56)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// sum += lhs·rhs, 64×n×16, both from shared memory
#define WGMMA(n, count, type, name, lhs_, rhs_, n_major_)                                                                \
    template <int N_MAJOR>                                                                                               \
    __device__ void wgmma(type, float (&sum)[count], unsigned long long lhs, unsigned long long rhs) {                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" NAMES_##count "}, " lhs_ ", "  \
                     rhs_ ", 1, 1, 1, 0, " n_major_ ";" : SUMS_##count(0) : "l"(lhs), "l"(rhs), "n"(N_MAJOR) : "memory");\
    }
WGMMA(128, 64, __half, "f16", "%64", "%65", "%66")
WGMMA(128, 64, __nv_bfloat16, "bf16", "%64", "%65", "%66")
WGMMA(256, 128, __half, "f16", "%128", "%129", "%130")
WGMMA(256, 128, __nv_bfloat16, "bf16", "%128", "%129", "%130")

// sum += lhs·rhs, 64×n×8 in tf32, lhs from registers: lane l of warp w has row 16·w + l/4 and the row 8 below, at depth l%4 and 4
// deeper ("Register Fragments", matrix A for .tf32). rhs must be K-major for tf32.
#define WGMMA_TF32(n, count, a, b, c, d, rhs_)                                                                           \
    __device__ inline void wgmma_tf32(float (&sum)[count], const unsigned (&lhs)[4], unsigned long long rhs) {           \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" NAMES_##count "}, {" a ", " b ", " c    \
                     ", " d "}, " rhs_ ", 1, 1, 1;"                                                                      \
                     : SUMS_##count(0) : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "l"(rhs) : "memory");       \
    }
WGMMA_TF32(128, 64, "%64", "%65", "%66", "%67", "%68")
WGMMA_TF32(256, 128, "%128", "%129", "%130", "%131", "%132")

// Rounds to tf32's 11 significant bits; ties away from zero.
__device__ inline unsigned to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
