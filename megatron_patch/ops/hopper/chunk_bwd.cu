// chunk_bwd: gradients of q, gate logits, v and aug for a chunk and head, given dy, h and dh. Takes
// the place of the Triton kernel of the same gradients on Hopper, in bfloat16, for heads of
// K <= 128. With P = causal_mask(qg kg^T) and the aug_score b:
//
//     y = P v + qg h + s                with s = sigmoid(b v)
//     dv = P^T dy + kg dh + b ds        with ds = dy s (1 - s);  db = sum over V of ds v
//     dP = causal_mask(dy v^T)          dqg = dy h^T + dP kg;    dkg = v dh^T + dP^T qg
//
// dq, dk and the gradients of the decays follow channel by channel.
//
// Triton's kernel reaches half of the memory bandwidth: it takes every register a thread can have,
// so few warps are left to hide each other's latency. Here eight warps of half as many registers
// serve a chunk and head, and two blocks share a multiprocessor, so that the cp.async loads of one
// overlap with the arithmetic of the other. Each of the two warpgroups computes half of the
// channels of K, and half of the columns of dv and of the scores.
//
// chunk_bwd.py compiles this file for a model with these macros: H, K, V; AUG and CU_SEQLENS, the
// bytes of an entry of aug and of cu_seqlens, or 0 without them; D_K and D_V, the distance of heads
// in dq and d_gate_logits, and in dv; BLOCKS per multiprocessor, each with SHARED bytes of shared
// memory.

#include "chunk.cuh"
#include "wgmma.cuh"

struct Arguments {
    const u16 *q, *gate_logits, *v;
    const void* aug;
    const u16 *dy, *qg, *kg;
    const float* g_last;  // [chunk, H, K], the log decay of the whole chunk
    const int* fallback;  // [chunk, H]: another kernel computes this chunk
    const float* aug_score;
    const u16 *h, *dh;  // [chunk, H, K, V], the state before and its gradient after each chunk
    u16 *dq, *d_gate_logits, *dv;
    float* d_aug;  // [chunk, H, K], partial sums
    Chunks chunks;
    i64 q_strides[3], gate_strides[3], v_strides[3];  // of batch, token and head
    float scale, inverse_tau;
};

constexpr int WG_CHANNELS = TILES_K * C / 2;  // channels of K that a warpgroup computes,
constexpr int PARTS = TILES_K;                // in parts of 32 in the epilogue

// Tiles in shared memory: qg and kg; P^T and dP; then multi-stage buffers that take 64 columns of V
// at a time, H_STAGES of h and dh and two of v and dy. The gate logits and q come last, into a
// stage of h and dh.
constexpr int H_STAGES = 3 - TILES_K, H_STAGE_BYTES = 2 * TILES_K * TILE, V_STAGE_BYTES = 2 * TILE;
constexpr int QG_AT = 0, KG_AT = TILES_K * TILE, SCORES_T_AT = 2 * TILES_K * TILE,
              D_SCORES_AT = SCORES_T_AT + TILE, H_AT = D_SCORES_AT + TILE,
              V_AT = H_AT + H_STAGES * H_STAGE_BYTES, CHANNELS_AT = V_AT + 2 * V_STAGE_BYTES;
constexpr int DH_AT = TILES_K * TILE, DY_AT = TILE;  // within a stage
constexpr int GATE_LOGITS_AT = H_AT + TILES_V % H_STAGES * H_STAGE_BYTES,
              Q_AT = GATE_LOGITS_AT + DH_AT;

// Numbers of each channel, stored after the tiles.
struct Channels {
    float g_last[TILES_K * C], aug[TILES_K * C];
};
static_assert(CHANNELS_AT + sizeof(Channels) <= SHARED, "");

// Sums over each warp's 16 rows, for the 32 channels of a warpgroup's part. They take the place of
// the scores, which nobody reads by then.
using WarpSums = float[4][C / 2];
struct Sums {
    WarpSums dg[2], g[2], dg_state[PARTS][2], d_aug[PARTS][2];
    float dg_last[PARTS * C], d_aug_score[2][C];
};
static_assert(sizeof(Sums) <= TILE, "");

// Suffix sums over a warp's 16 rows: each row of x becomes the sum of itself and the rows after it.
// The sums over all 16 rows go to shared memory.
__device__ void suffix_sum_rows(float (&x)[4][4], WarpSums& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                const float after = __shfl_down_sync(~0u, x[n][i], lanes);
                if (lane + lanes < 32) x[n][i] += after;
            }
