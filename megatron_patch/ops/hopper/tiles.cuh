// Tiles of bfloat16 in shared memory: 64 rows of 128 bytes with the 128-byte swizzle, filled by
// cp.async. K and V are the widths of a head.

#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int C = 64;              // tokens of a chunk; rows and columns of a tile
constexpr int WG_COLUMNS = C / 2;  // columns of a tile that one warpgroup computes
constexpr int TILES_K = (K + C - 1) / C, TILES_V = (V + C - 1) / C;
constexpr int TILE = C * 2 * C;                   // bytes of a tile
constexpr int THREADS = 256;                      // two warpgroups
constexpr int ROW_VECTORS = C / 8;                // 16-byte vectors of a row
constexpr int PASS_ROWS = THREADS / ROW_VECTORS;  // rows that all threads copy in one pass

// Byte offset in a tile. The 128-byte swizzle, which wgmma expects too, puts vector p of row r
// where vector p ^ (r % 8) would be, so that the same column of eight rows lies in different banks.
// Tiles must start at multiples of 1,024 bytes.
__device__ u32 swizzle(int row, int byte) { return row * 128 + (byte ^ (row % 8 * 16)); }

// A compiler barrier for one value: returns x, but the compiler can no longer see that. Whatever is
// computed from it is computed where it is used and does not occupy registers until then.
__device__ u32 compiler_barrier(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ i64 compiler_barrier(i64 x) {
    asm volatile("" : "+l"(x));
    return x;
}

// Starts the copy of a matrix, whose rows are `stride` elements apart, into a tile. Rows and
// columns that the matrix does not have become zeros.
__device__ void load_tile_async(u32 tile, const u16* from, i64 stride, int rows, int columns) {
    const u32 thread = compiler_barrier(threadIdx.x), vector = thread % ROW_VECTORS;
    const bool column_exists = 8 * vector < columns;
#pragma unroll
    for (int pass = 0; pass < C / PASS_ROWS; ++pass) {
        const int row = (int)(thread / ROW_VECTORS) + pass * PASS_ROWS;
        const bool exists = column_exists && row < rows;
        const u16* const source = exists ? from + row * stride + 8 * vector : from;
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + swizzle(row, 16 * vector)),
            "l"(source), "r"(exists ? 16 : 0)
            : "memory");
    }
}
// The same for K columns, which fill TILES_K tiles side by side.
__device__ void load_k_tiles_async(u32 tiles, const u16* from, i64 stride, int rows) {
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        load_tile_async(tiles + k * TILE, from + k * C, stride, rows, K - k * C);
}
__device__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the last committed groups are still in flight, in every thread.
// The proxy fence makes the copied data visible to wgmma.
template <int PENDING>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

__device__ uint4 load_vector(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at)
                 : "memory");
    return x;
}

// Copies the rows and columns that exist from a tile to global memory.
__device__ void store_tile(u16* to, u32 tile, i64 stride, int rows, int columns) {
    const u32 thread = compiler_barrier(threadIdx.x), vector = thread % ROW_VECTORS;
#pragma unroll
    for (int pass = 0; pass < C / PASS_ROWS; ++pass) {
        const int row = (int)(thread / ROW_VECTORS) + pass * PASS_ROWS;
        if (8 * vector >= columns || row >= rows) continue;
        *(uint4*)(to + row * stride + 8 * vector) = load_vector(tile + swizzle(row, 16 * vector));
    }
}

// Two bfloat16 in a word, the first in its lower half.
__device__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ float2 unpack(u32 word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}
// Entry i of a vector in float32 (BYTES = 4) or bfloat16 (BYTES = 2).
template <int BYTES>
__device__ float load_entry(const void* vector, i64 i) {
    return BYTES == 4 ? ((const float*)vector)[i]
                      : __uint_as_float((u32)((const u16*)vector)[i] << 16);
}

__device__ u32 load_word(u32 at) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    return word;
}
__device__ void store_word(u32 at, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

// The four words of a 16-column block that correspond to a thread's entries of an accumulator:
// words 0 and 2 are in its first row, 1 and 3 in the row 8 below. All loads are issued before any
// is used.
struct Words {
    u32 words[4];

    static __device__ u32 address(u32 at, int j) { return (at ^ j / 2 * 16) + j % 2 * 1024; }

    __device__ Words(u32 at) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = load_word(address(at, j));
    }
    __device__ u32 operator[](int j) const { return words[j]; }
};
