// Matrix products of tiles by a group of four warps, on tensor cores (`wgmma`).

#pragma once

#include "tiles.cuh"

// How a side of a product lies in its tile: with the summed index along rows' bytes, or across
// rows.
enum Summed { ALONG, ACROSS };

// What tells tensor cores where a side lies: its address, 1,024 bytes from eight rows to the next
// eight, and the swizzle of 128 bytes.
__device__ u64 descriptor(u32 address) {
    constexpr u64 NEXT = 1024 / 16, SWIZZLE_128 = 1;
    return (u64)(address / 16) | NEXT << 16 | NEXT << 32 | SWIZZLE_128 << 62;
}
// Bytes from 16 of the summed indices to the next 16.
template <Summed S>
constexpr int STEP = S == ALONG ? 32 : 16 * 128;

// Sums of a group: rows 16 w + lane / 4 of warp w and the row 8 further, columns 2 (lane % 4) and
// the next of each eight. sums[n][0..1] are of the first row, [2..3] of the other.
template <int COLUMNS>
using Sums = float[COLUMNS / 8][4];

__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int UNDER_WAY>
__device__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
}

#define EIGHT(x)                                                                              \
    "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]), \
        "+f"(x[1][2]), "+f"(x[1][3])

template <Summed A, Summed B>
__device__ void multiply_16(Sums<32>& x, u64 a, u64 b, bool add) {
    asm volatile(
        "{.reg .pred add;\n"
        "setp.ne.b32 add, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, add, 1, 1, %19, %20;}"
        : EIGHT((x + 0)), EIGHT((x + 2))
        : "l"(a), "l"(b), "r"((int)add), "n"(A == ACROSS), "n"(B == ACROSS)
        : "memory");
}
template <Summed A, Summed B>
__device__ void multiply_16(Sums<64>& x, u64 a, u64 b, bool add) {
    asm volatile(
        "{.reg .pred add;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add, 1, 1, %35, %36;}"
        : EIGHT((x + 0)), EIGHT((x + 2)), EIGHT((x + 4)), EIGHT((x + 6))
        : "l"(a), "l"(b), "r"((int)add), "n"(A == ACROSS), "n"(B == ACROSS)
        : "memory");
}

// sums (+)= a b, over a tile's 64 indices. To be awaited.
template <Summed A, Summed B, typename S>
__device__ void multiply_tile(S& sums, u32 a, u32 b, bool add) {
#pragma unroll
    for (int i = 0; i < C / 16; ++i)
        multiply_16<A, B>(sums, descriptor(a + i * STEP<A>), descriptor(b + i * STEP<B>),
                          add || i > 0);
}

// Rounds a group's sums into its half of a tile, and puts zeros where they do not count.
template <typename Counts>
__device__ void store_where(const Sums<HALF>& sums, u32 at, int first_column, Counts counts) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = first_column + 8 * n;
            store_word((at ^ 16 * n) + i * 1024,
                       pack(counts(i, column) ? sums[n][2 * i] : 0,
                            counts(i, column + 1) ? sums[n][2 * i + 1] : 0));
        }
}
