// The experts of a few tokens, one (token, expert) pair at a time, MXFP4 weights: moe_gate_up (DOWN 0), moe_down (DOWN 1).
//
// Defines: DOWN, HIDDEN, INNER, TOP_K; gate_up: EPS, ALPHA, LIMIT, EARLY (may x be read before the wait?); down: PUSH (with
// several ranks: no residual, and the sums go into slots of TOKENS tokens on every rank). HIDDEN is a multiple of 192, INNER
// of 96: columns of down are filled up with zeros to a multiple of 192, in the weights by their layout, in h here.
//
// Weights come as slabs of 64 rows x 64 columns in fragment order (kernels/layouts.py): 16 bytes a lane are the A operands
// of four mma of 16 rows. A *unit* is 16 rows x all K columns; three warps share a unit, a third of K each, and their sums
// meet in shared memory. The B operand is a vector, so one of its eight columns would do. Instead block j of eight blocks of
// 32 columns of K goes through column j, the other columns zero: eight blocks accumulate without regard to their scales, and
// lane (g, t) ends with the sums of blocks 2t and 2t + 1 of rows g and g + 8, whose four scales are one word.
//
// Decoding costs no multiplication: a value's bits at a bf16's places are the value x 2^-126, subnormals included, which mma
// takes as they are. The vector carries 2^64 to keep products in range; a scale is stored as s + 126, which as an fp32's
// exponent is 2^(s - 127) x 2^126, and 2^-64 comes at the end.
#include "exchange.cuh"

constexpr int SLAB = 2176, STAGE = 3 * SLAB;  // bytes; three slabs of one k-block of 64 columns lie together
constexpr int PARTS = 3;                      // warps that share a unit
#if DOWN
constexpr int K = (INNER + 191) / 192 * 192, ROWS = HIDDEN;
constexpr int SPLIT = TOP_K % 2 ? 1 : 2, OWN = TOP_K / SPLIT;  // blocks of a cluster and the experts of each
constexpr int GROUPS = OWN, UNITS = 1;                        // a block has one unit of each of its experts
constexpr int CHAINS = 2;  // sums of a unit: two mma in turn, so that neither waits for the other
#else
constexpr int K = HIDDEN, ROWS = 2 * INNER;
constexpr int GROUPS = 2, UNITS = 2;  // a block has the four units of a slab
constexpr int CHAINS = 1;  // two units take turns
#endif
constexpr int WARPS = PARTS * GROUPS, THREADS = 32 * WARPS;
constexpr int RESIDENT = WARPS < 18 ? 18 / WARPS : 1;  // blocks of a processor: 18 warps have 96 registers a thread
constexpr int BLOCKS = K / 64 / PARTS;                 // k-blocks of a warp, of each of its units
constexpr int WORDS = (BLOCKS + 3) / 4;                // scale words of a lane and unit: one serves four k-blocks
constexpr int LOADS = UNITS * BLOCKS, RING = LOADS < 15 ? LOADS : 15;
constexpr long EXPERT = (long)(ROWS / 192) * (K / 64) * STAGE;  // bytes
constexpr float UP = 18446744073709551616.f, DOWNSCALE = 1 / UP;  // 2^64

// A warp's weights in flight: load n is k-block n / UNITS of unit n % UNITS. The units are neighbours in a slab.
struct Weights {
    const char* values;  // the lane's 16 bytes of the first k-block
    uint4 ring[RING];
    u32 scales[UNITS][WORDS];

    DEVICE void load(int n) { ring[n % RING] = load_weight(values + n % UNITS * 512 + n / UNITS * STAGE); }

    // slab: the first k-block of this warp's third; first: which of the slab's four units is the first.
    DEVICE void start(const char* slab, int first, int lane) {
        const int g = lane / 4, t = lane % 4;
        values = slab + first * 512 + lane * 16;
        const char* words = slab + 2048 + first * 32 + g * 4 + t * STAGE;
#pragma unroll
        for (int u = 0; u < UNITS; ++u)
#pragma unroll
            for (int q = 0; q < WORDS; ++q)  // k-blocks beyond the third have a zero sum and need a finite scale
                scales[u][q] =
                    4 * q + 3 < BLOCKS || 4 * q + t < BLOCKS ? load_weight_word(words + u * 32 + 4 * q * STAGE) : 0;
#pragma unroll
        for (int n = 0; n < RING; ++n) load(n);
    }
};

