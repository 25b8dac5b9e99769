// out[t, n] = sum over k of weight[n, k] x[t, k] (+ bias[n]) (+ residual[t, n]); t < TOKENS, n < FEATURES, k < INNER.
// Weights are the left operand of wgmma, tokens the right one, so an accumulator is the output transposed.
//
// A block of threads has SLABS warpgroups of consumers, each with 64 rows of weights and WIDTH tokens, and four warps of
// producers: three stream weights, a slab of 64 rows x 64 columns a copy, one streams tokens. Each of the two has its own
// ring, for the weights need not wait for the kernel before this one and fill theirs ahead.
// SPLIT > 1: the blocks of a cluster share K. Each then sums up its part of the tokens, in the order of the blocks.
// PUSH: each token's row goes to the rank whose share it is in. Stores to other GPUs take long and come all at once, at the
// end of a tile; so consumers leave the tile in shared memory, whence a warp stores it while they multiply the next one.
#include "wgmma.cuh"
#if PUSH
#include "exchange.cuh"
#endif

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int least(int a, int b) { return a < b ? a : b; }

constexpr int STEPS = INNER / 64, SLAB_ROWS = ceil_div(FEATURES, 64), ROW_TILES = ceil_div(SLAB_ROWS, SLABS);
constexpr int TOKEN_TILES = ceil_div(TOKENS, WIDTH), ITEMS = ROW_TILES * TOKEN_TILES;
constexpr int BAND = 8;  // tiles of tokens that are taken through all rows together, so that they stay in the L2
constexpr int CONSUMERS = SLABS * 128, PRODUCERS = PUSH ? 2 : 3, OCTETS = WIDTH / 8, ATOMS = ceil_div(TOKENS, 8);
constexpr int BATCH = SLABS < 3 && WIDTH > 128 ? 16 : 8;  // octets whose residuals are loaded at a time
// A tile with all tokens is as wide as they are, so that the steps lie in memory one behind the other and TOKEN_STEPS of
// them are one copy. wgmma may then read beyond them, the weights at the end, for columns that nobody stores.
constexpr u32 SLAB_BYTES = 8192, WEIGHT_BYTES = SLABS * SLAB_BYTES, STEP_BYTES = least(WIDTH, ATOMS * 8) * 128;
constexpr u32 TOKEN_BYTES = TOKEN_STEPS * STEP_BYTES;
// Sums that other blocks of a SPLIT send: an octet of tokens is 16 bytes a consumer; octet j belongs to block j % SPLIT.
constexpr u32 OCTET_BYTES = CONSUMERS * 16, PART_BYTES = ceil_div(OCTETS, SPLIT) * OCTET_BYTES;
constexpr u32 WEIGHTS_AT = TOKEN_STAGES * TOKEN_BYTES, PARTS_AT = WEIGHTS_AT + WEIGHT_STAGES * WEIGHT_BYTES;
// A finished tile, of each slab [WIDTH tokens][64 rows], a token's 16-byte chunk c at place c ^ token % 8; and the header.
constexpr u32 TILE_AT = PARTS_AT + (SPLIT - 1) * PART_BYTES, TILE_BYTES = PUSH ? SLABS * WIDTH * 128 : 0;
constexpr u32 HEADER_AT = TILE_AT + TILE_BYTES, BARRIERS_AT = HEADER_AT + (PUSH ? 96 : 0);
static_assert(SHARED == BARRIERS_AT + (2 * WEIGHT_STAGES + 2 * TOKEN_STAGES + 3) * 8, "kernels/sm90/gemm.py disagrees");
static_assert(!PUSH || (!FP32 && !RESIDUAL && TOKENS < 1 << 21), "");
static_assert(INNER % 64 == 0 && FEATURES % 8 == 0 && WIDTH % 16 == 0 && (TOKEN_STEPS == 1 || TOKEN_TILES == 1), "");
static_assert(SLABS == 2 || SLABS == 3, "the numbers of registers suit these");
static_assert(SPLIT == 1 || ITEMS * SPLIT == GRID, "the parts' barrier serves one item");

#if FP32
typedef float Out;
#else
typedef u16 Out;
#endif

