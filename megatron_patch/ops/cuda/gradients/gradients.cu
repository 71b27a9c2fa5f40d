// Gradients of q, gate logits, v and aug of a chunk and head, given those of y and of the states:
// `megatron_patch.ops.triton.gradients` for Hopper, in bfloat16, for heads of K <= 64, V <= 128.
// The formulas stand there, and why gradients of decays are taken as they are.
//
// Triton's kernel reaches half of the memory's speed: it takes all registers a thread can have, so
// that few warps are there to hide each other's waits. Here a chunk and head have eight warps of
// half as many registers each, two blocks share a multiprocessor, and what is read goes by
// asynchronous copies into shared memory, all asked for at once; one block's copies and the other's
// arithmetic take place at the same time. The two groups of four warps do the same for different
// columns: half of V for dv, half of K for all else.
//
// gradients.py compiles this file for a model, with its numbers for names in capital letters: H, K,
// V, and bytes of the numbers of aug and of bounds, AUG and BOUND, zero where there are none.

#include "decays.cuh"
#include "products.cuh"
#include "reductions.cuh"

struct Arguments {
    const u16 *q, *gates, *v;
    const void* aug;
    const u16 *d_y, *early, *late;
    const float* chunk_decays;
    const int* exact;
    const float* similarity;
    const u16 *states, *d_states;
    u16 *d_q, *d_gates, *d_v;
    float* d_aug;
    const int* table;
    const void* bounds;
    i64 q_b, q_t, q_h, gate_b, gate_t, gate_h, v_b, v_t, v_h;
    i64 tokens, chunks;  // of a sequence
    float scale, inverse_tau;
};

// Tiles in shared memory. Those of V columns are two, and the states' rows are channels.
constexpr int EARLY = 0, LATE = TILE, GATES = 2 * TILE, QUERIES = 3 * TILE, VALUES = 4 * TILE,
              D_Y = 6 * TILE, STATE = 8 * TILE, D_STATE = 10 * TILE, SCORES_T = 12 * TILE,
              D_SCORES = 13 * TILE;
constexpr int HALF = C / 2;  // channels of a group

// Of the channels, after the tiles.
struct Channels {
    float decay[C], balance[C];  // log decay of the whole chunk; aug
};

// Where a chunk lies: its first token, counted over the batch, and how many it has.
struct Place {
    i64 batch, first;
    int length;  // negative: there is no such chunk

    static __device__ i64 bound(const Arguments& a, int i) {
        return BOUND == 8 ? ((const i64*)a.bounds)[i] : ((const int*)a.bounds)[i];
    }

    __device__ Place(const Arguments& a, int unit) {
        if (BOUND) {
            const int sequence = a.table[2 * unit];
            batch = 0;
            length = -1;
            if (sequence < 0) return;
            first = bound(a, sequence) + (i64)a.table[2 * unit + 1] * C;
            length = (int)min(bound(a, sequence + 1) - first, (i64)C);
        } else {
            batch = unit / (int)a.chunks;
            first = (i64)(unit % (int)a.chunks) * C;
            length = (int)min(a.tokens - first, (i64)C);
        }
    }
};

// Of each channel, from the sums of warps what a warp's rows lack: the decays' of later rows, and
// of all that count for each; half the chunk's log decay less that of later rows.
__device__ void join(Reductions& reductions, const Channels& channels) {
    const int channel = threadIdx.x % C, group = channel / HALF, column = channel % HALF,
              warp = threadIdx.x / C;
    float decays = reductions.edge[channel], after = 0.5f * channels.decay[channel];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        decays += reductions.from_state[group][w][column];
        if (w > warp) {
            decays += reductions.decays[group][w][column];
            after -= reductions.later[group][w][column];
        }
    }
    __syncthreads();
    reductions.decays[group][warp][column] = decays;
    reductions.later[group][warp][column] = after;
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

