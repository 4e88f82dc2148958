// The tensor core instruction from Ampere on.
#pragma once
#include "common.cuh"

// sum += a·b, 16×8×16, by a warp
#define MULTIPLY(type, name)                                                                                         \
    __device__ inline void multiply(type, float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {              \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                          \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
    }
MULTIPLY(__half, "f16")
MULTIPLY(__nv_bfloat16, "bf16")
