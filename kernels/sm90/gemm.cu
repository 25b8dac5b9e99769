// out[t, n] = sum over k of weight[n, k] x[t, k] (+ bias[n]) (+ residual[t, n]); t < TOKENS, n < FEATURES, k < INNER.
// Weights are the left operand of wgmma, tokens the right one, so an accumulator is the output transposed.
//
// A block has SLABS warpgroups of consumers, each with 64 rows of weights and WIDTH tokens, and four warps of producers: warp
// s < SLABS streams slab s of the weights, warp 3 the tokens, both as one bulk copy for each 64 columns into rings of their
// own, for the weights need not wait for the kernel before this one and fill theirs ahead.
//
// SPLIT > 1: few tokens. The blocks of a cluster share K; each adds up its part of the tokens, in the order of the blocks.
// PAIR = 2: many tokens. The blocks of a cluster take neighbouring tiles of tokens and each brings half of the weights to both.
#include "wgmma.cuh"

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int BLOCKS = INNER / 64, SLAB_ROWS = ceil_div(FEATURES, 64), ROW_TILES = ceil_div(SLAB_ROWS, SLABS);
constexpr int TOKEN_TILES = ceil_div(ceil_div(TOKENS, WIDTH), PAIR), ITEMS = ROW_TILES * TOKEN_TILES;  // tiles for each of a PAIR
constexpr int BAND = 8 / PAIR;  // tiles of tokens that are taken through all rows together, so that they stay in the L2
constexpr int BATCH = 8;  // octets whose residuals are loaded at a time
constexpr int CONSUMERS = SLABS * 128, CLUSTER = SPLIT * PAIR, OCTETS = WIDTH / 8, ATOMS = ceil_div(TOKENS, 8);
constexpr u32 SLAB_BYTES = 8192, WEIGHT_BYTES = SLABS * SLAB_BYTES, TOKEN_BYTES = WIDTH * 128;
// Sums that other blocks of a SPLIT send: an octet of tokens is 16 bytes a consumer; octet j belongs to block j % SPLIT.
constexpr u32 OCTET_BYTES = CONSUMERS * 16, PART_BYTES = ceil_div(OCTETS, SPLIT) * OCTET_BYTES;
constexpr u32 TOKENS_AT = WEIGHT_STAGES * WEIGHT_BYTES, PARTS_AT = TOKENS_AT + TOKEN_STAGES * TOKEN_BYTES;
constexpr u32 BARRIERS_AT = PARTS_AT + (SPLIT - 1) * PART_BYTES;
static_assert(SHARED == BARRIERS_AT + (2 * WEIGHT_STAGES + 2 * TOKEN_STAGES + 1) * 8, "kernels/sm90/gemm.py disagrees");
static_assert(INNER % 64 == 0 && FEATURES % 8 == 0 && WIDTH % 16 == 0 && (SPLIT == 1 || PAIR == 1), "");
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

// Tile (row, tokens) of the outputs, and which columns of K this block multiplies.
struct Item {
    int row, start, first, last;
    DEVICE Item(int i, int rank) {
        const int band = i / (BAND * ROW_TILES), at = i % (BAND * ROW_TILES);
        const int tiles = min(BAND, TOKEN_TILES - band * BAND);
        row = at / tiles;
        start = ((band * BAND + at % tiles) * PAIR + (PAIR > 1 ? rank : 0)) * WIDTH;
        first = SPLIT > 1 ? rank * BLOCKS / SPLIT : 0;
        last = SPLIT > 1 ? (rank + 1) * BLOCKS / SPLIT : BLOCKS;
    }
};

DEVICE void produce_weights(const char* weight, WeightRing ring, int slab, int cluster, int rank) {
    ring.data += slab * SLAB_BYTES;
    for (int i = cluster; i < ITEMS; i += GRID / CLUSTER) {
        const Item item(i, rank);
        const int row = item.row * SLABS + slab;
        const char* from = weight + ((u64)row * BLOCKS + item.first) * SLAB_BYTES;
        for (int block = item.first; block < item.last; ++block, from += SLAB_BYTES, ring.next()) {
            barrier_wait(ring.empty(), ring.phase ^ 1);
            if (row >= SLAB_ROWS) {  // no such rows: their results go nowhere
                barrier_arrive(ring.full());
                continue;
            }
            barrier_expect(ring.full(), SLAB_BYTES);
            if constexpr (PAIR > 1) {
                const u32 half = rank * (SLAB_BYTES / 2);
                bulk_copy_multicast(ring.here() + half, from + half, SLAB_BYTES / 2, ring.full(), 3);
            } else if constexpr (TOKEN_TILES == 1) {
                bulk_copy_once(ring.here(), from, SLAB_BYTES, ring.full());
            } else {
                bulk_copy(ring.here(), from, SLAB_BYTES, ring.full());
            }
        }
    }
}

