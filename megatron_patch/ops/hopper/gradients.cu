// Gradients of q, gate logits, v and aug of a chunk and head, given those of y and of the states:
// `megatron_patch.ops.triton.gradients` for Hopper, in bfloat16, for heads of K <= 128.
// The formulas stand there, and why gradients of decays are taken as they are.
//
// Triton's kernel reaches half of the memory's speed: it takes all registers a thread can have, so
// that few warps are there to hide each other's waits. Here a chunk and head have eight warps of
// half as many registers each, two blocks share a multiprocessor, and what is read goes by
// asynchronous copies into shared memory, asked for as soon as there is a place; one block's copies
// and the other's arithmetic take place at the same time. The two groups of four warps do the same
// for different columns: half of K, and half of the columns for dv and for the scores.
//
// gradients.py compiles this file for a model, with its numbers for names in capital letters: H, K,
// V, and bytes of the numbers of aug and of bounds, AUG and BOUND, zero where there are none;
// BLOCKS share a multiprocessor, with SHARED bytes of its memory each.

#include "decays.cuh"
#include "place.cuh"
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
    Chunks chunks;
    i64 q_strides[3], gate_strides[3], v_strides[3];  // of a batch entry, a token and a head
    float scale, inverse_tau;
};

constexpr int OWN = TILES_K * C / 2;  // channels of a group,
constexpr int PARTS = TILES_K;        // of which it takes 32 at once in the end

// Tiles in shared memory: of early and late; of scores and their gradients; and, for 64 columns of
// V at a time, of the states, in STATE_SLOTS places, and of v and the gradient of y in two. Gates
// and queries come last, into a place of the states.
constexpr int STATE_SLOTS = 3 - TILES_K, STATE_SLOT = 2 * TILES_K * TILE, VALUE_SLOT = 2 * TILE;
constexpr int EARLY = 0, LATE = TILES_K * TILE, SCORES_T = 2 * TILES_K * TILE,
              D_SCORES = SCORES_T + TILE, STATES = D_SCORES + TILE,
              VALUES = STATES + STATE_SLOTS * STATE_SLOT, CHANNELS = VALUES + 2 * VALUE_SLOT;
constexpr int D_STATES = TILES_K * TILE, D_Y = TILE;  // within a place
constexpr int GATES = STATES + TILES_V % STATE_SLOTS * STATE_SLOT, QUERIES = GATES + D_STATES;

// Of the channels, after the tiles.
struct Channels {
    float decay[TILES_K * C], balance[TILES_K * C];  // log decay of the whole chunk; aug
};
static_assert(CHANNELS + sizeof(Channels) <= SHARED, "");

// Of each of the groups' channels of a part, from the sums of warps what a warp's rows lack: the
// decays' of later rows, and of all that count for each; half the chunk's log decay less that of
// later rows.
__device__ void join(Reductions<PARTS>& reductions, const Channels& channels, int part) {
    const int group = threadIdx.x % C / HALF, column = threadIdx.x % HALF, warp = threadIdx.x / C,
              channel = group * OWN + part * HALF + column;
    float decays = reductions.edge[channel], after = 0.5f * channels.decay[channel];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        decays += reductions.from_state[part][group][w][column];
        if (w > warp) {
            decays += reductions.decays[group][w][column];
            after -= reductions.later[group][w][column];
        }
    }
    __syncthreads();
    reductions.decays[group][warp][column] = decays;
    reductions.later[group][warp][column] = after;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) chunk_gradients(const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = (u32)__cvta_generic_to_shared(memory);
    const int thread = threadIdx.x, lane = thread % 32, group = __shfl_sync(~0u, thread / 128, 0),
              warp = thread % 128 / 32;
    const int unit = blockIdx.x / H, head = blockIdx.x % H;
    const i64 chunk_at = (i64)unit * H + head;
    const Place place(a.chunks, unit);
    const int length = place.length;
    if (length < 0) {
        if (AUG && thread < K) a.d_aug[chunk_at * K + thread] = 0;
        return;
    }
    const i64 token_at = (place.batch * a.chunks.tokens + place.first) * H + head;

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
        if (AUG) balance = number_at<AUG>(a.aug, head * K + thread);
    }

    // The states of 64 columns of V, or behind all of them what is needed last; and v and the
    // gradient of y.
    const auto ask_for_states = [&](int tile) {
        const u32 at = anew(shared) + STATES + tile % STATE_SLOTS * STATE_SLOT;
        if (tile < TILES_V) {
            const i64 first = anew(chunk_at) * K * V + tile * C;
#pragma unroll
            for (int k = 0; k < TILES_K; ++k) {
                const i64 rows = first + k * C * V;
                copy_tile(at + k * TILE, a.states + rows, V, K - k * C, V - tile * C);
                copy_tile(at + D_STATES + k * TILE, a.d_states + rows, V, K - k * C, V - tile * C);
            }
        } else if (tile == TILES_V) {
            const Place where = anew(place);
            copy_channels(at, a.gates + where.in(a.gate_strides, head), a.gate_strides[1], length);
            if (AUG)
                copy_channels(at + D_STATES, a.q + where.in(a.q_strides, head), a.q_strides[1],
                              length);
        }
        commit_copies();
    };
    const auto ask_for_values = [&](int tile) {
        const u32 at = anew(shared) + VALUES + tile % 2 * VALUE_SLOT;
        if (tile < TILES_V) {
            const u16* const v = a.v + anew(place).in(a.v_strides, head);
            copy_tile(at, v + tile * C, a.v_strides[1], length, V - tile * C);
            copy_tile(at + D_Y, a.d_y + token_at * V + tile * C, H * V, length, V - tile * C);
        }
        commit_copies();
    };
    copy_channels(shared + EARLY, a.early + token_at * K, H * K, length);
    copy_channels(shared + LATE, a.late + token_at * K, H * K, length);
    commit_copies();
    ask_for_values(0);
