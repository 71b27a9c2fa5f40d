// The consumer warps: make the vector of each product, and multiply the pipeline's rows with it.

#pragma once

#include "exchange.cuh"
#include "math.cuh"
#include "matvec.cuh"

// The quads (four consecutive entries) of a vector that a lane makes. A warp makes exactly the
// entries that it multiplies, so it need not wait for other warps.
template <int COLUMNS>
struct Quads {
    static constexpr int OF_WARP = 8 * ceil_div(ceil_div(COLUMNS, 32), CONSUMERS),
                         COUNT = ceil_div(OF_WARP, 32);
    const int at = threadIdx.x / 32 * OF_WARP + threadIdx.x % 32;

    __device__ int clamped(int i) const { return min_of(at + 32 * i, COLUMNS / 4 - 1); }
    template <typename Work>
    __device__ void for_each(Work work) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if ((OF_WARP % 32 == 0 || threadIdx.x % 32 + 32 * i < OF_WARP) &&
                at + 32 * i < COLUMNS / 4)
                work(i, at + 32 * i);
    }
};
constexpr int QUADS = Quads<D>::COUNT;

struct Consumer {
    const Arguments& a;
    Shared& s;
    Pipeline pipeline;
    int buffer = 0;
    const void* const* table = s.table;  // of the current layer
    u32 phase;
    const BlockRows& block = s.rows;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const Quads<D> quads;

    // For this lane's quads of channels: the weights of a norm, and the weights and last inputs of
    // the convolution, oldest first.
    uint2 norm[QUADS], conv_weight[QUADS][KERNEL_SIZE], conv_state[QUADS][KERNEL_SIZE];
    // For this thread's entries of the recurrent state.
    float state[StateLayout::ROWS];
    Weight aug_weight[StateLayout::ROWS];

    // Multiplies, and hands the partial sums to the reducer.
    template <typename P, typename X>
    __device__ void multiply(P& product, const X& x, int stride) {
        product.multiply(x, s.sums[buffer], stride);
        signal_reducer(buffer);
        buffer = next_buffer(buffer);
    }

    // Stores a quad, as two words, in the order in which a lane of MatVec reads the words of a unit
    // as one vector.
    __device__ void store_quad(u32* part, int quad, u32 first, u32 second) {
        u32* const words = part + quad / 8 * 16 + quad % 2 * 8 + quad % 8 / 2;
        words[0] = first;
        words[4] = second;
    }
    // Splits a quad of x into high and low part.
    __device__ void store_x(int quad, const float (&x)[4]) {
        const uint2 high = pack(x);
        float low[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) low[j] = x[j] - widen(pick(&high, j));
        store_quad(s.x.high, quad, high.x, high.y);
        store_quad(s.x.low, quad, pack(low[0], low[1]), pack(low[2], low[3]));
    }

    __device__ void receive_quads(float4 (&x)[QUADS], int from, u32 phase) {
        receive(x, phase,
                [&](int i) { return a.exchange + exchange_index(from + 4 * quads.clamped(i)); });
    }

    // This warp's part of the sum of squares of an RMS norm.
    __device__ void store_sum_of_squares(const float4 (&x)[QUADS]) {
        float sum = 0;
        quads.for_each([&](int i, int) {
            sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
        });
        sum = warp_sum(sum);
        if (lane == 0) s.squares[warp] = sum;
    }
    __device__ void load_norm(const void* weight) {
        const float ones[4] = {1, 1, 1, 1};
        quads.for_each([&](int i, int quad) {
            norm[i] = weight ? __ldg((const uint2*)weight + quad) : pack(ones);
        });
    }
    // Stores x times the weights of the norm. The reducer applies 1 / RMS after the product.
    __device__ void store_normed(const float4 (&x)[QUADS]) {
        quads.for_each([&](int i, int quad) {
            const float y[4] = {
                x[i].x * widen(pick(norm + i, 0)), x[i].y * widen(pick(norm + i, 1)),
                x[i].z * widen(pick(norm + i, 2)), x[i].w * widen(pick(norm + i, 3))};
            store_x(quad, y);
        });
    }

