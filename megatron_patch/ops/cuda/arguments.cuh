// Of the kernel.

#pragma once

#include "layout.cuh"

struct Arguments {
    const void* const* table;         // [LAYERS, FIELDS]
    const Weight *final_norm, *head;  // [D] or null, [VOCABULARY, D]
    const float* x;                   // [D], the embedding
    float* exchange;  // [EXCHANGED], from stage to stage, zero before the first step
    Weight* logits;   // [VOCABULARY]
    u32* counters;    // [2], zero before the first step: steps made, blocks at the end
    float scale, inverse_tau, norm_eps, output_norm_eps;
};