template <int STAGES>
struct Ring {
    u32 data, bytes, barriers;
    int stage = 0;
    u32 phase = 0;
    DEVICE u32 here() const { return data + stage * bytes; }
    DEVICE u32 full() const { return barriers + stage * 8; }
    DEVICE u32 empty() const { return barriers + (STAGES + stage) * 8; }
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};
using WeightRing = Ring<WEIGHT_STAGES>;
using TokenRing = Ring<TOKEN_STAGES>;

// A tile of the outputs, and the steps of 64 columns of K that this block multiplies for it.
struct Item {
    int row, start, first, last;
    DEVICE Item(int i, int rank) {
        const int band = i / (BAND * ROW_TILES), at = i % (BAND * ROW_TILES);
        const int tiles = min(BAND, TOKEN_TILES - band * BAND);
        row = at / tiles;
        start = (band * BAND + at % tiles) * WIDTH;
        first = rank * STEPS / SPLIT;
        last = (rank + 1) * STEPS / SPLIT;
    }
};

// Every PRODUCERS-th copy, for a copy costs a thread more time than its bytes may take.
DEVICE void produce_weights(const char* weight, WeightRing ring, int producer, int cluster, int rank) {
    int turn = 0;
    for (int i = cluster; i < ITEMS; i += GRID / SPLIT) {
        const Item item(i, rank);
        for (int step = item.first; step < item.last; ++step, ring.next()) {
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                const bool mine = turn == producer;
                turn = turn + 1 < PRODUCERS ? turn + 1 : 0;
                if (!mine) continue;
                const int row = item.row * SLABS + slab;
                const u32 to = ring.here() + slab * SLAB_BYTES;
                const char* from = weight + ((u64)row * STEPS + step) * SLAB_BYTES;
                barrier_wait(ring.empty(), ring.phase ^ 1);
                if (row >= SLAB_ROWS) {  // no such rows: their results go nowhere
                    barrier_arrive(ring.full());
                    continue;
                }
                barrier_expect(ring.full(), SLAB_BYTES);
                if constexpr (TOKEN_TILES == 1) bulk_copy_once(to, from, SLAB_BYTES, ring.full());
                else bulk_copy(to, from, SLAB_BYTES, ring.full());
            }
        }
    }
}

DEVICE void produce_tokens(const char* tiles, TokenRing ring, int cluster, int rank) {
    for (int i = cluster; i < ITEMS; i += GRID / SPLIT) {
        const Item item(i, rank);
        const int step_bytes = min(WIDTH, ATOMS * 8 - item.start) * 128;  // the last tile may be narrower
        for (int step = item.first; step < item.last; step += TOKEN_STEPS, ring.next()) {
            const int bytes = min(TOKEN_STEPS, item.last - step) * step_bytes;
            barrier_wait(ring.empty(), ring.phase ^ 1);
            barrier_expect(ring.full(), bytes);
            bulk_copy(ring.here(), tiles + ((u64)step * ATOMS + item.start / 8) * 1024, bytes, ring.full());
        }
    }
}

// The stages that a step was the last to read. One lane of each warp gives them back.
struct Used {
    u32 weights = 0, tokens = 0;
    DEVICE void release() const {
        if (threadIdx.x % 32) return;
        if (weights) barrier_arrive(weights);
        if (tokens) barrier_arrive(tokens);
    }
};

