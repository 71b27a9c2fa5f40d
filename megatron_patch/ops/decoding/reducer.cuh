// The reducer warp: sums up the consumer warps' partial sums, applies what follows a product, and
// sends the result to all blocks.

#pragma once

#include "exchange.cuh"
#include "math.cuh"
#include "stages.cuh"

struct Reducer {
    const Arguments& a;
    Shared& s;
    const void* const* table;  // of the current layer
    u32 phase;
    const BlockRows& block = s.rows;
    const int lane = threadIdx.x % 32;
    int buffer = 0;

    // Waits for the sums of an operation, and calls work(index in the range, row, sums) for each
    // row.
    template <typename Work>
    __device__ void for_rows(const RowRange& range, Work work) {
        wait_for_sums(buffer);
        for (int i = lane; i < range.count; i += 32) work(i, range.first + i, s.sums[buffer]);
        buffer = next_buffer(buffer);
    }

    // The factor of an RMS norm. It commutes with the product, so it is applied after it.
    __device__ float rstd() { return rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps); }

    __device__ void in_proj() {
        for_rows(block.in_proj, [&](int i, int row, const float* sums) {
            float y = sum_of_row(sums, IN_PROJ_ROWS, i);
            if (D / 2 <= row && row < D) {  // a gate logit
                const float g = log_decay(y, a.inverse_tau);
                send(a.exchange, KEYS + row - D / 2, key_of(g), phase);
                y = __expf(g);
            }
            send(a.exchange, PROJECTIONS + row, y, phase);
        });
    }

    __device__ void recurrence() {
        for_rows(block.state_columns, [&](int i, int column, const float*) {
            float y = 0, aug = 0;
#pragma unroll
            for (int part = 0; part < StateLayout::SUMS; ++part) {
                y += s.o[part][i];
                aug += s.aug[part];
            }
            y *= a.scale;
            if (table[AUG]) y += sigmoid(aug * s.value[i]);
            send(a.exchange, OUTPUTS + block.head * V + column, y, phase);
        });
    }

    __device__ void out_proj() {
        for_rows(block.channels, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, CHANNEL_ROWS, i);
            send(a.exchange, AFTER_MIXER + row, s.residual[i], phase);
        });
    }

    __device__ void gate_up() {
        for_rows(block.gate_up, [&](int i, int row, const float* sums) {
            const float factor = rstd();
            const float y =
                sum_of_row(sums, GATE_UP_ROWS, 2 * i) * factor + load_or_zero(table[L1_BIAS], row);
            const float z = sum_of_row(sums, GATE_UP_ROWS, 2 * i + 1) * factor +
                            load_or_zero(table[L2_BIAS], row);
            const float x = y * sigmoid(y) * z;
            // Sent already split into high and low part. The phase takes a bit of the low part.
            const Weight high = narrow(x);
            send(a.exchange, MLP_HIDDEN + row,
                 __uint_as_float((u32)high << 16 | narrow(x - widen(high))), phase);
        });
    }

    __device__ void down() {
        for_rows(block.channels, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, CHANNEL_ROWS, i) + load_or_zero(table[L3_BIAS], row);
            send(a.exchange, AFTER_MLP + row, s.residual[i], phase);
        });
    }

    __device__ void logits() {
        for (int first = 0; first < block.logits.count; first += LOGIT_ROWS) {
            RowRange range = block.logits;
            range.first += first;
            range.count = min_of(LOGIT_ROWS, range.count - first);
            for_rows(range, [&](int i, int row, const float* sums) {
                a.logits[row] = narrow(sum_of_row(sums, LOGIT_ROWS, i) * rstd());
            });
        }
    }

    __device__ void run() {
        for (int i = lane; i < block.channels.count; i += 32)
            s.residual[i] = scaled_embedding(a, __ldg(s.embedding + block.channels.first + i));
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, phase ^= 1) {
            if (block.in_proj.count) in_proj();
            if (block.state_columns.count) recurrence();
            if (block.channels.count) out_proj();
            if (block.gate_up.count) gate_up();
            if (block.channels.count) down();
        }
        logits();
    }
};
