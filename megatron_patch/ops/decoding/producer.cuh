// The producer warps: copy the rows of all weights that this block multiplies into the pipeline.

#pragma once

#include "stages.cuh"

// Prefetches into L2 what a layer reads besides the large weights. The blocks share the work, a
// cache line for each of their lanes.
__device__ void prefetch_layer(const void* const* table) {
    const auto prefetch = [](const void* from, int bytes) {
        if (!from) return;
        for (int line = threadIdx.x % 32 * BLOCKS + blockIdx.x; line * 128 < bytes;
             line += 32 * BLOCKS)
            asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + line * 128));
    };
    prefetch(table[STATE], H * K * V * 4);
    prefetch(table[TOKEN_NORM], D * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION], D * KERNEL_SIZE * (int)sizeof(Weight));
    prefetch(table[CONVOLUTION_STATE], D * (KERNEL_SIZE - 1) * (int)sizeof(Weight));
    prefetch(table[OUT_GATE_BIAS], D * (int)sizeof(Weight));
    prefetch(table[AUG], D / 2 * (int)sizeof(Weight));
    prefetch(table[CHANNEL_NORM], D * (int)sizeof(Weight));
    prefetch(table[L1_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L2_BIAS], F * (int)sizeof(Weight));
    prefetch(table[L3_BIAS], D * (int)sizeof(Weight));
}

__device__ void produce(const Arguments& a, const Shared& s, Pipeline pipeline) {
    const BlockRows& block = s.rows;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const void* const* table = s.table + layer * FIELDS;
        const auto weight = [&](int field) { return (const Weight*)table[field]; };
        if (threadIdx.x / 32 == CONSUMERS + 1) prefetch_layer(table);
        pipeline.copy<InProj>(block.in_proj.count, [&](int i) {
            const int row = block.in_proj.first + i;
            return row < D / 2   ? weight(Q) + row * D
                   : row < D     ? weight(GATE_LOGITS) + (row - D / 2) * D
                   : row < 2 * D ? weight(V_PROJECTION) + (row - D) * D
                                 : weight(OUT_GATE) + (row - 2 * D) * D;
        });
        pipeline.copy<OutProj>(block.channels.count,
                               [&](int i) { return weight(OUT) + (block.channels.first + i) * D; });
        pipeline.copy<GateUp>(2 * block.gate_up.count, [&](int i) {
            return weight(i % 2 ? L2 : L1) + (block.gate_up.first + i / 2) * D;
        });
        pipeline.copy<Down>(block.channels.count,
                            [&](int i) { return weight(L3) + (block.channels.first + i) * F; });
    }
    pipeline.copy<Logits>(block.logits.count,
                          [&](int i) { return a.head + (long long)(block.logits.first + i) * D; });
}
