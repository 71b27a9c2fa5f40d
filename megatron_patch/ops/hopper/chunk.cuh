// The place of a chunk in its tensors, and the arithmetic of decays.

#pragma once

#include "tiles.cuh"

// The chunks of a call. CU_SEQLENS is the size in bytes of an entry of `cu_seqlens`, or zero when
// sequences are not packed.
struct Chunks {
    const int* chunk_indices;  // packed: (sequence or -1, chunk within it) of each chunk
    const void* cu_seqlens;    // packed: the first token of each sequence
    i64 tokens, count;         // not packed: tokens and chunks of a sequence

    __device__ i64 sequence_start(int sequence) const {
        return CU_SEQLENS == 8 ? ((const i64*)cu_seqlens)[sequence]
                               : ((const int*)cu_seqlens)[sequence];
    }
};

// The chunk and head of this block.
struct Chunk {
    int head;
    i64 chunk_head;    // row in [chunk, H, ...] tensors
    i64 batch, first;  // batch entry and first token
    int length;        // number of tokens, or negative when there is no such chunk

    __device__ Chunk(const Chunks& chunks) : head(blockIdx.x % H) {
        const int index = blockIdx.x / H;
        chunk_head = (i64)index * H + head;
        if (CU_SEQLENS) {
            const int sequence = chunks.chunk_indices[2 * index];
            batch = 0;
            length = -1;
            if (sequence < 0) return;
            first = chunks.sequence_start(sequence) + (i64)chunks.chunk_indices[2 * index + 1] * C;
            length = (int)min(chunks.sequence_start(sequence + 1) - first, (i64)C);
        } else {
            batch = index / (int)chunks.count;
            first = (i64)(index % (int)chunks.count) * C;
            length = (int)min(chunks.tokens - first, (i64)C);
        }
    }

    // The first token's row in contiguous [B, T, H, ...] tensors.
    __device__ i64 token_head(const Chunks& chunks) const {
        return (batch * chunks.tokens + first) * H + head;
    }
    // The first token's offset in a [B, T, H, ...] tensor, given the strides of B, T and H.
    __device__ i64 offset(const i64 (&strides)[3]) const {
        return batch * strides[0] + first * strides[1] + head * strides[2];
    }
};

__device__ Chunk compiler_barrier(Chunk chunk) {
    chunk.batch = compiler_barrier(chunk.batch);
    chunk.first = compiler_barrier(chunk.first);
    return chunk;
}

// Log decays are in base 2, as in the Triton kernels, because the hardware's exponential is.
constexpr float LOG2_E = 1.4426950408889634f;

__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float sigmoid(float x) { return reciprocal(1 + exp2_of(x * -LOG2_E)); }

// g = logsigmoid(logit) / tau in base 2. The polynomial log(1 + x) = x p(x) keeps the digits of
// small x. It is fitted on [0, 1] with a relative error of 8.4e-6.
__device__ float log_decay(float logit, float inverse_tau) {
    const float x = exp2_of(fabsf(logit) * -LOG2_E);
    float p = 0.10122223943f - 0.02386915684f * x;
    p = -0.21004858613f + x * p;
    p = 0.32520660758f + x * p;
    p = -0.49936133623f + x * p;
    return (fminf(logit, 0) - x * (0.99999159575f + x * p)) * (inverse_tau * LOG2_E);
}

// k = 1 - 2^g, with decay = 2^g. Near a decay of one the difference would cancel, so a polynomial
// fitted on [-1 / 32, 0] takes over: its relative error is 9.8e-6, the difference's at most 1.1e-5.
__device__ float key_of(float g, float decay) {
    return g > -0.03125f ? g * (-0.69314042222f - 0.23849897567f * g) : 1 - decay;
}
