// y[j, n] = factor[j] sum_k weight[n, k] norm_weight[k] x[row j, k] + bias[n] + residual[j, n], for 1 ... 8 tokens j.
//
// Macros beside those of gemv.cuh: N rows of the weight, EPS, HAS_ROWS, HAS_BIAS, HAS_RESIDUAL (which parameters there are),
// FLOAT_OUT (is out fp32?), GRID blocks. With fewer blocks than blocks of rows a block goes on with the next ones: it fetches x
// once, and its ring runs on from one block of rows into the next.
#include "gemv.cuh"

constexpr int BLOCKS = (N + ROWS - 1) / ROWS;
constexpr bool LOOPED = GRID < BLOCKS;
constexpr int RESULTS = (ROWS * TOKENS + THREADS - 1) / THREADS;
static_assert(64 % ROWS == 0 || N % ROWS == 0, "the last block reads no rows beyond the last tile");

struct Result {  // the i-th that this thread finishes of a block of rows
    int token, n;
    bool exists;
    DEVICE Result(int block, int i) {
        int index = threadIdx.x + i * THREADS;
        token = index / ROWS, n = block * ROWS + index % ROWS, exists = index < ROWS * TOKENS && n < N;
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
    __shared__ Sums sums[LOOPED ? 2 : 1];
    const Place at = my_place();
    const u32 x_shared = shared_address(memory), norm_shared = x_shared + TOKENS * K * 2;

    trigger_next();
    Ring ring;
    Rows mine = my_rows(weight, blockIdx.x, at);
    fill_ring(ring, mine, at);
#if NORM
    copy_norm_weight(norm_shared, norm_weight);
#endif
    float offset[RESULTS] = {}, residuals[RESULTS] = {};
    auto read_bias = [&](int block) {
#if HAS_BIAS
#pragma unroll
        for (int i = 0; i < RESULTS; ++i)
            if (Result r(block, i); r.exists) offset[i] = load_bf16(bias + r.n);
#endif
    };
    auto read_residual = [&](int block) {
#if HAS_RESIDUAL
#pragma unroll
        for (int i = 0; i < RESULTS; ++i)
            if (Result r(block, i); r.exists) residuals[i] = load_bf16(residual + r.token * N + r.n);
#endif
    };
    read_bias(blockIdx.x);

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
    read_residual(blockIdx.x);
    wait_for_copies();
    __syncthreads();

    for (int block = blockIdx.x, turn = 0; LOOPED ? block < BLOCKS : turn == 0; block += GRID, ++turn) {
        Sums& now = sums[LOOPED ? turn % 2 : 0];  // two, so that one barrier a turn is enough
        const bool more = LOOPED && block + GRID < BLOCKS;
        const Rows next = my_rows(weight, block + GRID, at);
        multiply<LOOPED>(now, ring, mine, next, more, x_shared, norm_shared, at);
        mine = next;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < RESULTS; ++i)
            if (Result r(block, i); r.exists) {
                float y = total(now, r.n - block * ROWS, r.token) + offset[i] + residuals[i];
#if FLOAT_OUT
                out[(u64)r.token * N + r.n] = y;
#else
                out[r.token * N + r.n] = to_bf16(y);
#endif
            }
        if (more) {
            read_bias(block + GRID);
            read_residual(block + GRID);
        }
    }
}