// c += values of two words (16 values: rows g and g + 8, eight columns each) times a block of the vector.
DEVICE void multiply_block(float (&c)[CHAINS][4], u32 w0, u32 w1, uint4 b) {
    constexpr u32 VALUE = 0x81C081C0, LEFT = 0x60306030;  // bits 15 | 8, 7, 6 of both halves; the bits that rotations leave
    u32 left;  // LEFT ? w0 : w1 rotated by 2, in one instruction
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(left) : "n"(LEFT), "r"(w0), "r"(__funnelshift_l(w1, w1, 2)));
    mma_bf16(c[0], w0 & VALUE, w0 << 6 & VALUE, __funnelshift_l(w0, w0, 12) & VALUE, left << 2 & VALUE, b.x, b.y);
    mma_bf16(c[CHAINS - 1], w1 & VALUE, w1 << 6 & VALUE, __funnelshift_l(w1, w1, 12) & VALUE,
             __funnelshift_l(left, left, 8) & VALUE, b.z, b.w);
}

// sum[0] (row g) and sum[1] (row g + 8) += the sums of blocks 2t and 2t + 1 times their scales; clears the sums.
DEVICE void add_scaled(float (&sum)[2], float (&c)[CHAINS][4], u32 scales) {
    constexpr u32 EXPONENT = 0x7F800000;
    const u32 factors[4] = {scales << 23, scales << 15, scales << 7, scales >> 1};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float whole = CHAINS == 2 ? c[0][i] + c[CHAINS - 1][i] : c[0][i];
        sum[i / 2] = fmaf(whole, __uint_as_float(factors[i] & EXPONENT), sum[i / 2]);
        c[0][i] = c[CHAINS - 1][i] = 0;
    }
}

// The warp's third of its units' products with a vector, into partial[u][row].
// vector: where this warp's third begins in shared memory; zero: 128 bytes of zeros there.
DEVICE void multiply(Weights& weights, u32 vector, u32 zero, int lane, float (*partial)[16]) {
    // ldmatrix: lane 8m + r gives column r of 8 rows m of a block: zeros, but for the block's column. They are read from
    // other banks than the vector's chunk, whose place modulo 8 is m or m + 4.
    const int column = lane % 8, matrix = lane / 8;
    zero += (matrix + 1) * 16;
    vector += column * 64 + matrix * 16;
    float c[UNITS][CHAINS][4] = {}, sum[UNITS][2] = {};
#pragma unroll
    for (int block = 0; block < 2 * BLOCKS; ++block) {
        const uint4 b = load_matrices(column == block % 8 ? vector + block / 8 * 512 : zero);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            const int n = block / 2 * UNITS + u;
            const uint4 w = weights.ring[n % RING];
            multiply_block(c[u], block % 2 ? w.z : w.x, block % 2 ? w.w : w.y, b);
            if (block % 2 && n + RING < LOADS) weights.load(n + RING);
            if (block % 8 == 7 || block == 2 * BLOCKS - 1) add_scaled(sum[u], c[u], weights.scales[u][block / 8]);
        }
    }
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float v = sum[u][half];
            v += __shfl_xor_sync(~0u, v, 1);
            v += __shfl_xor_sync(~0u, v, 2);
            if (lane % 4 == 0) partial[u][half * 8 + lane / 4] = v;
        }
}

extern __shared__ __align__(128) char shared[];  // the vectors: bf16, K each; then 128 bytes of zeros (down: for each warp)

