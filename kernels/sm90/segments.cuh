// How a step's tokens are cut into segments, and these with the kv heads into items, for attention_extend.cu.
#pragma once
#include "common.cuh"

// A segment is a run of at most SEGMENT consecutive positions of a sequence, cut at the multiples of SEGMENT, or of padding.
DEVICE bool starts_segment(int t, int position, int sequence, int position_before, int sequence_before) {
    if (t == 0) return true;
    if (position < 0) return position_before >= 0 || t % SEGMENT == 0;
    return position != position_before + 1 || sequence != sequence_before || position % SEGMENT == 0;
}

struct Segments {  // in shared memory
    int position[TOKENS];  // of each one's first token; -1: padding
    u16 start[TOKENS + 1]; // each one's first token; behind the last one TOKENS
};

// Fills `found`; returns how many there are.
DEVICE int find_segments(Segments& found, int* counts, const int* sequences, const int* positions) {
    constexpr int LOTS = (TOKENS + 32 * WARPS - 1) / (32 * WARPS);  // of 32 tokens, a warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = warp * LOTS * 32;
    int position[LOTS + 1], sequence[LOTS + 1];  // [0]: lane 31's is the token before the warp's first
    position[0] = base > 0 && base <= TOKENS ? load_4(positions + base - 1) : 0;
    sequence[0] = base > 0 && base <= TOKENS ? load_4(sequences + base - 1) : 0;
#pragma unroll
    for (int i = 0; i < LOTS; i++) {
        const int t = min(base + 32 * i + lane, TOKENS - 1);
        position[i + 1] = load_4(positions + t), sequence[i + 1] = load_4(sequences + t);
    }
    u32 flags = 0;  // lane i: of lot i
    int count = 0;
#pragma unroll
    for (int i = 0; i < LOTS; i++) {
        const int t = base + 32 * i + lane, before = (lane + 31) % 32;
        const int position_before = __shfl_sync(~0u, lane == 31 ? position[i] : position[i + 1], before);
        const int sequence_before = __shfl_sync(~0u, lane == 31 ? sequence[i] : sequence[i + 1], before);
        const u32 lot = __ballot_sync(~0u, t < TOKENS && starts_segment(t, position[i + 1], sequence[i + 1], position_before,
                                                                   sequence_before));
        flags = lane == i ? lot : flags;
        count += __popc(lot);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int total = 0, place = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        place = i == warp ? total : place;
        total += counts[i];
    }
#pragma unroll
    for (int i = 0; i < LOTS; i++) {
        const u32 lot = __shfl_sync(~0u, flags, i);
        const int at = place + __popc(lot & ((1u << lane) - 1));
        if (lot >> lane & 1) found.start[at] = base + 32 * i + lane, found.position[at] = position[i + 1];
        place += __popc(lot);
    }
    if (threadIdx.x == 0) found.start[total] = TOKENS;
    __syncthreads();
    return total;
}

// The block's item of a round, the last ones first, in a snake, so that no block always has the longer one. Negative: none,
// now and later.
DEVICE int item_index(int round, int items) {
    const int turn = round * GRID + (round % 2 ? GRID - 1 - (int)blockIdx.x : (int)blockIdx.x);
    return items - 1 - turn;
}

struct Item {
    int token, count, kv_head;  // tokens token ... token + count - 1
    int position;               // of the first of them; -1: padding
    int start, blocks;          // blocks of BLOCK keys from position `start`, a multiple of KEYS, on

    DEVICE Item(int index, const Segments& segments) {
        const int segment = index / KV;
        token = segments.start[segment], count = segments.start[segment + 1] - token, kv_head = index % KV;
        position = segments.position[segment];
        start = first() / KEYS * KEYS;
        blocks = position < 0 ? 0 : (last() - start) / BLOCK + 1;
    }
    DEVICE int first() const { return max(position - (REACH - 1), 0); }  // the oldest key that one of them may see
    DEVICE int last() const { return position + count - 1; }
};
