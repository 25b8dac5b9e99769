// rope_kv_attention of a decode step: rotates each token's queries and key, stores its key and value in the paged cache and
// attends over the visible positions, with a sink. Heads of 64 dims, bf16, at most eight query heads a kv head.
//
// SPLIT blocks serve one (token, kv head), or as many of them as have a block of keys for each warp; their warps take the
// visible keys in turn, 16 at a time. All but the token's own queries, key and value (and their rotation) is read before the
// wait: the other positions were written by earlier steps, which have ended when this step's first kernel starts, for that
// one is launched plainly, and no other kernel of this step writes this layer's cache; positions, sequences and page table
// are inputs of the step. The token's own slot is read too, possibly while it is written, but what comes back is replaced.
//
// What several blocks found meets in `slots`, words that are zeros until they are written and again once they were read: a
// block writes its part of every head, and puts together some of the heads itself. Those of one pair are neighbours and run
// at once, so they may wait for each other. (Clusters need no memory for that, but are placed two blocks a processor on half
// of the processors, and eight of 16 blocks do not fit with one a processor: 64k tokens took 1.4 times as long.)
//
// Fragments, lane = 4g + t. A load of a warp is four whole keys: 16 bytes a lane, of key g / 2 the half g % 2 of its dims.
// Scores = queries (A: row g is the first half of head g's dims, row g + 8 the second) x keys (B: column g is half of key
// g / 2): lane (g, t) gets, of head g and key t, both halves' sums. The weights of four loads, packed, are the B fragment of
// values^T (A: rows are dims) x weights^T, whose 16 x 8 results waste no row. A lane's 16 bytes of a key feed two products:
// the k index (a dim) is permuted alike in queries and keys. Values are transposed in registers, which permutes the rows of
// the results: see dim_of.
#include "common.cuh"

constexpr int D = 64, GROUP = Q / KV, KEYS = 16, HEADS = 8;
constexpr float FACTOR = (float)SCALE * LOG2E;                           // from q·k to the exponent of two
constexpr int ROUNDS = (REACH + KEYS - 2) / KEYS / (SPLIT * WARPS) + 1;  // blocks of keys that a warp may have
constexpr long long VALUES = (long long)KV * PAGE * D;                   // from a key to its value, in elements
constexpr int ROW = D + 2;                        // floats of a head's part: in a slot its dims, greatest score and sum
constexpr int AT_ONCE = SPLIT < 16 ? SPLIT : 16;  // parts that a warp waits for at once

struct Keys {
    uint4 key[4], value[4];  // [m]: of key 4m + g / 2 the dims 32 (g % 2) + 8t ... + 7
};

struct Softmax {
    float top;        // the greatest score of head g so far, times log2 e
    float sum;        // of head g's weights, of this lane's keys only
    float out[4][4];  // tile r: dims dim_of(r, g) and that + 32, of heads 2t and 2t + 1 each
};

DEVICE int dim_of(int r, int g) { return g / 2 * 8 + 2 * r + g % 2; }

DEVICE void load_keys(Keys& block, const u16* row) {
#pragma unroll
    for (int m = 0; m < 4; m++) block.key[m] = load_weight(row + m * 4 * D);
}

DEVICE void load_values(Keys& block, const u16* row) {
#pragma unroll
    for (int m = 0; m < 4; m++) block.value[m] = load_weight(row + VALUES + m * 4 * D);
}

// At the ends of the range: the token's own key and value come from `own`, and values that none may see could be NaN.
DEVICE void patch(Keys& block, int start, int first, int position, const u16* own, int lane) {
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int key = start + 4 * m + lane / 8;
        if (key == position) {
            block.key[m] = *(const uint4*)(own + lane % 8 * 8);
            block.value[m] = *(const uint4*)(own + D + lane % 8 * 8);
        }
        if (key < first || key > position) block.value[m] = make_uint4(0, 0, 0, 0);
    }
}

// s[m]: of head g the score of key 4m + t
DEVICE void score(float s[4], const uint4 query[2], const Keys& block) {
    const uint4 low = query[0], high = query[1];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const uint4 k = block.key[m];
        float c[4] = {};  // head g: first halves of keys t, of no use, of no use, second halves
        mma_bf16(c, low.x, high.x, low.y, high.y, k.x, k.y);
        mma_bf16(c, low.z, high.z, low.w, high.w, k.z, k.w);
        s[m] = c[0] + c[3];
    }
}

// Scores to weights, as the B fragment of the second product. What came before shrinks if a greatest score grew.
DEVICE uint2 weigh(Softmax& state, const float s[4], int t) {
    float top = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
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
    for (int i = 0; i < 4; i++) w[i] = exp2_fast(fmaf(s[i], FACTOR, -base));
    state.sum += (w[0] + w[1]) + (w[2] + w[3]);
    return make_uint2(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]));
}

