// Rows of activations as the tiles that wgmma reads: [K/64][ATOMS] atoms of 8 rows x 64 columns, 1,024 bytes. In an atom
// row r is 128 bytes, whose 16-byte chunk c lies at place c ^ r. Rows 8a .. 8b of 64 columns are then one piece of memory.
//   y[i] = x[rows[i]], with NORM x * rsqrt(mean x^2 + EPS) * norm_weight in fp32, rounded once.
// R: rows (with GATHER those of rows[]; -1 leaves the tile's row as it is); K: columns, a multiple of 64. COPIES: 0, or to
// how many rows of the tiles each row goes, which places[] names.
#include "common.cuh"

constexpr int CHUNKS = K / 8, LOADS = (CHUNKS + 31) / 32, WARPS = THREADS / 32;

// Is chunk 32 i + lane within the row?
DEVICE bool inside(int i, int lane) { return i * 32 + lane < CHUNKS; }

DEVICE float squares(uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.f;
#pragma unroll
    for (u32 pair : pairs) sum += low_bf16(pair) * low_bf16(pair) + high_bf16(pair) * high_bf16(pair);
    return sum;
}
DEVICE u32 scaled(u32 x, float factor, u32 weight) {
    asm volatile("" : "+r"(x), "+r"(weight));  // pairs until here: unpacked early they do not fit the registers
    return pack_bf16(low_bf16(x) * factor * low_bf16(weight), high_bf16(x) * factor * high_bf16(weight));
}

// A warp a row; lane l holds chunks l, l + 32, ...
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) tile(const u16* x,
#if GATHER
                                                                   const int* rows,
#endif
#if NORM
                                                                   const u16* norm_weight,
#endif
#if COPIES
                                                                   const int* places,
#endif
                                                                   u16* tiles) {
    trigger_next();
    const int lane = threadIdx.x % 32;
#if NORM
    uint4 weight[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
        weight[i] = inside(i, lane) ? load_weight(norm_weight + (i * 32 + lane) * 8) : uint4{};
#endif
    wait_for_previous();
#pragma unroll 1
    for (int row = blockIdx.x * WARPS + threadIdx.x / 32; row < R; row += gridDim.x * WARPS) {
#if GATHER
        const int from = (int)load_4(rows + row);
        if (from < 0) continue;
#else
        const int from = row;
#endif
#if COPIES
        int to[COPIES];
#pragma unroll
        for (int i = 0; i < COPIES; ++i) to[i] = (int)load_4(places + row * COPIES + i);
#endif
        const u16* line = x + (u64)from * K + lane * 8;
        uint4 values[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) values[i] = inside(i, lane) ? load_16(line + i * 256) : uint4{};
#if NORM
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) sum += squares(values[i]);
        const float factor = rsqrtf(warp_sum(sum) / K + EPS);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            values[i] = uint4{scaled(values[i].x, factor, weight[i].x), scaled(values[i].y, factor, weight[i].y),
                              scaled(values[i].z, factor, weight[i].z), scaled(values[i].w, factor, weight[i].w)};
#endif
        const auto store = [&](int to) {  // 32 chunks are four atoms of neighbouring column blocks, 128 bytes in each
            u16* atom = tiles + (u64)(lane / 8 * ATOMS + to / 8) * 512 + to % 8 * 64 + (lane % 8 ^ to % 8) * 8;
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                if (inside(i, lane)) store_16(atom + (u64)i * (4 * ATOMS * 512), values[i]);
        };
#if COPIES
#pragma unroll
        for (int i = 0; i < COPIES; ++i) store(to[i]);
#else
        store(row);
#endif
    }
}
