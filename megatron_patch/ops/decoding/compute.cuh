// What the warps that compute do.

#pragma once

#include "arguments.cuh"
#include "exchange.cuh"
#include "product.cuh"

// Fours of a factor's entries that a lane has: a warp makes just those that it multiplies.
template <int COLUMNS>
struct Fours {
    static constexpr int OF_WARP = 8 * ceil_div(ceil_div(COLUMNS, 32), WARPS),
                         COUNT = ceil_div(OF_WARP, 32);
    const int at = threadIdx.x / 32 * OF_WARP + threadIdx.x % 32;

    __device__ int clamped(int i) const { return smaller(at + 32 * i, COLUMNS / 4 - 1); }
    template <typename Work>
    __device__ void for_each(Work work) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if ((OF_WARP % 32 == 0 || threadIdx.x % 32 + 32 * i < OF_WARP) &&
                at + 32 * i < COLUMNS / 4)
                work(i, at + 32 * i);
    }
};
constexpr int FOURS = Fours<D>::COUNT;

// A thread of theirs.
struct Compute {
    const Arguments& a;
    Shared& s;
    Ring ring;
    int side = 0;
    const void* const* table = s.table;  // of the layer at hand
    u32 turn;
    const Place& place = s.place;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Fours<D> fours;

    // Of this lane's fours of channels: a norm's weights; the convolution's, and its inputs so far,
    // oldest first.
    uint2 norm[FOURS], taps[FOURS][TAPS], past[FOURS][TAPS];
    // Of this thread's entries of the state.
    float state[OfState::ROWS];
    Weight balance[OfState::ROWS];

    // A stage's product, whose sums go to who sends.
    template <typename P, typename Factor>
    __device__ void finish(P& product, const Factor& factor, int stride) {
        product.multiply(factor, s.sums[side], stride);
        hand_over(side);
        side = next(side);
    }

