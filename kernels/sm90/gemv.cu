// y[j, n] = factor[j] sum_k weight[n, k] norm_weight[k] x[row j, k] + bias[n] + residual[j, n], for 1 ... 8 tokens j.
//
// Macros beside those of gemv.cuh: N rows of the weight, EPS, HAS_ROWS, HAS_BIAS, HAS_RESIDUAL (which parameters there
// are), FLOAT_OUT (is out fp32?). A block for every ROWS rows.
//
// With several ranks: PUSH stores the results into slots on every rank, not in out. COLLECT: x is a residual and what comes
// into this rank's slots (BATCH pairs of columns at a time); every block adds that up for itself, one stores it in sum.
#include "exchange.cuh"
#include "gemv.cuh"

constexpr int RESULTS = (ROWS * TOKENS + THREADS - 1) / THREADS;
static_assert(64 % ROWS == 0 || N % ROWS == 0, "the last block reads no rows beyond the last tile");

struct Result {  // the i-th that this thread finishes
    int token, row, n;
    bool exists;
    DEVICE explicit Result(int i) {
        int index = threadIdx.x + i * THREADS;
        token = index / ROWS, row = index % ROWS, n = blockIdx.x * ROWS + row;
        exists = index < ROWS * TOKENS && n < N;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemv(
    const char* weight,
#if COLLECT
    const u64* partial, const u16* stream,
#else
    const u16* x,
#endif
#if NORM
    const u16* norm_weight,
#endif
#if HAS_ROWS
    const int* rows,
#endif
#if HAS_BIAS
    const u16* bias,
#endif
#if HAS_RESIDUAL
    const u16* residual,
#endif
#if PUSH || COLLECT
    const Header* exchange,
#endif
#if COLLECT
    u32* sum,
#endif
#if PUSH
    u64* out
#elif FLOAT_OUT
    float* out
#else
    u16* out
#endif
) {
    extern __shared__ __align__(128) char memory[];
    __shared__ Sums sums;
#if PUSH
    __shared__ Header known;
    const Ranks ranks{exchange, known};
#endif
    const Place at = my_place();
    const u32 x_shared = shared_address(memory), norm_shared = x_shared + TOKENS * K * 2;

    trigger_next();
#if COLLECT
    const u32 ranks = load_4(&exchange->ranks);
#endif
    Ring ring;
    const Rows mine = my_rows(weight, blockIdx.x, at);
    fill_ring(ring, mine, at);
    float offset[RESULTS] = {}, residuals[RESULTS] = {};
#if NORM
    copy_norm_weight(norm_shared, norm_weight);
#endif
#if HAS_BIAS
#pragma unroll
    for (int i = 0; i < RESULTS; ++i)
        if (Result r(i); r.exists) offset[i] = load_bf16(bias + r.n);
#endif
#if PUSH
    copy_header(known, exchange);
#endif

    wait_for_previous();
#if PUSH
    const u32 tag = tag_of(exchange);
#endif
#if COLLECT
    collect<BATCH, 2, THREADS>(partial, TOKENS * K / 2, stream, threadIdx.x, TOKENS * K / 2, exchange, ranks,
                               [&](int item, u32 pair) {
                                   store_shared_4(x_shared + item * 4, pair);
                                   if (blockIdx.x == 0) sum[item] = pair;
                               });
#else
    int row[TOKENS];
#pragma unroll
    for (int j = 0; j < TOKENS; ++j) {
#if HAS_ROWS
        row[j] = load_4(rows + j);
#else
        row[j] = j;
#endif
    }
    copy_tokens(x_shared, x, row);
#endif
#if HAS_RESIDUAL
#pragma unroll
    for (int i = 0; i < RESULTS; ++i)
        if (Result r(i); r.exists) residuals[i] = load_bf16(residual + r.token * N + r.n);
#endif
    wait_for_copies();
    __syncthreads();
    multiply(sums, ring, mine, x_shared, norm_shared, at);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RESULTS; ++i)
        if (Result r(i); r.exists) {
            float y = total(sums, r.row, r.token) + offset[i] + residuals[i];
#if PUSH
            push(out, TOKENS * N, r.token * N + r.n, y, tag, ranks);
#elif FLOAT_OUT
            out[(u64)r.token * N + r.n] = y;
#else
            out[r.token * N + r.n] = to_bf16(y);
#endif
        }
}