DEVICE void produce_tokens(const char* tiles, TokenRing ring, int cluster, int rank) {
    for (int i = cluster; i < ITEMS; i += GRID / CLUSTER) {
        const Item item(i, rank);
        const int bytes = min(WIDTH, ATOMS * 8 - item.start) * 128;  // the last tile may be narrower, or missing in its PAIR
        const char* from = tiles + ((u64)item.first * ATOMS + item.start / 8) * 1024;
        for (int block = item.first; block < item.last; ++block, from += ATOMS * 1024, ring.next()) {
            barrier_wait(ring.empty(), ring.phase ^ 1);
            if (bytes <= 0) {
                barrier_arrive(ring.full());
                continue;
            }
            barrier_expect(ring.full(), bytes);
            bulk_copy(ring.here(), from, bytes, ring.full());
        }
    }
}

// This warp has read the stage. One lane says so, to both producers of a PAIR.
DEVICE void release(u32 weights, u32 tokens, int rank) {
    if (threadIdx.x % 32) return;
    barrier_arrive(tokens);
    barrier_arrive(weights);
    if constexpr (PAIR > 1) barrier_arrive_at_peer(peer_address(weights, rank ^ 1));
}

// d = one item's product. One block's multiplications run while the next one's are issued.
DEVICE void multiply(float (&d)[WIDTH / 2], WeightRing& weights, TokenRing& tokens, int slab, int blocks, int rank) {
    u32 used_weights = 0, used_tokens = 0;
    for (int block = 0; block < blocks; ++block) {
        barrier_wait(weights.full(), weights.phase);
        barrier_wait(tokens.full(), tokens.phase);
        const u64 a = wgmma_operand(weights.here() + slab * SLAB_BYTES), b = wgmma_operand(tokens.here());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<WIDTH>::multiply(d, a + 2 * k, b + 2 * k, block + k);
        wgmma_commit();
        wgmma_wait<1>();
        if (block) release(used_weights, used_tokens, rank);
        used_weights = weights.empty(), used_tokens = tokens.empty();
        weights.next(), tokens.next();
    }
    wgmma_wait<0>();
    release(used_weights, used_tokens, rank);
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

// An octet's 16 rows x 8 tokens lie with lane 4g + c: d[0], d[1] row g, tokens 2c, 2c + 1; d[2], d[3] row g + 8. Memory wants a
// token's rows side by side. A transpose gives lane 4t + c rows 2c, 2c + 1 (`low`) and 2c + 8, 2c + 9 (`high`) of token t;
// an exchange of neighbours then gives it four rows in a row, from
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
// Rows 2c, 2c + 1 of token t for lane 4t + c of two fp32 fragments a (token 2c), b (token 2c + 1): halves travel by themselves.
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

// Stores this warp's 16 rows from `row` of the tokens from `start`; those of other blocks in a SPLIT not.
DEVICE void store(float (&d)[WIDTH / 2], float bias_low, float bias_high, int row, int start, int rank,
                  const u16* residual, Out* out) {
    const int lane = threadIdx.x % 32, token = start + lane / 4;
#pragma unroll
    for (int first = 0; first < OCTETS; first += BATCH) {
        [[maybe_unused]] uint2 added[BATCH];
#pragma unroll
        for (int j = first; RESIDUAL && j < min(first + BATCH, OCTETS); ++j) {
            const bool inside = token + 8 * j < TOKENS && row + first_row(lane) < FEATURES && (SPLIT == 1 || j % SPLIT == rank);
            added[j - first] = inside ? load_8(residual + (u64)(token + 8 * j) * FEATURES + row + first_row(lane)) : uint2{};
        }
#pragma unroll
        for (int j = first; j < min(first + BATCH, OCTETS); ++j) {
            if (SPLIT > 1 && j % SPLIT != rank) continue;
            float low[2] = {d[4 * j] + bias_low, d[4 * j + 1] + bias_low};
            float high[2] = {d[4 * j + 2] + bias_high, d[4 * j + 3] + bias_high};
            if constexpr (RESIDUAL) {
                const uint2 fragment = to_fragment(added[j - first]);
                low[0] += low_bf16(fragment.x), low[1] += high_bf16(fragment.x);
                high[0] += low_bf16(fragment.y), high[1] += high_bf16(fragment.y);
            }
            Out* to = out + (u64)(token + 8 * j) * FEATURES + row;
            store_octet(low, high, to, token + 8 * j < TOKENS ? FEATURES - row : 0);
        }
    }
}

DEVICE void consume(WeightRing weights, TokenRing tokens, u32 parts, u32 parts_full, int cluster, int rank, const u16* bias,
                    const u16* residual, Out* out) {
    const int warp = threadIdx.x / 32, slab = warp / 4, g = threadIdx.x % 32 / 4;
    for (int i = cluster; i < ITEMS; i += GRID / CLUSTER) {
        const Item item(i, rank);
        const int row = (item.row * SLABS + slab) * 64 + warp % 4 * 16;
        float bias_low = 0.f, bias_high = 0.f;
#if BIAS
        if (row + g < FEATURES) bias_low = load_bf16(bias + row + g);
        if (row + g + 8 < FEATURES) bias_high = load_bf16(bias + row + g + 8);
#endif
        float d[WIDTH / 2];
        multiply(d, weights, tokens, slab, item.last - item.first, rank);
        if constexpr (SPLIT > 1) exchange(d, parts, parts_full, rank);
        store(d, bias_low, bias_high, row, item.start, rank, residual, out);
    }
}

// Wide tiles want more registers than a block of this size can have for each thread; producers need few.
template <bool CONSUMER>
DEVICE void share_registers() {
    constexpr int COUNT = CONSUMER ? (SLABS == 3 ? 160 : 240) : (SLABS == 3 ? 32 : 24);
    if constexpr (WIDTH <= 128 || SLABS == 1) return;
    else if constexpr (CONSUMER) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#if SPLIT * PAIR > 1
#define CLUSTER_SHAPE __cluster_dims__(SPLIT * PAIR, 1, 1)
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
                                                                                    Out* out) {
#if !BIAS
    const u16* bias = nullptr;
#endif
#if !RESIDUAL
    const u16* residual = nullptr;
#endif
    extern __shared__ __align__(1024) char memory[];
    trigger_next();
    const int cluster = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, warp = threadIdx.x / 32 - SLABS * 4;
    const u32 base = shared_address(memory), barriers = base + BARRIERS_AT;
    const WeightRing weights{base, WEIGHT_BYTES, barriers};
    const TokenRing tokens{base + TOKENS_AT, TOKEN_BYTES, barriers + 2 * WEIGHT_STAGES * 8};
    const u32 parts_full = barriers + (2 * WEIGHT_STAGES + 2 * TOKEN_STAGES) * 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < WEIGHT_STAGES; ++i) {
            barrier_init(barriers + i * 8, SLABS);
            barrier_init(barriers + (WEIGHT_STAGES + i) * 8, SLABS * 4 * PAIR);
        }
        for (int i = 0; i < TOKEN_STAGES; ++i) {
            barrier_init(tokens.barriers + i * 8, 1);
            barrier_init(tokens.barriers + (TOKEN_STAGES + i) * 8, SLABS * 4);
        }
        barrier_init(parts_full, 1);
        fence_barrier_init();
        barrier_expect(parts_full, (SPLIT - 1) * ((OCTETS - rank + SPLIT - 1) / SPLIT) * OCTET_BYTES);
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_arrive_relaxed();
    if constexpr (PAIR > 1) cluster_wait();
    if (warp < 0) {
        share_registers<true>();
        wait_for_previous();  // for what is stored, and the residual
        consume(weights, tokens, base + PARTS_AT, parts_full, cluster, rank, bias, residual, out);
    } else {
        share_registers<false>();
        if (warp < SLABS && threadIdx.x % 32 == 0) produce_weights(weight, weights, warp, cluster, rank);
        if (warp == 3 && threadIdx.x % 32 == 0) {
            wait_for_previous();
            produce_tokens(tiles, tokens, cluster, rank);
        }
        __syncwarp();
    }
    if constexpr (PAIR > 1) cluster_sync();  // the other block may still write into this one's shared memory
}
