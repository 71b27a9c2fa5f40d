// How blocks hand each other numbers.

#pragma once

#include "layout.cuh"

// Where blocks find each other's numbers: residual stream behind the mixer and behind the MLP [D],
// projections [3 D] with decays in place of gate logits, keys [D / 2], read-outs [D], the MLP's
// inner values [F]. Eight numbers lie on a line of memory: the more blocks write and read on one,
// the later they find what they look for.
constexpr int MIDDLE = 0, OUTER = D, PROJECTIONS = 2 * D, KEYS = 5 * D, READ_OUT = 6 * D,
              INNER = 7 * D;
[[maybe_unused]] constexpr int EXCHANGED = 32 * ceil_div(7 * D + F, 8);
__device__ int place_of(int number) { return number / 8 * 32 + number % 8; }

// To all blocks, with the turn in the last bit.
__device__ void send(float* exchange, int number, float x, u32 turn) {
    const u32 word = (__float_as_uint(x) & ~1u) | turn;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(exchange + place_of(number)), "r"(word)
                 : "memory");
}

// COUNT of them, from the addresses at(i); all are asked for before any is looked at.
template <int COUNT, typename At>
__device__ void receive(float (&x)[COUNT], u32 turn, At at) {
    bool all;
    do {
        all = true;
        u32 words[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                         : "=r"(words[i])
                         : "l"(at(i))
                         : "memory");
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            all &= (words[i] & 1) == turn;
            x[i] = __uint_as_float(words[i]);
        }
    } while (!all);
}

// The same with four at each address, a multiple of 16 bytes. The last lane looks for its last
// number before the others ask, for it is mostly too early, and all are in each other's way.
template <int COUNT, typename At>
__device__ void receive(float4 (&x)[COUNT], u32 turn, At at) {
    u32 last;
    do
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                     : "=r"(last)
                     : "l"(at(COUNT - 1))
                     : "memory");
    while (threadIdx.x % 32 == 31 && (last & 1) != turn);
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
            all &= ((turn ? w.x & w.y & w.z & w.w : w.x | w.y | w.z | w.w) & 1) == turn;
            x[i] = make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                               __uint_as_float(w.w));
        }
    } while (!all);
}
