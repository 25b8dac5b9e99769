// RMSNorm, router logits and the choice of TOP_K experts, for many tokens: wgmma with 64 experts a warpgroup, tokens as columns.
//
// Macros: K columns (a multiple of 64), E experts, ALL_TOKENS of the call, TOKENS a block (16, 32 or 64), TOP_K, EPS.
// weight [E, K] in layout "tiles". A block has all experts, so it chooses from its own logits.
//
// The weights of a step of 64 columns come by bulk copies, a ring of stages ahead. The threads fetch x two steps ahead, multiply
// it by the norm's weight and store it as a wgmma operand: the rounded product and, since an expert must not win by rounding,
// what rounding took, as a second operand. Operands are triple: one is written, one waits, one is being read.
#include "route.cuh"
#include "wgmma.cuh"

constexpr int STEPS = K / 64, GROUPS = (E + 63) / 64, THREADS = 128 * GROUPS;
constexpr int STAGES = 5, OPERANDS = 3;
constexpr int TILE_BYTES = 8192, STAGE_BYTES = GROUPS * TILE_BYTES, OPERAND_BYTES = TOKENS * 128;
constexpr int CHUNKS = TOKENS * 8, MINE = (CHUNKS + THREADS - 1) / THREADS;  // of x in a step, and those of a thread
static_assert(OPERANDS == 3 && STAGES > OPERANDS, "see the loop");

struct Chunks {
    uint4 value[MINE];
};

struct Block {
    u32 stages, operands, arrived;  // addresses of the weights, the operands and a barrier for each stage
    int first;                      // token
};

// Chunk i of the thread: 8 columns of a token. Lanes 8j ... 8j + 7 have one token.
DEVICE int chunk_of(int i) { return threadIdx.x + i * THREADS; }

DEVICE void fetch(Chunks& x, const u16* source, const Block& block, int step) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        int chunk = chunk_of(i), token = min(block.first + chunk / 8, ALL_TOKENS - 1);
        if (chunk < CHUNKS) x.value[i] = load_16(source + (u64)token * K + step * 64 + chunk % 8 * 8);
    }
}

DEVICE float add_squares(float sum, uint4 x) {
    for (u32 pair : {x.x, x.y, x.z, x.w}) sum = fmaf(low_bf16(pair), low_bf16(pair), fmaf(high_bf16(pair), high_bf16(pair), sum));
    return sum;
}

// x times the norm's weight and what rounding took from it, as two operands; sums of squares on the way.
DEVICE void store_operands(const Chunks& x, float (&squares)[MINE], const u16* norm_weight, u32 operand, int step) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        int chunk = chunk_of(i), row = chunk / 8, place = chunk % 8 ^ row % 8;
        if (chunk < CHUNKS) {
            uint4 g = *(const uint4*)(norm_weight + step * 64 + chunk % 8 * 8), product = multiply_8(x.value[i], g);
            squares[i] = add_squares(squares[i], x.value[i]);
            store_shared_16(operand + row * 128 + place * 16, product);
            store_shared_16(operand + OPERAND_BYTES + row * 128 + place * 16, rounding_errors(x.value[i], g, product));
        }
    }
}

// Asks for a step's weights in the ring; by one thread.
DEVICE void ask(const Block& block, const char* weight, int step) {
    const u32 stage = step % STAGES, barrier = block.arrived + stage * 8;
    barrier_expect(barrier, STAGE_BYTES);
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        copy_bulk(block.stages + stage * STAGE_BYTES + i * TILE_BYTES, weight + (u64)(i * STEPS + step) * TILE_BYTES, TILE_BYTES,
                  barrier);
}

DEVICE void multiply_step(float (&sums)[TOKENS / 2], u32 weights, u32 operand) {
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < 2; ++part)  // the rounded products, then the rest
#pragma unroll
        for (int k = 0; k < 4; ++k)
            Wgmma<TOKENS>::multiply(sums, wgmma_operand(weights) + 2 * k,
                                    wgmma_operand(operand + part * OPERAND_BYTES) + 2 * k, 1);
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS) route_tiled(
    const char* weight, const u16* x, const u16* norm_weight, const u16* bias, float* probs, int* ids) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ u64 arrived[STAGES];
    __shared__ float factor[TOKENS];
    u16* norm = (u16*)(memory + STAGES * STAGE_BYTES + OPERANDS * 2 * OPERAND_BYTES);
    const u32 base = shared_address(memory);
    const Block block = {base, base + STAGES * STAGE_BYTES, shared_address(arrived), (int)blockIdx.x * TOKENS};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(block.arrived + i * 8, 1);
        fence_barrier_init();
        for (int i = 0; i < min(STAGES, STEPS); ++i) ask(block, weight, i);
    }
    for (int i = threadIdx.x; i < K / 8; i += THREADS) ((uint4*)norm)[i] = load_weight(norm_weight + i * 8);
    wait_for_previous();
    trigger_next();  // late: who starts behind this kernel may read what was written before it, without a wait

    Chunks ahead[2];
    float squares[MINE] = {}, sums[TOKENS / 2] = {};
    fetch(ahead[0], x, block, 0);
    if (STEPS > 1) fetch(ahead[1], x, block, 1);
    __syncthreads();  // the norm's weight and the barriers
    // Behind the barrier of step s all warpgroups have ended the products of step s - 2. So the operand of step s + 1 may be
    // written over that of s - 2, and the stage of s - 2 may be refilled.
    auto turn = [&](Chunks& mine, int step) {
        const u32 operand = block.operands + step % OPERANDS * 2 * OPERAND_BYTES;
        store_operands(mine, squares, norm, operand, step);
        if (step + 2 < STEPS) fetch(mine, x, block, step + 2);
        fence_async_proxy();
        __syncthreads();
        if (threadIdx.x == 0 && step >= 2 && step - 2 + STAGES < STEPS) ask(block, weight, step - 2 + STAGES);
        barrier_wait(block.arrived + step % STAGES * 8, step / STAGES % 2);
        multiply_step(sums, block.stages + step % STAGES * STAGE_BYTES + group * TILE_BYTES, operand);
        wgmma_wait<1>();
    };
    for (int step = 0; step < STEPS; step += 2) {
        turn(ahead[0], step);
        if (step + 1 < STEPS) turn(ahead[1], step + 1);
    }
    wgmma_wait<0>();

#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        float sum = squares[i];
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (chunk_of(i) < CHUNKS && lane % 8 == 0) factor[chunk_of(i) / 8] = rsqrtf(sum * (1.0f / K) + EPS);
    }
    __syncthreads();  // the factors; and nobody reads the ring any more, where the keys go
    u32* keys = (u32*)memory;
    constexpr int STRIDE = GROUPS * 64 + 4;  // lanes of a column lie 8 tokens apart, in other banks
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        int expert = group * 64 + warp % 4 * 16 + lane / 4 + i / 2 % 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (expert < E) keys[token * STRIDE + expert] = key_of(sums[i] * factor[token] + load_bf16(bias + expert));
    }
    __syncthreads();
    for (int token = warp; token < min(TOKENS, ALL_TOKENS - block.first); token += THREADS / 32) {
        u32 key[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) key[i] = lane + 32 * i < E ? keys[token * STRIDE + lane + 32 * i] : 0;
        choose(key, probs + (u64)(block.first + token) * TOP_K, ids + (u64)(block.first + token) * TOP_K);
    }
}
