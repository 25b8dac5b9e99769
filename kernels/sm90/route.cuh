// The choice of experts: logits travel as keys, and a warp finds the best TOP_K of E and their softmax.
//
// A key orders as its logit does, and it is never 0: zeroed memory says by itself which logits have not arrived.
#pragma once
#include "common.cuh"

constexpr int KEYS = (E + 31) / 32;  // a lane's: of experts lane, lane + 32, ...

DEVICE u32 key_of(float logit) {
    u32 bits = __float_as_uint(logit);
    return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}
DEVICE float logit_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// probs[0 ... TOP_K) and ids of one token, best first, the lowest expert first where logits are equal. By a whole warp,
// which loses its keys; 0 where there is no expert. The lanes that `store` do.
DEVICE void choose(u32 (&key)[KEYS], float* probs, int* ids, bool stores = threadIdx.x % 32 == 0) {
    const int lane = threadIdx.x % 32;
    int expert[TOP_K];
    float weight[TOP_K], best = 0, sum = 0;
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
        u32 highest = 0, lowest = ~0u;
#pragma unroll
        for (int i = 0; i < KEYS; ++i) highest = max(highest, key[i]);
        highest = __reduce_max_sync(~0u, highest);
#pragma unroll
        for (int i = KEYS - 1; i >= 0; --i)
            if (key[i] == highest) lowest = lane + 32 * i;
        lowest = __reduce_min_sync(~0u, lowest);
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
            if (lowest == lane + 32 * i) key[i] = 0;
        if (j == 0) best = logit_of(highest);
        expert[j] = lowest;
        weight[j] = expf(logit_of(highest) - best);
        sum += weight[j];
    }
    if (stores) {
#pragma unroll
        for (int j = 0; j < TOP_K; ++j) {
            probs[j] = weight[j] / sum;
            ids[j] = expert[j];
        }
    }
}
