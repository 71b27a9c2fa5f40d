// What the warps that copy do.

#pragma once

#include "arguments.cuh"
#include "ring.cuh"

// Asks for all that a layer reads beside the large weights, a line by each of all blocks' lanes.
__device__ void prefetch_layer(const void* const* table) {
    const auto prefetch = [](const void* from, int bytes) {
        if (!from) return;
        for (int line = threadIdx.x % 32 * BLOCKS + blockIdx.x; line * 128 < bytes;
             line += 32 * BLOCKS)
            asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + line * 128));
    };
    prefetch(table[STATE], H * K * V * 4);
    prefetch(table[TOKEN_NORM], D * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION], D * TAPS * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION_STATE], D * (TAPS - 1) * (int)sizeof(Weight));
    prefetch(table[OUT_GATE_BIAS], D * (int)sizeof(Weight));
    prefetch(table[AUG], D / 2 * (int)sizeof(Weight));
    prefetch(table[CHANNEL_NORM], D * (int)sizeof(Weight));
    prefetch(table[L1_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L2_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L3_BIAS], D * (int)sizeof(Weight));
}

__device__ void copy_stream(const Arguments& a, const Shared& s, Ring ring) {
    const Place& place = s.place;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const void* const* table = s.table + layer * FIELDS;
        const auto weight = [&](int field) { return (const Weight*)table[field]; };
        if (threadIdx.x / 32 == WARPS + 1) prefetch_layer(table);
        ring.copy<ProjectRows>(place.project.count, [&](int i) {
            const int row = place.project.first + i;
            return row < D / 2   ? weight(Q) + row * D
                   : row < D     ? weight(GATE_LOGITS) + (row - D / 2) * D
                   : row < 2 * D ? weight(V_PROJECTION) + (row - D) * D
                                 : weight(OUT_GATE) + (row - 2 * D) * D;
        });
        ring.copy<EmitRows>(place.own.count,
                            [&](int i) { return weight(OUT) + (place.own.first + i) * D; });
        ring.copy<ExpandRows>(2 * place.expand.count, [&](int i) {
            return weight(i % 2 ? L2 : L1) + (place.expand.first + i / 2) * D;
        });
        ring.copy<ContractRows>(place.own.count,
                                [&](int i) { return weight(L3) + (place.own.first + i) * F; });
    }
    ring.copy<HeadRows>(place.logits.count,
                        [&](int i) { return a.head + (long long)(place.logits.first + i) * D; });
}
