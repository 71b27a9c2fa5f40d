// How blocks exchange vectors through global memory inside one launch, without fences or counters.
//
// Every number carries its own flag, as in NCCL's low-latency (LL) protocol: the last bit of the
// mantissa is the phase, which flips with every layer. A reader polls a number until its phase is
// right, so data and flag arrive in one trip to memory. A number is never overwritten before
// all blocks have read it: everything that is sent in one layer depends, through other blocks, on
// everything that was sent in the layer before.

#pragma once

#include "layout.cuh"

// Offsets of the vectors: the residual stream after the mixer and after the MLP [D], the
// projections [3 D] with decays in place of gate logits, keys [D / 2], the outputs of the heads
// [D], and the hidden vector of the MLP [F].
constexpr int AFTER_MIXER = 0, AFTER_MLP = D, PROJECTIONS = 2 * D, KEYS = 5 * D, OUTPUTS = 6 * D,
              MLP_HIDDEN = 7 * D;
// Only eight numbers lie on a line of 128 bytes: the more blocks write and poll one line, the later
// they see each other's numbers.
__device__ int exchange_index(int i) { return i / 8 * 32 + i % 8; }

// Sends number i to all blocks.
__device__ void send(float* exchange, int i, float x, u32 phase) {
    const u32 word = (__float_as_uint(x) & ~1u) | phase;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(exchange + exchange_index(i)),
                 "r"(word)
                 : "memory");
}

__device__ u32 load_relaxed(const float* from) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

// Receives COUNT numbers from the addresses at(i). All loads are issued before any is looked at.
template <int COUNT, typename At>
__device__ void receive(float (&x)[COUNT], u32 phase, At at) {
    bool all;
    do {
        all = true;
        u32 words[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) words[i] = load_relaxed(at(i));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            all &= (words[i] & 1) == phase;
            x[i] = __uint_as_float(words[i]);
        }
    } while (!all);
}

// The same with four numbers at each address, a multiple of 16 bytes. One lane polls its last
// number first: mostly it is not there yet, and all lanes polling would slow each other down.
template <int COUNT, typename At>
__device__ void receive(float4 (&x)[COUNT], u32 phase, At at) {
    u32 last;
    do last = load_relaxed(at(COUNT - 1));
    while (threadIdx.x % 32 == 31 && (last & 1) != phase);
    __syncwarp();
    bool all;
    do {
        all = true;
        uint4 words[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                         : "l"(at(i))
                         : "memory");
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const uint4 w = words[i];
            all &= ((phase ? w.x & w.y & w.z & w.w : w.x | w.y | w.z | w.w) & 1) == phase;
            x[i] = make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                               __uint_as_float(w.w));
        }
    } while (!all);
}
