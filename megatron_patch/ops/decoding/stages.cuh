// The multi-stage pipeline through which weights reach the consumer warps, and the barriers between
// the roles of warps in a block.

#pragma once

#include "layout.cuh"

// A named barrier among the consumer warps.
__device__ void consumer_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMER_THREADS) : "memory");
}

// A named barrier at which consumers only arrive and the reducer warp waits: the partial sums of an
// operation are in buffer `buffer`. Three buffers in rotation, each with its own barrier, are
// enough without a signal back: a fourth operation cannot begin before the first was reduced and
// sent, because it depends on what other blocks made of that.
__device__ void signal_reducer(int buffer) {
    asm volatile("bar.arrive %0, %1;" ::"r"(2 + buffer), "n"(CONSUMER_THREADS + 32) : "memory");
}
__device__ void wait_for_sums(int buffer) {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + buffer), "n"(CONSUMER_THREADS + 32) : "memory");
}
__device__ int next_buffer(int buffer) { return buffer == SUM_BUFFERS - 1 ? 0 : buffer + 1; }

__device__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

__device__ void mbarrier_wait(u32 at, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(at),
        "r"(parity)
        : "memory");
}

// One side's view of the pipeline. Producers wait on a stage's `empty` mbarrier and fill it by bulk
// copies (TMA), which complete on its `full` mbarrier; consumers do the reverse.
struct Pipeline {
    u32 stages, full, empty;  // addresses in shared memory: of the stages and of their mbarriers
    u32 position;             // stages that this side has gone through

    // Producer: copies `count` rows, row i from source(i).
    template <typename R, typename Source>
    __device__ void copy(int count, Source source) {
        const int lane = threadIdx.x % 32, producer = threadIdx.x / 32 - CONSUMERS - 1;
        for (int first = 0; first < count; first += R::STAGE_ROWS, ++position) {
            if (position % PRODUCERS != producer) continue;
            const int rows = min_of(R::STAGE_ROWS, count - first);
            const u32 stage = position % STAGES;
            if (position >= STAGES) mbarrier_wait(empty + 8 * stage, (position / STAGES - 1) & 1);
            if (position >= IN_FLIGHT) {
                const u32 landed = position - IN_FLIGHT;
                mbarrier_wait(full + 8 * (landed % STAGES), landed / STAGES & 1);
            }
            const u32 filled = full + 8 * stage;
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(filled),
                             "r"(rows * R::ROW_BYTES)
                             : "memory");
            __syncwarp();
            for (int row = lane; row < rows; row += 32)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1], %2, [%3];" ::"r"(stages + stage * STAGE_BYTES + row * R::STRIDE),
                    "l"(source(first + row)), "n"(R::ROW_BYTES), "r"(filled)
                    : "memory");
        }
    }

    // Consumer: waits until the next `count` stages are full.
    __device__ void wait(int count) {
        const u32 at = position + threadIdx.x % 32;
        if (at - position < count) mbarrier_wait(full + 8 * (at % STAGES), at / STAGES & 1);
        __syncwarp();
    }

    // Consumer: this warp has read the next `count` stages.
    __device__ void release(int count) {
        const u32 at = position + threadIdx.x % 32;
        __syncwarp();
        if (at - position < count)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * (at % STAGES))
                         : "memory");
        position += count;
    }
};
