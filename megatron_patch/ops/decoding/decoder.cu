// One token of one sequence through a whole MetaLA model in a single launch: a persistent,
// warp-specialised kernel for GPUs with bulk copies (compute capability 9.0 or later).
//
// A step at batch 1 takes at least as long as reading the weights once, and no longer if memory is
// never idle. But each operation needs the results of the one before from all blocks, and waiting
// for those, five times a layer, takes longer than the reading. So the two are decoupled:
//
// - What a block reads of the weights depends on no result. Producer warps (producer.cuh) copy this
//   fixed stream of rows into a multi-stage pipeline in shared memory (stages.cuh), as far ahead as
//   it has stages.
// - Consumer warps (consumer.cuh) multiply the rows with the current vector (matvec.cuh).
// - A reducer warp (reducer.cuh) adds up the consumers' partial sums and sends the results to all
//   blocks, through global memory (exchange.cuh).
//
// The operations of a layer, whose rows are divided among the blocks:
//
//     in_proj     norm and convolution; projection to q, gate logits, v and output gate
//     recurrence  update and output of some columns of a head's state
//     out_proj    LayerNorm and output gate of all heads; output projection, residual
//     gate_up     norm; the MLP's first two products and SwiGLU
//     down        the MLP's last product, residual
//
// The embedding precedes the first layer; the final norm and the logits follow the last. Between
// operations everything is float32, and sums have a fixed order.
//
// decoder.py compiles this file for a model; `macros_for` lists its macros.

#include "consumer.cuh"
#include "producer.cuh"
#include "reducer.cuh"

extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS + 32 + 32 * PRODUCERS, 1)
    decode_token(const Arguments a) {
    // The token comes first, because its embedding takes another trip to memory.
    const long long token = *(volatile const long long*)a.token;
    extern __shared__ __align__(128) char memory[];
    Shared& s = *(Shared*)(memory + STAGES * STAGE_BYTES);
    const u32 stages = shared_address(memory), full = shared_address(&s + 1),
              empty = full + 8 * STAGES;
    const Pipeline pipeline{stages, full, empty, 0};
    for (int i = threadIdx.x; i < LAYERS * FIELDS; i += blockDim.x) s.table[i] = a.table[i];
    if (threadIdx.x < STAGES) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * threadIdx.x));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * threadIdx.x),
                     "n"(CONSUMERS));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const u32 steps = *(volatile u32*)a.counters;
    if (threadIdx.x == 0) {
        s.rows = BlockRows(blockIdx.x);
        if ((u64)token >= VOCABULARY) __trap();  // an error of the GPU, as in PyTorch's embedding
        s.embedding = a.embedding + token * D;
    }
    __syncthreads();
    const u32 phase = (steps * LAYERS + 1) & 1;
    if (threadIdx.x < CONSUMER_THREADS) {
        Consumer{a, s, pipeline, 0, s.table, phase}.run();
    } else if (threadIdx.x < CONSUMER_THREADS + 32) {
        Reducer{a, s, s.table, phase}.run();
    } else {
        produce(a, s, pipeline);
    }
    // The last block to finish counts the step: by then all have read the counter.
    if (threadIdx.x == 0 && atomicAdd(a.counters + 1, 1) == BLOCKS - 1) {
        a.counters[0] = steps + 1;
        a.counters[1] = 0;
    }
}
