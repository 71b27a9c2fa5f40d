// Matrices of bfloat16 in shared memory, as tiles of 64 rows of 128 bytes. A head has K and V
// columns.

#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int C = 64;        // tokens of a chunk; rows and columns of a tile
constexpr int HALF = C / 2;  // columns of a group of four warps
constexpr int TILES_K = (K + C - 1) / C, TILES_V = (V + C - 1) / C;
constexpr int TILE = C * 2 * C;            // bytes
constexpr int THREADS = 256;               // of a block: two groups of four warps
constexpr int PIECES = C / 8;              // of 16 bytes, of a row
constexpr int IN_TURN = THREADS / PIECES;  // rows that all threads copy at once

// Piece p of row r lies where piece p ^ (r % 8) would, so that eight rows' pieces p lie in
// different banks: the "128-byte swizzle" of the copy engine and of matrix products. Tiles begin at
// multiples of 1,024 bytes.
__device__ u32 place_of(int row, int byte) { return row * 128 + (byte ^ (row % 8 * 16)); }

// The same number, which the compiler takes for a new one: what follows from it is computed where
// it is used, and holds no registers elsewhere.
__device__ u32 anew(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ i64 anew(i64 x) {
    asm volatile("" : "+l"(x));
    return x;
}

// Copies rows of 16-byte pieces from `from`, `stride` numbers apart, into a tile; zeros where there
// are fewer rows than 64 or fewer columns.
__device__ void copy_tile(u32 tile, const u16* from, i64 stride, int rows, int columns) {
    const u32 thread = anew(threadIdx.x), piece = thread % PIECES;
    const bool inside = 8 * piece < columns;
#pragma unroll
    for (int turn = 0; turn < C / IN_TURN; ++turn) {
        const int row = (int)(thread / PIECES) + turn * IN_TURN;
        const bool known = inside && row < rows;
        const u16* const source = known ? from + row * stride + 8 * piece : from;
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + place_of(row, 16 * piece)),
            "l"(source), "r"(known ? 16 : 0)
            : "memory");
    }
}
// Rows of K numbers, into tiles side by side.
__device__ void copy_channels(u32 tiles, const u16* from, i64 stride, int rows) {
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        copy_tile(tiles + k * TILE, from + k * C, stride, rows, K - k * C);
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most so many of this thread's last groups of copies are under way, and the same is true
// of all threads; what they have written is then there for matrix products too.
template <int UNDER_WAY>
__device__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(UNDER_WAY) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

// A piece of a row.
__device__ uint4 load_piece(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at)
                 : "memory");
    return x;
}

// The other way, of rows that are there.
__device__ void store_tile(u16* to, u32 tile, i64 stride, int rows, int columns) {
    const u32 thread = anew(threadIdx.x), piece = thread % PIECES;
#pragma unroll
    for (int turn = 0; turn < C / IN_TURN; ++turn) {
        const int row = (int)(thread / PIECES) + turn * IN_TURN;
        if (8 * piece >= columns || row >= rows) continue;
        *(uint4*)(to + row * stride + 8 * piece) = load_piece(tile + place_of(row, 16 * piece));
    }
}

// Two numbers side by side, the first below.
__device__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ float2 unpack(u32 word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}
// A number of float32 or of bfloat16, of so many bytes.
template <int BYTES>
__device__ float number_at(const void* numbers, i64 i) {
    return BYTES == 4 ? ((const float*)numbers)[i]
                      : __uint_as_float((u32)((const u16*)numbers)[i] << 16);
}

__device__ u32 load_word(u32 at) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    return word;
}
__device__ void store_word(u32 at, u32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

// Four words of a tile, all asked for at once: of this thread's two rows and of its columns
// among 16.
struct Words {
    u32 words[4];

    static __device__ u32 place(u32 at, int j) { return (at ^ j / 2 * 16) + j % 2 * 1024; }

    __device__ Words(u32 at) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = load_word(place(at, j));
    }
    __device__ u32 operator[](int j) const { return words[j]; }
};
