// RMSNorm, router logits and the choice of TOP_K experts, for few tokens: the weights land in registers before the wait.
//
// Macros beside those of gemv.cuh: E experts, ALL_TOKENS of the call, TOP_K, EPS. Block (tokens in groups of TOKENS, 8
// experts), experts fastest. `keys` [ALL_TOKENS, E] holds the logits' keys, zero before and behind the kernel: each block
// leaves its own there, and the last block of a group of tokens waits until it sees them all. Blocks start in order, so it
// waits only for blocks that run.
//
// COLLECT, with several ranks: x is a residual and what comes into this rank's slots (BATCH pairs of columns at a time).
// Every block adds that up for its tokens, the first of a group of tokens stores it in sum.
#include "exchange.cuh"
#include "gemv.cuh"
#include "route.cuh"

static_assert(GROUPS == 1 && E % 8 == 0, "a block has 8 experts");

// No ordering is needed: a word is data and flag in one.
DEVICE void publish(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE u32 look(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// A token's keys, as soon as all are there; leaves zeros.
DEVICE void collect(u32 (&key)[KEYS], u32* keys, int lane) {
    bool complete;
    do {
        complete = true;
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            int e = lane + 32 * i;
            key[i] = e < E ? look(keys + e) : 0;
            complete &= e >= E || key[i] != 0;
        }
    } while (!__all_sync(~0u, complete));
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
        if (lane + 32 * i < E) publish(keys + lane + 32 * i, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) route_few(
    const char* weight,
#if COLLECT
    const u64* partial, const u16* stream,
#else
    const u16* x,
#endif
    const u16* norm_weight, const u16* bias,
#if COLLECT
    const Header* exchange, u32* sum,
#endif
    float* probs, int* ids, u32* keys) {
    extern __shared__ __align__(128) char memory[];
    __shared__ Sums sums;
    const Place at = my_place();
    const u32 x_shared = shared_address(memory), norm_shared = x_shared + TOKENS * K * 2;
    const int block = blockIdx.x % (E / 8), first = blockIdx.x / (E / 8) * TOKENS;

#if COLLECT
    const u32 ranks = load_4(&exchange->ranks);
#endif
    Ring ring;
    const Rows mine = my_rows(weight, block, at);
    fill_ring(ring, mine, at);
    copy_norm_weight(norm_shared, norm_weight);
    const float offset = load_bf16(bias + block * 8 + threadIdx.x % 8);

    wait_for_previous();
    trigger_next();  // late: who starts behind this kernel may read what was written before it, without a wait
#if COLLECT
    constexpr int PAIRS = K / 2;
    const int begin = first * PAIRS;
    collect<BATCH, 2, THREADS>(partial, ALL_TOKENS * PAIRS, stream, begin + threadIdx.x,
                               min(first + TOKENS, ALL_TOKENS) * PAIRS, exchange, ranks,
                               [&](int item, u32 pair) {
                                   store_shared_4(x_shared + (item - begin) * 4, pair);
                                   if (block == 0) sum[item] = pair;
                               });
#else
    int row[TOKENS];
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) row[j] = min(first + j, ALL_TOKENS - 1);
    copy_tokens(x_shared, x, row);
#endif
    wait_for_copies();
    __syncthreads();
    multiply(sums, ring, mine, x_shared, norm_shared, at);
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * TOKENS; i += THREADS) {
        int token = first + i / 8;
        if (token < ALL_TOKENS) publish(keys + token * E + block * 8 + i % 8, key_of(total(sums, i % 8, i / 8) + offset));
    }
    if (block != E / 8 - 1) return;
    for (int token = first + at.warp; token < min(first + TOKENS, ALL_TOKENS); token += WARPS) {
        u32 key[KEYS];
        collect(key, keys + token * E, at.lane);
        choose(key, probs + token * TOP_K, ids + token * TOP_K);
    }
}