// A number of aug.
__device__ float balance_at(const void* aug, int i) {
    return AUG == 4 ? ((const float*)aug)[i] : widen(((const u16*)aug)[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) chunk_gradients(const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = thread / 128,
              warp = thread % 128 / 32;
    const int unit = blockIdx.x / H, head = blockIdx.x % H;
    const i64 chunk_at = (i64)unit * H + head;
    const Place place(a, unit);
    const int length = place.length;
    if (length < 0) {
        if (AUG && thread < K) a.d_aug[chunk_at * K + thread] = 0;
        return;
    }
    const i64 token_at = (place.batch * a.tokens + place.first) * H + head;

    // Small numbers first: behind all copies they would be waited for.
    const bool is_exact = a.exact[chunk_at];
    // This thread's rows of all sums are `row` and the one 8 further.
    const int row = warp * 16 + lane / 4;
    float similarity[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (row + 8 * i < length) similarity[i] = a.similarity[token_at + (row + 8 * i) * H];
    }
    float decay = 0, balance = 0;
    if (thread < K) {
        decay = a.chunk_decays[chunk_at * K + thread];
        if (AUG) balance = balance_at(a.aug, head * K + thread);
    }

    copy_tile(shared + EARLY, a.early + token_at * K, H * K, length, K);
    copy_tile(shared + LATE, a.late + token_at * K, H * K, length, K);
    commit_copies();
    const u16* const v = a.v + place.batch * a.v_b + head * a.v_h + place.first * a.v_t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int columns = V - half * C;
        copy_tile(shared + VALUES + half * TILE, v + half * C, a.v_t, length, columns);
        copy_tile(shared + D_Y + half * TILE, a.d_y + token_at * V + half * C, H * V, length,
                  columns);
    }
    commit_copies();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const i64 at = chunk_at * K * V + half * C;
        copy_tile(shared + STATE + half * TILE, a.states + at, V, K, V - half * C);
        copy_tile(shared + D_STATE + half * TILE, a.d_states + at, V, K, V - half * C);
    }
    commit_copies();
    copy_tile(shared + GATES,
              a.gates + place.batch * a.gate_b + head * a.gate_h + place.first * a.gate_t, a.gate_t,
              length, K);
    if (AUG)
        copy_tile(shared + QUERIES, a.q + place.batch * a.q_b + head * a.q_h + place.first * a.q_t,
                  a.q_t, length, K);
    commit_copies();

    // Where a word of two columns lies: in the group's half of a tile, and in a tile of its own.
    const u32 half_word = shared + place_of(row, group * 64 + lane % 4 * 4),
              tile_word = shared + place_of(row, lane % 4 * 4);
    const u32 own_rows = group * HALF * 128, own_columns = group * HALF * 2;
    const int own_column = group * HALF + lane % 4 * 2;  // the first of this thread's

    Channels& channels = *(Channels*)(memory + 14 * TILE);
    if (thread < C) {
        channels.decay[thread] = decay;
        channels.balance[thread] = balance;
    }

    await_copies<3>();
    if (is_exact) {  // left to `exact_gradients`
        await_copies<0>();
        return;
    }
    Sums<32> scores;
    begin_products();
    multiply_tile<ALONG, ALONG>(scores, shared + LATE, shared + EARLY + own_rows, false);
    commit_products();
    await_products<0>();
    // Of a later token (column) and an earlier one (row).
    store_where(scores, half_word + SCORES_T, own_column,
                [&](int i, int column) { return row + 8 * i <= column; });

    await_copies<2>();
    Sums<32> d_scores;
    Sums<64> dv;
    begin_products();
    multiply_tile<ALONG, ALONG>(d_scores, shared + D_Y, shared + VALUES + own_rows, false);
    multiply_tile<ALONG, ALONG>(d_scores, shared + D_Y + TILE, shared + VALUES + TILE + own_rows,
                                true);
    commit_products();
    multiply_tile<ALONG, ACROSS>(dv, shared + SCORES_T, shared + D_Y + group * TILE, false);
    commit_products();
    await_products<1>();
    store_where(d_scores, half_word + D_SCORES, own_column,
                [&](int i, int column) { return row + 8 * i >= column; });

    await_copies<1>();
    Sums<32> d_early, d_late, dk;
    begin_products();
    multiply_tile<ALONG, ACROSS>(dv, shared + LATE, shared + D_STATE + group * TILE, true);
    multiply_tile<ALONG, ALONG>(d_early, shared + D_Y, shared + STATE + own_rows, false);
    multiply_tile<ALONG, ALONG>(d_early, shared + D_Y + TILE, shared + STATE + TILE + own_rows,
                                true);
    multiply_tile<ALONG, ALONG>(d_late, shared + VALUES, shared + D_STATE + own_rows, false);
    multiply_tile<ALONG, ALONG>(d_late, shared + VALUES + TILE, shared + D_STATE + TILE + own_rows,
                                true);
    multiply_tile<ALONG, ACROSS>(d_early, shared + D_SCORES, shared + LATE + own_columns, true);
    multiply_tile<ACROSS, ACROSS>(dk, shared + D_SCORES, shared + EARLY + own_columns, false);
    commit_products();
    const float edge_of_states = state_product(shared + STATE, shared + D_STATE);
    await_products<0>();
    await_copies<0>();  // all groups' products are done, too: their tiles can be written over

    // Over the scores, which nobody reads any more.
    Reductions& reductions = *(Reductions*)(memory + SCORES_T);
    if (lane < 8) reductions.edge[thread / 32 * 8 + lane] = edge_of_states;
    float d_similarity[2] = {};
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        const u32 at = (tile_word ^ 16 * n) + group * TILE;
        const Words values(at + VALUES), d_y(at + D_Y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = j % 2;
            float* const sum = &dv[n + j / 2][2 * i];
            if (AUG) {
                const float2 x = unpack(values[j]), dy = unpack(d_y[j]);
                const float b = similarity[i];
                const float s = sigmoid(b * x.x), t = sigmoid(b * x.y);
                const float ds = dy.x * (s - s * s), dt = dy.y * (t - t * t);
                d_similarity[i] += ds * x.x + dt * x.y;
                sum[0] += b * ds;
                sum[1] += b * dt;
            }
            store_word(Words::place(at + D_Y, j), pack(sum[0], sum[1]));
        }
    }
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            d_similarity[i] += __shfl_xor_sync(~0u, d_similarity[i], 1);
            d_similarity[i] += __shfl_xor_sync(~0u, d_similarity[i], 2);
            if (lane % 4 == 0) reductions.d_similarity[group][row + 8 * i] = d_similarity[i];
        }
    }

    // `from_state` counts for the decays after its token: all of it, less that from t on.
    float decays[4][4], g[4][4], from_state[8] = {};
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
        const u32 at = half_word ^ 16 * n;
        const Words early(at + EARLY), late(at + LATE), logits(at + GATES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = n + j / 2, i = j % 2;
            const float2 e = unpack(early[j]), l = unpack(late[j]), logit = unpack(logits[j]);
            const float* const de = &d_early[m][2 * i];
            const float* const dl = &d_late[m][2 * i];
            float* const of_key = &dk[m][2 * i];
            from_state[2 * m] += l.x * dl[0];
            from_state[2 * m + 1] += l.y * dl[1];
            of_key[0] += dl[0];
            of_key[1] += dl[1];
            decays[m][2 * i] = e.x * de[0] - l.x * of_key[0];
            decays[m][2 * i + 1] = e.y * de[1] - l.y * of_key[1];
            // There is no decay at tokens after the chunk's.
            const float rate = row + 8 * i < length ? a.inverse_tau : 0;
            g[m][2 * i] = log_decay(logit.x, rate);
            g[m][2 * i + 1] = log_decay(logit.y, rate);
        }
    }
    float later[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) later[n][i] = g[n][i];
    sum_later_rows(decays, reductions.decays[group]);
    sum_later_rows(later, reductions.later[group]);
    sum_rows(from_state, reductions.from_state[group]);
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; ++half)
        store_tile(a.d_v + token_at * V + half * C, shared + D_Y + half * TILE, H * V, length,
                   V - half * C);
    join(reductions, channels);
    __syncthreads();

    float share[2] = {}, aug_shares[8] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            share[i] =
                reductions.d_similarity[0][row + 8 * i] + reductions.d_similarity[1][row + 8 * i];
    }
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
        const u32 at = half_word ^ 16 * n;
        const Words logits(at + GATES), queries(at + QUERIES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = n + j / 2, i = j % 2, column = 8 * m + lane % 4 * 2;
            const float2 logit = unpack(logits[j]), q = unpack(queries[j]);
            float dq[2], d_logits[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float log_decay = g[m][2 * i + h], decay = exp2_of(log_decay),
                            k = key_of(log_decay, decay);
                // G_t - m, from the later log decays.
                const float since =
                    reductions.later[group][warp][column + h] + log_decay - later[m][2 * i + h];
                const float dg = decays[m][2 * i + h] + reductions.decays[group][warp][column + h];
                dq[h] = d_early[m][2 * i + h] * (exp2_of(since) * a.scale);
                float of_key = dk[m][2 * i + h] * exp2_of(-since);
                if (AUG) {
                    const float raw_q = h ? q.y : q.x,
                                of_balance = share[i] * channels.balance[group * HALF + column + h];
                    aug_shares[2 * m + h] += share[i] * raw_q * k;
                    dq[h] += of_balance * k;
                    of_key += of_balance * raw_q;
                }
                d_logits[h] =
                    (dg - decay * of_key) * sigmoid(-(h ? logit.y : logit.x)) * a.inverse_tau;
            }
            store_word(Words::place(at + EARLY, j), pack(dq[0], dq[1]));
            store_word(Words::place(at + LATE, j), pack(d_logits[0], d_logits[1]));
        }
    }
    if (AUG) sum_rows(aug_shares, reductions.aug[group]);
    __syncthreads();
    store_tile(a.d_q + token_at * K, shared + EARLY, H * K, length, K);
    store_tile(a.d_gates + token_at * K, shared + LATE, H * K, length, K);
    if (AUG && thread < K) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += reductions.aug[thread / HALF][w][thread % HALF];
        a.d_aug[chunk_at * K + thread] = sum;
    }
}
