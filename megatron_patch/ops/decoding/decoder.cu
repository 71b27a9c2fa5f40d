// One token of one sequence through a whole MetaLA decoder, as a single launch, for GPUs with bulk
// copies (compute capability 9.0 or later). `megatron_patch.ops.triton.decoder` is for the others.
//
// Such a step takes as long as it takes to read the weights, if the memory is never left idle. But
// a stage needs what the one before it has computed in all blocks, and so many waits, five per
// layer, take longer than the reading. So the two are taken apart here:
//
// What a block reads of the weights does not depend on any result. It is one stream of rows, the
// same at every token. A warp or two (copier.cuh) copy it into shared memory, a ring of slots
// (ring.cuh), as far ahead as the ring is long. The warps that compute (compute.cuh) take the rows
// from there; one more (sender.cuh) sums up what they have and sends it to all blocks.
//
// What blocks send each other goes through global memory, each number by itself (exchange.cuh): the
// last bit of its mantissa tells the turn, which is another one in every layer. Who needs a number
// reads until the turn is the right one. So there is one way to memory and one back per stage, no
// fence and no counter. No number is overwritten too early: whatever is sent in a layer is needed,
// by way of other blocks, for all that is sent a layer later.
//
// A layer's stages, in each of which a block has its share of the rows:
//
//     project   norm, convolution; rows of the projections to q, gate logits, v and output gate
//     mix       recurrence and read-out of some columns of a head's state
//     emit      LayerNorm and gate of all heads; rows of the output projection, residual
//     expand    norm; rows of the first two products of the MLP, SwiGLU
//     contract  rows of the last product of the MLP, residual
//
// The first layer begins with the token's embedding; behind the last are norm and rows of the
// logits. Between stages all is float32, and sums have a fixed order.
//
// decoder.py compiles this file for a model, with its numbers for names in capital letters.

#include "compute.cuh"
#include "copier.cuh"
#include "sender.cuh"

extern "C" __global__ void __launch_bounds__(THREADS + 32 + 32 * COPIERS, 1)
    decode_token(const Arguments a) {
    // First of all, for its embedding is another way to memory away.
    const long long token = *(volatile const long long*)a.token;
    extern __shared__ __align__(128) char memory[];
    Shared& s = *(Shared*)(memory + SLOTS * SLOT);
    const u32 slots = shared_address(memory), full = shared_address(&s + 1),
              empty = full + 8 * SLOTS;
    const Ring ring{slots, full, empty, 0};
    for (int i = threadIdx.x; i < LAYERS * FIELDS; i += blockDim.x) s.table[i] = a.table[i];
    if (threadIdx.x < SLOTS) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * threadIdx.x));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * threadIdx.x),
                     "n"(WARPS));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const u32 steps = *(volatile u32*)a.counters;
    if (threadIdx.x == 0) {
        s.place = Place(blockIdx.x);
        s.embedding = a.embedding_of(token);
    }
    __syncthreads();
    const u32 turn = (steps * LAYERS + 1) & 1;
    if (threadIdx.x < THREADS) {
        Compute{a, s, ring, 0, s.table, turn}.run();
    } else if (threadIdx.x < THREADS + 32) {
        Sender{a, s, s.table, turn}.run();
    } else {
        copy_stream(a, s, ring);
    }
    // All blocks have read the number of steps when the last of them is here.
    if (threadIdx.x == 0 && atomicAdd(a.counters + 1, 1) == BLOCKS - 1) {
        a.counters[0] = steps + 1;
        a.counters[1] = 0;
    }
}
