// RMSNorm, router logits and the choice of TOP_K experts, for many tokens: wgmma, 64 experts a warpgroup, tokens as
// columns.
//
// Macros: K columns (a multiple of 64), E experts, ALL_TOKENS of the call, TOKENS a block (16, 32 or 64), TURN steps of 64
// columns at a time, TOP_K, EPS. weight [E, K] in layout "tiles". A block has all experts, so it chooses from its own
// logits. SHARE: each rank routes its share of the tokens, as exchange_rows.cu has just left them here, and tells all ranks,
// where probs and ids are in the exchange area; the kernel ends when all have, and have stored their rows of x.
//
// The weights come by bulk copies, a turn ahead. The threads fetch x, multiply it by the norm's weight and store it as
// operands of wgmma: the rounded product and, since no expert must win by rounding, what rounding took. The fence between
// such stores and wgmma waits for a thread's loads, too; hence turns of several steps, and x of the next is asked for
// behind the fence.
#include "route.cuh"
#include "wgmma.cuh"
#if SHARE
#include "exchange.cuh"
#endif

constexpr int STEPS = K / 64, GROUPS = (E + 63) / 64, THREADS = 128 * GROUPS;
constexpr int TILE_BYTES = 8192, STAGE_BYTES = GROUPS * TILE_BYTES, STAGES = 2 * TURN;
constexpr int OPERAND_BYTES = TOKENS * 128;  // of a step; two of them, product and rest, are 2 * OPERAND_BYTES
constexpr int CHUNKS = TURN * TOKENS * 8, MINE = (CHUNKS + THREADS - 1) / THREADS;  // of x in a turn, and those of a thread
static_assert(STEPS % TURN == 0, "no wgmma may be conditional");

struct Block {
    u32 stages, operands, arrived;  // addresses of the weights, the operands and a barrier for each stage
    int first, tokens;              // the first token, and how many there are in all blocks
    int step, start;                // token i is row i * step + start of x
    DEVICE u64 row(int token) const { return (u64)(token * step + start); }
};

// Where chunk i of the thread lies within a turn: 8 columns of a token in a step. Eight lanes share token and step.
struct Chunk {
    int step, token, column;  // column / 8
    bool exists;
    DEVICE explicit Chunk(int i) {
        int index = threadIdx.x + i * THREADS;
        step = index / (TOKENS * 8), token = index / 8 % TOKENS, column = index % 8;
        exists = CHUNKS % THREADS == 0 || index < CHUNKS;
    }
};

DEVICE void fetch(uint4 (&x)[MINE], const u16* source, const Block& block, int turn) {
#pragma unroll
    for (int i = 0; i < MINE; ++i)
        if (Chunk c(i); c.exists)
            x[i] = load_16(source + block.row(min(block.first + c.token, block.tokens - 1)) * K
                           + (turn * TURN + c.step) * 64 + c.column * 8);
}

DEVICE float squares_of(uint4 x) {
    float sum = 0;
    for (u32 pair : {x.x, x.y, x.z, x.w})
        sum = fmaf(low_bf16(pair), low_bf16(pair), fmaf(high_bf16(pair), high_bf16(pair), sum));
    return sum;
}

// x times the norm's weight and what rounding took from it, as operands; sums of squares on the way.
DEVICE void store_operands(const uint4 (&x)[MINE], float (&squares)[MINE], const u16* norm, u32 operands, int turn) {
    uint4 product[MINE], rest[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i)  // all of it before the first store, for the compiler moves no load over one
        if (Chunk c(i); c.exists) {
            uint4 g = *(const uint4*)(norm + (turn * TURN + c.step) * 64 + c.column * 8);
            product[i] = multiply_8(x[i], g);
            rest[i] = rounding_errors(x[i], g, product[i]);
            squares[i] += squares_of(x[i]);
        }
#pragma unroll
    for (int i = 0; i < MINE; ++i)
        if (Chunk c(i); c.exists) {
            u32 at = operands + c.step * 2 * OPERAND_BYTES + c.token * 128 + (c.column ^ c.token % 8) * 16;
            store_shared_16(at, product[i]);
            store_shared_16(at + OPERAND_BYTES, rest[i]);
        }
}

// Asks for a step's weights in the ring; by one thread.
DEVICE void ask(const Block& block, const char* weight, int step) {
    const u32 stage = step % STAGES, barrier = block.arrived + stage * 8;
    barrier_expect(barrier, STAGE_BYTES);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        bulk_copy(block.stages + stage * STAGE_BYTES + i * TILE_BYTES, weight + (u64)(i * STEPS + step) * TILE_BYTES,
                  TILE_BYTES, barrier);
}

// sums += weights x operand, but = if it is the first.
DEVICE void multiply_step(float (&sums)[TOKENS / 2], u32 weights, u32 operand, bool first) {
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < 2; ++part)  // the rounded products, then the rest
#pragma unroll
        for (int k = 0; k < 4; ++k)
            Wgmma<TOKENS>::multiply(sums, wgmma_operand(weights) + 2 * k,
                                    wgmma_operand(operand + part * OPERAND_BYTES) + 2 * k, part > 0 || k > 0 || !first);
}

