// out [ROWS, COLUMNS] fp32: the ranks' columns side by side. Rank r has ceil(COLUMNS r / ranks) ... of them, and x
// [ROWS, its columns] in its exchange area. The last kernel of a step: it counts the step.
//
// Macros: ROWS, COLUMNS, UNITS that a thread has in flight, THREADS.
#include "exchange.cuh"

template <typename Unit>
DEVICE Unit load(const float* p);
template <>
DEVICE uint4 load<uint4>(const float* p) { return load_system_16(p); }
template <>
DEVICE u32 load<u32>(const float* p) { return load_system((const u32*)p); }
DEVICE void store(float* p, uint4 v) { store_16(p, v); }
DEVICE void store(float* p, u32 v) { *(u32*)p = v; }

DEVICE int first_column(u32 rank, u32 ranks) { return (int)(((u64)COLUMNS * rank + ranks - 1) / ranks); }

// Unit by unit, from wherever each is. bounds[r]: rank r's first column.
template <typename Unit>
DEVICE void gather(const float* x, float* out, const int (&bounds)[MOST_RANKS + 1], const Ranks& ranks) {
    const u32 count = ranks.count();
    constexpr int WIDTH = sizeof(Unit) / 4, LINE = COLUMNS / WIDTH, ALL = ROWS * LINE;
#pragma unroll 1
    for (int start = blockIdx.x * (UNITS * THREADS) + threadIdx.x; start < ALL; start += gridDim.x * (UNITS * THREADS)) {
        Unit v[UNITS];
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            const int unit = start + i * THREADS;
            if (unit >= ALL) continue;
            const int row = unit / LINE, column = unit % LINE * WIDTH;
            u32 r = 0;
            while (r + 1 < count && column >= bounds[r + 1]) ++r;
            v[i] = load<Unit>(ranks.at(r, x) + (u64)row * (bounds[r + 1] - bounds[r]) + column - bounds[r]);
        }
#pragma unroll
        for (int i = 0; i < UNITS; ++i)
            if (const int unit = start + i * THREADS; unit < ALL) store(out + (u64)unit * WIDTH, v[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
all_gather(const float* x, Header* exchange, Flags* flags, u32* counter, float* out) {
    __shared__ Header known;
    __shared__ int bounds[MOST_RANKS + 1];
    trigger_next();
    copy_header(known, exchange);
    wait_for_copies();
    __syncthreads();
    const Ranks ranks{exchange, known};
    const u32 count = ranks.count();
    if (threadIdx.x <= count) bounds[threadIdx.x] = first_column(threadIdx.x, count);
    wait_for_previous();
    const u32 tag = tag_of(exchange);
    await_ready(flags, tag, ranks);  // and a barrier behind the bounds
    if (COLUMNS % (4 * count) == 0) gather<uint4>(x, out, bounds, ranks);
    else gather<u32>(x, out, bounds, ranks);
    // Nobody overwrites x, or anything else in its area, in the next step before all have read: a rank that is behind this
    // wait knows all others to be behind every exchange of the step.
    if (await_done(flags, tag, ranks, counter) && threadIdx.x == 0) {
        const u32 next = load_system(&exchange->step) + 1;
        store_system(&exchange->step, next ? next : 1);
    }
}
