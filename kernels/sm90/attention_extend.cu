// attention of prompts and mixed chunks over the paged cache, with sinks: heads of 64 dims, bf16, eight query heads a kv
// head.
//
// The tokens are cut into segments: runs of at most SEGMENT consecutive positions of a sequence. A segment and a kv head are
// an item; each block of the grid takes items in turn, the last segments, which see most keys, first. The item's queries,
// SEGMENT x 8 heads, are the rows of SEGMENT / 8 warpgroups, 64 each; they share the keys and values, BLOCK at a time, which
// the first warpgroup gathers page by page into a ring of slots in shared memory. Row r of a warpgroup is head r % 8 of its
// token r / 8: both rows g and g + 8 that lane 4g + t of a warp holds are head g, of two neighbouring tokens.
//
// The ring's order is the one of use: K0, K1, V0, K2, V1, ..., for while the tensor cores multiply the queries with K(i) and
// the weights with V(i - 1), nothing else is to do; then the softmax of block i runs under the products of the other
// warpgroups. What was read before the wait are step inputs only: rope_kv, just before, writes queries and cache.
#include "wgmma.cuh"

constexpr int D = 64, GROUP = 8, KEYS = 16, WARPGROUPS = SEGMENT / 8, WARPS = 4 * (WARPGROUPS + 1);

#include "segments.cuh"

constexpr float FACTOR = (float)SCALE * LOG2E;             // from q·k to the exponent of two
constexpr int ROW = 2 * D, TILE = BLOCK * ROW, QUERIES = SEGMENT * GROUP * ROW;  // bytes
constexpr long long PAGE_STRIDE = 2LL * KV * PAGE * D, VALUES = (long long)KV * PAGE * D;  // elements
constexpr int LAG = STAGES < 6 ? STAGES - 2 : 4;  // slots whose copies are under way: who waits for one may need the next
static_assert(Q == KV * GROUP && PAGE % KEYS == 0);

// Where a warpgroup is in the ring; full and empty are barriers.
struct Ring {
    u32 shared, barriers;
    int slot = 0;
    u32 phase = 0;