    // Words of a product's factor, that with the first of four entries and the next, to where a
    // lane of `Product` finds its four of a unit side by side.
    __device__ void put(u32* part, int four, u32 first, u32 second) {
        u32* const words = part + four / 8 * 16 + four % 2 * 8 + four % 8 / 2;
        words[0] = first;
        words[4] = second;
    }
    __device__ void put(int four, const float (&x)[4]) {
        const uint2 high = pack(x);
        float low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) low[j] = x[j] - widen(pick(&high, j));
        put(s.channels.high, four, high.x, high.y);
        put(s.channels.low, four, pack(low[0], low[1]), pack(low[2], low[3]));
    }

    __device__ void receive_fours(float4 (&x)[FOURS], int at, u32 turn) {
        receive(x, turn, [&](int i) { return a.exchange + place_of(at + 4 * fours.clamped(i)); });
    }

    // For a norm's factor, by warps.
    __device__ void square(const float4 (&x)[FOURS]) {
        float sum = 0;
        fours.for_each([&](int i, int) {
            sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
        });
        sum = warp_sum(sum);
        if (lane == 0) s.squares[warp] = sum;
    }
    __device__ void load_norm(const void* weight) {
        const float ones[4] = {1, 1, 1, 1};
        fours.for_each([&](int i, int four) {
            norm[i] = weight ? __ldg((const uint2*)weight + four) : pack(ones);
        });
    }
    // x times the norm's weights, as a product's right side.
    __device__ void put_normed(const float4 (&x)[FOURS]) {
        fours.for_each([&](int i, int four) {
            const float y[4] = {
                x[i].x * widen(pick(norm + i, 0)), x[i].y * widen(pick(norm + i, 1)),
                x[i].z * widen(pick(norm + i, 2)), x[i].w * widen(pick(norm + i, 3))};
            put(four, y);
        });
    }

    // Ahead of `project`: what it reads that no other block writes meanwhile.
    __device__ void prepare_project(const void* const* table) {
        load_norm(table[TOKEN_NORM]);
        fours.for_each([&](int i, int four) {
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                taps[i][k] = __ldg((const uint2*)table[CONVOLUTION] + four * TAPS + k);
#pragma unroll
            for (int k = 0; k < TAPS - 1; ++k)
                past[i][k] = ((const uint2*)table[CONVOLUTION_STATE])[four * (TAPS - 1) + k];
        });
    }

    __device__ void project(bool first) {
        Product<ProjectRows> product(ring, place.project.count);
        float mixed[FOURS][4];
        fours.for_each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mixed[i][j] = 0;
#pragma unroll
                for (int tap = 0; tap < TAPS - 1; ++tap)
                    mixed[i][j] += widen(pick(taps[i], j * TAPS + tap)) *
                                   widen(pick(past[i], j * (TAPS - 1) + tap));
            }
        });
        float4 x[FOURS];
        if (first)
            fours.for_each([&](int i, int four) {
                const uint2 words = __ldg((const uint2*)s.embedding + four);
                const auto at = [&](int j) { return a.embedded(pick(&words, j)); };
                x[i] = make_float4(at(0), at(1), at(2), at(3));
            });
        else
            receive_fours(x, OUTER, turn ^ 1);
        square(x);
        barrier();
        const float factor = rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps);
        fours.for_each([&](int i, int four) {
            const float of_channel[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            float normed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                normed[j] = of_channel[j] * factor * widen(pick(norm + i, j));
            past[i][TAPS - 1] = pack(normed);  // rounded as in the convolution's state
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mixed[i][j] +=
                    widen(pick(taps[i], j * TAPS + TAPS - 1)) * widen(pick(past[i] + TAPS - 1, j));
                mixed[i][j] *= sigmoid(mixed[i][j]);
            }
            put(four, mixed[i]);
        });
        __syncwarp();
        finish(product, s.channels, PROJECTED);
    }

    // The state's column and row of a thread's entry; the columns are this block's.
    __device__ int column() { return thread % OfState::ACROSS; }
    __device__ int state_row(int i) { return thread / OfState::ACROSS + i * OfState::DOWN; }
    __device__ float* state_at(int row) {
        return (float*)table[STATE] + (place.head * K + row) * V + place.columns.first + column();
    }

    __device__ void prepare_mix() {
        const int inside = smaller(column(), place.columns.count - 1) - column();
#pragma unroll
        for (int i = 0; i < OfState::ROWS; ++i) {
            const int row = smaller(state_row(i), K - 1);
            state[i] = state_at(row)[inside];
            if (table[AUG]) balance[i] = __ldg((const Weight*)table[AUG] + place.head * K + row);
        }
    }

    __device__ void mix() {
        const Share columns = place.columns;
        const int head = place.head;
        constexpr int DECAYS = PROJECTIONS + D / 2, VALUES = PROJECTIONS + D;
        float sum = 0, aug = 0;
        if (column() < columns.count) {
            float x[3 * OfState::ROWS + 1];
            receive(x, turn, [&](int i) {
                const int row = head * K + smaller(state_row(i / 3), K - 1);
                return a.exchange + place_of(i == 3 * OfState::ROWS
                                                 ? VALUES + head * V + columns.first + column()
                                             : i % 3 == 0 ? PROJECTIONS + row
                                             : i % 3 == 1 ? DECAYS + row
                                                          : KEYS + row);
            });
            if (thread < OfState::ACROSS) s.value[column()] = x[3 * OfState::ROWS];
#pragma unroll
            for (int i = 0; i < OfState::ROWS; ++i) {
                const float q = x[3 * i], decay = x[3 * i + 1], key = x[3 * i + 2];
                if (state_row(i) >= K) continue;
                state[i] = decay * state[i] + key * x[3 * OfState::ROWS];
                *state_at(state_row(i)) = state[i];
                sum += q * state[i];
                if (table[AUG]) aug += q * key * widen(balance[i]);
            }
        }
#pragma unroll
        for (int offset = OfState::ACROSS; offset < 32; offset *= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            aug += __shfl_xor_sync(~0u, aug, offset);
        }
        const int part = OfState::ACROSS < 32 ? warp : thread / OfState::ACROSS;
        if (OfState::ACROSS >= 32 || lane < OfState::ACROSS) s.read_out[part][column()] = sum;
        if (column() == 0) s.aug[part] = aug;
        hand_over(side);
        side = next(side);
    }

    __device__ void emit() {
        Product<EmitRows> product(ring, place.own.count);
        // A warp has a head, of which a lane has some four columns.
        constexpr int OF_LANE = ceil_div(V / 4, 32);
        // If a warp's part of the factor is of whole heads, these are its heads, and it need not
        // wait.
        constexpr int OF_WARP = 4 * Fours<D>::OF_WARP;
        constexpr bool WHOLE = OF_WARP % V == 0;
        if (!WHOLE) barrier();  // all have read the factor before
        const int first_head = WHOLE ? warp * (OF_WARP / V) : warp;
        for (int i = 0; i < (WHOLE ? OF_WARP / V : ceil_div(H, WARPS)); ++i) {
            const int head = first_head + (WHOLE ? i : i * WARPS);
            if (head >= H) break;
            float y[OF_LANE][4], gate[OF_LANE][4], sum = 0, squares = 0;
            const auto four = [&](int i) { return smaller(lane + 32 * i, V / 4 - 1); };
            const auto inside = [&](int i) { return lane + 32 * i < V / 4; };
            uint2 bias[OF_LANE];
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i)
                bias[i] = __ldg((const uint2*)table[OUT_GATE_BIAS] + head * (V / 4) + four(i));
            float4 x[OF_LANE];
            receive(x, turn, [&](int i) {
                return a.exchange + place_of(PROJECTIONS + 2 * D + head * V + 4 * four(i));
            });
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
                const float gates[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    gate[i][j] = gates[j] + widen(pick(bias + i, j));
                    gate[i][j] *= sigmoid(gate[i][j]);
                }
            }
            receive(x, turn, [&](int i) {
                return a.exchange + place_of(READ_OUT + head * V + 4 * four(i));
            });
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
                y[i][0] = x[i].x, y[i][1] = x[i].y, y[i][2] = x[i].z, y[i][3] = x[i].w;
                if (inside(i)) sum += (y[i][0] + y[i][1]) + (y[i][2] + y[i][3]);
            }
            const float mean = warp_sum(sum) / V;
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    y[i][j] -= mean;
                    if (inside(i)) squares += y[i][j] * y[i][j];
                }
            const float factor = rsqrtf(warp_sum(squares) / V + a.output_norm_eps);
