// out[i] = residual[row] + the sum of the ranks' partial[row] as it comes into the slots; row = i, with GATHER rows[i].
//
// Macros: SLOT_ROWS of partial, ROWS of out, COLUMNS (even), GATHER, THREADS. A thread two columns.
#include "exchange.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
exchange_slots(const u64* partial, const u16* residual,
#if GATHER
               const int* rows,
#endif
               const Header* exchange, u32* out) {
    constexpr int PAIRS = COLUMNS / 2;
    trigger_next();
    const u32 ranks = load_4(&exchange->ranks);
    wait_for_previous();
    const int item = blockIdx.x * THREADS + threadIdx.x;
    if (item >= ROWS * PAIRS) return;
#if GATHER
    const int from = (int)load_4(rows + item / PAIRS) * PAIRS + item % PAIRS;
#else
    const int from = item;
#endif
    collect<1, MOST_RANKS, 1>(partial, SLOT_ROWS * PAIRS, residual, from, from + 1, exchange, ranks,
                              [&](int, u32 pair) { out[item] = pair; });
}
