// Numbers of 16 bits beside those of 32, and products of small matrices by a warp.

#pragma once

#include "layout.cuh"

#if BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

__device__ float widen(Weight x) {
    float y;
    asm("cvt.f32." TYPE " %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ Weight narrow(float x) {
    Weight y;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Number i of those that lie side by side in words; i is known to the compiler.
__device__ Weight pick(const uint2* words, int i) {
    const u32 word = i / 2 % 2 ? words[i / 4].y : words[i / 4].x;
    return (Weight)(i % 2 ? word >> 16 : word);
}

// Two numbers side by side, the first below.
__device__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ uint2 pack(const float (&x)[4]) {
    return make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// c [16, 8] += a [16, 16] b [16, 8] by a warp. Of a lane: of a, columns 2 (lane % 4) and the next
// of rows lane / 4 and 8 further, then the same with columns from 8 on; of b, such rows of column
// lane / 4; of c, columns 2 (lane % 4) and the next of the row, then of that 8 further.
__device__ void multiply_add(float (&c)[4], const u32* a, u32 b, u32 b_from_8) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE
        ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_from_8));
}

// Such words of four matrices of 8 rows of 16 bytes, of which each lane says where one begins.
__device__ void load_matrices(u32* words, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// A log decay, and 1 - exp(g), with all digits where they are close to zero.
__device__ float log_decay(float logit, float inverse_tau) {
    const float x = __expf(-fabsf(logit));
    const float log1p = x < 0.02f ? x * (1 - x * (0.5f - x * (1.0f / 3))) : __logf(1 + x);
    return (fminf(logit, 0) - log1p) * inverse_tau;
}
__device__ float key_of(float g) {
    return g > -0.03f ? -g * (1 + g * (0.5f + g * (1.0f / 6))) : 1 - __expf(g);
}

__device__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// A number of a vector of weights that may not be there.
__device__ float entry(const void* vector, int index) {
    return vector ? widen(__ldg((const Weight*)vector + index)) : 0.0f;
}
