// Products of the stream's rows.

#pragma once

#include "numbers.cuh"
#include "ring.cuh"

// The products of the next `count` rows of the stream with a factor, as sums [WARPS, stride] by
// warps.
//
// On tensor cores: tiles of 16 rows are the left side of `multiply_add`, the factor's higher and
// lower part by turns the columns of the right side. Of a tile of eight rows, other columns stand
// where rows 8 to 15 would: two products have each a half that counts. What registers can hold is
// read from the ring before the factor is there.
template <typename R>
struct Product {
    Ring& ring;
    const int count;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = 0;       // of the rows at hand
    u32 rows[R::TILES];  // where this lane's of each tile begins
    u32 held[R::TILES][R::HELD][R::WORDS];

    __device__ Product(Ring& ring, int count) : ring(ring), count(count) { read(); }

    __device__ int slots() { return ceil_div(smaller(R::BATCH, count - first), R::IN_SLOT); }

    // The matrices of a unit's 64 bytes: lanes of eight say where the rows of one begin.
    __device__ void load_unit(u32* words, int tile, int turn) {
        const int unit = warp * R::TURNS + turn, matrix = lane / 8;
        if (R::UNITS < R::TURNS * WARPS && unit >= R::UNITS) return;
        const auto column =
            [&](int eight) {  // the last unit may be short: what is there twice meets zeros
                return rows[tile] + smaller(unit * 64 + eight * 16, R::SIZE - 16);
            };
        if (R::HEIGHT == 8) {
            load_matrices(words, column(matrix % 2 * 2 + matrix / 2));
        } else {
            load_matrices(words, column(matrix / 2));
            load_matrices(words + R::WORDS / 2, column(2 + matrix / 2));
        }
    }

    __device__ void read() {
        ring.await_slots(slots());
        const u32 first_slot = ring.position % SLOTS;
#pragma unroll
        for (int tile = 0; tile < R::TILES; ++tile) {
            // Rows that are not there have some sum too, which nobody reads.
            const int index = tile * R::HEIGHT + lane % R::HEIGHT;
            u32 slot = first_slot + index / R::IN_SLOT;
            if (slot >= SLOTS) slot -= SLOTS;
            rows[tile] = ring.slots + slot * SLOT + index % R::IN_SLOT * R::STRIDE;
#pragma unroll
            for (int turn = 0; turn < R::HELD; ++turn) load_unit(held[tile][turn], tile, turn);
        }
        if (R::HELD == R::TURNS) ring.release(slots());
    }

    __device__ void multiply(const Factor<R::COLUMNS>& factor, float* sums, int stride) {
        const u32* const words = lane / 4 % 2 ? factor.low : factor.high;
        while (true) {
            float y[R::TILES][2][4] = {};
#pragma unroll
            for (int turn = 0; turn < R::TURNS; ++turn) {
                const int unit = warp * R::TURNS + turn;
                if (R::UNITS < R::TURNS * WARPS && unit >= R::UNITS) break;
                uint4 x = *(const uint4*)(words + unit * 16 + lane % 4 * 4);
                if (R::SIZE % 64 && unit == R::UNITS - 1) {
                    if (R::SIZE % 64 <= 16) x.y = 0;
                    if (R::SIZE % 64 <= 32) x.z = 0;
                    if (R::SIZE % 64 <= 48) x.w = 0;
                }
#pragma unroll
                for (int tile = 0; tile < R::TILES; ++tile) {
                    u32 w[R::WORDS];
                    if (turn >= R::HELD) load_unit(w, tile, turn);
                    const u32* of_rows = turn < R::HELD ? held[tile][turn % R::HELD] : w;
                    multiply_add(y[tile][0], of_rows, x.x, x.y);
                    multiply_add(y[tile][1], of_rows + R::WORDS - 4, x.z, x.w);
                }
            }
            if (R::HELD < R::TURNS) ring.release(slots());
            const int done = first;
            if ((first += R::BATCH) < count) read();
#pragma unroll
            for (int tile = 0; tile < R::TILES; ++tile) {
                const int row = done + tile * R::HEIGHT + lane / 4;
                float* sum = sums + warp * stride + row;
                const auto upper = [&](int half) { return y[tile][half][0] + y[tile][half][1]; };
                const auto lower = [&](int half) { return y[tile][half][2] + y[tile][half][3]; };
                if (lane % 4 == 0 && row < count)
                    sum[0] = upper(0) + (R::HEIGHT == 8 ? lower(1) : upper(1));
                if (R::HEIGHT == 16 && lane % 4 == 0 && row + 8 < count)
                    sum[8] = lower(0) + lower(1);
            }
            if (first >= count) break;
        }
    }
};

__device__ float sum_of_squares(const float* squares) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += squares[i];
    return sum;
}

__device__ float sum_of_row(const float* sums, int stride, int row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += sums[i * stride + row];
    return sum;
}