#if !DOWN
// Block (pair, slab), slab fastest: 32 features of one pair. It triggers late, so that the next kernel may read the ids
// before its wait; x it reads before its own, if EARLY, because the router triggers late too. Else the router has made x,
// and x is normed while the weights come.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
moe_gate_up(const u16* x, const u16* norm_weight, const int* ids, const char* weight, const u16* bias, u16* out) {
    constexpr int CHUNKS = K / 8, EACH = (CHUNKS + THREADS - 1) / THREADS;
    __shared__ float partial[PARTS][GROUPS * UNITS][16], squares[WARPS];
    __shared__ u32 biases[32];  // of gate and up, bf16
    const int tid = threadIdx.x, lane = tid % 32, part = tid / 32 % PARTS, first = tid / 32 / PARTS * UNITS;
    const int pair = blockIdx.x / (ROWS / 64), slab = blockIdx.x % (ROWS / 64);
    const u32 vector = shared_address(shared), zero = vector + K * 2;

    const u16* line = x + pair / TOP_K * K;
    uint4 values[EACH], factors[EACH];
    const auto fetch = [&](uint4 (&to)[EACH], const u16* from) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int chunk = tid + i * THREADS;
            to[i] = chunk < CHUNKS ? load_16(from + chunk * 8) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch(factors, norm_weight);
    Weights weights;
    int expert;
    const auto start_weights = [&] {
        const char* at = weight + expert * EXPERT + ((slab / 3 * (K / 64) + part * BLOCKS) * 3 + slab % 3) * (long)SLAB;
        weights.start(at, first, lane);
        if (tid < 32) copy_4_async(shared_address(&biases[lane]), bias + ((long)expert * INNER + slab * 32 + lane) * 2);
    };
#if EARLY
    fetch(values, line);
#else
    wait_for_previous();
    trigger_next();
    expert = load_4(ids + pair);
    fetch(values, line);
    start_weights();
#endif
    float square = 0;
    const auto scaled = [&](u32 v, u32 factor) {
        const float a = low_bf16(v), b = high_bf16(v);
        square = fmaf(a, a, fmaf(b, b, square));
        return pack_bf16(a * low_bf16(factor) * UP, b * high_bf16(factor) * UP);
    };
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint4 v = values[i], f = factors[i];
        const uint4 y = make_uint4(scaled(v.x, f.x), scaled(v.y, f.y), scaled(v.z, f.z), scaled(v.w, f.w));
        if (tid + i * THREADS < CHUNKS) store_shared_16(vector + (tid + i * THREADS) * 16, y);
    }
    if (tid < 8) store_shared_16(zero + tid * 16, make_uint4(0, 0, 0, 0));
    square = warp_sum(square);
    if (lane == 0) squares[tid / 32] = square;
    __syncthreads();

#if EARLY
    wait_for_previous();
    trigger_next();
    expert = load_4(ids + pair);
    start_weights();
