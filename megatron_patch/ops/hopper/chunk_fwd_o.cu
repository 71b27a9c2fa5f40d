// chunk_fwd_o: the output of a chunk and head of gated linear attention, followed by MetaLA's
// self-augmentation, LayerNorm and output gate. Takes the place of the Triton kernel on Hopper, in
// bfloat16, for heads of K <= 128 and V <= 256:
//
//     y = causal_mask(qg kg^T) v + qg h,  y += sigmoid(aug_score v),  out = silu(gate) LayerNorm(y)
//
// The kernel is bound by memory. Triton's version starts the load of a tile when it needs it, and
// has too few warps on a multiprocessor to hide the latency. Here cp.async brings every tile into
// multi-stage buffers in shared memory as early as there is room. Two warpgroups each compute half
// of the columns with wgmma.
//
// chunk_fwd_o.py compiles this file for a model with these macros: H, K, V; AUG, 1 with
// self-augmentation; KEEP, 1 to store what the backward pass reads; GATE, BIAS and CU_SEQLENS, the
// bytes of an entry of out_gate, its bias and cu_seqlens, or 0 without them; BLOCKS per
// multiprocessor, each with SHARED bytes of shared memory.

#include "chunk.cuh"
#include "wgmma.cuh"

struct Arguments {
    const u16 *v, *out_gate;
    const void* bias;
    const u16 *qg, *kg;
    const int* fallback;  // [chunk, H]: the scores were computed without factoring
    const u16* scores;    // [B, T, H, C], of such chunks alone
    const float* aug_score;
    const u16* h;  // [chunk, H, K, V], the state before each chunk
    u16 *out, *x_hat;
    float* rstd;
    Chunks chunks;
    i64 v_strides[3], out_gate_strides[3];  // of batch, token and head
    float norm_eps;
};

// Tiles in shared memory. The scores replace kg. H_STAGES buffers take h, 64 columns of V at a
// time, and after it the output gate.
constexpr int OUT_GATE_LOADS = (TILES_V + TILES_K - 1) / TILES_K;
constexpr int H_STAGES = OUT_GATE_LOADS < 2 ? 2 : TILES_K == 2 && TILES_V == 4 ? 3 : OUT_GATE_LOADS;
constexpr int QG_AT = 0, KG_AT = TILES_K * TILE, SCORES_AT = KG_AT, V_AT = 2 * TILES_K * TILE,
              H_AT = V_AT + TILES_V * TILE;
static_assert(H_AT + H_STAGES * TILES_K * TILE <= SHARED, "");
__device__ constexpr int out_gate_at(int tile) {
    return H_AT + ((TILES_V + tile / TILES_K) % H_STAGES * TILES_K + tile % TILES_K) * TILE;
}

