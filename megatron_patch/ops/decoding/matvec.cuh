// Matrix-vector products on tensor cores, of the rows that come through the pipeline.

#pragma once

#include "math.cuh"
#include "stages.cuh"

// c [16, 8] += a [16, 16] b [16, 8] by a warp. With r = lane / 4 and p = 2 (lane % 4), a lane has
//
//     a   columns p and p + 1 of rows r and r + 8, then columns p + 8 and p + 9 of both rows
//     b   rows p and p + 1 of column r, then rows p + 8 and p + 9
//     c   columns p and p + 1 of row r, then of row r + 8
__device__ void mma_m16n8k16(float (&c)[4], const u32* a, u32 b, u32 b_from_8) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE
        ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_from_8));
}

// Loads four 8 x 8 matrices as operands of mma.sync. Each lane passes the address of one row.
__device__ void ldmatrix_x4(u32* words, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// The products of the next `count` rows of the pipeline with a vector. The columns are split among
// the warps (split-K), so the result is a partial sum for each warp and row: sums [CONSUMERS,
// stride].
//
// The weights are the left operand of mma.sync. The right operand's columns alternate between the
// high and the low part of the vector. In a tile of only 8 rows, rows 8 to 15 of the left operand
// hold the same rows' other 16 columns of the unit, and one half of each of the two products counts.
// As many weights as fit are loaded into registers before the vector is there.
template <typename R>
struct MatVec {
    Pipeline& pipeline;
    const int count;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = 0;       // row of the current batch
    u32 rows[R::TILES];  // address of this lane's row of each tile
    u32 prefetched[R::TILES][R::PREFETCHED][R::UNIT_WORDS];

    __device__ MatVec(Pipeline& pipeline, int count) : pipeline(pipeline), count(count) { load(); }

    __device__ int stages() {
        return ceil_div(min_of(R::BATCH_ROWS, count - first), R::STAGE_ROWS);
    }

    // Loads a unit's 64 bytes of each row of a tile.
    __device__ void load_unit(u32* words, int tile, int i) {
        const int unit = warp * R::WARP_UNITS + i, matrix = lane / 8;
        if (R::UNITS < R::WARP_UNITS * CONSUMERS && unit >= R::UNITS) return;
        // The last unit may be short. Columns that are then loaded twice meet zeros in the vector.
        const auto column = [&](int eight) {
            return rows[tile] + min_of(unit * 64 + eight * 16, R::ROW_BYTES - 16);
        };
        if (R::TILE_ROWS == 8) {
            ldmatrix_x4(words, column(matrix % 2 * 2 + matrix / 2));
        } else {
            ldmatrix_x4(words, column(matrix / 2));
            ldmatrix_x4(words + R::UNIT_WORDS / 2, column(2 + matrix / 2));
        }
    }

    // Waits for a batch of rows, and loads what registers can hold.
    __device__ void load() {
        pipeline.wait(stages());
        const u32 first_stage = pipeline.position % STAGES;
#pragma unroll
        for (int tile = 0; tile < R::TILES; ++tile) {
            // Rows past the end are computed from whatever is there, and nobody reads their sums.
            const int index = tile * R::TILE_ROWS + lane % R::TILE_ROWS;
            u32 stage = first_stage + index / R::STAGE_ROWS;
            if (stage >= STAGES) stage -= STAGES;
            rows[tile] = pipeline.stages + stage * STAGE_BYTES + index % R::STAGE_ROWS * R::STRIDE;
#pragma unroll
            for (int i = 0; i < R::PREFETCHED; ++i) load_unit(prefetched[tile][i], tile, i);
        }
        if (R::PREFETCHED == R::WARP_UNITS) pipeline.release(stages());
    }

    __device__ void multiply(const SplitVector<R::COLUMNS>& x, float* sums, int stride) {
        const u32* const x_words = lane / 4 % 2 ? x.low : x.high;
        while (true) {
            float y[R::TILES][2][4] = {};
#pragma unroll
            for (int i = 0; i < R::WARP_UNITS; ++i) {
                const int unit = warp * R::WARP_UNITS + i;
                if (R::UNITS < R::WARP_UNITS * CONSUMERS && unit >= R::UNITS) break;
                uint4 b = *(const uint4*)(x_words + unit * 16 + lane % 4 * 4);
                if (R::ROW_BYTES % 64 && unit == R::UNITS - 1) {
                    if (R::ROW_BYTES % 64 <= 16) b.y = 0;
                    if (R::ROW_BYTES % 64 <= 32) b.z = 0;
                    if (R::ROW_BYTES % 64 <= 48) b.w = 0;
                }
#pragma unroll
                for (int tile = 0; tile < R::TILES; ++tile) {
                    u32 loaded[R::UNIT_WORDS];
                    if (i >= R::PREFETCHED) load_unit(loaded, tile, i);
                    const u32* w = i < R::PREFETCHED ? prefetched[tile][i % R::PREFETCHED] : loaded;
                    mma_m16n8k16(y[tile][0], w, b.x, b.y);
                    mma_m16n8k16(y[tile][1], w + R::UNIT_WORDS - 4, b.z, b.w);
                }
            }
            if (R::PREFETCHED < R::WARP_UNITS) pipeline.release(stages());
            const int done = first;
            if ((first += R::BATCH_ROWS) < count) load();
#pragma unroll
            for (int tile = 0; tile < R::TILES; ++tile) {
                const int row = done + tile * R::TILE_ROWS + lane / 4;
                float* sum = sums + warp * stride + row;
                // The product with the high part plus that with the low part.
                const auto upper = [&](int half) { return y[tile][half][0] + y[tile][half][1]; };
                const auto lower = [&](int half) { return y[tile][half][2] + y[tile][half][3]; };
                if (lane % 4 == 0 && row < count)
                    sum[0] = upper(0) + (R::TILE_ROWS == 8 ? lower(1) : upper(1));
                if (R::TILE_ROWS == 16 && lane % 4 == 0 && row + 8 < count)
                    sum[8] = lower(0) + lower(1);
            }
            if (first >= count) break;
        }
    }
};
