// rope_kv_attention of a decode step: rotates each token's queries and key, stores its key and value in the paged cache and
// attends over the visible positions, with a sink. Heads of 64 dims, bf16, at most eight query heads a kv head.
//
// A cluster of CTAS blocks serves one (token, kv head); its warps take the visible keys in turn, 16 at a time. All but the
// token's own queries, key and value (and their rotation) is read before the wait: the other positions were written by
// earlier steps, which have ended when this step's first kernel starts, for that one is launched plainly, and no other
// kernel of this step writes this layer's cache; positions, sequences and page table are inputs of the step. The token's
// own slot is read too, possibly while it is written, but what comes back is replaced.
//
// Fragments, lane = 4g + t. Scores = queries (A: rows are heads) x keys: lane (g, t) gets head g and, of eight keys, 2t and
// 2t + 1. Packed, that is the B fragment of values^T (A: rows are dims) x weights^T, whose 16 x 8 results waste no row. A
// lane's 16 bytes of a key feed two products: the k index (a dim) is permuted alike in queries and keys. Values are
// transposed in registers, which permutes the rows of the results: see dim_of.
#include "common.cuh"

constexpr int D = 64, GROUP = Q / KV, KEYS = 16, HEADS = 8;
constexpr float FACTOR = (float)SCALE * LOG2E;              // from q·k to the exponent of two
constexpr int STRIDE = CTAS * WARPS;                    // warps of a cluster, so blocks of keys between two of one warp
constexpr int ROUNDS = (REACH + KEYS - 2) / KEYS / STRIDE + 1;  // blocks of keys that a warp may have
constexpr int AHEAD = 3;  // blocks behind those in registers that a warp has asked the L2 for: registers hold too few
constexpr int FINISHERS = CTAS < HEADS ? CTAS : HEADS;  // blocks of a cluster that put heads together: the first ones
constexpr int MERGED = HEADS / FINISHERS;               // heads of each
constexpr long long VALUES = (long long)KV * PAGE * D;  // from a key to its value, in elements
constexpr int ROW = D + 2;                              // floats from head to head of partial results: spreads the banks
#if CTAS > 1
#define CLUSTER __cluster_dims__(CTAS, 1, 1)
#else
#define CLUSTER
#endif

struct Keys {
    uint4 key[2][2], value[2][2];  // [i][h]: of key 8i + g the dims 32h + 8t ... 32h + 8t + 7
};

struct Softmax {
    float top;        // the greatest score of head g so far, times log2 e
    float sum;        // of head g's weights, of this lane's keys only
    float out[4][4];  // tile 2h + j: dims dim_of(h, j, g) and that + 2, of heads 2t and 2t + 1 each
};

DEVICE int dim_of(int h, int j, int g) { return 32 * h + g / 2 * 8 + 4 * j + g % 2; }

DEVICE void load_keys(Keys& block, const u16* row) {
#pragma unroll
    for (int i = 0; i < 4; i++) block.key[i / 2][i % 2] = load_weight(row + i / 2 * 8 * D + i % 2 * 32);
}

DEVICE void load_values(Keys& block, const u16* row) {
#pragma unroll
    for (int i = 0; i < 4; i++) block.value[i / 2][i % 2] = load_weight(row + VALUES + i / 2 * 8 * D + i % 2 * 32);
}

// At the ends of the range: the token's own key and value come from `own`, and values that none may see could be NaN.
DEVICE void patch(Keys& block, int start, int first, int position, const u16* own, int g, int t) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = start + i / 2 * 8 + g;
        if (key == position) {
            block.key[i / 2][i % 2] = *(const uint4*)(own + i % 2 * 32 + 8 * t);
            block.value[i / 2][i % 2] = *(const uint4*)(own + D + i % 2 * 32 + 8 * t);
        }
        if (key < first || key > position) block.value[i / 2][i % 2] = make_uint4(0, 0, 0, 0);
    }
}

// s[i]: of head g the scores of keys 8i + 2t and 8i + 2t + 1, then two zeros (rows 8 to 15 of A are zero)
DEVICE void score(float s[2][4], const uint4 query[2], const Keys& block) {
#pragma unroll
    for (int i = 0; i < 8; i++) s[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 q = query[i / 2], k = block.key[i % 2][i / 2];
        mma_bf16(s[i % 2], q.x, 0, q.y, 0, k.x, k.y);
        mma_bf16(s[i % 2], q.z, 0, q.w, 0, k.z, k.w);
    }
}

