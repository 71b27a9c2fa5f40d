// Of the kernel, in the order of `Arguments` in decoder.py.

#pragma once

#include "numbers.cuh"

struct Arguments {
    const void* const* table;        // [LAYERS, FIELDS]
    const Weight *embedding, *head;  // [VOCABULARY, D]
    const Weight* final_norm;        // [D] or null
    float* exchange;                 // [EXCHANGED], from stage to stage, zero before the first step
    u32* counters;  // [2], zero before the first step: steps made, blocks at the end
    float embedding_scale, scale, inverse_tau, norm_eps, output_norm_eps;
    // Of a step.
    const long long* token;  // [1]
    Weight* logits;          // [VOCABULARY]

    // A token's row of the embedding; an error where PyTorch's look-up has one.
    __device__ const Weight* embedding_of(long long token) const {
        if ((u64)token >= VOCABULARY) __trap();
        return embedding + token * D;
    }
    // An entry of it, scaled and rounded as the model's.
    __device__ float embedded(Weight x) const { return widen(narrow(embedding_scale * widen(x))); }
};
