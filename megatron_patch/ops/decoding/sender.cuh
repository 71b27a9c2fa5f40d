// What the warp that sends does.

#pragma once

#include "arguments.cuh"
#include "exchange.cuh"
#include "product.cuh"

// Sums up what the warps that compute have, and sends it to all blocks.
struct Sender {
    const Arguments& a;
    Shared& s;
    const void* const* table;  // of the layer at hand
    u32 turn;
    const Place& place = s.place;
    const int lane = threadIdx.x % 32;
    int side = 0;

    // Work for each row of a share, of which there are sums [WARPS, stride].
    template <typename Work>
    __device__ void for_rows(const Share& share, Work work) {
        await_sums(side);
        for (int i = lane; i < share.count; i += 32) work(i, share.first + i, s.sums[side]);
        side = next(side);
    }

    __device__ float norm_factor() { return rsqrtf(sum_of_squares(s.squares) / D + a.norm_eps); }

    __device__ void project() {
        for_rows(place.project, [&](int i, int row, const float* sums) {
            float y = sum_of_row(sums, PROJECTED, i);
            if (D / 2 <= row && row < D) {
                const float g = log_decay(y, a.inverse_tau);
                send(a.exchange, KEYS + row - D / 2, key_of(g), turn);
                y = __expf(g);
            }
            send(a.exchange, PROJECTIONS + row, y, turn);
        });
    }

    __device__ void mix() {
        for_rows(place.columns, [&](int i, int column, const float*) {
            float y = 0, aug = 0;
#pragma unroll
            for (int part = 0; part < OfState::SUMS; ++part) {
                y += s.read_out[part][i];
                aug += s.aug[part];
            }
            y *= a.scale;
            if (table[AUG]) y += sigmoid(aug * s.value[i]);
            send(a.exchange, READ_OUT + place.head * V + column, y, turn);
        });
    }

    __device__ void emit() {
        for_rows(place.own, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, OWN, i);
            send(a.exchange, MIDDLE + row, s.residual[i], turn);
        });
    }

    __device__ void expand() {
        for_rows(place.expand, [&](int i, int row, const float* sums) {
            const float factor = norm_factor();
            const float y = sum_of_row(sums, EXPANDED, 2 * i) * factor + entry(table[L1_BIAS], row);
            const float z =
                sum_of_row(sums, EXPANDED, 2 * i + 1) * factor + entry(table[L2_BIAS], row);
            const float x = y * sigmoid(y) * z;
            // As the next factor's two parts, of which the lower one loses a bit.
            const Weight high = narrow(x);
            send(a.exchange, INNER + row,
                 __uint_as_float((u32)high << 16 | narrow(x - widen(high))), turn);
        });
    }

    __device__ void contract() {
        for_rows(place.own, [&](int i, int row, const float* sums) {
            s.residual[i] += sum_of_row(sums, OWN, i) + entry(table[L3_BIAS], row);
            send(a.exchange, OUTER + row, s.residual[i], turn);
        });
    }

    __device__ void logits() {
        for (int first = 0; first < place.logits.count; first += HEAD_ROWS) {
            Share rows = place.logits;
            rows.first += first;
            rows.count = smaller(HEAD_ROWS, rows.count - first);
            for_rows(rows, [&](int i, int row, const float* sums) {
                a.logits[row] = narrow(sum_of_row(sums, HEAD_ROWS, i) * norm_factor());
            });
        }
    }

    __device__ void run() {
        for (int i = lane; i < place.own.count; i += 32)
            s.residual[i] = a.embedded(__ldg(s.embedding + place.own.first + i));
        for (int layer = 0; layer < LAYERS; ++layer, table += FIELDS, turn ^= 1) {
            if (place.project.count) project();
            if (place.columns.count) mix();
            if (place.own.count) emit();
            if (place.expand.count) expand();
            if (place.own.count) contract();
        }
        logits();
    }
};