// Four words, of loads 0 to 3, of dims that lie alike in their keys. Transposed, a word is two dims, of both halves, of key
// 4m + t; the products' k index 2t + m % 2 + m / 2 * 8 is that key.
DEVICE void accumulate(float out[4], uint2 weights, u32 v0, u32 v1, u32 v2, u32 v3) {
    v0 = transpose_8x8(v0), v1 = transpose_8x8(v1), v2 = transpose_8x8(v2), v3 = transpose_8x8(v3);
    mma_bf16(out, __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
             __byte_perm(v2, v3, 0x7632), weights.x, weights.y);
}

DEVICE void accumulate(Softmax& state, uint2 weights, const Keys& block) {
    const uint4 a = block.value[0], b = block.value[1], c = block.value[2], d = block.value[3];
    accumulate(state.out[0], weights, a.x, b.x, c.x, d.x);
    accumulate(state.out[1], weights, a.y, b.y, c.y, d.y);
    accumulate(state.out[2], weights, a.z, b.z, c.z, d.z);
    accumulate(state.out[3], weights, a.w, b.w, c.w, d.w);
}

// Dims `lane` and `lane` + 32 of the head at x
DEVICE float2 halves(const u16* x, int lane) { return make_float2(load_bf16(x + lane), load_bf16(x + D / 2 + lane)); }

DEVICE void store_rotated(u16* to, float2 x, float cosine, float sine, int lane) {
    to[lane] = to_bf16(x.x * cosine - x.y * sine);
    to[D / 2 + lane] = to_bf16(x.y * cosine + x.x * sine);
}

// A warp's blocks of keys: the i-th is block first + i stride of the sequence.
struct Walk {
    const int* table;  // the sequence's row of the page table
    int first, stride, count;
    int pages, ahead;  // lane l: the page of its block 32n + l, and that of the block 32 behind

    DEVICE int start(int i) const { return (first + i * stride) * KEYS; }
    DEVICE int fetch(int i) const { return i < count ? (int)load_4(table + (u32)start(i) / PAGE % P) : 0; }
    // Where the kv head's keys of block i start in the cache, in elements. To be called for every i in turn.
    DEVICE long long place(int i, int kv_head, int lane) {
        if (ROUNDS > 32 && i > 0 && i % 32 == 0) pages = ahead, ahead = fetch(i + 32 + lane);
        const long long page = __shfl_sync(~0u, pages, i % 32);
        return ((page * 2 * KV + kv_head) * PAGE + start(i) % PAGE) * D;
    }
};

// (sum, 2 dims) of the warps' partial results in softmax terms, relative to `top`; `stats` = (greatest score, sum).
template <class Stats, class Part>
DEVICE float3 merged(float top, Stats stats, Part part) {
    const float base = top == -INFINITE ? 0.f : top;
    float3 total = make_float3(0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const float factor = exp2_fast(stats(i).x - base);
        const float2 v = part(i);
        total = make_float3(fmaf(factor, stats(i).y, total.x), fmaf(factor, v.x, total.y), fmaf(factor, v.y, total.z));
    }
    return total;
}

// A zero is stored as -0: no word that was written is all zeros.
DEVICE void write_slot(float* slot, float2 v) {
    const u32 x = __float_as_uint(v.x), y = __float_as_uint(v.y);
    store_8(slot, make_uint2(x ? x : 1u << 31, y ? y : 1u << 31));
}

DEVICE bool is_written(uint2 slot) { return slot.x && slot.y; }
DEVICE float2 floats(uint2 v) { return make_float2(__uint_as_float(v.x), __uint_as_float(v.y)); }

