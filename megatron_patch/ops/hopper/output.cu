// The read-out of a chunk and head, with self-augmentation, LayerNorm and output gate behind it:
// `megatron_patch.ops.triton.output` for Hopper, in bfloat16, for heads of K <= 128, V <= 256.
//
// Triton's kernel asks for a tile when it needs it, and has too few warps on a multiprocessor to
// wait for memory with. Here all tiles go by asynchronous copies into shared memory, as early as
// there is a place for them. Two groups of four warps have half of the columns each.
//
// output.py compiles this file for a model, with its numbers for names in capital letters: H, K, V;
// whether there are similarities, AUG, and whether the backward pass's tensors are kept, KEEP; and
// bytes of the numbers of out_gate, bias and bounds, GATE, BIAS and BOUND, zero where there are
// none; BLOCKS share a multiprocessor, with SHARED bytes of its memory each.

#include "decays.cuh"
#include "place.cuh"
#include "products.cuh"

struct Arguments {
    const u16 *v, *out_gate;
    const void* bias;
    const u16 *early, *late;
    const int* exact;
    const u16* scores;
    const float* similarity;
    const u16* states;
    u16 *out, *normalised;
    float* inverse_std;
    Chunks chunks;
    i64 v_strides[3], gate_strides[3];  // of a batch entry, a token and a head
    float norm_eps;
};

// Tiles in shared memory. The scores take the place of late; states of 64 columns of V come into
// STATE_SLOTS places one after the other, and behind them the gates.
constexpr int GATE_STAGES = (TILES_V + TILES_K - 1) / TILES_K;
constexpr int STATE_SLOTS = GATE_STAGES < 2 ? 2 : TILES_K == 2 && TILES_V == 4 ? 3 : GATE_STAGES;
constexpr int EARLY = 0, LATE = TILES_K * TILE, SCORES = LATE, VALUES = 2 * TILES_K * TILE,
              STATES = VALUES + TILES_V * TILE;
static_assert(STATES + STATE_SLOTS * TILES_K * TILE <= SHARED, "");
// Where the tile of gates of such columns lies.
__device__ constexpr int gates_at(int tile) {
    return STATES + ((TILES_V + tile / TILES_K) % STATE_SLOTS * TILES_K + tile % TILES_K) * TILE;
}

