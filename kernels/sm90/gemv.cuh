// Products of a weight in layout "tiles" with up to 8 tokens: the weights land in registers, before the wait.
//
// Macros: K columns (a multiple of 64), ROWS of the weight a block (a multiple of 8), PARTS in which warps split the
// columns, RING 64-column steps whose weights a warp has in flight, TOKENS (1 ... 8) a block, NORM (RMSNorm in front?),
// EXACT (is the product with the norm's weight kept unrounded?), EPS, MIN_BLOCKS that an SM must hold.
//
// A warp takes 8 rows and every PARTS-th step of 64 columns. Of such a step lane (g, t) = (lane / 4, lane % 4) holds 16
// bytes of row g / 2 and 16 of row 4 + g / 2: chunk 4 (g % 2) + t. So each load of a warp is 512 bytes without a gap, and
// rows g = 2r and 2r + 1 of the matrix instruction are the two halves of the columns of one weight row. Its columns are
// halves too: column 2j carries the first 32 values of token j, column 2j + 1 the other 32. Of the 16 x 8 results those
// count whose row and column are the same half (join_halves), which leaves four tokens to an instruction: a set.
//
// x lies in shared memory as it is; times the norm's weight, it is rounded to bf16 once, or not at all if EXACT, where what
// rounding took is a second operand. The norm's factor belongs to the token, so it multiplies the finished sums. Sums of
// squares are the diagonal of x times itself, on the tensor cores as well.
#pragma once
#include "common.cuh"

constexpr int STEPS = K / 64, WARP_STEPS = (STEPS + PARTS - 1) / PARTS;
constexpr int GROUPS = ROWS / 8, WARPS = GROUPS * PARTS, THREADS = 32 * WARPS;
constexpr int SETS = (TOKENS + 3) / 4;
constexpr int STEP_BYTES = 8192;  // of weights: a tile
static_assert(K % 64 == 0 && ROWS % 8 == 0 && TOKENS <= 8 && RING <= WARP_STEPS, "shape");

struct Sums {  // of one block of rows, by warp: added up in a fixed order
    float products[PARTS][TOKENS][ROWS];
    float squares[WARPS][TOKENS];
};

// The weights in flight.
struct Ring {
    uint4 upper[RING], lower[RING];
};

struct Place {  // of this thread
    int lane, warp, part, group;
    u32 chunk;  // bytes from a token's (or the norm weight's) step of 64 columns to this lane's 8
};

DEVICE Place my_place() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {lane, warp, warp / GROUPS, warp % GROUPS, 64u * (lane / 4 % 2) + 16u * (lane % 4)};
}

struct Rows {  // where a lane's two chunks of the warp's first step lie
    const char *upper, *lower;
};

// Those in block of rows `block`. Row r + 4 lies 512 bytes behind row r, its chunk c at place c ^ r ^ 4.
DEVICE Rows my_rows(const char* weight, int block, const Place& at) {
    int eight = block * GROUPS + at.group, row = at.lane / 8, place = 4 * (at.lane / 4 % 2) + at.lane % 4 ^ row;
    const char* first = weight + (u64)(eight / 8 * STEPS + at.part) * STEP_BYTES + eight % 8 * 1024 + row * 128;
    return {first + place * 16, first + 512 + (place ^ 4) * 16};
}

// Has the warp an i-th step? Only the last can be missing, in some parts.
DEVICE bool has_step(int i, const Place& at) { return (i + 1) * PARTS <= STEPS || i * PARTS + at.part < STEPS; }

DEVICE void load_step(Ring& ring, const Rows& rows, int i, int slot) {
    ring.upper[slot] = load_weight(rows.upper + (u64)i * PARTS * STEP_BYTES);
    ring.lower[slot] = load_weight(rows.lower + (u64)i * PARTS * STEP_BYTES);
}

DEVICE void fill_ring(Ring& ring, const Rows& rows, const Place& at) {
#pragma unroll
    for (int i = 0; i < RING; ++i)
        if (has_step(i, at)) load_step(ring, rows, i, i);
}

