// What bench/read_kernel.py's kernel does, which reads a block of static data and then a vector, where the step that it stands
// for exchanges too: it pushes partial sums into slots, or collects them. For the yardstick of benches; no operator's kernel.
//
// A block reads WORDS words. values: how many partial sums a rank has. They are pushed when the block's data is there, by
// every block its part of them; every block collects all, BATCH pairs of them at a time, as gemv.cu's do.
//
// Macros: WORDS, VECTOR words of the vector, THREADS, COLLECT (else it pushes), BATCH.
#include "exchange.cuh"

constexpr int CHUNKS = WORDS / 4 / THREADS;
static_assert(CHUNKS * 4 * THREADS == WORDS, "a block's data divides among its threads");
constexpr u32 NEVER = 0x5EED1E55;  // a sum that keeps the loads alive, and that none has

extern "C" __global__ void __launch_bounds__(THREADS)
read_exchange(const uint4* source, const u32* vector, const Header* exchange, u64* slots, const u32* values, u32* out) {
    __shared__ Header known;
    const Ranks ranks{exchange, known};
    trigger_next();
    const int count = load_4(values);
    copy_header(known, exchange);
    uint4 data[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
        data[i] = load_weight(source + (u64)blockIdx.x * (WORDS / 4) + i * THREADS + threadIdx.x);
    wait_for_copies();
    __syncthreads();
    wait_for_previous();

    u32 total = 0;
#if COLLECT
    collect<BATCH, 2, THREADS>(slots, count / 2, (const u16*)vector, threadIdx.x, count / 2, exchange, ranks.count(),
                               [&](int, u32 pair) { total ^= pair; });
#else
    const u32 tag = tag_of(exchange);
    for (int i = threadIdx.x; i < VECTOR; i += THREADS) total ^= load_4(vector + i);
#endif
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) total ^= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
    const int any = __syncthreads_or(total == NEVER);
#if COLLECT
    if (any) out[0] = total;
#else
    const int part = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * part;
    for (int i = first + threadIdx.x; i < min(first + part, count); i += THREADS) push(slots, count, i, any, tag, ranks);
#endif
}
