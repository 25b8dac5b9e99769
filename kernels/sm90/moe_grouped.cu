// The experts of many tokens: both projections in one persistent launch, MXFP4 weights decoded in registers.
//
// Rows of the activation tiles are sorted by expert, and a *group* is up to WIDEST rows of one expert (moe_route.cu). Phase
// 0, gate_up: h[row] = swiglu(W x[row] + b), in tile form; phase 1, down: y[row] = W h[row] + b, row by row. A *tile* is 192
// weight rows times a group. Blocks take tiles from a counter, all of phase 0 first; a tile of phase 1 waits until the
// group's h is complete, but its weights do not.
//
// wgmma computes D[weight row, token]: weights are its A operand, in registers, tokens its B, in shared memory. Three
// warpgroups have 64 weight rows each and share the tokens. A fourth feeds them: one thread streams weights, one tokens, one
// publishes finished tiles, a warp fetches biases. So nobody who multiplies waits for device memory.
//
// Of down's K = INNER the last 64 columns may be half there: weights have zeros for the others by their layout (which goes
// on with whole blocks of zeros, skipped here), and whoever stores the group's last features stores zeros behind them.
//
// Nothing here but pointers depends on the number of tokens. extent: {groups, rows of the activation tiles / 8}.
// Defines: HIDDEN: a multiple of 192; INNER: of 96; WIDEST: of 8; STAGES: of the ring, a divisor of HIDDEN / 64; BLOCKS: on
// a processor; SHARED: bytes; ALPHA, LIMIT.
#include "wgmma_registers.cuh"

constexpr int SLABS = 3, SLAB = 2176;     // warpgroups that multiply; bytes of 64 weight rows x 64 columns
constexpr int TILES = 4;                  // of the ring of tile descriptors
constexpr int GATE_UP_PARTS = 2 * INNER / 192, DOWN_PARTS = HIDDEN / 192;  // tiles a group
constexpr int UP_BLOCKS = HIDDEN / 64, DOWN_BLOCKS = (INNER + 63) / 64;  // of 64 columns: a tile's stages
constexpr int DOWN_STRIDE = (INNER + 191) / 192 * 3;                     // stages from one tile's weights to the next's
constexpr int MULTIPLIERS = SLABS * 128, THREADS = MULTIPLIERS + 128;

struct Tile { int phase, group, part, expert, start, rows, atoms, unused; };  // rows 0: no more tiles

// ---- shared memory: activations, weights, barriers, biases, tiles -------------------------------

constexpr int TOKENS_STAGE = WIDEST * 128, WEIGHTS_STAGE = SLABS * SLAB;
constexpr int WEIGHTS_AT = STAGES * TOKENS_STAGE, BARRIERS_AT = WEIGHTS_AT + STAGES * WEIGHTS_STAGE;
constexpr int BIASES_AT = BARRIERS_AT + 8 * (2 * STAGES + 4 * TILES), TILES_AT = BIASES_AT + TILES * SLABS * 32 * 8;
static_assert(TILES_AT + TILES * (int)sizeof(Tile) <= SHARED, "shared memory");

extern __shared__ __align__(1024) char shared[];

struct Places {  // addresses; every one but the base is a constant where the stage is
    u32 base;
    DEVICE u32 tokens(int stage) const { return base + stage * TOKENS_STAGE; }
    DEVICE u32 weights(int stage) const { return base + WEIGHTS_AT + stage * WEIGHTS_STAGE; }
    DEVICE u32 full(int stage) const { return base + BARRIERS_AT + 8 * stage; }
    DEVICE u32 empty(int stage) const { return base + BARRIERS_AT + 8 * (STAGES + stage); }
    DEVICE u32 posted(int slot) const { return base + BARRIERS_AT + 8 * (2 * STAGES + slot); }           // a tile is there
    DEVICE u32 taken(int slot) const { return base + BARRIERS_AT + 8 * (2 * STAGES + TILES + slot); }    // nobody needs it
    DEVICE u32 stored(int slot) const { return base + BARRIERS_AT + 8 * (2 * STAGES + 2 * TILES + slot); }  // results are
    DEVICE u32 biased(int slot) const { return base + BARRIERS_AT + 8 * (2 * STAGES + 3 * TILES + slot); }
};
DEVICE Tile& tile_at(int slot) { return ((Tile*)(shared + TILES_AT))[slot]; }
DEVICE float2* biases_at(int slot) { return (float2*)(shared + BIASES_AT) + slot * (SLABS * 32); }  // [warpgroup][warp][g]