// Sums on the tensor cores: with one set in two chains, for an instruction's latency is long; two sets are two chains
// anyway.
struct Accumulator {
    static constexpr int CHAINS = SETS == 1 ? 2 : 1;
    float c[CHAINS][4] = {};
    DEVICE void multiply(uint4 upper, uint4 lower, uint4 x) {
        mma_bf16(c[0], upper.x, lower.x, upper.y, lower.y, x.x, x.y);
        mma_bf16(c[CHAINS - 1], upper.z, lower.z, upper.w, lower.w, x.z, x.w);
    }
    DEVICE float operator[](int i) const { return CHAINS == 1 ? c[0][i] : c[0][i] + c[CHAINS - 1][i]; }
};

// Row 4 (g % 2) + g / 2 of the eight, token t of the set: the lane's own half and the neighbour's of the other.
DEVICE float join_halves(const Accumulator& c, int lane) {
    bool second = lane & 4;
    return (second ? c[3] : c[0]) + __shfl_xor_sync(~0u, second ? c[1] : c[2], 4);
}

// The products of the block's rows into `sums`, the ring refilled on the way. x: the tokens [TOKENS][K] in shared memory,
// norm: the norm's weight [K].
DEVICE void multiply(Sums& sums, Ring& ring, const Rows& rows, u32 x, u32 norm, const Place& at) {
    Accumulator products[SETS], rest[SETS], squares[SETS];
    u32 address[SETS];
#pragma unroll
    for (int s = 0; s < SETS; ++s)
        address[s] = x + min(4 * s + at.lane / 8, TOKENS - 1) * (K * 2) + at.chunk + at.part * 128;
    norm += at.chunk + at.part * 128;
#pragma unroll
    for (int i = 0; i < WARP_STEPS; ++i) {
        const int slot = i % RING;
        if (has_step(i, at)) {
            uint4 g = NORM ? load_shared_16(norm + i * PARTS * 128) : uint4();
#pragma unroll
            for (int s = 0; s < SETS; ++s) {
                uint4 b = load_shared_16(address[s] + i * PARTS * 128);
                if (NORM) {
                    if (at.group == i * GROUPS / WARP_STEPS) squares[s].multiply(b, uint4(), b);  // one of b's readers
                    uint4 raw = b;
                    b = multiply_8(raw, g);
                    if (EXACT) rest[s].multiply(ring.upper[slot], ring.lower[slot], rounding_errors(raw, g, b));
                }
                products[s].multiply(ring.upper[slot], ring.lower[slot], b);
            }
        }
        if (i + RING < WARP_STEPS && has_step(i + RING, at)) load_step(ring, rows, i + RING, slot);
    }
    const int g = at.lane / 4, t = at.lane % 4;
#pragma unroll
    for (int s = 0; s < SETS; ++s) {
        float y = join_halves(products[s], at.lane);
        if (EXACT) y += join_halves(rest[s], at.lane);
        if (4 * s + t < TOKENS) sums.products[at.part][4 * s + t][8 * at.group + 4 * (g % 2) + g / 2] = y;
        if (NORM) {  // row g = column g is in lane (g, g / 2)
            float half = g % 2 ? squares[s][1] : squares[s][0];
            half += __shfl_xor_sync(~0u, half, 4);
            if (g == 2 * t && 4 * s + t < TOKENS) sums.squares[at.warp][4 * s + t] = half;
        }
    }
}

// The finished product of a row and a token.
DEVICE float total(const Sums& sums, int row, int token) {
    float y = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) y += sums.products[i][token][row];
    if (NORM) {
#pragma unroll
        for (int i = 0; i < WARPS; ++i) squares += sums.squares[i][token];
        y *= rsqrtf(squares * (1.0f / K) + EPS);
    }
    return y;
}

// Asks for the norm's weight in shared memory.
DEVICE void copy_norm_weight(u32 norm, const u16* norm_weight) {
    for (int i = threadIdx.x; i < K / 8; i += THREADS) copy_16_async(norm + i * 16, norm_weight + i * 8);
}

// Asks for rows row[0], row[1], ... of x.
DEVICE void copy_tokens(u32 shared, const u16* x, const int (&row)[TOKENS]) {
#pragma unroll
    for (int j = 0; j < TOKENS; ++j)
#pragma unroll
        for (int i = threadIdx.x; i < K / 8; i += THREADS)
            copy_16_async(shared + (j * (K / 8) + i) * 16, x + (u64)row[j] * K + i * 8);
}