    // Loads what in_proj needs and no other block writes meanwhile, ahead of time.
    __device__ void prefetch_in_proj(const void* const* table) {
        load_norm(table[TOKEN_NORM]);
        quads.for_each([&](int i, int quad) {
#pragma unroll
            for (int k = 0; k < KERNEL_SIZE; ++k)
                conv_weight[i][k] =
                    __ldg((const uint2*)table[CONVOLUTION] + quad * KERNEL_SIZE + k);
#pragma unroll
            for (int k = 0; k < KERNEL_SIZE - 1; ++k)
                conv_state[i][k] =
                    ((const uint2*)table[CONVOLUTION_STATE])[quad * (KERNEL_SIZE - 1) + k];
        });
    }

    __device__ void in_proj(bool first_layer) {
        MatVec<InProj> product(pipeline, block.in_proj.count);
        // The convolution over past inputs, before the current one is there.
        float x_conv[QUADS][4];
        quads.for_each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x_conv[i][j] = 0;
#pragma unroll
                for (int k = 0; k < KERNEL_SIZE - 1; ++k)
                    x_conv[i][j] += widen(pick(conv_weight[i], j * KERNEL_SIZE + k)) *
                                    widen(pick(conv_state[i], j * (KERNEL_SIZE - 1) + k));
            }
        });
        float4 x[QUADS];
        if (first_layer)
            quads.for_each([&](int i, int quad) {
                const uint2 words = __ldg((const uint2*)s.embedding + quad);
                const auto at = [&](int j) { return scaled_embedding(a, pick(&words, j)); };
                x[i] = make_float4(at(0), at(1), at(2), at(3));
            });
        else
            receive_quads(x, AFTER_MLP, phase ^ 1);
        store_sum_of_squares(x);
        consumer_barrier();
        const float rstd = rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps);
        quads.for_each([&](int i, int quad) {
            const float channels[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            float normed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) normed[j] = channels[j] * rstd * widen(pick(norm + i, j));
            // The convolution's state holds rounded inputs, so the current one is rounded too.
            conv_state[i][KERNEL_SIZE - 1] = pack(normed);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                x_conv[i][j] += widen(pick(conv_weight[i], j * KERNEL_SIZE + KERNEL_SIZE - 1)) *
                                widen(pick(conv_state[i] + KERNEL_SIZE - 1, j));
                x_conv[i][j] *= sigmoid(x_conv[i][j]);
            }
            store_x(quad, x_conv[i]);
        });
        __syncwarp();
        multiply(product, s.x, IN_PROJ_ROWS);
    }

    // This thread's entries of the state have one of the block's columns, and ROWS of the head's
    // rows.
    __device__ int column() { return thread % StateLayout::ACROSS; }
    __device__ int state_row(int i) { return thread / StateLayout::ACROSS + i * StateLayout::DOWN; }
    __device__ float* state_at(int row) {
        return (float*)table[STATE] + (block.head * K + row) * V + block.state_columns.first +
               column();
    }

    __device__ void prefetch_recurrence() {
        const int inside = min_of(column(), block.state_columns.count - 1) - column();
#pragma unroll
        for (int i = 0; i < StateLayout::ROWS; ++i) {
            const int row = min_of(state_row(i), K - 1);
            state[i] = state_at(row)[inside];
            if (table[AUG]) aug_weight[i] = __ldg((const Weight*)table[AUG] + block.head * K + row);
        }
    }

    // S = diag(exp(g)) S + k v^T and o = S^T q, for this block's columns of a head, and the score
    // of self-augmentation.
    __device__ void recurrence() {
        const RowRange columns = block.state_columns;
        const int head = block.head;
        constexpr int DECAYS = PROJECTIONS + D / 2, VALUES = PROJECTIONS + D;
        float sum = 0, aug = 0;
        if (column() < columns.count) {
            // q, decay and key of each row, then the value of the column.
            float x[3 * StateLayout::ROWS + 1];
            receive(x, phase, [&](int i) {
                const int row = head * K + min_of(state_row(i / 3), K - 1);
                return a.exchange +
                       exchange_index(i == 3 * StateLayout::ROWS
                                          ? VALUES + head * V + columns.first + column()
                                      : i % 3 == 0 ? PROJECTIONS + row
                                      : i % 3 == 1 ? DECAYS + row
                                                   : KEYS + row);
            });
            if (thread < StateLayout::ACROSS) s.value[column()] = x[3 * StateLayout::ROWS];
#pragma unroll
            for (int i = 0; i < StateLayout::ROWS; ++i) {
                const float q = x[3 * i], decay = x[3 * i + 1], key = x[3 * i + 2];
                if (state_row(i) >= K) continue;
                state[i] = decay * state[i] + key * x[3 * StateLayout::ROWS];
                *state_at(state_row(i)) = state[i];
                sum += q * state[i];
                if (table[AUG]) aug += q * key * widen(aug_weight[i]);
            }
        }
#pragma unroll
        for (int offset = StateLayout::ACROSS; offset < 32; offset *= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            aug += __shfl_xor_sync(~0u, aug, offset);
        }
        const int part = StateLayout::ACROSS < 32 ? warp : thread / StateLayout::ACROSS;
        if (StateLayout::ACROSS >= 32 || lane < StateLayout::ACROSS) s.o[part][column()] = sum;
        if (column() == 0) s.aug[part] = aug;
        signal_reducer(buffer);
        buffer = next_buffer(buffer);
    }

    __device__ void out_proj() {
        MatVec<OutProj> product(pipeline, block.channels.count);
        // A warp normalises one head at a time; a lane has quads of its columns.
        constexpr int HEAD_QUADS = ceil_div(V / 4, 32);
        // If the entries that a warp multiplies are those of whole heads, it normalises just these
        // heads and need not wait for other warps.
        constexpr int WARP_CHANNELS = 4 * Quads<D>::OF_WARP;
        constexpr bool WHOLE_HEADS = WARP_CHANNELS % V == 0;
        if (!WHOLE_HEADS) consumer_barrier();  // other warps may still read x
        const int first_head = WHOLE_HEADS ? warp * (WARP_CHANNELS / V) : warp;
        for (int i = 0; i < (WHOLE_HEADS ? WARP_CHANNELS / V : ceil_div(H, CONSUMERS)); ++i) {
            const int head = first_head + (WHOLE_HEADS ? i : i * CONSUMERS);
            if (head >= H) break;
            float y[HEAD_QUADS][4], gate[HEAD_QUADS][4], sum = 0, squares = 0;
            const auto quad = [&](int i) { return min_of(lane + 32 * i, V / 4 - 1); };
            const auto inside = [&](int i) { return lane + 32 * i < V / 4; };
            uint2 bias[HEAD_QUADS];
#pragma unroll
            for (int i = 0; i < HEAD_QUADS; ++i)
                bias[i] = __ldg((const uint2*)table[OUT_GATE_BIAS] + head * (V / 4) + quad(i));
            float4 x[HEAD_QUADS];
            receive(x, phase, [&](int i) {
                return a.exchange + exchange_index(PROJECTIONS + 2 * D + head * V + 4 * quad(i));
            });
#pragma unroll
            for (int i = 0; i < HEAD_QUADS; ++i) {
                const float gates[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    gate[i][j] = gates[j] + widen(pick(bias + i, j));
                    gate[i][j] *= sigmoid(gate[i][j]);
                }
            }
            receive(x, phase, [&](int i) {
                return a.exchange + exchange_index(OUTPUTS + head * V + 4 * quad(i));
            });
#pragma unroll
            for (int i = 0; i < HEAD_QUADS; ++i) {
                y[i][0] = x[i].x, y[i][1] = x[i].y, y[i][2] = x[i].z, y[i][3] = x[i].w;
                if (inside(i)) sum += (y[i][0] + y[i][1]) + (y[i][2] + y[i][3]);
            }
            const float mean = warp_sum(sum) / V;
#pragma unroll
            for (int i = 0; i < HEAD_QUADS; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    y[i][j] -= mean;
                    if (inside(i)) squares += y[i][j] * y[i][j];
                }
            const float rstd = rsqrtf(warp_sum(squares) / V + a.output_norm_eps);
#pragma unroll
            for (int i = 0; i < HEAD_QUADS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) y[i][j] *= rstd * gate[i][j];
                if (inside(i)) store_x(head * (V / 4) + quad(i), y[i]);
            }
        }
        WHOLE_HEADS ? __syncwarp() : consumer_barrier();
        multiply(product, s.x, CHANNEL_ROWS);
    }

    __device__ void gate_up() {
        MatVec<GateUp> product(pipeline, 2 * block.gate_up.count);
        float4 x[QUADS];
        load_norm(table[CHANNEL_NORM]);
        receive_quads(x, AFTER_MIXER, phase);
        store_normed(x);
        __syncwarp();
        store_sum_of_squares(x);
        multiply(product, s.x, GATE_UP_ROWS);
        store_conv_state();
    }

    // Shifts the convolution's state of this block's channels. By now all blocks have read it: what
    // gate_up received depends on the outputs of all heads, and these on all projections.
    __device__ void store_conv_state() {
        const RowRange own = block.channels;
        quads.for_each([&](int i, int quad) {
            if (4 * quad + 4 <= own.first || own.first + own.count <= 4 * quad) return;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (own.has(4 * quad + j))
#pragma unroll
                    for (int k = 0; k < KERNEL_SIZE - 1; ++k)
                        ((Weight*)
                             table[CONVOLUTION_STATE])[(4 * quad + j) * (KERNEL_SIZE - 1) + k] =
                            k < KERNEL_SIZE - 2 ? pick(conv_state[i], j * (KERNEL_SIZE - 1) + k + 1)
                                                : pick(conv_state[i] + KERNEL_SIZE - 1, j);
        });
    }

    __device__ void down() {
        MatVec<Down> product(pipeline, block.channels.count);
        const Quads<F> quads;
        float4 x[Quads<F>::COUNT];
        receive(x, phase, [&](int i) {
            return a.exchange + exchange_index(MLP_HIDDEN + 4 * quads.clamped(i));
        });
        // Each number is a high and a low part already: gather the high ones, then the low ones.
        quads.for_each([&](int i, int quad) {
            const u32 parts[4] = {__float_as_uint(x[i].x), __float_as_uint(x[i].y),
                                  __float_as_uint(x[i].z), __float_as_uint(x[i].w)};
            store_quad(s.mlp_hidden.high, quad, __byte_perm(parts[0], parts[1], 0x7632),
                       __byte_perm(parts[2], parts[3], 0x7632));
            store_quad(s.mlp_hidden.low, quad, __byte_perm(parts[0], parts[1], 0x5410),
                       __byte_perm(parts[2], parts[3], 0x5410));
        });
        __syncwarp();
        multiply(product, s.mlp_hidden, CHANNEL_ROWS);
    }

    __device__ void logits() {
        float4 x[QUADS];
        load_norm(a.final_norm);
        receive_quads(x, AFTER_MLP, phase ^ 1);
        store_normed(x);
        __syncwarp();
        store_sum_of_squares(x);
        for (int first = 0; first < block.logits.count; first += LOGIT_ROWS) {
            MatVec<Logits> product(pipeline, min_of(LOGIT_ROWS, block.logits.count - first));
            product.multiply(s.x, s.sums[buffer], LOGIT_ROWS);
            wait_for_sums(buffer);  // keeps warps at most one buffer ahead of the reducer
            buffer = next_buffer(buffer);
        }
    }

    __device__ void run() {
        prefetch_in_proj(table);
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, phase ^= 1) {
            if (block.state_columns.count) prefetch_recurrence();
            if (block.in_proj.count) in_proj(layer == 0);
            if (block.state_columns.count) recurrence();
            if (block.channels.count) out_proj();
            if (block.gate_up.count) gate_up();
            if (layer + 1 < LAYERS) prefetch_in_proj(table + FIELDS);
            if (block.channels.count) down();
        }
        if (block.logits.count) logits();
    }
};