#pragma unroll
    for (int tile = 0; tile < STATE_SLOTS; ++tile) ask_for_states(tile);
    ask_for_values(1);

    // Where words of two columns lie in a tile: of a group's half of the columns, and of its
    // channels' first part.
    const u32 half_word = place_of(row, group * HALF * 2 + lane % 4 * 4),
              part_word = OWN < C ? half_word : group * TILE + place_of(row, lane % 4 * 4);
    // Where a group's half lies, as rows and as columns, and so its channels.
    const u32 half_rows = group * HALF * 128, half_columns = group * HALF * 2;
    const u32 own_rows = group * OWN * 128, own_columns = OWN < C ? half_columns : group * TILE;

    await_copies<STATE_SLOTS + 2>();
    if (is_exact) {  // left to `exact_gradients`
        await_copies<0>();
        return;
    }
    Sums<HALF> scores;
    begin_products();
#pragma unroll
    for (int k = 0; k < TILES_K; ++k)
        multiply_tile<ALONG, ALONG>(scores, shared + LATE + k * TILE,
                                    shared + EARLY + k * TILE + half_rows, k > 0);
    commit_products();
    await_products<0>();
    const int own_column = group * HALF + lane % 4 * 2;  // the first of this thread's
    // Of a later token (column) and an earlier one (row).
    store_where(scores, shared + SCORES_T + half_word, own_column,
                [&](int i, int column) { return row + 8 * i <= column; });
    Channels& channels = *(Channels*)(memory + CHANNELS);
    if (thread < TILES_K * C) {
        channels.decay[thread] = decay;
        channels.balance[thread] = balance;
    }

    Sums<HALF> d_scores;
    Sums<OWN> d_early, d_late;
    float d_similarity[2] = {}, edge[TILES_K] = {};