// A position in a ring of tiles: the slot and the parity of its next phase.
struct Turn {
    int slot = 0;
    u32 parity = 0;
    DEVICE void next() {
        if (++slot == TILES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Every tile begins at stage 0 of the ring and goes round as often as it needs to. In phase 1 the last round may be short,
// of END stages: the others are left out.
constexpr int UP_ROUNDS = UP_BLOCKS / STAGES, DOWN_ROUNDS = (DOWN_BLOCKS + STAGES - 1) / STAGES;
constexpr int END = DOWN_BLOCKS % STAGES;  // 0: no round is short
static_assert(UP_BLOCKS % STAGES == 0, "stages");
DEVICE int rounds_of(int phase) { return phase ? DOWN_ROUNDS : UP_ROUNDS; }
DEVICE bool is_short(int phase, int round) { return END && phase && round == DOWN_ROUNDS - 1; }

// `parities`: of the next phases of the stages' barriers. Bit 0: of the first END stages, or of all; bit 1: of the others,
// which lag behind by the short rounds.
DEVICE u32 parity_of(u32 parities, int stage) { return !END ? parities : stage < END ? parities & 1 : parities >> 1; }
DEVICE u32 after_round(u32 parities, bool is_short) { return parities ^ (!END || is_short ? 1 : 3); }

// ---- decoding -----------------------------------------------------------------------------------

// A bf16 whose bits 15 | 8, 7, 6 are an e2m1's sign, exponent and mantissa is its value x 2^-126, subnormals included; one
// multiplication by 2^(126 + scale) decodes and scales. `factors`: of rows g (low half) and g + 8 (high half).
// In assembly, because this form makes the broadcast of a half part of the multiplication.
DEVICE u32 times_low(u32 a, u32 factors) {
    u32 r;
    asm("{\n.reg .b16 low, high;\n.reg .b32 both;\nmov.b32 {low, high}, %2;\nmov.b32 both, {low, low};\n"
        "mul.rn.bf16x2 %0, %1, both;\n}" : "=r"(r) : "r"(a), "r"(factors));
    return r;
}
DEVICE u32 times_high(u32 a, u32 factors) {
    u32 r;
    asm("{\n.reg .b16 low, high;\n.reg .b32 both;\nmov.b32 {low, high}, %2;\nmov.b32 both, {high, high};\n"
        "mul.rn.bf16x2 %0, %1, both;\n}" : "=r"(r) : "r"(a), "r"(factors));
    return r;
}
DEVICE u32 select_bits(u32 mask, u32 ones, u32 zeros) {  // in one instruction
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(r) : "r"(ones), "r"(zeros), "r"(mask));
    return r;
}

// The 16 values of two words: A operands of two products of 16 columns. Three rotations of each word bring values in place,
// and what these leave over in both, merged, is the last two registers (kernels/layouts.py).
DEVICE void decode(u32 (&a)[8], u32 w0, u32 w1, u32 factors) {
    constexpr u32 VALUE = 0x81C081C0, LEFT_OVER = 0x60306030;
    const auto rotated = [](u32 w, int bits) { return __funnelshift_l(w, w, bits); };
    const u32 merged = select_bits(LEFT_OVER, w0, rotated(w1, 2));
    a[0] = times_low(w0 & VALUE, factors);
    a[1] = times_high(w0 << 6 & VALUE, factors);
    a[2] = times_low(rotated(w0, 12) & VALUE, factors);
    a[3] = times_high(merged << 2 & VALUE, factors);
    a[4] = times_low(w1 & VALUE, factors);
    a[5] = times_high(w1 << 6 & VALUE, factors);
    a[6] = times_low(rotated(w1, 12) & VALUE, factors);
    a[7] = times_high(rotated(merged, 8) & VALUE, factors);
}
// Scale bytes are (row g, step 0), (g, 1), (g + 8, 0), (g + 8, 1), each the exponent of its factor.
DEVICE u32 factors_of(u32 scales, int step) { return (step ? scales >> 1 : scales << 7) & 0x7F807F80; }

// ---- the warpgroups that multiply ---------------------------------------------------------------

DEVICE float swiglu(float gate, float up_and_1) {
    const float g = fminf(gate, LIMIT), u = fminf(fmaxf(up_and_1, 1 - LIMIT), 1 + LIMIT);
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + exp2_fast(g * (-ALPHA * LOG2E))));
    return g * r * u;
}

