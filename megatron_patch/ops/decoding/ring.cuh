// The stream of rows through shared memory.

#pragma once

#include "threads.cuh"

// One end of the ring: `position` counts the slots that were filled and emptied before.
struct Ring {
    u32 slots, full, empty;  // addresses in shared memory: of slots and of their barriers
    u32 position;

    // Copies `count` rows into the ring, each from where source(row) says.
    template <typename R, typename Source>
    __device__ void copy(int count, Source source) {
        const int lane = threadIdx.x % 32, copier = threadIdx.x / 32 - WARPS - 1;
        for (int first = 0; first < count; first += R::IN_SLOT, ++position) {
            if (position % COPIERS != copier) continue;
            const int rows = smaller(R::IN_SLOT, count - first);
            const u32 slot = position % SLOTS;
            if (position >= SLOTS) await_phase(empty + 8 * slot, (position / SLOTS - 1) & 1);
            if (position >= IN_FLIGHT) {
                const u32 landed = position - IN_FLIGHT;
                await_phase(full + 8 * (landed % SLOTS), landed / SLOTS & 1);
            }
            const u32 filled = full + 8 * slot;
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(filled),
                             "r"(rows * R::SIZE)
                             : "memory");
            __syncwarp();
            for (int row = lane; row < rows; row += 32)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1], %2, [%3];" ::"r"(slots + slot * SLOT + row * R::STRIDE),
                    "l"(source(first + row)), "n"(R::SIZE), "r"(filled)
                    : "memory");
        }
    }

    // Until so many slots, from the next on, are full.
    __device__ void await_slots(int count) {
        const u32 at = position + threadIdx.x % 32;
        if (at - position < count) await_phase(full + 8 * (at % SLOTS), at / SLOTS & 1);
        __syncwarp();
    }

    // This warp has read them.
    __device__ void release(int count) {
        const u32 at = position + threadIdx.x % 32;
        __syncwarp();
        if (at - position < count)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * (at % SLOTS))
                         : "memory");
        position += count;
    }
};