// Scores to weights, as the B fragment of the second product. What came before shrinks if a greatest score grew.
DEVICE uint2 weigh(Softmax& state, const float s[2][4], int t) {
    float top = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * FACTOR, state.top);
    const float base = top == -INFINITE ? 0.f : top;  // no visible key so far
    if (ROUNDS == 1) {
        state.top = top;
    } else if (__any_sync(~0u, top > state.top)) {
        const float shrink = exp2_fast(state.top - base);
        const float even = __shfl_sync(~0u, shrink, 8 * t), odd = __shfl_sync(~0u, shrink, 8 * t + 4);
        state.sum *= shrink;
        state.top = top;
#pragma unroll
        for (int i = 0; i < 16; i++) state.out[i / 4][i % 4] *= i % 2 ? odd : even;
    }
    float w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = exp2_fast(fmaf(s[i / 2][i % 2], FACTOR, -base));
    state.sum += (w[0] + w[1]) + (w[2] + w[3]);
    return make_uint2(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]));
}

DEVICE void accumulate(Softmax& state, uint2 weights, const Keys& block) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 a = block.value[0][h], b = block.value[1][h];
        mma_bf16(state.out[2 * h], transpose_8x8(a.x), transpose_8x8(a.y), transpose_8x8(b.x), transpose_8x8(b.y), weights.x,
                 weights.y);
        mma_bf16(state.out[2 * h + 1], transpose_8x8(a.z), transpose_8x8(a.w), transpose_8x8(b.z), transpose_8x8(b.w),
                 weights.x, weights.y);
    }
}

// Dims `lane` and `lane` + 32 of the head at x
DEVICE float2 halves(const u16* x, int lane) { return make_float2(load_bf16(x + lane), load_bf16(x + D / 2 + lane)); }

DEVICE void store_rotated(u16* to, float2 x, float cosine, float sine, int lane) {
    to[lane] = to_bf16(x.x * cosine - x.y * sine);
    to[D / 2 + lane] = to_bf16(x.y * cosine + x.x * sine);
}

// A warp's blocks of keys: the i-th is block first + i STRIDE of the sequence.
struct Walk {
    const int* table;  // the sequence's row of the page table
    int first, count;
    int pages, ahead;  // lane l: the page of its block 32n + l, and that of the block 32 behind

    DEVICE int start(int i) const { return (first + i * STRIDE) * KEYS; }
    DEVICE int fetch(int i) const { return i < count ? (int)load_4(table + (u32)start(i) / PAGE % P) : 0; }
    DEVICE long long place_in(long long page, int i, int kv_head) const {
        return ((page * 2 * KV + kv_head) * PAGE + start(i) % PAGE) * D;
    }
    // Where the kv head's keys of block i start in the cache, in elements. To be called for every i in turn.
    DEVICE long long place(int i, int kv_head, int lane) {
        if (ROUNDS > 32 && i > 0 && i % 32 == 0) pages = ahead, ahead = fetch(i + 32 + lane);
        return place_in(__shfl_sync(~0u, pages, i % 32), i, kv_head);
    }
    // Asks the L2 for block i, which is less than 32 behind the last that was placed. Lanes 0 and 1: its keys, its values.
    DEVICE void prefetch(int i, bool next_pages, const u16* cache, int kv_head, int lane) const {
        const int page = __shfl_sync(~0u, next_pages ? ahead : pages, i % 32);
        if (i < count && lane < 2) prefetch_bulk(cache + place_in(page, i, kv_head) + lane * VALUES, KEYS * D * 2);
    }
};

// (sum, 2 dims) of partial results i = 0 ... N - 1 in softmax terms; `stats` = (greatest score, sum), relative to `top`.
template <int N, class Stats, class Part>
DEVICE float3 merged(float top, Stats stats, Part part) {
    const float base = top == -INFINITE ? 0.f : top;
    float3 total = make_float3(0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float factor = exp2_fast(stats(i).x - base);
        const float2 v = part(i);
        total = make_float3(fmaf(factor, stats(i).y, total.x), fmaf(factor, v.x, total.y), fmaf(factor, v.y, total.z));
    }
    return total;
}

