// y[j, n] = factor[j] sum_k weight[n, k] norm_weight[k] x[row j, k] + bias[n] + residual[j, n], for 1 ... 8 tokens j.
//
// Macros beside those of gemv.cuh: N rows of the weight, EPS, HAS_ROWS, HAS_BIAS, HAS_RESIDUAL (which parameters there
// are), FLOAT_OUT (is out fp32?). A block for every ROWS rows.
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
    const char* weight, const u16* x,
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
#if FLOAT_OUT
    float* out
#else
    u16* out
#endif
) {
    extern __shared__ __align__(128) char memory[];
    __shared__ Sums sums;
    const Place at = my_place();
    const u32 x_shared = shared_address(memory), norm_shared = x_shared + TOKENS * K * 2;

    trigger_next();
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

    wait_for_previous();
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
#if FLOAT_OUT
            out[(u64)r.token * N + r.n] = y;
#else
            out[r.token * N + r.n] = to_bf16(y);
#endif
        }
}