#pragma unroll
        for (int j = 0; j < 2; ++j) x[n][j] += __shfl_sync(~0u, x[n][2 + j], lane % 4);
        if (lane < 4) *(float2*)(sums[warp] + 8 * n + 2 * lane) = make_float2(x[n][0], x[n][1]);
    }
}

// Sums over a warp's rows, where x already holds the sums over a thread's two rows in each of its
// eight columns. In this transposing butterfly each exchange halves the columns a thread is
// responsible for, which takes 7 shuffles where a reduction of every column would take 24.
__device__ void sum_rows(float (&x)[8], WarpSums& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int count = 4, lanes = 16; count; count /= 2, lanes /= 2) {
        const bool upper = lane & lanes;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const float kept = upper ? x[i + count] : x[i], given = upper ? x[i] : x[i + count];
            x[i] = kept + __shfl_xor_sync(~0u, given, lanes);
        }
    }
    // Bits 4, 3 and 2 of the lane are the number of the column that it was left with.
    const int left = lane / 4;
    const int n = left / 2, j = left % 2;
    sums[warp][8 * n + 2 * (lane % 4) + j] = x[0];
}

// Returns a quarter of the dot product, over 64 columns of V, of a row of h with the same row of dh.
// The thread has row 8 warp + lane % 8 and quarter lane / 8.
__device__ float h_dot_dh(u32 h, u32 dh) {
    const u32 thread = compiler_barrier(threadIdx.x), row = thread / 32 * 8 + thread % 8,
              quarter = thread % 32 / 8;
    float sum = 0;
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
        const u32 at = swizzle(row, quarter * 32 + vector * 16);
        const uint4 x = load_vector(h + at), y = load_vector(dh + at);
        const auto add = [&](u32 x, u32 y) {
            const float2 a = unpack(x), b = unpack(y);
            sum += a.x * b.x + a.y * b.y;
        };
        add(x.x, y.x);
        add(x.y, y.y);
        add(x.z, y.z);
        add(x.w, y.w);
    }
    return sum;
}
__device__ float sum_quarters(float sum) {
    sum += __shfl_xor_sync(~0u, sum, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
}

// Turns the sums of the four warps into what each warp has to add to its own suffix sums, for the
// 32 channels that each warpgroup has in this part. For dg these are the sums of later warps, and
// the terms that count for every token of the chunk. For g it is half of the chunk's log decay less
// the sums of later warps, because kg and qg are relative to the middle of the chunk's decay.
__device__ void combine_warps(Sums& sums, const Channels& channels, int part) {
    const int warpgroup = threadIdx.x % C / WG_COLUMNS, column = threadIdx.x % WG_COLUMNS,
              warp = threadIdx.x / C,
              channel = warpgroup * WG_CHANNELS + part * WG_COLUMNS + column;
    float dg = sums.dg_last[channel], g = 0.5f * channels.g_last[channel];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        dg += sums.dg_state[part][warpgroup][w][column];
        if (w > warp) {
            dg += sums.dg[warpgroup][w][column];
            g -= sums.g[warpgroup][w][column];
        }
    }
    __syncthreads();
    sums.dg[warpgroup][warp][column] = dg;
    sums.g[warpgroup][warp][column] = g;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) chunk_bwd(const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int thread = threadIdx.x, lane = thread % 32,
              warpgroup = __shfl_sync(~0u, thread / 128, 0), warp = thread % 128 / 32;
    const Chunk chunk(a.chunks);
    const int head = chunk.head, length = chunk.length;
    const i64 chunk_head = chunk.chunk_head;
    if (length < 0) {
        if (AUG && thread < K) a.d_aug[chunk_head * K + thread] = 0;
        return;
    }
    const i64 token_head = chunk.token_head(a.chunks);

    // Small loads come first: after the tiles they would wait for all of them.
    const bool is_fallback = a.fallback[chunk_head];
    // A thread's rows of every accumulator are this one and the one 8 below.
    const int row = warp * 16 + lane / 4;
    float aug_score[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (row + 8 * i < length) aug_score[i] = a.aug_score[token_head + (row + 8 * i) * H];
    }
    float g_last = 0, aug = 0;
    if (thread < K) {
        g_last = a.g_last[chunk_head * K + thread];
        if (AUG) aug = load_entry<AUG>(a.aug, head * K + thread);
    }

    // Compiler barriers make each load compute its addresses anew, instead of keeping them in
    // registers through the loop.
    const auto load_h_dh = [&](int tile) {
        const u32 at = compiler_barrier(shared) + H_AT + tile % H_STAGES * H_STAGE_BYTES;
        if (tile < TILES_V) {
            const i64 first = compiler_barrier(chunk_head) * K * V + tile * C;
#pragma unroll
            for (int k = 0; k < TILES_K; ++k) {
                const i64 rows = first + k * C * V;
                load_tile_async(at + k * TILE, a.h + rows, V, K - k * C, V - tile * C);
                load_tile_async(at + DH_AT + k * TILE, a.dh + rows, V, K - k * C, V - tile * C);
            }
        } else if (tile == TILES_V) {  // the epilogue's gate logits and q
            const Chunk same = compiler_barrier(chunk);
            load_k_tiles_async(at, a.gate_logits + same.offset(a.gate_strides), a.gate_strides[1],
                               length);
            if (AUG)
                load_k_tiles_async(at + DH_AT, a.q + same.offset(a.q_strides), a.q_strides[1],
                                   length);
        }
        cp_async_commit();
    };
    const auto load_v_dy = [&](int tile) {
        const u32 at = compiler_barrier(shared) + V_AT + tile % 2 * V_STAGE_BYTES;
        if (tile < TILES_V) {
            const u16* const v = a.v + compiler_barrier(chunk).offset(a.v_strides);
            load_tile_async(at, v + tile * C, a.v_strides[1], length, V - tile * C);
            load_tile_async(at + DY_AT, a.dy + token_head * V + tile * C, H * V, length,
                            V - tile * C);
        }
        cp_async_commit();
    };
    load_k_tiles_async(shared + QG_AT, a.qg + token_head * K, H * K, length);
    load_k_tiles_async(shared + KG_AT, a.kg + token_head * K, H * K, length);
    cp_async_commit();
    load_v_dy(0);
#pragma unroll
    for (int tile = 0; tile < H_STAGES; ++tile) load_h_dh(tile);
    load_v_dy(1);

    // Addresses of a thread's words in a tile: in the warpgroup's half of the columns, and in the
    // first part of its channels.
    const u32 thread_word = swizzle(row, warpgroup * WG_COLUMNS * 2 + lane % 4 * 4),
              channel_word =
                  WG_CHANNELS < C ? thread_word : warpgroup * TILE + swizzle(row, lane % 4 * 4);
    // Addresses of the warpgroup's half of a tile, and of its channels, as rows and as columns.
    const u32 wg_rows = warpgroup * WG_COLUMNS * 128, wg_columns = warpgroup * WG_COLUMNS * 2;
    const u32 channel_rows = warpgroup * WG_CHANNELS * 128,
              channel_columns = WG_CHANNELS < C ? wg_columns : warpgroup * TILE;

    cp_async_wait<H_STAGES + 2>();
    if (is_fallback) {
        cp_async_wait<0>();  // no copy may outlive the block
        return;
    }
    Accumulator<WG_COLUMNS> scores_t;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        wgmma_tile<K_MAJOR, K_MAJOR>(scores_t, shared + KG_AT + k * TILE,
                                     shared + QG_AT + k * TILE + wg_rows, k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    const int first_column = warpgroup * WG_COLUMNS + lane % 4 * 2;  // of this thread
    // Rows are keys, columns are queries.
    store_masked(scores_t, shared + SCORES_T_AT + thread_word, first_column,
                 [&](int i, int column) { return row + 8 * i <= column; });
    Channels& channels = *(Channels*)(memory + CHANNELS_AT);
    if (thread < TILES_K * C) {
        channels.g_last[thread] = g_last;
        channels.aug[thread] = aug;
    }

    Accumulator<WG_COLUMNS> d_scores;
    Accumulator<WG_CHANNELS> dqg, dkg;
    float d_aug_score[2] = {}, dg_last[TILES_K] = {};
#pragma unroll 1
    for (int tile = 0; tile < TILES_V; ++tile) {
        const u32 tiles = compiler_barrier(shared);
        const u32 v = tiles + V_AT + tile % 2 * V_STAGE_BYTES, dy = v + DY_AT,
                  h = tiles + H_AT + tile % H_STAGES * H_STAGE_BYTES, dh = h + DH_AT;
        cp_async_wait<H_STAGES>();
        Accumulator<WG_COLUMNS> dv;
        wgmma_fence();
        wgmma_tile<K_MAJOR, K_MAJOR>(d_scores, dy, v + wg_rows, tile > 0);
        wgmma_tile<K_MAJOR, MN_MAJOR>(dv, tiles + SCORES_T_AT, dy + wg_columns, false);
#pragma unroll
        for (int k = 0; k < TILES_K; ++k)
            wgmma_tile<K_MAJOR, MN_MAJOR>(dv, tiles + KG_AT + k * TILE, dh + k * TILE + wg_columns,
                                          true);
        wgmma_tile<K_MAJOR, K_MAJOR>(dqg, dy, h + channel_rows, tile > 0);
        wgmma_tile<K_MAJOR, K_MAJOR>(dkg, v, dh + channel_rows, tile > 0);
        wgmma_commit();
#pragma unroll
        for (int k = 0; k < TILES_K; ++k) dg_last[k] += h_dot_dh(h + k * TILE, dh + k * TILE);
        wgmma_wait<0>();
        __syncthreads();  // both warpgroups have read h and dh, which the next load overwrites
        load_h_dh(tile + H_STAGES);

        // dv replaces dy.
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = thread_word ^ 16 * n;
            const Words v_words(v + at), dy_words(dy + at);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = j % 2;
                float* const pair = &dv[n + j / 2][2 * i];
                if (AUG) {
                    const float2 x = unpack(v_words[j]), dy = unpack(dy_words[j]);
                    const float b = aug_score[i];
                    const float s = sigmoid(b * x.x), t = sigmoid(b * x.y);
                    const float ds = dy.x * (s - s * s), dt = dy.y * (t - t * t);
                    d_aug_score[i] += ds * x.x + dt * x.y;
                    pair[0] += b * ds;
                    pair[1] += b * dt;
                }
                store_word(Words::address(dy + at, j), pack(pair[0], pair[1]));
            }
        }
        __syncthreads();
        // Each thread stores the vectors that it will overwrite with its next loads, so no barrier
        // is needed in between.
        store_tile(a.dv + token_head * D_V + tile * C, dy, H * D_V, length, V - tile * C);
        load_v_dy(tile + 2);
    }

    Sums& sums = *(Sums*)(memory + SCORES_T_AT);
    store_masked(d_scores, shared + D_SCORES_AT + thread_word, first_column,
                 [&](int i, int column) { return row + 8 * i >= column; });
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
        const float sum = sum_quarters(dg_last[k]);
        if (lane < 8) sums.dg_last[k * C + thread / 32 * 8 + lane] = sum;
    }
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            d_aug_score[i] += __shfl_xor_sync(~0u, d_aug_score[i], 1);
            d_aug_score[i] += __shfl_xor_sync(~0u, d_aug_score[i], 2);
            if (lane % 4 == 0) sums.d_aug_score[warpgroup][row + 8 * i] = d_aug_score[i];
        }
    }
    // dkg holds v dh^T alone so far: the gradient through the state after the chunk. There a
    // token's kg v has decayed by every g_t behind it, so the gradient of g_t has the sum of kg dkg
    // over tokens before t. That is the sum over the whole chunk, taken here, less the sum from t
    // on, which the suffix sums below contain.
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float dg_state[8] = {};
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const Words kg_words(shared + KG_AT + (channel_word ^ part * WG_COLUMNS * 2 ^ 16 * n));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2;
                const float2 kg = unpack(kg_words[j]);
                const float* const pair = &dkg[4 * part + m][2 * (j % 2)];
                dg_state[2 * m] += kg.x * pair[0];
                dg_state[2 * m + 1] += kg.y * pair[1];
            }
        }
        sum_rows(dg_state, sums.dg_state[part][warpgroup]);
    }
    cp_async_wait<0>();
    wgmma_fence();
    wgmma_tile<K_MAJOR, MN_MAJOR>(dqg, shared + D_SCORES_AT, shared + KG_AT + channel_columns,
                                  true);
    wgmma_tile<MN_MAJOR, MN_MAJOR>(dkg, shared + D_SCORES_AT, shared + QG_AT + channel_columns,
                                   true);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // both warpgroups have read qg and kg, which dq and d_gate_logits replace

    float d_score[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            d_score[i] = sums.d_aug_score[0][row + 8 * i] + sums.d_aug_score[1][row + 8 * i];
    }
    // The gradient of G_i, the running sum of log decays, is qg_i dqg_i - kg_i dkg_i, and that of a
    // log decay g_t is its sum over i >= t. Contributions of pairs of tokens on one side of t
    // cancel exactly, because both products use the same rounded operands.
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float dg[4][4], g[4][4], g_suffix[4][4];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = shared + (channel_word ^ part * WG_COLUMNS * 2 ^ 16 * n);
            const Words qg_words(at + QG_AT), kg_words(at + KG_AT),
                logit_words(at + GATE_LOGITS_AT);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                const float2 qg = unpack(qg_words[j]), kg = unpack(kg_words[j]),
                             logit = unpack(logit_words[j]);
                const float* const dqg_pair = &dqg[4 * part + m][2 * i];
                const float* const dkg_pair = &dkg[4 * part + m][2 * i];
                dg[m][2 * i] = qg.x * dqg_pair[0] - kg.x * dkg_pair[0];
                dg[m][2 * i + 1] = qg.y * dqg_pair[1] - kg.y * dkg_pair[1];
                // Rows past the end of the sequence have no decay.
                const float rate = row + 8 * i < length ? a.inverse_tau : 0;
                g_suffix[m][2 * i] = g[m][2 * i] = log_decay(logit.x, rate);
                g_suffix[m][2 * i + 1] = g[m][2 * i + 1] = log_decay(logit.y, rate);
            }
        }
        suffix_sum_rows(dg, sums.dg[warpgroup]);
        suffix_sum_rows(g_suffix, sums.g[warpgroup]);
        __syncthreads();
        combine_warps(sums, channels, part);
        __syncthreads();

        float d_aug[8] = {};
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = shared + (channel_word ^ part * WG_COLUMNS * 2 ^ 16 * n);
            const Words logit_words(at + GATE_LOGITS_AT), q_words(at + Q_AT);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2, column = 8 * m + lane % 4 * 2;
                const float2 logits = unpack(logit_words[j]), q = unpack(q_words[j]);
                const float rate = row + 8 * i < length ? a.inverse_tau : 0;
                float dq[2], d_logits[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float logit = e ? logits.y : logits.x;
                    // With two parts g is computed again, for want of registers.
                    const float log = PARTS > 1 ? log_decay(logit, rate) : g[m][2 * i + e];
                    const float decay = exp2_of(log), k = key_of(log, decay);
                    // The exponent G_t - g_last / 2 of qg, from the suffix sums of g.
                    const float exponent =
                        sums.g[warpgroup][warp][column + e] + log - g_suffix[m][2 * i + e];
                    const float d_log = dg[m][2 * i + e] + sums.dg[warpgroup][warp][column + e];
                    dq[e] = dqg[4 * part + m][2 * i + e] * (exp2_of(exponent) * a.scale);
                    float dk = dkg[4 * part + m][2 * i + e] * exp2_of(-exponent);
                    if (AUG) {
                        const float raw_q = e ? q.y : q.x;
                        const float d_weighted =
                            d_score[i] *
                            channels.aug[warpgroup * WG_CHANNELS + part * WG_COLUMNS + column + e];
                        d_aug[2 * m + e] += d_score[i] * raw_q * k;
                        dq[e] += d_weighted * k;
                        dk += d_weighted * raw_q;
                    }
                    d_logits[e] = (d_log - decay * dk) * sigmoid(-logit) * a.inverse_tau;
                }
                store_word(Words::address(at + QG_AT, j), pack(dq[0], dq[1]));
                store_word(Words::address(at + KG_AT, j), pack(d_logits[0], d_logits[1]));
            }
        }
        if (AUG) sum_rows(d_aug, sums.d_aug[part][warpgroup]);
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
        store_tile(a.dq + token_head * D_K + k * C, shared + QG_AT + k * TILE, H * D_K, length,
                   K - k * C);
        store_tile(a.d_gate_logits + token_head * D_K + k * C, shared + KG_AT + k * TILE, H * D_K,
                   length, K - k * C);
    }
    if (AUG && thread < K) {
        const int column = thread % WG_COLUMNS, part = thread % WG_CHANNELS / WG_COLUMNS,
                  owner = thread / WG_CHANNELS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += sums.d_aug[part][owner][w][column];
        a.d_aug[chunk_head * K + thread] = sum;
    }
}