// Sums of a tile's 64 weight rows of this warpgroup times N tokens, over the phase's K.
//
// The ring is walked in straight line from stage 0 on: all addresses are constants. The second half of a stage is decoded
// under the first half's products, the next stage's first half under the other warpgroups'.
template <int N>
DEVICE void multiply(float (&d)[N / 2], const Places& at, int phase, u32& parities) {
    const int tid = threadIdx.x, warpgroup = tid / 128, warp = tid / 32 % 4, g = tid % 32 / 4;
    const u32 own = warpgroup * SLAB + tid % 128 * 16, own_scales = warpgroup * SLAB + 2048 + warp * 32 + g * 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;

    u32 first[8], second[8];
    barrier_wait(at.full(0), parity_of(parities, 0));
    uint4 w = load_shared_16(at.weights(0) + own);
    u32 scales = load_shared_4(at.weights(0) + own_scales);
    decode(first, w.x, w.y, factors_of(scales, 0));
#pragma unroll 1
    for (int round = 0; round < rounds_of(phase); ++round) {
        const bool last_round = round == rounds_of(phase) - 1, short_round = is_short(phase, round);
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const int next = (stage + 1) % STAGES;
            const u32 next_parity = next ? parity_of(parities, next) : parity_of(parities, 0) ^ 1;
            const bool more = stage + 1 == END ? !short_round : next || !last_round;
            const u64 tokens = wgmma_operand(at.tokens(stage));
            const bool ready = !more || barrier_test(at.full(next), next_parity);
            wgmma_fence();
            WgmmaRegisters<N>::multiply(d, first, tokens);
            WgmmaRegisters<N>::multiply(d, first + 4, tokens + 2);
            wgmma_commit();
            decode(second, w.z, w.w, factors_of(scales, 1));
            wgmma_fence();
            WgmmaRegisters<N>::multiply(d, second, tokens + 4);
            WgmmaRegisters<N>::multiply(d, second + 4, tokens + 6);
            wgmma_commit();
            if (more) {
                if (!ready) barrier_wait(at.full(next), next_parity);
                w = load_shared_16(at.weights(next) + own);
                scales = load_shared_4(at.weights(next) + own_scales);
            }
            wgmma_wait<0>();
            barrier_arrive(at.empty(stage));
            if (more) decode(first, w.x, w.y, factors_of(scales, 0));
            else if (stage + 1 == END) break;
        }
        parities = after_round(parities, short_round);
    }
}

// The results of a tile. Lane 4g + c has fragment rows g and g + 8 of its warp's 16 at tokens 8j + 2c and 8j + 2c + 1; the
// transposition gives it token 8j + g and neighbouring features.
template <int N>
DEVICE void store(const float (&d)[N / 2], const Tile& tile, float2 bias, u16* h, u16* y) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const int slab = tile.part * SLABS + warpgroup;
    if (tile.phase == 0) {  // gate and up of feature slab * 32 + warp * 8 + g: a warp's 8 are one chunk of a tile's row
        const auto place = [&](int chunk) {
            return h + ((long)(slab / 2) * tile.atoms + tile.start / 8) * 512 + g * 64 + (chunk ^ g) * 8 + c * 2;
        };
        u16* out = place(slab % 2 * 4 + warp);
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float even = swiglu(d[4 * j] + bias.x, d[4 * j + 2] + bias.y);
            const float odd = swiglu(d[4 * j + 1] + bias.x, d[4 * j + 3] + bias.y);
            const u32 features = transpose_8x8(pack_bf16(even, odd));
            if (8 * j + g < tile.rows) *(u32*)(out + j * 512) = features;
        }
        if (INNER % 64 && slab == INNER / 32 - 1) {  // the last features are half a row of the last tile
            u16* behind = place(4 + warp);
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
                if (8 * j + g < tile.rows) *(u32*)(behind + j * 512) = 0;
        }
    } else {  // rows are dealt so that a lane gets four neighbouring features
        u16* out = y + (long)(tile.start + g) * HIDDEN + slab * 64 + warp * 16 + c * 4;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const u32 low = transpose_8x8(pack_bf16(d[4 * j] + bias.x, d[4 * j + 1] + bias.x));
            const u32 high = transpose_8x8(pack_bf16(d[4 * j + 2] + bias.y, d[4 * j + 3] + bias.y));
            if (8 * j + g < tile.rows) *(uint2*)(out + (long)j * 8 * HIDDEN) = make_uint2(low, high);
        }
    }
}