// d = one item's product, once `wgmma_wait<0>` says so. While one step's products run, the next one's are issued. Returns
// what is to be released then.
DEVICE Used multiply(float (&d)[WIDTH / 2], WeightRing& weights, TokenRing& tokens, int slab, int steps) {
    Used used;
    for (int step = 0; step < steps; ++step) {
        const int part = step % TOKEN_STEPS;
        barrier_wait(weights.full(), weights.phase);
        if (part == 0) barrier_wait(tokens.full(), tokens.phase);
        const u64 a = wgmma_operand(weights.here() + slab * SLAB_BYTES);
        const u64 b = wgmma_operand(tokens.here() + part * STEP_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<WIDTH>::multiply(d, a + 2 * k, b + 2 * k, step + k);
        wgmma_commit();
        wgmma_wait<1>();
        used.release();
        used = Used{weights.empty(), 0};
        weights.next();
        if (part + 1 == TOKEN_STEPS || step + 1 == steps) {
            used.tokens = tokens.empty();
            tokens.next();
        }
    }
    return used;
}

// Sends each octet of tokens to the block that owns it, and adds to this block's octets what the others send, in the order
// of the blocks.
DEVICE void exchange(float (&d)[WIDTH / 2], u32 parts, u32 barrier, int rank) {
    cluster_wait();  // the others run
    const u32 mine = parts + threadIdx.x * 16;
#pragma unroll
    for (int j = 0; j < OCTETS; ++j) {
        const int owner = j % SPLIT;
        const u32 place = mine + (rank - (rank > owner)) * PART_BYTES + j / SPLIT * OCTET_BYTES;
        if (owner != rank)
            store_async(peer_address(place, owner), peer_address(barrier, owner),
                        make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
    }
    barrier_wait(barrier, 0);
#pragma unroll
    for (int j = 0; j < OCTETS; ++j) {
        if (j % SPLIT != rank) continue;
        float sum[4] = {};
#pragma unroll
        for (int block = 0; block < SPLIT; ++block) {
            uint4 part{__float_as_uint(d[4 * j]), __float_as_uint(d[4 * j + 1]), __float_as_uint(d[4 * j + 2]),
                       __float_as_uint(d[4 * j + 3])};
            if (block != rank) part = load_shared_16(mine + (block - (block > rank)) * PART_BYTES + j / SPLIT * OCTET_BYTES);
            sum[0] += __uint_as_float(part.x), sum[1] += __uint_as_float(part.y);
            sum[2] += __uint_as_float(part.z), sum[3] += __uint_as_float(part.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) d[4 * j + i] = sum[i];
    }
}

// An octet's 16 rows x 8 tokens lie with lane 4g + c: d[0], d[1] row g, tokens 2c, 2c + 1; d[2], d[3] row g + 8. Memory
// wants a token's rows side by side. A transpose gives lane 4t + c rows 2c, 2c + 1 (`low`) and 2c + 8, 2c + 9 (`high`) of
// token t; an exchange of neighbours then gives it four rows in a row, from
DEVICE int first_row(int lane) { return lane % 2 * 8 + lane % 4 / 2 * 4; }

DEVICE uint2 to_rows(u32 low, u32 high) {
    const bool odd = threadIdx.x % 2;
    low = transpose_8x8(low), high = transpose_8x8(high);
    const u32 other = __shfl_xor_sync(~0u, odd ? low : high, 1);
    return odd ? uint2{other, high} : uint2{low, other};
}
// The inverse: x the low, y the high rows.
DEVICE uint2 to_fragment(uint2 rows) {
    const bool odd = threadIdx.x % 2;
    const u32 other = __shfl_xor_sync(~0u, odd ? rows.x : rows.y, 1);
    return uint2{transpose_8x8(odd ? other : rows.x), transpose_8x8(odd ? rows.y : other)};
}
// The same for fp32, a of token 2c, b of 2c + 1, whose halves travel by themselves: lane 4t + c gets rows 2c, 2c + 1 of t.
DEVICE uint2 to_rows_fp32(float a, float b) {
    const u32 x = __float_as_uint(a), y = __float_as_uint(b);
    const u32 low = transpose_8x8(__byte_perm(x, y, 0x5410)), high = transpose_8x8(__byte_perm(x, y, 0x7632));
    return uint2{__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
}

// An octet of this warp to `to`; `rows` are there.
DEVICE void store_octet(const float (&low)[2], const float (&high)[2], Out* to, int rows) {
    const int lane = threadIdx.x % 32;
#if FP32
    const uint2 first = to_rows_fp32(low[0], low[1]), second = to_rows_fp32(high[0], high[1]);
    const int at = lane % 4 * 2;
    if (at < rows) store_8(to + at, first);
    if (at + 8 < rows) store_8(to + at + 8, second);
#else
    const uint2 packed = to_rows(pack_bf16(low[0], low[1]), pack_bf16(high[0], high[1]));
    if (first_row(lane) < rows) store_8(to + first_row(lane), packed);
#endif
}

// Where a warp's 16 rows of a tile lie.
struct Place {
    int row, start, rank;
    DEVICE int token(int octet) const { return start + 8 * octet + threadIdx.x % 32 / 4; }
    DEVICE bool mine(int octet) const { return SPLIT == 1 || octet % SPLIT == rank; }
};

// The residuals of a batch of octets, four rows a lane; nothing waits for them yet.
DEVICE void load_residuals(uint2 (&added)[BATCH], const Place& place, int first, const u16* residual) {
    const int at = place.row + first_row(threadIdx.x % 32);
#pragma unroll
    for (int j = first; j < least(first + BATCH, OCTETS); ++j) {
        const bool inside = place.mine(j) && place.token(j) < TOKENS && at < FEATURES;
        added[j - first] = inside ? load_8(residual + (u64)place.token(j) * FEATURES + at) : uint2{};
    }
}

// Stores the octets of this block. `added` are the residuals of the first batch.
DEVICE void store(const float (&d)[WIDTH / 2], uint2 (&added)[BATCH], float bias_low, float bias_high, const Place& place,
                  const u16* residual, Out* out) {
#pragma unroll
    for (int first = 0; first < OCTETS; first += BATCH) {
        if (RESIDUAL && first) load_residuals(added, place, first, residual);
#pragma unroll
        for (int j = first; j < least(first + BATCH, OCTETS); ++j) {
            if (!place.mine(j)) continue;
            float low[2] = {d[4 * j] + bias_low, d[4 * j + 1] + bias_low};
            float high[2] = {d[4 * j + 2] + bias_high, d[4 * j + 3] + bias_high};
            if constexpr (RESIDUAL) {
                const uint2 fragment = to_fragment(added[j - first]);
                low[0] += low_bf16(fragment.x), low[1] += high_bf16(fragment.x);
                high[0] += low_bf16(fragment.y), high[1] += high_bf16(fragment.y);
            }
            Out* to = out + (u64)place.token(j) * FEATURES + place.row;
            store_octet(low, high, to, place.token(j) < TOKENS ? FEATURES - place.row : 0);
        }
    }
}

// A finished tile in shared memory.
struct Tile {
    u32 data, full;
    DEVICE u32 empty() const { return full + 8; }
    DEVICE u32 slab(int i) const { return data + i * (WIDTH * 128); }
};

#if PUSH
// Leaves the octets of this block in the tile.
DEVICE void leave(const float (&d)[WIDTH / 2], float bias_low, float bias_high, u32 slab, int rank) {
    const int token = threadIdx.x % 8, chunk = threadIdx.x / 32 % 4 * 2 + threadIdx.x / 8 % 2;
    const u32 to = slab + token * 128 + (chunk ^ token) * 16;
#pragma unroll
    for (int j = 0; j < OCTETS; ++j)
        if (SPLIT == 1 || j % SPLIT == rank)
            store_transposed(to + j * 1024, pack_bf16(d[4 * j] + bias_low, d[4 * j + 1] + bias_low),
                             pack_bf16(d[4 * j + 2] + bias_high, d[4 * j + 3] + bias_high));
}

// One warp stores the tiles, where each token's row belongs: eight lanes the 128 bytes of a token in a slab.
DEVICE void push_tiles(Tile tile, const Ranks& ranks, u16* out, int cluster, int rank) {
    const Shares shares(ranks.count(), TOKENS);
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    u32 phase = 0;
    for (int i = cluster; i < ITEMS; i += GRID / SPLIT, phase ^= 1) {
        const Item item(i, rank);
        const int row = item.row * SLABS * 64 + chunk * 8;
        barrier_wait(tile.full, phase);
#pragma unroll 2
        for (int token = lane / 8; token < WIDTH; token += 4) {
            if ((SPLIT > 1 && token / 8 % SPLIT != rank) || item.start + token >= TOKENS) continue;
            u16* to = shares.place(ranks, out, ranks.own(), item.start + token, FEATURES) + row;
            uint4 v[SLABS];
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
                v[slab] = load_shared_16(tile.slab(slab) + token * 128 + (chunk ^ token % 8) * 16);
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
                if (row + slab * 64 < FEATURES) store_16(to + slab * 64, v[slab]);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(tile.empty());
    }
    fence_system();  // see finish_pushes()
}
#endif

DEVICE void consume(WeightRing weights, TokenRing tokens, u32 parts, u32 parts_full, Tile tile, int cluster, int rank,
                    const u16* bias, const u16* residual, Out* out) {
    const int warp = threadIdx.x / 32, slab = warp / 4, g = threadIdx.x % 32 / 4;
    u32 phase = 1;  // of the tile: it begins empty
    for (int i = cluster; i < ITEMS; i += GRID / SPLIT) {
        const Item item(i, rank);
        const Place place{(item.row * SLABS + slab) * 64 + warp % 4 * 16, item.start, rank};
        float bias_low = 0.f, bias_high = 0.f;
        if constexpr (BIAS) {
            if (place.row + g < FEATURES) bias_low = load_bf16(bias + place.row + g);
            if (place.row + g + 8 < FEATURES) bias_high = load_bf16(bias + place.row + g + 8);
        }
        float d[WIDTH / 2];
        uint2 added[BATCH];
        const Used used = multiply(d, weights, tokens, slab, item.last - item.first);
        if constexpr (RESIDUAL) load_residuals(added, place, 0, residual);  // while the last products run
        wgmma_wait<0>();
        used.release();
        if constexpr (SPLIT > 1) exchange(d, parts, parts_full, rank);
#if PUSH
        barrier_wait(tile.empty(), phase);
        phase ^= 1;
        leave(d, bias_low, bias_high, tile.slab(slab), rank);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(tile.full);
#else
        store(d, added, bias_low, bias_high, place, residual, out);
#endif
    }
}

#if SPLIT > 1
#define CLUSTER_SHAPE __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER_SHAPE
#endif

extern "C" __global__ void CLUSTER_SHAPE __launch_bounds__(CONSUMERS + 128, 1) gemm(const char* tiles, const char* weight,
#if BIAS
                                                                                    const u16* bias,
#endif
#if RESIDUAL
                                                                                    const u16* residual,
#endif
#if PUSH
                                                                                    const Header* header,
#endif
                                                                                    Out* out) {
#if !BIAS
    const u16* bias = nullptr;
#endif
#if !RESIDUAL
    const u16* residual = nullptr;
#endif
    extern __shared__ __align__(1024) char memory[];
    trigger_next();
    const int cluster = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT, warp = threadIdx.x / 32 - SLABS * 4;
    const u32 base = shared_address(memory), barriers = base + BARRIERS_AT;
    const WeightRing weights{base + WEIGHTS_AT, WEIGHT_BYTES, barriers};
    const TokenRing tokens{base, TOKEN_BYTES, barriers + 2 * WEIGHT_STAGES * 8};
    const u32 parts_full = barriers + (2 * WEIGHT_STAGES + 2 * TOKEN_STAGES) * 8;
    const Tile tile{base + TILE_AT, parts_full + 8};
#if PUSH
    static_assert(sizeof(Header) == BARRIERS_AT - HEADER_AT, "kernels/sm90/gemm.py disagrees");
    Header& known = *(Header*)(memory + HEADER_AT);
    copy_header(known, header);
    wait_for_copies();
#endif
    if (threadIdx.x == 0) {
        for (int i = 0; i < WEIGHT_STAGES; ++i) {
            barrier_init(barriers + i * 8, SLABS);
            barrier_init(barriers + (WEIGHT_STAGES + i) * 8, SLABS * 4);
        }
        for (int i = 0; i < TOKEN_STAGES; ++i) {
            barrier_init(tokens.barriers + i * 8, 1);
            barrier_init(tokens.barriers + (TOKEN_STAGES + i) * 8, SLABS * 4);
        }
        barrier_init(parts_full, 1);
        barrier_init(tile.full, SLABS * 4);
        barrier_init(tile.empty(), 1);
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) barrier_expect(parts_full, (SPLIT - 1) * ((OCTETS - rank + SPLIT - 1) / SPLIT) * OCTET_BYTES);
    if constexpr (SPLIT > 1) cluster_arrive_relaxed();
    if (warp < 0) {
        // More than so many threads get at the start, from what the others need not
        if constexpr (WIDTH > 128) take_registers<(SLABS == 3 ? 160 : 240) - PUSH * 8>();
        wait_for_previous();  // for what is stored, and the residual
        consume(weights, tokens, base + PARTS_AT, parts_full, tile, cluster, rank, bias, residual, out);
    } else {
        if constexpr (WIDTH > 128) keep_registers<SLABS == 3 ? 32 + PUSH * 24 : 24 + PUSH * 16>();
#if PUSH
        if (warp == 3) {
            wait_for_previous();
            push_tiles(tile, Ranks{header, known}, out, cluster, rank);
            return;
        }
#endif
        if (threadIdx.x % 32) return;
        if (warp == PRODUCERS) {
            wait_for_previous();
            produce_tokens(tiles, tokens, cluster, rank);
        } else {  // last here and hence first in the machine code: the lint looks for loads ahead of the first wait
            produce_weights(weight, weights, warp, cluster, rank);
        }
    }
}
