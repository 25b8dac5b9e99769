// Before and behind the experts' products of many tokens (moe_grouped.cu): which row of the tiles is whose, and the mix.
//
// Pairs (token, expert) lie in the tiles expert by expert, tokens ascending. An expert's run begins at a multiple of 8, so
// that it is whole atoms of the tiles. Defines: SORT, TOKENS, TOP_K; sort: EXPERTS, ROWS, WIDEST; combine: HIDDEN, THREADS,
// GRID, RESIDUAL (is x added?), PLACED (are the rows of y anywhere but in the order of the pairs?), PUSH (does each row go to
// the rank whose share it is in?).
#if PUSH
#include "exchange.cuh"
#else
#include "common.cuh"
#endif

#if SORT
constexpr int PAIRS = TOKENS * TOP_K, WARPS = 32, THREADS = WARPS * 32, SLICES = (PAIRS + THREADS - 1) / THREADS;
constexpr int AHEAD = SLICES < 8 ? SLICES : 8;  // slices whose ids are fetched at once

DEVICE int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The sums of two values over this lane and those before it.
DEVICE int2 inclusive_sums(int2 v, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int x = __shfl_up_sync(~0u, v.x, offset), y = __shfl_up_sync(~0u, v.y, offset);
        if (lane >= offset) v = make_int2(v.x + x, v.y + y);
    }
    return v;
}

// place[pair]: its row of the tiles. groups[i]: {expert, first row, rows, 0} of a tile of the products. extent: how many of
// these, and atoms in a column of the tiles.
//
// Block b places slice b of the pairs, a thread one. It counts each expert's pairs in the slices before and behind for
// itself, which is quicker than to be told; within the slice, every warp ranks its pairs.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
moe_sort(const int* ids, int* place, int4* groups, int2* extent) {
    __shared__ int counts[WARPS][EXPERTS];      // of this slice's pairs in each warp, then in those before it
    __shared__ int before[EXPERTS], behind[EXPERTS], first_row[EXPERTS];
    __shared__ int2 totals[(EXPERTS + 31) / 32];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, slice = blockIdx.x;
    for (int i = tid; i < WARPS * EXPERTS; i += THREADS) counts[0][i] = 0;
    if (tid < EXPERTS) before[tid] = behind[tid] = 0;
    __syncthreads();
    trigger_next();
    wait_for_previous();

    int expert = -1;  // of the pair that this thread places
    for (int first = 0; first < SLICES; first += AHEAD) {
        int ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int pair = (first + i) * THREADS + tid;
            ahead[i] = pair < PAIRS ? (int)load_4(ids + pair) : -1;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i == slice) expert = ahead[i];
            else if (ahead[i] >= 0) atomicAdd(first + i < slice ? before + ahead[i] : behind + ahead[i], 1);
        }
    }
    const u32 same = __match_any_sync(~0u, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (expert >= 0 && rank == 0) counts[warp][expert] = __popc(same);
    __syncthreads();

    // Thread e sums up expert e, and learns where its rows and its tiles begin.
    int count = 0, share = 8;  // rows of the expert, and of each of its tiles
    int2 sums = make_int2(0, 0);
    if (tid < EXPERTS) {
        count = before[tid];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const int found = counts[w][tid];
            counts[w][tid] = count;
            count += found;
        }
        count += behind[tid];
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

    if (expert >= 0) place[slice * THREADS + tid] = first_row[expert] + counts[warp][expert] + rank;
    if (slice > 0 || tid >= EXPERTS) return;
    for (int i = 0; i < own.y; ++i)
        groups[first_tile + i] = make_int4(tid, start + i * share, min(share, count - i * share), 0);
    if (tid == 0) *extent = make_int2(all.y, ROWS / 8);
}

#else
constexpr int CHUNKS = HIDDEN / 8, ITEMS = TOKENS * CHUNKS, STRIDE = GRID * THREADS;
constexpr bool ONCE = STRIDE >= ITEMS;  // a thread has one item at most
static_assert(ONCE || !RESIDUAL, "");

DEVICE void add_scaled(float (&sum)[8], uint4 v, float factor) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(factor, low_bf16(pairs[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(factor, high_bf16(pairs[i]), sum[2 * i + 1]);
    }
}

// The pairs of a token: their rows of y, and how much each of them counts.
struct Pairs {
    int row[TOP_K];
    float share[TOP_K];
    DEVICE void fetch(const int* place, const float* probs, int token) {
#pragma unroll
        for (int a = 0; a < TOP_K; ++a) {
            row[a] = PLACED ? (int)load_4(place + token * TOP_K + a) : token * TOP_K + a;
            share[a] = __uint_as_float(load_4(probs + token * TOP_K + a));
        }
    }
};

// out = x (with RESIDUAL) + sum over a of probs[a] y[place[a]]; an item is eight columns of one token. With PLACED all but y
// is read before the wait, of a thread's first item: the kernel that makes y, moe_grouped.cu, lets this one start only when
// those before it have ended. With PUSH there are no more blocks than run at once, for each waits at its end until its stores
// have arrived.
extern "C" __global__ void __launch_bounds__(THREADS)
moe_combine(
#if RESIDUAL
    const u16* x,
#endif
    const float* probs,
#if PLACED
    const int* place,
#endif
    const u16* y,
#if PUSH
    const Header* exchange,
#endif
    u16* out) {
    trigger_next();
#if !PLACED
    const int* place = nullptr;
#endif
#if PUSH
    __shared__ Header known;
    copy_header(known, exchange);
#endif
    int item = blockIdx.x * THREADS + threadIdx.x;
    Pairs pairs;
#if RESIDUAL
    uint4 own = make_uint4(0, 0, 0, 0);
    if (item < ITEMS) own = load_16(x + (long)item * 8);
#endif
    if (PLACED && item < ITEMS) pairs.fetch(place, probs, item / CHUNKS);
#if PUSH
    wait_for_copies();
    __syncthreads();
    const Ranks ranks{exchange, known};
    const Shares shares(ranks.count(), TOKENS);
#endif
    wait_for_previous();
    if (!PLACED && item < ITEMS) pairs.fetch(place, probs, item / CHUNKS);
#pragma unroll 1
    for (; item < ITEMS; item += STRIDE) {
        const int chunk = item % CHUNKS;
        uint4 v[TOP_K];
#pragma unroll
        for (int a = 0; a < TOP_K; ++a) v[a] = load_16(y + (long)pairs.row[a] * HIDDEN + chunk * 8);
        Pairs next = pairs;
        if (!ONCE && item + STRIDE < ITEMS) next.fetch(place, probs, (item + STRIDE) / CHUNKS);
        float sum[8] = {};
#if RESIDUAL
        add_scaled(sum, own, 1.f);
#endif
#pragma unroll
        for (int a = 0; a < TOP_K; ++a) add_scaled(sum, v[a], pairs.share[a]);
#if PUSH
        u16* to = shares.place(ranks, out, ranks.own(), item / CHUNKS, HIDDEN) + chunk * 8;
#else
        u16* to = out + (long)item * 8;
#endif
        store_16(to, make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                                pack_bf16(sum[6], sum[7])));
        if (ONCE) break;
        pairs = next;
    }
#if PUSH
    finish_pushes();
#endif
}
#endif