extern "C" __global__ void CLUSTER __launch_bounds__(WARPS * 32, MIN_BLOCKS)
attention_decode(const u16* qkv, const float* cos_sin, u16* cache, const int* table, const int* sequences,
                 const int* positions, const u16* sinks, u16* out) {
    __shared__ __align__(16) u16 queries[HEADS][D + 8], own[2 * D];  // own: the token's key, then its value
    __shared__ __align__(8) float2 stats[WARPS][HEADS], peer_stats[CTAS][MERGED], peer_parts[CTAS][MERGED][D / 2];
    __shared__ __align__(8) float parts[WARPS][HEADS][ROW], sink[HEADS];
    __shared__ __align__(8) u64 arrived;
    trigger_next();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % CTAS, kv_head = blockIdx.x / CTAS % KV, token = blockIdx.x / (CTAS * KV);

    const int position = load_4(positions + token);  // -1: padding, which sees and stores nothing
    const int first = max(position - (REACH - 1), 0), worker = warp * CTAS + rank;
    const int blocks = position < 0 ? 0 : position / KEYS - first / KEYS + 1;
    Walk walk;
    walk.table = table + (long long)load_4(sequences + token) * P;
    walk.first = first / KEYS + worker;
    walk.count = (blocks - worker + STRIDE - 1) / STRIDE;
    walk.pages = walk.fetch(lane);
    walk.ahead = ROUNDS > 32 ? walk.fetch(32 + lane) : 0;
    const u16* lane_row = cache + g * D + 8 * t;
    Keys block[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (i < walk.count) {
            const u16* row = lane_row + walk.place(i, kv_head, lane);
            load_keys(block[i], row);
            load_values(block[i], row);
        }
    if (ROUNDS > DEPTH)
#pragma unroll
        for (int i = DEPTH; i < DEPTH + AHEAD; i++) walk.prefetch(i, false, cache, kv_head, lane);
    const float own_sink = threadIdx.x < GROUP ? load_bf16(sinks + kv_head * GROUP + threadIdx.x) * LOG2E : 0.f;
    const long long own_page = blocks > 0 ? load_4(walk.table + (u32)position / PAGE % P) : 0;
    const u32 barrier = shared_address(&arrived);
    if (CTAS > 1) {
        if (threadIdx.x == 0) {
            barrier_init(barrier, 1);
            fence_barrier_init();
            barrier_expect(barrier, CTAS * MERGED * (D + 2) * 4);
        }
        __syncwarp();
        cluster_arrive_relaxed();
    }
    wait_for_previous();

    const u16* x = qkv + (long long)token * (Q + 2 * KV) * D;
    const float cosine = __uint_as_float(load_4(cos_sin + token * D + lane));
    const float sine = __uint_as_float(load_4(cos_sin + token * D + D / 2 + lane));
    float2 query[(HEADS + WARPS - 1) / WARPS], key = {}, value = {};
#pragma unroll
    for (int i = 0; i * WARPS < HEADS; i++) {
        const int head = warp + i * WARPS;
        query[i] = head < GROUP ? halves(x + (kv_head * GROUP + head) * D, lane) : make_float2(0.f, 0.f);
    }
    if (warp == WARPS - 1) key = halves(x + (Q + kv_head) * D, lane), value = halves(x + (Q + KV + kv_head) * D, lane);
#pragma unroll
    for (int i = 0; i * WARPS < HEADS; i++)
        if (warp + i * WARPS < HEADS) store_rotated(queries[warp + i * WARPS], query[i], cosine, sine, lane);
    if (warp == WARPS - 1) {
        store_rotated(own, key, cosine, sine, lane);
        store_rotated(own + D, value, 1.f, 0.f, lane);
    }
    if (threadIdx.x < GROUP) sink[threadIdx.x] = own_sink;
    __syncthreads();
    if (warp == 0 && lane < 16 && blocks > 0 && rank == (blocks - 1) % CTAS) {  // one of this block's warps has it
        u16* slot = cache + ((own_page * 2 * KV + kv_head) * PAGE + position % PAGE) * D + lane / 8 * VALUES;
        *(uint4*)(slot + lane % 8 * 8) = *(const uint4*)(own + lane * 8);
    }

    const uint4 fragments[2] = {*(const uint4*)&queries[g][8 * t], *(const uint4*)&queries[g][32 + 8 * t]};
    Softmax state;
    state.top = -INFINITE, state.sum = 0.f;
#pragma unroll
    for (int i = 0; i < 16; i++) state.out[i / 4][i % 4] = 0.f;
#pragma unroll 1
    for (int round = 0; round < walk.count; round += DEPTH) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++) {
            const int i = round + slot, start = walk.start(i);
            if (i >= walk.count) break;
            const bool edge = start < first || start + KEYS > position, refill = ROUNDS > DEPTH && i + DEPTH < walk.count;
            if (edge) patch(block[slot], start, first, position, own, g, t);
            float s[2][4];
            score(s, fragments, block[slot]);
            const u16* row = lane_row;
            if (refill) load_keys(block[slot], row += walk.place(i + DEPTH, kv_head, lane));
            if (ROUNDS > DEPTH + AHEAD && refill)
                walk.prefetch(i + DEPTH + AHEAD, (i + DEPTH) % 32 + AHEAD >= 32, cache, kv_head, lane);
            if (edge) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int key = start + k / 2 * 8 + 2 * t + k % 2;
                    if (key < first || key > position) s[k / 2][k % 2] = -INFINITE;
                }
            }
            accumulate(state, weigh(state, s, t), block[slot]);
            if (refill) load_values(block[slot], row);
        }
    }

    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    if (t == 0) stats[warp][g] = make_float2(state.top, state.sum);
