// The arithmetic of decays, as in `megatron_patch.ops.triton.tiles`: log decays are in base 2.

#pragma once

constexpr float LOG2_E = 1.4426950408889634f;

__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float sigmoid(float x) { return reciprocal(1 + exp2_of(x * -LOG2_E)); }

// logsigmoid(logit) / tau in base 2. log(1 + x) = x p(x) keeps the digits of small x; fitted on
// [0, 1], relative error 8.4e-6.
__device__ float log_decay(float logit, float inverse_tau) {
    const float x = exp2_of(fabsf(logit) * -LOG2_E);
    float p = 0.10122223943f - 0.02386915684f * x;
    p = -0.21004858613f + x * p;
    p = 0.32520660758f + x * p;
    p = -0.49936133623f + x * p;
    return (fminf(logit, 0) - x * (0.99999159575f + x * p)) * (inverse_tau * LOG2_E);
}

// 1 - 2^g, with all digits where the decay 2^g is close to one; fitted on [-1 / 32, 0], relative
// error 9.8e-6, and 1.1e-5 where the decay itself serves.
__device__ float key_of(float g, float decay) {
    return g > -0.03125f ? g * (-0.69314042222f - 0.23849897567f * g) : 1 - decay;
}