#pragma unroll 1
    for (int tile = 0; tile < TILES_V; ++tile) {
        const u32 tiles = anew(shared);
        const u32 values = tiles + VALUES + tile % 2 * VALUE_SLOT, d_y = values + D_Y,
                  states = tiles + STATES + tile % STATE_SLOTS * STATE_SLOT,
                  d_states = states + D_STATES;
        await_copies<STATE_SLOTS>();
        Sums<HALF> dv;
        begin_products();
        multiply_tile<ALONG, ALONG>(d_scores, d_y, values + half_rows, tile > 0);
        multiply_tile<ALONG, ACROSS>(dv, tiles + SCORES_T, d_y + half_columns, false);
#pragma unroll
        for (int k = 0; k < TILES_K; ++k)
            multiply_tile<ALONG, ACROSS>(dv, tiles + LATE + k * TILE,
                                         d_states + k * TILE + half_columns, true);
        multiply_tile<ALONG, ALONG>(d_early, d_y, states + own_rows, tile > 0);
        multiply_tile<ALONG, ALONG>(d_late, values, d_states + own_rows, tile > 0);
        commit_products();
#pragma unroll
        for (int k = 0; k < TILES_K; ++k)
            edge[k] += state_product(states + k * TILE, d_states + k * TILE);
        await_products<0>();
        __syncthreads();  // all groups' products are done
        ask_for_states(tile + STATE_SLOTS);

#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = half_word ^ 16 * n;
            const Words of_v(values + at), of_y(d_y + at);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = j % 2;
                float* const sum = &dv[n + j / 2][2 * i];
                if (AUG) {
                    const float2 x = unpack(of_v[j]), dy = unpack(of_y[j]);
                    const float b = similarity[i];
                    const float s = sigmoid(b * x.x), t = sigmoid(b * x.y);
                    const float ds = dy.x * (s - s * s), dt = dy.y * (t - t * t);
                    d_similarity[i] += ds * x.x + dt * x.y;
                    sum[0] += b * ds;
                    sum[1] += b * dt;
                }
                store_word(Words::place(d_y + at, j), pack(sum[0], sum[1]));
            }
        }
        __syncthreads();
        // By the threads that then ask for what takes its place.
        store_tile(a.d_v + token_at * V + tile * C, d_y, H * V, length, V - tile * C);
        ask_for_values(tile + 2);
    }

    // Over the scores, which nobody reads any more.
    Reductions<PARTS>& reductions = *(Reductions<PARTS>*)(memory + SCORES_T);
    store_where(d_scores, shared + D_SCORES + half_word, own_column,
                [&](int i, int column) { return row + 8 * i >= column; });
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
        const float sum = sum_quarters(edge[k]);
        if (lane < 8) reductions.edge[k * C + thread / 32 * 8 + lane] = sum;
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
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float from_state[8] = {};
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const Words late(shared + LATE + (part_word ^ part * HALF * 2 ^ 16 * n));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2;
                const float2 l = unpack(late[j]);
                const float* const dl = &d_late[4 * part + m][2 * (j % 2)];
                from_state[2 * m] += l.x * dl[0];
                from_state[2 * m + 1] += l.y * dl[1];
            }
        }
        sum_rows(from_state, reductions.from_state[part][group]);
    }
    await_copies<0>();
    auto& dk = d_late;
    begin_products();
    multiply_tile<ALONG, ACROSS>(d_early, shared + D_SCORES, shared + LATE + own_columns, true);
    multiply_tile<ACROSS, ACROSS>(dk, shared + D_SCORES, shared + EARLY + own_columns, true);
    commit_products();
    await_products<0>();
    __syncthreads();  // early and late can be written over

    float share[2] = {};
    if (AUG) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            share[i] =
                reductions.d_similarity[0][row + 8 * i] + reductions.d_similarity[1][row + 8 * i];
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        float decays[4][4], g[4][4], later[4][4];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = shared + (part_word ^ part * HALF * 2 ^ 16 * n);
            const Words early(at + EARLY), late(at + LATE), logits(at + GATES);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2;
                const float2 e = unpack(early[j]), l = unpack(late[j]), logit = unpack(logits[j]);
                const float* const de = &d_early[4 * part + m][2 * i];
                const float* const of_key = &dk[4 * part + m][2 * i];
                decays[m][2 * i] = e.x * de[0] - l.x * of_key[0];
                decays[m][2 * i + 1] = e.y * de[1] - l.y * of_key[1];
                // There is no decay at tokens after the chunk's.
                const float rate = row + 8 * i < length ? a.inverse_tau : 0;
                later[m][2 * i] = g[m][2 * i] = log_decay(logit.x, rate);
                later[m][2 * i + 1] = g[m][2 * i + 1] = log_decay(logit.y, rate);
            }
        }
        sum_later_rows(decays, reductions.decays[group]);
        sum_later_rows(later, reductions.later[group]);
        __syncthreads();
        join(reductions, channels, part);
        __syncthreads();

        float aug_shares[8] = {};
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const u32 at = shared + (part_word ^ part * HALF * 2 ^ 16 * n);
            const Words logits(at + GATES), queries(at + QUERIES);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = n + j / 2, i = j % 2, column = 8 * m + lane % 4 * 2;
                const float2 logit = unpack(logits[j]), q = unpack(queries[j]);
                const float rate = row + 8 * i < length ? a.inverse_tau : 0;
                float dq[2], d_logits[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float raw_logit = h ? logit.y : logit.x;
                    // With several parts once more, for want of registers.
                    const float log = PARTS > 1 ? log_decay(raw_logit, rate) : g[m][2 * i + h];
                    const float decay = exp2_of(log), k = key_of(log, decay);
                    // G_t - m, from the later log decays.
                    const float since =
                        reductions.later[group][warp][column + h] + log - later[m][2 * i + h];
                    const float dg =
                        decays[m][2 * i + h] + reductions.decays[group][warp][column + h];
                    dq[h] = d_early[4 * part + m][2 * i + h] * (exp2_of(since) * a.scale);
                    float of_key = dk[4 * part + m][2 * i + h] * exp2_of(-since);
                    if (AUG) {
                        const float raw_q = h ? q.y : q.x;
                        const float of_balance =
                            share[i] * channels.balance[group * OWN + part * HALF + column + h];
                        aug_shares[2 * m + h] += share[i] * raw_q * k;
                        dq[h] += of_balance * k;
                        of_key += of_balance * raw_q;
                    }
                    d_logits[h] = (dg - decay * of_key) * sigmoid(-raw_logit) * a.inverse_tau;
                }
                store_word(Words::place(at + EARLY, j), pack(dq[0], dq[1]));
                store_word(Words::place(at + LATE, j), pack(d_logits[0], d_logits[1]));
            }
        }
        if (AUG) sum_rows(aug_shares, reductions.aug[part][group]);
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
        store_tile(a.d_q + token_at * K + k * C, shared + EARLY + k * TILE, H * K, length,
                   K - k * C);
        store_tile(a.d_gates + token_at * K + k * C, shared + LATE + k * TILE, H * K, length,
                   K - k * C);
    }
    if (AUG && thread < K) {
        const int column = thread % HALF, part = thread % OWN / HALF, own = thread / OWN;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += reductions.aug[part][own][w][column];
        a.d_aug[chunk_at * K + thread] = sum;
    }
}
