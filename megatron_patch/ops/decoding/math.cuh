// Conversions between 16-bit weights and float32, and the functions of a step.

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

// Weight i of those packed in words. The compiler has to know i, or the words go to local memory.
__device__ Weight pick(const uint2* words, int i) {
    const u32 word = i / 2 % 2 ? words[i / 4].y : words[i / 4].x;
    return (Weight)(i % 2 ? word >> 16 : word);
}

// Two weights in a word, the first in its lower half.
__device__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ uint2 pack(const float (&x)[4]) {
    return make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// A weight of a vector, or zero where there is no vector.
__device__ float load_or_zero(const void* vector, int index) {
    return vector ? widen(__ldg((const Weight*)vector + index)) : 0.0f;
}

// An entry of the embedding, scaled and rounded as in the model.
__device__ float scaled_embedding(const Arguments& a, Weight x) {
    return widen(narrow(a.embedding_scale * widen(x)));
}

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// g = logsigmoid(logit) / tau and k = 1 - exp(g), each by its Taylor series near zero, where the
// plain formula would lose digits.
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

// Sums what the consumer warps have left in shared memory, in a fixed order.
__device__ float sum_of_squares(const float* squares) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CONSUMERS; ++i) sum += squares[i];
    return sum;
}
__device__ float sum_of_row(const float* sums, int stride, int row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CONSUMERS; ++i) sum += sums[i * stride + row];
    return sum;
}