#pragma unroll
    for (int i = 0; i < 16; i++)
        parts[warp][2 * t + i % 2][dim_of(i / 8, i / 4 % 2, g) + i % 4 / 2 * 2] = state.out[i / 4][i % 4];
    if (CTAS > 1) cluster_wait();  // the peers' barriers are initialised
    __syncthreads();
#pragma unroll
    for (int head = warp; head < HEADS; head += WARPS) {
        if (head >= GROUP && CTAS == 1) break;
        float top = CTAS == 1 ? sink[head] : -INFINITE;
#pragma unroll
        for (int i = 0; i < WARPS; i++) top = fmaxf(top, stats[i][head].x);
        const float3 sum = merged<WARPS>(top, [&](int i) { return stats[i][head]; },
                                         [&](int i) { return *(const float2*)&parts[i][head][2 * lane]; });
        if (CTAS == 1) {
            const float factor = __fdividef(1.f, sum.x + exp2_fast(sink[head] - top));
            *(u32*)(out + (long long)(token * Q + kv_head * GROUP + head) * D + 2 * lane) =
                pack_bf16(sum.y * factor, sum.z * factor);
        } else {
            const int peer = head / MERGED, mine = head % MERGED;
            const u32 peer_barrier = peer_address(barrier, peer);
            const u32 part = shared_address(&peer_parts[rank][mine][lane]), stat = shared_address(&peer_stats[rank][mine]);
            store_async(peer_address(part, peer), peer_barrier, make_float2(sum.y, sum.z));
            if (lane == 0) store_async(peer_address(stat, peer), peer_barrier, make_float2(top, sum.x));
        }
    }
    if (CTAS == 1 || rank >= FINISHERS) return;
    barrier_wait(barrier, 0);  // every warp: a block must not leave while its peers still write to it
#pragma unroll
    for (int mine = warp; mine < MERGED; mine += WARPS) {
        const int head = rank * MERGED + mine;
        if (head >= GROUP) break;
        float top = sink[head];
#pragma unroll
        for (int i = 0; i < CTAS; i++) top = fmaxf(top, peer_stats[i][mine].x);
        const float3 sum = merged<CTAS>(top, [&](int i) { return peer_stats[i][mine]; },
                                        [&](int i) { return peer_parts[i][mine][lane]; });
        const float factor = __fdividef(1.f, sum.x + exp2_fast(sink[head] - top));
        *(u32*)(out + (long long)(token * Q + kv_head * GROUP + head) * D + 2 * lane) =
            pack_bf16(sum.y * factor, sum.z * factor);
    }
}