#endif
    multiply(weights, vector + part * BLOCKS * 128, zero, lane, &partial[part][first]);
    __syncthreads();
    if (tid < 32) {  // feature i of unit u: gate is row i, up row i + 8
        const int u = lane / 8, i = lane % 8;
        wait_for_copies();
        float total = 0, gate = 0, up = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += squares[w];
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            gate += partial[p][u][i];
            up += partial[p][u][i + 8];
        }
        const float factor = rsqrtf(total * (1.f / K) + EPS) * DOWNSCALE;
        gate = fminf(fmaf(gate, factor, low_bf16(biases[lane])), LIMIT);
        up = fminf(fmaxf(fmaf(up, factor, high_bf16(biases[lane])), -LIMIT), LIMIT);
        out[blockIdx.x * 32 + lane] = to_bf16(gate / (1 + __expf(-ALPHA * gate)) * (up + 1));
    }
}
#else
// Cluster (token, unit), unit fastest: 16 features of one token; each block has its share of the experts, and the first adds
// up. All but h is read before the wait.
#if TOP_K % 2
#define CLUSTER
#else
#define CLUSTER __cluster_dims__(2, 1, 1)
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, RESIDENT)
moe_down(const u16* h, const int* ids, const float* probs, const char* weight, const u16* bias,
#if PUSH
         const Header* exchange, u64* out) {
    __shared__ Header known;
    const Ranks ranks{exchange, known};
#else
         const u16* residual, u16* out) {
    __shared__ __align__(16) u16 residuals[16];
#endif
    __shared__ float partial[PARTS][OWN][16], shares[OWN];
    __shared__ __align__(16) u16 biases[OWN][16];
    __shared__ __align__(8) float received[16];
    __shared__ u64 arrival;
    const int tid = threadIdx.x, lane = tid % 32, part = tid / 32 % PARTS, own = tid / 32 / PARTS;
    const int rank = blockIdx.x % SPLIT, place = blockIdx.x / SPLIT;
    const int token = place / (ROWS / 16), unit = place % (ROWS / 16), slab = unit / 4;
    const int pair = token * TOP_K + rank * OWN + own;
    const u32 vector = shared_address(shared) + own * K * 2, zero = shared_address(shared) + OWN * K * 2 + tid / 32 * 128;
    const u32 barrier = shared_address(&arrival);

    trigger_next();
    const int expert = load_4(ids + pair);
    if (SPLIT == 2) {
        if (tid == 0 && rank == 0) {
            barrier_init(barrier, 1);
            fence_barrier_init();
        }
        __syncwarp();
        cluster_arrive_relaxed();
    }
    const char* at = weight + expert * EXPERT + ((slab / 3 * (K / 64) + part * BLOCKS) * 3 + slab % 3) * (long)SLAB;
    Weights weights;
    weights.start(at, unit % 4, lane);
    // What the end needs comes asynchronously: a register that waits for it would wait for the weights before it, too.
    if (part == 0 && lane < 2)
        copy_16_async(shared_address(&biases[own][lane * 8]), bias + (long)expert * HIDDEN + unit * 16 + lane * 8);
    if (part == 0 && lane == 2) copy_4_async(shared_address(&shares[own]), probs + pair);
#if PUSH
    copy_header(known, exchange);
#else
    if (tid < 2) copy_16_async(shared_address(&residuals[tid * 8]), residual + place * 16 + tid * 8);
#endif
    if (lane < 8) store_shared_16(zero + lane * 16, make_uint4(0, 0, 0, 0));  // every warp its own: none waits for another

    wait_for_previous();
#if PUSH
    const u32 tag = tag_of(exchange);
#endif
    // Each warp fetches what it needs of h itself, and no more: no barrier before the products.
    constexpr int CHUNKS = BLOCKS * 8;  // of 16 bytes: a third of a vector
    constexpr u32 UP_BF16 = 0x5F805F80;  // 2^64, twice
    const u32 third = vector + part * CHUNKS * 16;
    const u16* line = h + (long)pair * INNER + part * CHUNKS * 8;
    const int there = INNER / 8 - part * CHUNKS;  // chunks from here to h's end: those beyond are zeros
#pragma unroll
    for (int start = 0; start < CHUNKS; start += 128) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (const int chunk = start + i * 32 + lane; chunk < CHUNKS)
                v[i] = K == INNER || chunk < there ? load_16(line + chunk * 8) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (const int chunk = start + i * 32 + lane; chunk < CHUNKS)
                store_shared_16(third + chunk * 16,
                                make_uint4(multiply_bf16(v[i].x, UP_BF16), multiply_bf16(v[i].y, UP_BF16),
                                           multiply_bf16(v[i].z, UP_BF16), multiply_bf16(v[i].w, UP_BF16)));
    }
    __syncwarp();
    multiply(weights, third, zero, lane, &partial[part][own]);
    wait_for_copies();
    __syncthreads();
    if (SPLIT == 2) cluster_wait();  // the first block's barrier is initialised
    if (tid < 16) {  // of four neighbouring features the first two are rows 2i and 2i + 1 of the unit, the others these + 8
        const int row = tid / 4 * 2 + tid % 2 + (tid / 2 % 2) * 8;
#if PUSH
        float y = 0;
#else
        float y = rank == 0 ? low_bf16(residuals[tid]) : 0;
#endif
#pragma unroll
        for (int a = 0; a < OWN; ++a) {
            float sum = 0;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) sum += partial[p][a][row];
            y = fmaf(shares[a], fmaf(sum, DOWNSCALE, low_bf16(biases[a][tid])), y);
        }
        if (rank == 1) {
            const float next = __shfl_down_sync(0xFFFF, y, 1);
            if (tid % 2 == 0)
                store_async(peer_address(shared_address(&received[tid]), 0), peer_address(barrier, 0), make_float2(y, next));
        } else {
            if (SPLIT == 2) {
                if (tid == 0) barrier_expect(barrier, sizeof(received));
                barrier_wait(barrier, 0);
                y += received[tid];
            }
#if PUSH
            push(out, TOKENS * HIDDEN, place * 16 + tid, y, tag, ranks);
#else
            out[place * 16 + tid] = to_bf16(y);
#endif
        }
    }
}
#endif