template <int N>
DEVICE void run_tile(const Places& at, const Turn& turn, u32& parities, u16* h, u16* y) {
    float d[N / 2];
    multiply<N>(d, at, tile_at(turn.slot).phase, parities);
    __syncwarp();
    const Tile tile = tile_at(turn.slot);
    barrier_wait(at.biased(turn.slot), turn.parity);
    const float2 bias = biases_at(turn.slot)[threadIdx.x / 32 * 8 + threadIdx.x % 32 / 4];
    store<N>(d, tile, bias, h, y);
    __syncwarp();
    barrier_arrive(at.stored(turn.slot));  // the publisher does the rest; nobody here waits for the stores to arrive
    barrier_arrive(at.taken(turn.slot));
}

// A tile's width is its rows, rounded up to whole atoms.
template <int N>
DEVICE void run_tile_of_width(int rows, const Places& at, const Turn& turn, u32& parities, u16* h, u16* y) {
    if (rows <= N) run_tile<N>(at, turn, parities, h, y);
    else if constexpr (N < WIDEST) run_tile_of_width<N + 8>(rows, at, turn, parities, h, y);
}

DEVICE void multiply_tiles(const Places& at, u16* h, u16* y) {
    u32 parities = 0;
    for (Turn turn;; turn.next()) {
        barrier_wait(at.posted(turn.slot), turn.parity);
        const int rows = tile_at(turn.slot).rows;
        if (rows == 0) return;
        run_tile_of_width<8>(rows, at, turn, parities, h, y);
    }
}

// ---- the warps that feed them -------------------------------------------------------------------

// One thread takes tiles from the counter, posts them and streams their weights.
DEVICE void stream_weights(const Places& at, const int4* groups, const int* extent, const char* up, const char* down,
                           int* counter) {
    const int group_count = load_4(extent), atoms = load_4(extent + 1);
    const int gate_up_tiles = group_count * GATE_UP_PARTS, all = gate_up_tiles + group_count * DOWN_PARTS;
    Turn turn;
    u32 parities = 0;
    int i = atomicAdd(counter, 1);
    for (;; turn.next()) {
        const int following = atomicAdd(counter, 1);
        barrier_wait(at.taken(turn.slot), turn.parity ^ 1);
        if (i >= all) {
            tile_at(turn.slot).rows = 0;
            barrier_arrive(at.posted(turn.slot));
            break;
        }
        const int phase = i >= gate_up_tiles, j = phase ? i - gate_up_tiles : i, parts = phase ? DOWN_PARTS : GATE_UP_PARTS;
        const uint4 group = load_16(groups + j / parts);
        tile_at(turn.slot) = {phase, j / parts, j % parts, (int)group.x, (int)group.y, (int)group.z, atoms, 0};
        barrier_arrive(at.posted(turn.slot));
        const int stride = phase ? DOWN_STRIDE : UP_BLOCKS;
        const char* from = (phase ? down : up) + ((long)group.x * parts + j % parts) * stride * WEIGHTS_STAGE;
#pragma unroll 1
        for (int round = 0; round < rounds_of(phase); parities = after_round(parities, is_short(phase, round++)))
#pragma unroll
            for (int stage = 0; stage < STAGES; ++stage, from += WEIGHTS_STAGE) {
                if (END && stage == END && is_short(phase, round)) break;
                barrier_wait(at.empty(stage), parity_of(parities, stage) ^ 1);
                barrier_expect(at.full(stage), WEIGHTS_STAGE);
                if (WIDEST <= 64) bulk_copy_once(at.weights(stage), from, WEIGHTS_STAGE, at.full(stage));
                else bulk_copy(at.weights(stage), from, WEIGHTS_STAGE, at.full(stage));  // other groups read them again
            }
        i = following;
    }
}

