// Where chunks lie. BOUND is how many bytes a number of `cu_seqlens` has, zero where sequences are
// not packed.

#pragma once

#include "tiles.cuh"

struct Chunks {
    const int* table;    // of packed sequences: each chunk's sequence, or -1, and its index there
    const void* bounds;  // their first tokens
    i64 tokens, count;   // of a sequence otherwise

    __device__ i64 bound(int sequence) const {
        return BOUND == 8 ? ((const i64*)bounds)[sequence] : ((const int*)bounds)[sequence];
    }
};

struct Place {
    i64 batch, first;  // the chunk's first token
    int length;        // tokens; negative: there is no such chunk

    __device__ Place(const Chunks& chunks, int unit) {
        if (BOUND) {
            const int sequence = chunks.table[2 * unit];
            batch = 0;
            length = -1;
            if (sequence < 0) return;
            first = chunks.bound(sequence) + (i64)chunks.table[2 * unit + 1] * C;
            length = (int)min(chunks.bound(sequence + 1) - first, (i64)C);
        } else {
            batch = unit / (int)chunks.count;
            first = (i64)(unit % (int)chunks.count) * C;
            length = (int)min(chunks.tokens - first, (i64)C);
        }
    }

    // The chunk's first row in a tensor [B, T, H, ...] of these strides.
    __device__ i64 in(const i64 (&strides)[3], int head) const {
        return batch * strides[0] + first * strides[1] + head * strides[2];
    }
};

__device__ Place anew(Place place) {
    place.batch = anew(place.batch);
    place.first = anew(place.first);
    return place;
}