    DEVICE u32 queries(int i) const { return shared + i % 2 * QUERIES; }
    DEVICE u32 tile() const { return shared + 2 * QUERIES + slot * TILE; }
    DEVICE u32 full(int which) const { return barriers + which * 8; }
    DEVICE u32 empty(int which) const { return barriers + (STAGES + which) * 8; }
    DEVICE u32 queries_empty(int i) const { return barriers + (2 * STAGES + i % 2) * 8; }
    DEVICE void next() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// ---- the warpgroup that copies -------------------------------------------------------------------

DEVICE void copy_or_zero(u32 shared, const void* global, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

struct Copier {
    Ring ring;
    int behind = 0;  // slots whose copies are under way, the last ones before ring.slot

    // All slots but the last LEFT are full for those who wait.
    template <int LEFT>
    DEVICE void announce() {
        asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
        fence_async_proxy();
        for (; behind > LEFT; behind--) barrier_arrive(ring.full((ring.slot + STAGES - behind) % STAGES));
    }
    DEVICE void acquire(u32 barrier, u32 parity) {
        if (barrier_test(barrier, parity)) return;
        announce<0>();  // who is to empty it may wait for them
        barrier_wait(barrier, parity);
    }
    DEVICE void finish() {
        commit_copies();
        ring.next();
        behind++;
        if (behind > LAG) announce<LAG>();
    }
    // Keys (or values) start ... start + BLOCK - 1, of which those outside first ... last, which nobody sees, become zero.
    // pages: lane i has the page of keys start + 16 i ...
    DEVICE void copy_block(const u16* head, int pages, int start, int first, int last) {
        const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        const u32 to = ring.tile() + row * ROW + (chunk ^ row % 8) * 16;
#pragma unroll
        for (int i = 0; i < BLOCK / KEYS; i++) {
            const int key = start + i * KEYS + row;
            const u16* from = head + __shfl_sync(~0u, pages, i) * PAGE_STRIDE + key % PAGE * D + chunk * 8;
            copy_or_zero(to + i * KEYS * ROW, from, key >= first && key <= last);
        }
    }
    DEVICE void copy_queries(u32 to, const u16* q, int count) {
#pragma unroll
        for (int i = 0; i < SEGMENT / 2; i++) {
            const int row = i * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8;
            const bool inside = row / GROUP < count;
            copy_or_zero(to + row * ROW + (chunk ^ row % 8) * 16,
                         q + (inside ? (row / GROUP * Q + row % GROUP) * D + chunk * 8 : 0), inside);
        }
    }
};

DEVICE void copy_all(Ring ring, const Segments& segments, int items, const u16* q, const u16* cache, const int* table,
                     const int* sequences) {
    Copier copier{ring};
    int used = 0;  // items that had keys
#pragma unroll 1
    for (int round = 0; item_index(round, items) >= 0; round++) {
        const Item item(item_index(round, items), segments);
        if (item.blocks == 0) continue;
        const int* pages_of = table + (long long)load_4(sequences + item.token) * P;
        auto fetch = [&](int block) {
            const int key = item.start + block * BLOCK + (int)threadIdx.x % 32 * KEYS;
            return threadIdx.x % 32 < BLOCK / KEYS && key <= item.last() ? (int)load_4(pages_of + (u32)key / PAGE % P) : 0;
        };
        int before = 0, now = fetch(0);
        copier.announce<0>();  // the last item's slots: in the meantime they have arrived
        copier.acquire(ring.queries_empty(used), (used / 2 & 1) ^ 1);
        copier.copy_queries(ring.queries(used), q + (item.token * Q + item.kv_head * GROUP) * D, item.count);
        used++;
        const u16* head = cache + item.kv_head * PAGE * D;
#pragma unroll 1
        for (int block = 0; block <= item.blocks; block++) {
            const int ahead = fetch(block + 1), start = item.start + block * BLOCK;
            if (block < item.blocks) {
                copier.acquire(copier.ring.empty(copier.ring.slot), copier.ring.phase ^ 1);
                copier.copy_block(head, now, start, item.first(), item.last());
                copier.finish();
            }
            if (block > 0) {
                copier.acquire(copier.ring.empty(copier.ring.slot), copier.ring.phase ^ 1);
                copier.copy_block(head + VALUES, before, start - BLOCK, item.first(), item.last());
                copier.finish();
            }
            before = now, now = ahead;
        }
    }
    copier.announce<0>();
}

// ---- the warpgroups that compute -----------------------------------------------------------------

// What an asynchronous product writes or reads is not touched before this point.
template <int COUNT>
DEVICE void settle(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int COUNT>
DEVICE void settle(u32 (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// d[64 x 64] += a[64 x 16] b[16 x 64], a in registers, b given as 16 rows of 64 columns
DEVICE void multiply_values(float (&d)[32], const u32* a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_NAMES_64
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : WGMMA_VALUES_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Word i of lane t of four becomes word t of lane i.
DEVICE uint4 transpose_4x4(const u32 (&w)[4], int t) {
    const bool odd = t & 1, high = t & 2;
    const u32 a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
    const u32 x[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
    const u32 c = __shfl_xor_sync(~0u, high ? x[0] : x[2], 2), d = __shfl_xor_sync(~0u, high ? x[1] : x[3], 2);
    return high ? make_uint4(c, d, x[2], x[3]) : make_uint4(x[0], x[1], c, d);
}

struct Attention {
    Ring ring;
    float scores[BLOCK / 2], out[32];  // columns 8j + 2t, 8j + 2t + 1: row g at 4j, 4j + 1, row g + 8 at 4j + 2, 4j + 3
    u32 weights[BLOCK / 4];            // as A fragments, four a 16 keys
    float top[2], sum[2], shrink[2];   // of rows g and g + 8; sum: of this lane's columns

    DEVICE void await() { barrier_wait(ring.full(ring.slot), ring.phase); }
    DEVICE void release(int slot) {
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(slot));
    }
    DEVICE void skip(int slots) {
#pragma unroll 1
        for (; slots > 0; slots--) {
            await();
            release(ring.slot);
            ring.next();
        }
    }
    DEVICE void multiply_keys(u64 queries) {
        const u64 keys = wgmma_operand(ring.tile());
#pragma unroll
        for (int k = 0; k < D / 16; k++) Wgmma<BLOCK>::multiply(scores, queries + 2 * k, keys + 2 * k, k > 0);
        wgmma_commit();
    }
    DEVICE void multiply_weights() {
        const u64 values = wgmma_operand(ring.tile());
#pragma unroll
        for (int k = 0; k < BLOCK / 16; k++) multiply_values(out, weights + 4 * k, values + k * (16 * ROW / 16));
        wgmma_commit();
    }
    // Scores of keys start ... to weights, in place. position: of row g's token; the one of row g + 8 is the next.
    DEVICE void soften(int start, int position) {
        const int column = start + threadIdx.x % 4 * 2;
        if (start + BLOCK - 1 > position || start <= position + 1 - REACH) {
#pragma unroll
            for (int i = 0; i < BLOCK / 2; i++) {
                const int age = position + i / 2 % 2 - (column + i / 4 * 8 + i % 2);
                if (age < 0 || age >= REACH) scores[i] = -INFINITE;
            }
        }
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float greatest = scores[2 * row];
#pragma unroll
            for (int i = 0; i < BLOCK / 8; i++)
                greatest = fmaxf(greatest, fmaxf(scores[4 * i + 2 * row], scores[4 * i + 2 * row + 1]));
            greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 1));
            greatest = fmaxf(fmaxf(greatest, __shfl_xor_sync(~0u, greatest, 2)) * FACTOR, top[row]);
            shrink[row] = exp2_fast(top[row] - greatest);
            top[row] = greatest;
            float total = 0.f;
#pragma unroll
            for (int i = 0; i < BLOCK / 4; i++) {
                float& score = scores[i / 2 * 4 + 2 * row + i % 2];
                score = exp2_fast(fmaf(score, FACTOR, -greatest));
                total += score;
            }
            sum[row] = fmaf(sum[row], shrink[row], total);
        }
    }
    DEVICE void pack() {
#pragma unroll
        for (int i = 0; i < BLOCK / 4; i++) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
    }

    // Row g or g + 8 of the results to `out`, 64 dims.
    DEVICE void store(u16* out, int row) const {
        const int t = threadIdx.x % 4;
        float total = sum[row];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float factor = __fdividef(1.f, total);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = this->out + 16 * half + 4 * i + 2 * row;
                words[i] = pack_bf16(pair[0] * factor, pair[1] * factor);
            }
            *(uint4*)(out + 32 * half + 8 * t) = transpose_4x4(words, t);
        }
    }

    // The blocks first ... last of an item; the others are passed by. position: see `soften`.
    DEVICE void run(const Item& item, int first, int last, int position, u64 queries, u32 queries_empty) {
        skip(max(2 * first - 1, 0));
        await();
        wgmma_fence();
        multiply_keys(queries);
        wgmma_wait<0>();
        settle(scores);
        release(ring.slot);
        ring.next();
        soften(item.start + first * BLOCK, position);
        pack();
        if (first > 0) skip(1);
        await();
#pragma unroll 1
        for (int block = first + 1; block <= last; block++) {
            const int keys = ring.slot;
            wgmma_fence();
            multiply_keys(queries);
            ring.next();
            await();
            wgmma_fence();
            multiply_weights();
            wgmma_wait<1>();
            settle(scores);
            release(keys);
            soften(item.start + block * BLOCK, position);
            settle(scores);
            const int values = ring.slot;
            ring.next();
            await();  // the next slot, here because ptxas would move the wait below to before the softmax, but for a loop
            wgmma_wait<0>();
            settle(out);
            settle(weights);
            release(values);
#pragma unroll
            for (int i = 0; i < 32; i++) out[i] *= shrink[i / 2 % 2];
            pack();
        }
        if (threadIdx.x % 32 == 0) barrier_arrive(queries_empty);
        if (last < item.blocks - 1) skip(1);
        await();
        wgmma_fence();
        multiply_weights();
        wgmma_wait<0>();
        settle(out);
        release(ring.slot);
        ring.next();
        skip(2 * (item.blocks - 1 - last) - (last < item.blocks - 1));
    }
};

DEVICE void attend_all(Ring ring, const Segments& segments, int items, const u16* sinks, u16* out) {
    const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // tells the compiler that it is uniform
    const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Attention state;
    state.ring = ring;
    int used = 0;
#pragma unroll 1
    for (int round = 0; item_index(round, items) >= 0; round++) {
        const Item item(item_index(round, items), segments);
        const float sink = load_bf16(sinks + item.kv_head * GROUP + g) * LOG2E;
#pragma unroll
        for (int i = 0; i < 32; i++) state.out[i] = 0.f;
#pragma unroll
        for (int row = 0; row < 2; row++) state.top[row] = sink, state.sum[row] = t == 0 ? 1.f : 0.f;
        const int tokens = min(item.count - 8 * group, 8), newest = item.position + 8 * group + tokens - 1;
        if (item.blocks > 0 && tokens > 0) {
            const int oldest = max(item.position + 8 * group - (REACH - 1), 0);
            state.run(item, (oldest - item.start) / BLOCK, (newest - item.start) / BLOCK,
                      item.position + 8 * group + 2 * warp, wgmma_operand(ring.queries(used) + group * 64 * ROW),
                      ring.queries_empty(used));
        } else if (item.blocks > 0) {
            state.skip(2 * item.blocks);
            if (threadIdx.x % 32 == 0) barrier_arrive(ring.queries_empty(used));
        }
        used += item.blocks > 0;
        const Item done(item_index(round, items), segments);  // read again: above, registers are short
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const int token = 8 * group + 2 * warp + row;
            if (token >= done.count) break;
            state.store(out + ((done.token + token) * Q + done.kv_head * GROUP + g) * D, row);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
attention_extend(const u16* q, const u16* cache, const int* table, const int* sequences, const int* positions,
                 const u16* sinks, u16* out) {
    extern __shared__ __align__(1024) char memory[];  // queries twice, the ring's slots, segments
    __shared__ u64 barriers[2 * STAGES + 2];
    __shared__ int counts[WARPS];
    trigger_next();
    Segments& segments = *(Segments*)(memory + 2 * QUERIES + STAGES * TILE);
    const Ring ring = {shared_address(memory), shared_address(barriers)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(ring.full(i), 128);
            barrier_init(ring.empty(i), 4 * WARPGROUPS);
        }
        for (int i = 0; i < 2; i++) barrier_init(ring.queries_empty(i), 4 * WARPGROUPS);
        fence_barrier_init();
    }
    const int items = KV * find_segments(segments, counts, sequences, positions);
    wait_for_previous();
    if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
        keep_registers<COPIER_REGISTERS>();
        copy_all(ring, segments, items, q, cache, table, sequences);
    } else {
        take_registers<REGISTERS>();
        attend_all(ring, segments, items, sinks, out);
    }
}