// Written over qg and kg once they are no longer needed.
struct Epilogue {
    float bias[TILES_V * C];
    float sums[2][C], squares[2][C];  // of each row, by warpgroup
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) chunk_fwd_o(const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int thread = threadIdx.x, lane = thread % 32,
              warpgroup = __shfl_sync(~0u, thread / 128, 0), warp = thread % 128 / 32;
    const Chunk chunk(a.chunks);
    const int head = chunk.head, length = chunk.length;
    const i64 chunk_head = chunk.chunk_head;
    if (length < 0) return;
    const i64 token_head = chunk.token_head(a.chunks);

    // Small loads come first: after the tiles they would wait for all of them.
    const bool is_fallback = a.fallback[chunk_head];
    const int row = warp * 16 + lane / 4;  // a thread's rows are this one and the one 8 below
    float aug_score[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (row + 8 * i < length) aug_score[i] = a.aug_score[token_head + (row + 8 * i) * H];
    }
    const float bias = BIAS && thread < V ? load_entry<BIAS>(a.bias, head * V + thread) : 0;

    const u16* const v = a.v + chunk.offset(a.v_strides);
    const auto load_stage = [&](int stage) {
        const u32 at = shared + H_AT + stage % H_STAGES * TILES_K * TILE;
        if (stage < TILES_V) {
            const i64 first = chunk_head * K * V + stage * C;
#pragma unroll
            for (int k = 0; k < TILES_K; ++k)
                load_tile_async(at + k * TILE, a.h + first + k * C * V, V, K - k * C,
                                V - stage * C);
            load_tile_async(shared + V_AT + stage * TILE, v + stage * C, a.v_strides[1], length,
                            V - stage * C);
        } else if (GATE) {
            const u16* const out_gate = a.out_gate + chunk.offset(a.out_gate_strides);
#pragma unroll
            for (int k = 0; k < TILES_K; ++k) {
                const int tile = (stage - TILES_V) * TILES_K + k;
                if (tile < TILES_V)
                    load_tile_async(at + k * TILE, out_gate + tile * C, a.out_gate_strides[1],
                                    length, V - tile * C);
            }
        }
        cp_async_commit();
    };
    load_k_tiles_async(shared + QG_AT, a.qg + token_head * K, H * K, length);
    load_k_tiles_async(shared + KG_AT, a.kg + token_head * K, H * K, length);
    cp_async_commit();
#pragma unroll
    for (int stage = 0; stage < H_STAGES; ++stage) load_stage(stage);

    // Addresses in a tile: of a thread's words, and of a warpgroup's half, as rows or as columns.
    const u32 thread_word = shared + swizzle(row, warpgroup * WG_COLUMNS * 2 + lane % 4 * 4);
    const u32 wg_rows = warpgroup * WG_COLUMNS * 128, wg_columns = warpgroup * WG_COLUMNS * 2;
    const int first_column = warpgroup * WG_COLUMNS + lane % 4 * 2;  // of this thread

    cp_async_wait<H_STAGES>();
    Accumulator<WG_COLUMNS> scores;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        wgmma_tile<K_MAJOR, K_MAJOR>(scores, shared + QG_AT + k * TILE,
                                     shared + KG_AT + k * TILE + wg_rows, k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // both warpgroups have read kg, which the scores replace
    if (is_fallback) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = row + i / 2 * 8, column = first_column + 8 * n + i % 2;
                scores[n][i] = token < length
                                   ? load_entry<2>(a.scores, (token_head + token * H) * C + column)
                                   : 0;
            }
    }
    store_masked(scores, thread_word + SCORES_AT, first_column,
                 [&](int i, int column) { return row + 8 * i >= column; });

    Accumulator<WG_COLUMNS> y[TILES_V];
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile) {
        const u32 h = shared + H_AT + tile % H_STAGES * TILES_K * TILE;
        cp_async_wait<H_STAGES - 1>();
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILES_K; ++k)
            wgmma_tile<K_MAJOR, MN_MAJOR>(y[tile], shared + QG_AT + k * TILE,
                                          h + k * TILE + wg_columns, k > 0);
        wgmma_tile<K_MAJOR, MN_MAJOR>(y[tile], shared + SCORES_AT,
                                      shared + V_AT + tile * TILE + wg_columns, true);
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads();  // both warpgroups have read this stage, which the next load overwrites
        load_stage(tile + H_STAGES);
    }

    Epilogue& epilogue = *(Epilogue*)memory;
    if (BIAS && thread < TILES_V * C) epilogue.bias[thread] = bias;
    const auto exists = [&](int tile, int n) {
        return V % C == 0 || tile * C + first_column + 8 * n < V;
    };
    float sums[2] = {}, squares[2] = {};
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const Words v_words(thread_word + V_AT + tile * TILE ^ 16 * n);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                float* const pair = &y[tile][m][2 * i];
                if (AUG) {
                    const float2 x = unpack(v_words[j]);
                    pair[0] += sigmoid(aug_score[i] * x.x);
                    pair[1] += sigmoid(aug_score[i] * x.y);
                }
                if (exists(tile, m)) sums[i] += pair[0] + pair[1];
            }
        }
    // Completes the sums of a thread's two rows: over the four lanes that share a row, then over
    // the two warpgroups.
    const auto sum_over_columns = [&](float (&x)[2], float (&partial)[2][C]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[i] += __shfl_xor_sync(~0u, x[i], 1);
            x[i] += __shfl_xor_sync(~0u, x[i], 2);
            if (lane % 4 == 0) partial[warpgroup][row + 8 * i] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = partial[0][row + 8 * i] + partial[1][row + 8 * i];
    };
    // LayerNorm in two passes: the mean, then the squares of what differs from it.
    sum_over_columns(sums, epilogue.sums);
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                y[tile][n][j] -= sums[j / 2] * (1.f / V);
                if (exists(tile, n)) squares[j / 2] += y[tile][n][j] * y[tile][n][j];
            }
    sum_over_columns(squares, epilogue.squares);
    float rstd[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        rstd[i] = rsqrtf(squares[i] * (1.f / V) + a.norm_eps);
        if (KEEP && warpgroup == 0 && lane % 4 == 0 && row + 8 * i < length)
            a.rstd[token_head + (row + 8 * i) * H] = rstd[i];
    }

    // x_hat replaces v, and out replaces the output gate, so that both leave as whole tiles.
    cp_async_wait<0>();
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 v_at = thread_word + V_AT + tile * TILE ^ 16 * n,
                      gate_at = thread_word + out_gate_at(tile) ^ 16 * n;
            const Words gate_words(gate_at);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                const float x = y[tile][m][2 * i] * rstd[i], next = y[tile][m][2 * i + 1] * rstd[i];
                if (KEEP || !GATE) store_word(Words::address(v_at, j), pack(x, next));
                if (GATE) {
                    float2 z = unpack(gate_words[j]);
                    if (BIAS) {
                        const float2 shift =
                            *(float2*)(epilogue.bias + tile * C + first_column + 8 * m);
                        z.x += shift.x;
                        z.y += shift.y;
                    }
                    store_word(Words::address(gate_at, j),
                               pack(x * (z.x * sigmoid(z.x)), next * (z.y * sigmoid(z.y))));
                }
            }
        }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES_V; ++tile) {
        const i64 at = token_head * V + tile * C;
        const u32 x_hat = shared + V_AT + tile * TILE;
        if (KEEP) store_tile(a.x_hat + at, x_hat, H * V, length, V - tile * C);
        store_tile(a.out + at, GATE ? shared + out_gate_at(tile) : x_hat, H * V, length,
                   V - tile * C);
    }
}
