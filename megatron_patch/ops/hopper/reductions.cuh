// Sums over a chunk's tokens, and over the columns of states.

#pragma once

#include "tiles.cuh"

// Sums of each warp, for the other warps: of 32 channels of each group, in so many parts.
using OfWarps = float[4][C / 2];
template <int PARTS>
struct Reductions {
    OfWarps decays[2], later[2], from_state[PARTS][2], aug[PARTS][2];
    float edge[PARTS * C], d_similarity[2][C];
};
static_assert(sizeof(Reductions<2>) <= TILE, "");

// Turns rows as `Sums` has them into sums of each row and those of the warp after it, and writes
// all 16 rows' sums.
__device__ void sum_later_rows(float (&x)[4][4], OfWarps& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                const float later = __shfl_down_sync(~0u, x[n][i], lanes);
                if (lane + lanes < 32) x[n][i] += later;
            }
#pragma unroll
        for (int j = 0; j < 2; ++j) x[n][j] += __shfl_sync(~0u, x[n][2 + j], lane % 4);
        if (lane < 4) *(float2*)(sums[warp] + 8 * n + 2 * lane) = make_float2(x[n][0], x[n][1]);
    }
}

// Writes sums over a warp's rows, of each of a thread's columns, over which x already has the sums
// over the thread's two rows. Each exchange leaves a thread half as many columns.
__device__ void sum_rows(float (&x)[8], OfWarps& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int count = 4, lanes = 16; count; count /= 2, lanes /= 2) {
        const bool upper = lane & lanes;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float mine = upper ? x[i + count] : x[i], given = upper ? x[i] : x[i + count];
            x[i] = mine + __shfl_xor_sync(~0u, given, lanes);
        }
    }
    // Number n of the eight was kept by the lanes whose bits 4, 3 and 2 say n.
    const int kept = lane / 4;
    const int n = kept / 2, j = kept % 2;
    sums[warp][8 * n + 2 * (lane % 4) + j] = x[0];
}

// Of a tile of states, row 8 (warp) + lane % 8: a quarter of the sum over columns of the product
// with its gradient.
__device__ float state_product(u32 state, u32 d_state) {
    const u32 thread = anew(threadIdx.x), row = thread / 32 * 8 + thread % 8,
              quarter = thread % 32 / 8;
    float sum = 0;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
        const u32 at = place_of(row, quarter * 32 + piece * 16);
        const uint4 x = load_piece(state + at), y = load_piece(d_state + at);
        const auto add = [&](u32 x, u32 y) {
            const float2 p = unpack(x), r = unpack(y);
            sum += p.x * r.x + p.y * r.y;
        };
        add(x.x, y.x);
        add(x.y, y.y);
        add(x.z, y.z);
        add(x.w, y.w);
    }
    return sum;
}
// The sum over quarters.
__device__ float sum_quarters(float sum) {
    sum += __shfl_xor_sync(~0u, sum, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
}
