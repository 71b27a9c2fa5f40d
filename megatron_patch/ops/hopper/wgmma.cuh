// Products of tiles on tensor cores by warpgroup MMA (wgmma), with both operands in shared memory.

#pragma once

#include "tiles.cuh"

// The layout of an operand in its tile: K_MAJOR has the summed index along a row, MN_MAJOR has it
// across rows (the transposed operand).
enum Major { K_MAJOR, MN_MAJOR };

// The matrix descriptor of an operand: its address, 1,024 bytes from eight rows to the next eight,
// and the 128-byte swizzle.
__device__ u64 descriptor(u32 address) {
    constexpr u64 NEXT = 1024 / 16, SWIZZLE_128 = 1;
    return (u64)(address / 16) | NEXT << 16 | NEXT << 32 | SWIZZLE_128 << 62;
}
// Bytes from 16 summed indices to the next 16.
template <Major M>
constexpr int STEP = M == K_MAJOR ? 32 : 16 * 128;

// A warpgroup's 64 x COLUMNS accumulator. Warp w's thread has rows 16 w + lane / 4 (entries [n][0]
// and [n][1]) and 8 below ([n][2] and [n][3]), in columns 8 n + 2 (lane % 4) and the next one.
template <int COLUMNS>
using Accumulator = float[COLUMNS / 8][4];

__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define EIGHT(x)                                                                              \
    "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]), \
        "+f"(x[1][2]), "+f"(x[1][3])

// One instruction: x (+)= a b over 16 summed indices.
template <Major A, Major B>
__device__ void wgmma_k16(Accumulator<32>& x, u64 a, u64 b, bool accumulate) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1, %19, %20;}"
        : EIGHT((x + 0)), EIGHT((x + 2))
        : "l"(a), "l"(b), "r"((int)accumulate), "n"(A == MN_MAJOR), "n"(B == MN_MAJOR)
        : "memory");
}
template <Major A, Major B>
__device__ void wgmma_k16(Accumulator<64>& x, u64 a, u64 b, bool accumulate) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, %35, %36;}"
        : EIGHT((x + 0)), EIGHT((x + 2)), EIGHT((x + 4)), EIGHT((x + 6))
        : "l"(a), "l"(b), "r"((int)accumulate), "n"(A == MN_MAJOR), "n"(B == MN_MAJOR)
        : "memory");
}

// Starts x (+)= a b over the 64 summed indices of a tile; wgmma_wait finishes it.
template <Major A, Major B, typename X>
__device__ void wgmma_tile(X& x, u32 a, u32 b, bool accumulate) {
#pragma unroll
    for (int i = 0; i < C / 16; ++i)
        wgmma_k16<A, B>(x, descriptor(a + i * STEP<A>), descriptor(b + i * STEP<B>),
                        accumulate || i > 0);
}

// Rounds an accumulator into a warpgroup's half of a tile, and writes zeros where mask(i, column)
// is false: i is 0 for the thread's first row and 1 for the one 8 below.
template <typename Mask>
__device__ void store_masked(const Accumulator<WG_COLUMNS>& x, u32 at, int first_column,
                             Mask mask) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = first_column + 8 * n;
            store_word((at ^ 16 * n) + i * 1024, pack(mask(i, column) ? x[n][2 * i] : 0,
                                                      mask(i, column + 1) ? x[n][2 * i + 1] : 0));
        }
}
