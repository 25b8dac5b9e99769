// Before and behind the experts' products of many tokens (moe_grouped.cu): which rows of the tiles are whose, and the mix.
//
// Pairs (token, expert) lie in the tiles expert by expert, tokens ascending. An expert's run begins at a multiple of 8, so
// that it is whole atoms of the tiles. Defines: SORT, TOKENS, TOP_K; sort: EXPERTS, ROWS, WIDEST, COARSE; combine: HIDDEN,
// THREADS.
#include "common.cuh"

#if SORT
constexpr int PAIRS = TOKENS * TOP_K, WARPS = 32;
constexpr int CHUNKS = (PAIRS + WARPS * 32 - 1) / (WARPS * 32);  // of 32 pairs, that a warp ranks one after the other
constexpr int AHEAD = CHUNKS < 8 ? CHUNKS : 8;                           // of which so many are fetched at once

DEVICE int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
// The width of the product's tile that serves n rows.
DEVICE int width_of(int n) { return n <= COARSE ? up_to(n, 32) : up_to(n, 8); }

// The sums of two values over this lane and those before it.
DEVICE int2 inclusive_sums(int2 v, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int x = __shfl_up_sync(~0u, v.x, offset), y = __shfl_up_sync(~0u, v.y, offset);
        if (lane >= offset) v = make_int2(v.x + x, v.y + y);
    }
    return v;
}

// rows[i]: the token of row i of the tiles, -1 where there is none. place[pair]: its row. groups[i]: {expert, first row,
// rows, width} of a tile of the products. extent: how many of these, and atoms in a column of the tiles.
//
// Warp w ranks pairs w * CHUNKS * 32 ... among those of the same expert before them in its share; the counts of the warps
// before it do the rest. Every block does all of that, for it is quick, but keeps only chunk blockIdx.x of each warp.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
moe_sort(const int* ids, int* rows, int* place, int4* groups, int2* extent) {
    __shared__ int counts[WARPS][EXPERTS], first_row[EXPERTS];
    __shared__ int2 totals[(EXPERTS + 31) / 32];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    for (int e = lane; e < EXPERTS; e += 32) counts[warp][e] = 0;
    trigger_next();
    wait_for_previous();
    __syncwarp();

    int expert = -1, rank = 0;  // of the pair that this thread keeps
    for (int first = 0; first < CHUNKS; first += AHEAD) {
        int ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int pair = (warp * CHUNKS + first + i) * 32 + lane;
            ahead[i] = first + i < CHUNKS && pair < PAIRS ? (int)load_4(ids + pair) : -1;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int e = ahead[i];
            const u32 same = __match_any_sync(~0u, e), before = same & ((1u << lane) - 1);
            const int found = e >= 0 ? counts[warp][e] : 0;
            __syncwarp();
            if (e >= 0 && before == 0) counts[warp][e] = found + __popc(same);
            __syncwarp();
            if (first + i == blockIdx.x) {
                expert = e;
                rank = found + __popc(before);
            }
        }
    }
    __syncthreads();

    // Thread e turns expert e's counts into what the warps before found, and learns where its rows and its tiles begin.
    int count = 0, share = 8;  // rows of the expert, and of each of its tiles
    int2 sums = make_int2(0, 0);
    if (tid < EXPERTS) {
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const int found = counts[w][tid];
            counts[w][tid] = count;
            count += found;
        }
        if (count > 0) {
            const int tiles = (count + WIDEST - 1) / WIDEST;
            share = up_to((count + tiles - 1) / tiles, 8);
        }
        sums = make_int2(up_to(count, 8), (count + share - 1) / share);
    }
    const int2 own = sums;
    if (warp < (EXPERTS + 31) / 32) {
        sums = inclusive_sums(sums, lane);
        if (lane == 31) totals[warp] = sums;
    }
    __syncthreads();
    int2 all = make_int2(0, 0);
#pragma unroll
    for (int w = 0; w < (EXPERTS + 31) / 32; ++w) {
        if (w < warp) sums = make_int2(sums.x + totals[w].x, sums.y + totals[w].y);
        all = make_int2(all.x + totals[w].x, all.y + totals[w].y);
    }
    const int start = sums.x - own.x, first_tile = sums.y - own.y;
    if (tid < EXPERTS) first_row[tid] = start;
    __syncthreads();

    if (expert >= 0) {
        const int pair = (warp * CHUNKS + blockIdx.x) * 32 + lane, row = first_row[expert] + counts[warp][expert] + rank;
        place[pair] = row;
        rows[row] = pair / TOP_K;
    }
    if (blockIdx.x > 0) return;
    if (tid < EXPERTS) {
        for (int i = 0; i < own.y; ++i) {
            const int valid = min(share, count - i * share);
            groups[first_tile + i] = make_int4(tid, start + i * share, valid, width_of(valid));
        }
        for (int row = start + count; row < start + own.x; ++row) rows[row] = -1;
    }
    for (int row = all.x + tid; row < ROWS; row += WARPS * 32) rows[row] = -1;
    if (tid == 0) *extent = make_int2(all.y, ROWS / 8);
}

#else
constexpr int CHUNKS = HIDDEN / 8;

DEVICE void add_scaled(float (&sum)[8], uint4 v, float factor) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(factor, low_bf16(pairs[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(factor, high_bf16(pairs[i]), sum[2 * i + 1]);
    }
}

// out = x + sum over a of probs[a] y[place[a]]; a thread eight columns of one token. All but y is read before the wait: the
// kernel that makes y lets this one start only when those before it have ended.
extern "C" __global__ void __launch_bounds__(THREADS)
moe_combine(const u16* x, const float* probs, const int* place, const u16* y, u16* out) {
    trigger_next();
    const int item = blockIdx.x * THREADS + threadIdx.x, token = item / CHUNKS, chunk = item % CHUNKS;
    const bool inside = token < TOKENS;
    uint4 v[TOP_K], own = make_uint4(0, 0, 0, 0);
    float share[TOP_K];
    int row[TOP_K];
    if (inside) {
        own = load_16(x + (long)item * 8);
#pragma unroll
        for (int a = 0; a < TOP_K; ++a) {
            row[a] = (int)load_4(place + token * TOP_K + a);
            share[a] = __uint_as_float(load_4(probs + token * TOP_K + a));
        }
    }
    wait_for_previous();
    if (!inside) return;
#pragma unroll
    for (int a = 0; a < TOP_K; ++a) v[a] = load_16(y + (long)row[a] * HIDDEN + chunk * 8);
    float sum[8] = {};
    add_scaled(sum, own, 1.f);
#pragma unroll
    for (int a = 0; a < TOP_K; ++a) add_scaled(sum, v[a], share[a]);
    *(uint4*)(out + (long)item * 8) = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                 pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
}
#endif