extern "C" __global__ void __launch_bounds__(THREADS) route_tiled(
    const char* weight, const u16* x, const u16* norm_weight, const u16* bias,
#if SHARE
    const Header* exchange, Flags* flags, u32* counter,
#endif
    float* probs, int* ids) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ u64 arrived[STAGES];
    __shared__ float squares[TURN][TOKENS], factor[TOKENS];
    u16* norm = (u16*)(memory + STAGES * STAGE_BYTES + 2 * TURN * 2 * OPERAND_BYTES);
    const u32 base = shared_address(memory);
    Block block = {base, base + STAGES * STAGE_BYTES, shared_address(arrived), (int)blockIdx.x * TOKENS, ALL_TOKENS, 1, 0};
#if SHARE
    __shared__ Header known;
    copy_header(known, exchange);
    wait_for_copies();
    __syncthreads();
    const Ranks ranks{exchange, known};
    block.step = ranks.count(), block.start = ranks.own();
    block.tokens = Shares(ranks.count(), ALL_TOKENS).count(ranks.own(), ALL_TOKENS);
#endif
    const bool idle = block.first >= block.tokens;  // there are blocks for all tokens, and a share has fewer
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(block.arrived + i * 8, 1);
        fence_barrier_init();
        for (int i = 0; i < (idle ? 0 : min(STAGES, STEPS)); ++i) ask(block, weight, i);
    }
    for (int i = threadIdx.x; i < K / 8; i += THREADS) ((uint4*)norm)[i] = load_weight(norm_weight + i * 8);
    const int expert = group * 64 + warp % 4 * 16 + lane / 4;  // and expert + 8: those of this lane's results
    const float offset[2] = {expert < E ? load_bf16(bias + expert) : 0.0f,
                             expert + 8 < E ? load_bf16(bias + expert + 8) : 0.0f};
    wait_for_previous();
    trigger_next();  // late: who starts behind this kernel may read what was written before it, without a wait
#if SHARE
    if (idle) {
        await_done(flags, tag_of(exchange), ranks, counter);
        return;
    }
#endif

    uint4 ahead[MINE];
    float mine[MINE] = {}, sums[TOKENS / 2];
    fetch(ahead, x, block, 0);
    __syncthreads();  // the norm's weight, the barriers
    for (int turn = 0; turn < STEPS / TURN; ++turn) {
        const u32 operands = block.operands + turn % 2 * TURN * 2 * OPERAND_BYTES;
        store_operands(ahead, mine, norm, operands, turn);
        fence_async_proxy();
        __syncthreads();  // behind it all products of the turn before have ended, so its stages may be filled again
        if (turn + 1 < STEPS / TURN) {
            if (threadIdx.x == 0 && turn > 0)
                for (int i = 0; i < TURN; ++i) ask(block, weight, (turn + 1) * TURN + i);
            fetch(ahead, x, block, turn + 1);
        }
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            const int stage = turn % 2 * TURN + i;
            barrier_wait(block.arrived + stage * 8, turn / 2 % 2);
            multiply_step(sums, block.stages + stage * STAGE_BYTES + group * TILE_BYTES, operands + i * 2 * OPERAND_BYTES,
                          turn == 0 && i == 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) mine[i] += __shfl_xor_sync(~0u, mine[i], offset);
        if (Chunk c(i); c.exists && c.column == 0) squares[c.step][c.token] = mine[i];
    }
    __syncthreads();  // all squares
    if (threadIdx.x < TOKENS) {
        float sum = 0;
        for (int i = 0; i < TURN; ++i) sum += squares[i][threadIdx.x];
        factor[threadIdx.x] = rsqrtf(sum * (1.0f / K) + EPS);
    }
    __syncthreads();  // the factors; and nobody reads the ring any more, where the keys go
    u32* keys = (u32*)memory;
    constexpr int STRIDE = GROUPS * 64 + 4;  // lanes of a column lie 8 tokens apart, in other banks
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        int row = i / 2 % 2, e = expert + 8 * row, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (e < E) keys[token * STRIDE + e] = key_of(sums[i] * factor[token] + offset[row]);
    }
    __syncthreads();
    for (int token = warp; token < min(TOKENS, block.tokens - block.first); token += THREADS / 32) {
        u32 key[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) key[i] = lane + 32 * i < E ? keys[token * STRIDE + lane + 32 * i] : 0;
        const u64 to = block.row(block.first + token) * TOP_K;
#if SHARE
        const u32 rank = min(lane, (int)ranks.count() - 1);
        choose(key, ranks.at(rank, probs + to), ranks.at(rank, ids + to), lane < ranks.count());
#else
        choose(key, probs + to, ids + to);
#endif
    }
#if SHARE
    await_done(flags, tag_of(exchange), ranks, counter);
#endif
}
