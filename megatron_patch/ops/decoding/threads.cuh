// How the threads of a block wait for each other.

#pragma once

#include "layout.cuh"

// Among all threads that compute.
__device__ void barrier() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// From these to the warp that sends: the sums of a stage are there. Who computes need not wait for
// who sends, and has for each of three stages in succession another barrier and place for sums: a
// fourth cannot begin before the first was sent, since it needs what other blocks made of that.
__device__ void hand_over(int side) {
    asm volatile("bar.arrive %0, %1;" ::"r"(2 + side), "n"(THREADS + 32) : "memory");
}
__device__ void await_sums(int side) {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + side), "n"(THREADS + 32) : "memory");
}
__device__ int next(int side) { return side == SIDES - 1 ? 0 : side + 1; }

__device__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

__device__ void await_phase(u32 at, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(at),
        "r"(parity)
        : "memory");
}
