// Experts into the layouts `mxfp4_gate_up` and `mxfp4_down` of kernels/layouts.py, once, when an artifact is loaded. One binary
// serves weights of every shape: the shape comes from memory. A thread makes 16 bytes of the result; neighbours write
// neighbouring bytes. Columns are filled up to a multiple of 192 with blocks that are all zero, their scale too.
#include "common.cuh"

struct Parameters { int experts, rows, columns, down; };  // of a weight [experts, rows, columns]

constexpr int STAGE_SLABS = 3, SLAB_BYTES = 2176, VALUE_BYTES = 2048;

// The weight row within a slab of fragment row `r` of a warp.
__device__ int slab_row(int down, int warp, int r) {
    const int low = r & 7, high = r >> 3;
    return down ? warp * 16 + 4 * (low / 2) + (low & 1) + 2 * high : 2 * (warp * 8 + low) + high;
}

// Bit `place` of decoded register `reg` comes from this bit of the pair (w1 : w0).
__device__ constexpr int source_bit(int reg, int place) {
    constexpr int rotations[8] = {0, 6, 12, 2, 0, 6, 12, 8};
    const int bit = (place - rotations[reg]) & 31, in_half = bit & 15;
    if (reg % 4 == 3) return in_half == 4 || in_half == 5 || in_half == 13 || in_half == 14 ? bit : 32 + ((bit - 2) & 31);
    return bit + (reg >= 4 ? 32 : 0);
}

// The two words of one block of 32 columns of a lane, from its rows' 16 bytes each.
__device__ u64 two_words(const unsigned char* low_row, const unsigned char* high_row, int t) {
    constexpr int places[4] = {6, 7, 8, 15};
    u64 words = 0;
#pragma unroll
    for (int reg = 0; reg < 8; reg++) {
        const unsigned char* row = reg & 1 ? high_row : low_row;
        const unsigned pair = row[(reg / 4 * 16 + 2 * t + 8 * (reg % 4 / 2)) / 2];  // two columns, the even one low
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int bit = 0; bit < 4; bit++)
                words |= (u64)(pair >> (4 * h + bit) & 1) << source_bit(reg, places[bit] + 16 * h);
    }
    return words;
}

extern "C" __global__ void mxfp4(const Parameters* shape, const unsigned char* blocks, const unsigned char* scales, uint4* out) {
    trigger_next();
    wait_for_previous();
    constexpr int PIECES = SLAB_BYTES / 16, VALUES = VALUE_BYTES / 16;
    const int groups = shape->columns / 32, depth = (shape->columns + 191) / 192 * 3, down = shape->down;
    const long slabs = (long)shape->experts * shape->rows / 64, count = slabs * depth * PIECES;
    for (long i = blockIdx.x * (long)blockDim.x + threadIdx.x; i < count; i += (long)gridDim.x * blockDim.x) {
        const int piece = i % PIECES;
        const long at = i / PIECES, stage = at / STAGE_SLABS;  // stages: [expert and slab triple][column block]
        const long first = ((stage / depth) * STAGE_SLABS + at % STAGE_SLABS) * 64;  // the slab's first row, over all experts
        const long group = stage % depth * 2;
        if (piece < VALUES) {  // thread `piece` of a warpgroup
            const int warp = piece / 32, g = piece % 32 / 4, t = piece % 4;
            const unsigned char* low = blocks + ((first + slab_row(down, warp, g)) * groups + group) * 16;
            const unsigned char* high = blocks + ((first + slab_row(down, warp, g + 8)) * groups + group) * 16;
            const u64 a = group < groups ? two_words(low, high, t) : 0;
            const u64 b = group + 1 < groups ? two_words(low + 16, high + 16, t) : 0;
            out[i] = make_uint4((u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32));
        } else {  // [warp][g][row half][step]: four words are one warp's g … g + 3
            const int warp = (piece - VALUES) / 2, g0 = (piece - VALUES) % 2 * 4;
            u32 words[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                words[k] = 0;
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    const long row = first + slab_row(down, warp, g0 + k + 8 * (byte / 2));
                    const u32 scale = group + byte % 2 < groups ? scales[row * groups + group + byte % 2] : 0;
                    words[k] |= (scale + 126 & 255) << 8 * byte;
                }
            }
            out[i] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