// One thread streams activations: of each 64 columns, the group's atoms. The last of all blocks to end clears the counters.
DEVICE void stream_tokens(const Places& at, const char* x, const char* h, int* counters, int group_count) {
    int* const finished = counters + 2;
    Turn turn;
    u32 parities = 0;
    for (;; turn.next()) {
        barrier_wait(at.posted(turn.slot), turn.parity);
        const Tile tile = tile_at(turn.slot);
        if (tile.rows == 0) break;
        barrier_arrive(at.taken(turn.slot));
        if (tile.phase) {
            while (load_acquire(finished + tile.group) < GATE_UP_PARTS) {}
            fence_async_global();
        }
        const char* from = (tile.phase ? h : x) + (long)tile.start * 128;
        const int bytes = (tile.rows + 7) / 8 * 1024;
#pragma unroll 1
        for (int round = 0; round < rounds_of(tile.phase); parities = after_round(parities, is_short(tile.phase, round++)))
#pragma unroll
            for (int stage = 0; stage < STAGES; ++stage, from += tile.atoms * 1024L) {
                if (END && stage == END && is_short(tile.phase, round)) break;
                barrier_wait(at.empty(stage), parity_of(parities, stage) ^ 1);
                barrier_expect(at.full(stage), bytes);
                bulk_copy(at.tokens(stage), from, bytes, at.full(stage));
            }
    }
    __threadfence();
    if (atomicAdd(counters + 1, 1) == gridDim.x - 1) {
        __threadfence();
        for (int i = 0; i < 2 + group_count; ++i) counters[i] = 0;
    }
}

// One thread tells the other blocks of finished tiles of h.
DEVICE void publish(const Places& at, int* finished) {
    for (Turn turn;; turn.next()) {
        barrier_wait(at.posted(turn.slot), turn.parity);
        const Tile tile = tile_at(turn.slot);
        if (tile.rows == 0) return;
        barrier_wait(at.stored(turn.slot), turn.parity);
        if (tile.phase == 0) {
            fence_async_global();  // h is read by bulk copies
            add_release(finished + tile.group, 1);
        }
        barrier_arrive(at.taken(turn.slot));
    }
}

// A warp fetches the biases of the tiles to come. Lane 8w + g: fragment rows g and g + 8 of warp w of each warpgroup.
DEVICE void fetch_biases(const Places& at, const u16* up_bias, const u16* down_bias) {
    const int lane = threadIdx.x % 32, warp = lane / 8, g = lane % 8;
    for (Turn turn;; turn.next()) {
        barrier_wait(at.posted(turn.slot), turn.parity);
        const Tile tile = tile_at(turn.slot);
        if (tile.rows == 0) return;
#pragma unroll
        for (int k = 0; k < SLABS; ++k) {
            const int slab = tile.part * SLABS + k;
            float2 pair;
            if (tile.phase == 0) {  // gate and up of a feature, which swiglu takes with 1 added
                const u32 both = load_4(up_bias + (long)tile.expert * 2 * INNER + slab * 64 + (warp * 8 + g) * 2);
                pair = make_float2(low_bf16(both), high_bf16(both) + 1.f);
            } else {
                const u16* bias = down_bias + (long)tile.expert * HIDDEN + slab * 64 + warp * 16 + g / 2 * 4 + g % 2;
                pair = make_float2(load_bf16(bias), load_bf16(bias + 2));
            }
            biases_at(turn.slot)[k * 32 + lane] = pair;
        }
        barrier_arrive(at.biased(turn.slot));
        barrier_arrive(at.taken(turn.slot));
    }
}

// counters: next tile, blocks that have ended, finished tiles of h of each group; all zero, and left so.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
moe_grouped(const char* x, const int4* groups, const int* extent, const char* up, const u16* up_bias, const char* down,
            const u16* down_bias, u16* h, u16* y, int* counters) {
    const Places at = {shared_address(shared)};
    const int tid = threadIdx.x;
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(at.full(i), 2);  // weights and activations
            barrier_init(at.empty(i), MULTIPLIERS);
        }
        for (int i = 0; i < TILES; ++i) {
            barrier_init(at.posted(i), 1);
            barrier_init(at.taken(i), MULTIPLIERS + 32 + 2);  // and the warp of biases, the streamer, the publisher
            barrier_init(at.stored(i), MULTIPLIERS);
            barrier_init(at.biased(i), 32);
        }
        fence_barrier_init();
        fence_async_proxy();
    }
    __syncthreads();
    wait_for_previous();
    trigger_next();
    if (tid < MULTIPLIERS) {
        take_registers<BLOCKS == 1 ? 160 : 72>();
        return multiply_tiles(at, h, y);
    }
    keep_registers<BLOCKS == 1 ? 32 : 40>();
    if (tid == MULTIPLIERS) stream_weights(at, groups, extent, up, down, counters);
    else if (tid == MULTIPLIERS + 32) publish(at, counters + 2);
    else if (tid == MULTIPLIERS + 64) stream_tokens(at, x, (const char*)h, counters, load_4(extent));
    else if (tid >= MULTIPLIERS + 96) fetch_biases(at, up_bias, down_bias);
}