// slots [token, kv head][head][SPLIT][ROW]
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
attention_decode(const u16* qkv, const float* cos_sin, u16* cache, const int* table, const int* sequences,
                 const int* positions, const u16* sinks, u16* out
#if SPLIT > 1
                 , float* slots
#endif
) {
    __shared__ __align__(16) u16 queries[HEADS][D + 8], own[2 * D];  // own: the token's key, then its value
    __shared__ __align__(8) float2 stats[WARPS][HEADS];
    __shared__ __align__(8) float parts[WARPS][HEADS][ROW], sink[HEADS];
    trigger_next();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % SPLIT, kv_head = blockIdx.x / SPLIT % KV, token = blockIdx.x / (SPLIT * KV);

    const int position = load_4(positions + token);  // -1: padding, which sees and stores nothing
    const int first = max(position - (REACH - 1), 0);
    const int blocks = position < 0 ? 0 : position / KEYS - first / KEYS + 1;
    const int split = SPLIT == 1 ? 1 : max(min((blocks + WARPS - 1) / WARPS, SPLIT), 1), worker = warp * split + rank;
    if (rank >= split) return;
    Walk walk;
    walk.stride = split * WARPS;
    walk.table = table + (long long)load_4(sequences + token) * P;
    walk.first = first / KEYS + worker;
    walk.count = (blocks - worker + walk.stride - 1) / walk.stride;
    walk.pages = walk.fetch(lane);
    walk.ahead = ROUNDS > 32 ? walk.fetch(32 + lane) : 0;
    const u16* lane_row = cache + lane * 8;
    Keys block[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (i < walk.count) {
            const u16* row = lane_row + walk.place(i, kv_head, lane);
            load_keys(block[i], row);
            load_values(block[i], row);
        }
    const float own_sink = threadIdx.x < GROUP ? load_bf16(sinks + kv_head * GROUP + threadIdx.x) * LOG2E : 0.f;
    const long long own_page = blocks > 0 ? load_4(walk.table + (u32)position / PAGE % P) : 0;
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
    if (warp == 0 && lane < 16 && blocks > 0 && rank == (blocks - 1) % split) {  // one of this block's warps has it
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
            if (edge) patch(block[slot], start, first, position, own, lane);
            float s[4];
            score(s, fragments, block[slot]);
            const u16* row = lane_row;
            if (refill) load_keys(block[slot], row += walk.place(i + DEPTH, kv_head, lane));
            if (edge) {
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    const int key = start + 4 * m + t;
                    if (key < first || key > position) s[m] = -INFINITE;
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
        parts[warp][2 * t + i % 2][dim_of(i / 4, g) + i % 4 / 2 * 32] = state.out[i / 4][i % 4];
    __syncthreads();
    const auto write_out = [&](int head, float top, float3 sum) {
        const float factor = __fdividef(1.f, sum.x + exp2_fast(sink[head] - top));
        *(u32*)(out + (long long)(token * Q + kv_head * GROUP + head) * D + 2 * lane) =
            pack_bf16(sum.y * factor, sum.z * factor);
    };
#if SPLIT > 1
    float* const pair_slots = slots + (long long)(token * KV + kv_head) * HEADS * SPLIT * ROW;
#endif
#pragma unroll
    for (int head = warp; head < GROUP; head += WARPS) {
        float top = split == 1 ? sink[head] : -INFINITE;
#pragma unroll
        for (int i = 0; i < WARPS; i++) top = fmaxf(top, stats[i][head].x);
        const float3 sum = merged(top, [&](int i) { return stats[i][head]; },
                                  [&](int i) { return *(const float2*)&parts[i][head][2 * lane]; });
#if SPLIT > 1
        if (split > 1) {
            float* slot = pair_slots + (head * SPLIT + rank) * ROW;
            write_slot(slot + 2 * lane, make_float2(sum.y, sum.z));
            if (lane == 0) write_slot(slot + D, make_float2(top, sum.x));
            continue;
        }
#endif
        write_out(head, top, sum);
    }
#if SPLIT > 1
    if (split == 1) return;
    for (int head = warp * split + rank; head < GROUP; head += WARPS * split) {
        float* const head_slots = pair_slots + head * SPLIT * ROW;
        float3 total;
        float top, factor;
#pragma unroll
        for (int start = 0; start < SPLIT; start += AT_ONCE) {
            // Of each part two dims; the last, at first: of part `lane` its greatest score and sum
            const auto slot = [&](int i) {
                return i < AT_ONCE ? head_slots + (start + i) * ROW + 2 * lane : head_slots + lane * ROW + D;
            };
            const auto wanted = [&](int i) { return i < AT_ONCE ? start + i < split : start == 0 && lane < split; };
            uint2 found[AT_ONCE + 1] = {};
            bool there;
            do {  // polls for all that is missing at once
                there = true;
#pragma unroll
                for (int i = 0; i <= AT_ONCE; i++)
                    if (wanted(i) && !is_written(found[i])) found[i] = poll_8(slot(i));
#pragma unroll
                for (int i = 0; i <= AT_ONCE; i++) there &= !wanted(i) || is_written(found[i]);
            } while (!__all_sync(~0u, there));
#pragma unroll
            for (int i = 0; i <= AT_ONCE; i++)
                if (wanted(i)) store_8(slot(i), make_uint2(0, 0));
            if (start == 0) {
                const float2 stat = lane < split ? floats(found[AT_ONCE]) : make_float2(-INFINITE, 0.f);
                top = fmaxf(warp_max(stat.x), sink[head]);
                factor = exp2_fast(stat.x - top);
                total = make_float3(warp_sum(factor * stat.y), 0.f, 0.f);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (wanted(i)) {
                    const float2 v = floats(found[i]);
                    const float f = __shfl_sync(~0u, factor, start + i);
                    total.y = fmaf(f, v.x, total.y), total.z = fmaf(f, v.y, total.z);
                }
        }
        write_out(head, top, total);
    }
#endif
}