#pragma unroll
            for (int i = 0; i < OF_LANE; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) y[i][j] *= factor * gate[i][j];
                if (inside(i)) put(head * (V / 4) + four(i), y[i]);
            }
        }
        WHOLE ? __syncwarp() : barrier();
        finish(product, s.channels, OWN);
    }

    __device__ void expand() {
        Product<ExpandRows> product(ring, 2 * place.expand.count);
        float4 x[FOURS];
        load_norm(table[CHANNEL_NORM]);
        receive_fours(x, MIDDLE, turn);
        put_normed(x);
        __syncwarp();
        square(x);
        finish(product, s.channels, EXPANDED);
        move_on();
    }

    // This block's channels of the convolution's state. All blocks have read it: what `expand` got
    // from one depends on the read-outs of all heads, and these on all projections.
    __device__ void move_on() {
        const Share own = place.own;
        fours.for_each([&](int i, int four) {
            if (4 * four + 4 <= own.first || own.first + own.count <= 4 * four) return;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (own.has(4 * four + j))
#pragma unroll
                    for (int tap = 0; tap < TAPS - 1; ++tap)
                        ((Weight*)table[CONVOLUTION_STATE])[(4 * four + j) * (TAPS - 1) + tap] =
                            tap < TAPS - 2 ? pick(past[i], j * (TAPS - 1) + tap + 1)
                                           : pick(past[i] + TAPS - 1, j);
        });
    }

    __device__ void contract() {
        Product<ContractRows> product(ring, place.own.count);
        const Fours<F> fours;
        float4 x[Fours<F>::COUNT];
        receive(x, turn,
                [&](int i) { return a.exchange + place_of(INNER + 4 * fours.clamped(i)); });
        fours.for_each([&](int i, int four) {
            const u32 parts[4] = {__float_as_uint(x[i].x), __float_as_uint(x[i].y),
                                  __float_as_uint(x[i].z), __float_as_uint(x[i].w)};
            put(s.inner.high, four, __byte_perm(parts[0], parts[1], 0x7632),
                __byte_perm(parts[2], parts[3], 0x7632));
            put(s.inner.low, four, __byte_perm(parts[0], parts[1], 0x5410),
                __byte_perm(parts[2], parts[3], 0x5410));
        });
        __syncwarp();
        finish(product, s.inner, OWN);
    }

    __device__ void logits() {
        float4 x[FOURS];
        load_norm(a.final_norm);
        receive_fours(x, OUTER, turn ^ 1);
        put_normed(x);
        __syncwarp();
        square(x);
        for (int first = 0; first < place.logits.count; first += HEAD_ROWS) {
            Product<HeadRows> product(ring, smaller(HEAD_ROWS, place.logits.count - first));
            product.multiply(s.channels, s.sums[side], HEAD_ROWS);
            await_sums(side);  // nobody is more than one part ahead of who sends
            side = next(side);
        }
    }

    __device__ void run() {
        prepare_project(table);
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, turn ^= 1) {
            if (place.columns.count) prepare_mix();
            if (place.project.count) project(layer == 0);
            if (place.columns.count) mix();
            if (place.own.count) emit();
            if (place.expand.count) expand();
            if (layer + 1 < LAYERS) prepare_project(table + FIELDS);
            if (place.own.count) contract();
        }
        if (place.logits.count) logits();
    }
};