// Over early and late, in the end.
struct Rows {
    float bias[TILES_V * C];
    float sums[2][C], squares[2][C];  // of a group's columns
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) chunk_output(const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = __shfl_sync(~0u, thread / 128, 0),
              warp = thread % 128 / 32;
    const int unit = blockIdx.x / H, head = blockIdx.x % H;
    const i64 chunk_at = (i64)unit * H + head;
    const Place place(a.chunks, unit);
    const int length = place.length;
    if (length < 0) return;
    const i64 token_at = (place.batch * a.chunks.tokens + place.first) * H + head;

    // Small numbers first: behind all copies they would be waited for.
    const bool is_exact = a.exact[chunk_at];
    const int row = warp * 16 + lane / 4;  // this thread's rows are this one and the one 8 further
    float similarity[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (row + 8 * i < length) similarity[i] = a.similarity[token_at + (row + 8 * i) * H];
    }
    const float bias = BIAS && thread < V ? number_at<BIAS>(a.bias, head * V + thread) : 0;

    const u16* const v = a.v + place.in(a.v_strides, head);
    const auto ask_for = [&](int stage) {
        const u32 at = shared + STATES + stage % STATE_SLOTS * TILES_K * TILE;
        if (stage < TILES_V) {
            const i64 first = chunk_at * K * V + stage * C;
#pragma unroll
            for (int k = 0; k < TILES_K; ++k)
                copy_tile(at + k * TILE, a.states + first + k * C * V, V, K - k * C, V - stage * C);
            copy_tile(shared + VALUES + stage * TILE, v + stage * C, a.v_strides[1], length,
                      V - stage * C);
        } else if (GATE) {
            const u16* const gates = a.out_gate + place.in(a.gate_strides, head);
#pragma unroll
            for (int k = 0; k < TILES_K; ++k) {
                const int tile = (stage - TILES_V) * TILES_K + k;
                if (tile < TILES_V)
                    copy_tile(at + k * TILE, gates + tile * C, a.gate_strides[1], length,
                              V - tile * C);
            }
        }
        commit_copies();
    };
    copy_channels(shared + EARLY, a.early + token_at * K, H * K, length);
    copy_channels(shared + LATE, a.late + token_at * K, H * K, length);
    commit_copies();
#pragma unroll
    for (int stage = 0; stage < STATE_SLOTS; ++stage) ask_for(stage);

    // Where words of two columns lie in a tile, of a group's half of the columns; and that half.
    const u32 half_word = shared + place_of(row, group * HALF * 2 + lane % 4 * 4);
    const u32 half_rows = group * HALF * 128, half_columns = group * HALF * 2;
    const int own_column = group * HALF + lane % 4 * 2;  // the first of this thread's

    await_copies<STATE_SLOTS>();
    Sums<HALF> scores;
    begin_products();
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        multiply_tile<ALONG, ALONG>(scores, shared + EARLY + k * TILE,
                                    shared + LATE + k * TILE + half_rows, k > 0);
    commit_products();
    await_products<0>();
    __syncthreads();  // both groups' products are done
    if (is_exact) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = row + i / 2 * 8, column = own_column + 8 * n + i % 2;
                scores[n][i] = token < length
                                   ? number_at<2>(a.scores, (token_at + token * H) * C + column)
                                   : 0;
            }
    }
    store_where(scores, half_word + SCORES, own_column,
                [&](int i, int column) { return row + 8 * i >= column; });

    Sums<HALF> y[TILES_V];
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile) {
        const u32 states = shared + STATES + tile % STATE_SLOTS * TILES_K * TILE;
        await_copies<STATE_SLOTS - 1>();
        begin_products();
#pragma unroll
        for (int k = 0; k < TILES_K; ++k)
            multiply_tile<ALONG, ACROSS>(y[tile], shared + EARLY + k * TILE,
                                         states + k * TILE + half_columns, k > 0);
        multiply_tile<ALONG, ACROSS>(y[tile], shared + SCORES,
                                     shared + VALUES + tile * TILE + half_columns, true);
        commit_products();
        await_products<0>();
        __syncthreads();  // both groups' products are done
        ask_for(tile + STATE_SLOTS);
    }

    Rows& rows = *(Rows*)memory;
    if (BIAS && thread < TILES_V * C) rows.bias[thread] = bias;
    const auto known = [&](int tile, int n) {
        return V % C == 0 || tile * C + own_column + 8 * n < V;
    };
    float sums[2] = {}, squares[2] = {};
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const Words values(half_word + VALUES + tile * TILE ^ 16 * n);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                float* const sum = &y[tile][m][2 * i];
                if (AUG) {
                    const float2 x = unpack(values[j]);
                    sum[0] += sigmoid(similarity[i] * x.x);
                    sum[1] += sigmoid(similarity[i] * x.y);
                }
                if (known(tile, m)) sums[i] += sum[0] + sum[1];
            }
        }
    // Of each row over all columns.
    const auto over_columns = [&](float (&x)[2], float (&of_groups)[2][C]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[i] += __shfl_xor_sync(~0u, x[i], 1);
            x[i] += __shfl_xor_sync(~0u, x[i], 2);
            if (lane % 4 == 0) of_groups[group][row + 8 * i] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = of_groups[0][row + 8 * i] + of_groups[1][row + 8 * i];
    };
    over_columns(sums, rows.sums);
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                y[tile][n][j] -= sums[j / 2] * (1.f / V);
                if (known(tile, n)) squares[j / 2] += y[tile][n][j] * y[tile][n][j];
            }
    over_columns(squares, rows.squares);
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        factor[i] = rsqrtf(squares[i] * (1.f / V) + a.norm_eps);
        if (KEEP && group == 0 && lane % 4 == 0 && row + 8 * i < length)
            a.inverse_std[token_at + (row + 8 * i) * H] = factor[i];
    }

    await_copies<0>();
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 values = half_word + VALUES + tile * TILE ^ 16 * n,
                      gates = half_word + gates_at(tile) ^ 16 * n;
            const Words logits(gates);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                const float x = y[tile][m][2 * i] * factor[i],
                            next = y[tile][m][2 * i + 1] * factor[i];
                if (KEEP || !GATE) store_word(Words::place(values, j), pack(x, next));
                if (GATE) {
                    float2 z = unpack(logits[j]);
                    if (BIAS) {
                        const float2 shift = *(float2*)(rows.bias + tile * C + own_column + 8 * m);
                        z.x += shift.x;
                        z.y += shift.y;
                    }
                    store_word(Words::place(gates, j),
                               pack(x * (z.x * sigmoid(z.x)), next * (z.y * sigmoid(z.y))));
                }
            }
        }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile) {
        const i64 at = token_at * V + tile * C;
        const u32 values = shared + VALUES + tile * TILE;
        if (KEEP) store_tile(a.normalised + at, values, H * V, length, V - tile * C);
        store_tile(a.out + at, GATE ? shared + gates_at(tile) : values, H * V, length,
                   V - tile * C);
    }
}
