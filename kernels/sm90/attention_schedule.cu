// What FlashInfer's attention wants to be told about a step, which its own module would work out on the host: which queries
// each of its BLOCKS thread blocks takes, and page tables that begin with the first page that is looked at.
//
// An item is a tile, QUERIES consecutive tokens of a sequence or the last ones, and a query head. Items go to thread blocks
// by the keys that they see, most first, in a snake, so that all have about as much to do. Every thread block here works all
// of that out, and writes its share of it.
#include "common.cuh"

// Items are dealt to blocks in turns, every other one backwards.
struct Snake {
    int items;
    DEVICE int block(int item) const { return item / BLOCKS % 2 ? BLOCKS - 1 - item % BLOCKS : item % BLOCKS; }
    DEVICE int start(int block) const {  // how many items the blocks before it have
        const int rounds = items / BLOCKS, left = items % BLOCKS;
        return block * rounds + (rounds % 2 ? max(block - (BLOCKS - left), 0) : min(block, left));
    }
};

struct Tile {
    int sequence, number;  // of the tile in its sequence
    int keys;              // that its tokens see
};

struct Plan {
    int first[SEQUENCES], end[SEQUENCES];  // tokens of each sequence
    int skipped[SEQUENCES];                // keys before the first page that is looked at
    int before[SEQUENCES + 1];             // tiles of the sequences before
    Tile tile[TILES];
    int order[TILES];  // tiles by how many keys they see

    DEVICE int count(int s) const { return end[s] - first[s]; }
};

DEVICE void find_sequences(Plan& plan, const int* sequences, const int* positions) {
    for (int s = threadIdx.x; s < SEQUENCES; s += THREADS) plan.first[s] = plan.end[s] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < TOKENS; t += THREADS) {
        if ((int)load_4(positions + t) < 0) continue;
        const int s = load_4(sequences + t);
        if (t == 0 || (int)load_4(sequences + t - 1) != s) plan.first[s] = t;
        if (t == TOKENS - 1 || (int)load_4(positions + t + 1) < 0 || (int)load_4(sequences + t + 1) != s)
            plan.end[s] = t + 1;
    }
    __syncthreads();
    for (int s = threadIdx.x; s <= SEQUENCES; s += THREADS) {
        int tiles = 0;
        for (int other = 0; other < s; other++) tiles += (plan.count(other) + QUERIES - 1) / QUERIES;
        plan.before[s] = tiles;
    }
    for (int s = threadIdx.x; s < SEQUENCES; s += THREADS) {
        const int position = plan.count(s) ? (int)load_4(positions + plan.first[s]) : 0;
        plan.skipped[s] = WINDOW ? max(position - (WINDOW - 1), 0) / PAGE * PAGE : 0;
    }
    __syncthreads();
}

DEVICE void order_tiles(Plan& plan, const int* positions) {
    const int tiles = plan.before[SEQUENCES];
    for (int s = threadIdx.x; s < SEQUENCES; s += THREADS)
        for (int i = plan.before[s]; i < plan.before[s + 1]; i++) {
            const int number = i - plan.before[s], position = load_4(positions + plan.first[s]);
            const int oldest = WINDOW ? max(position + number * QUERIES - (WINDOW - 1), 0) : 0;
            plan.tile[i] = {s, number, position + min((number + 1) * QUERIES, plan.count(s)) - oldest};
        }
    __syncthreads();
    for (int i = threadIdx.x; i < tiles; i += THREADS) {
        int place = 0;
        for (int j = 0; j < tiles; j++)
            place += plan.tile[j].keys > plan.tile[i].keys || (plan.tile[j].keys == plan.tile[i].keys && j < i);
        plan.order[place] = i;
    }
    __syncthreads();
}

// items [7, TILES * Q]: tile, first token, place of the first page in the page table, tokens, keys, head, sequence.
DEVICE void write_items(int* items, int* starts, const Plan& plan, const int* positions) {
    constexpr int MOST = TILES * Q;
    const Snake snake{plan.before[SEQUENCES] * Q};
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < snake.items; i += GRID * THREADS) {
        const Tile tile = plan.tile[plan.order[i / Q]];
        const int s = tile.sequence, block = snake.block(i);
        const int last = (int)load_4(positions + plan.end[s] - 1);
        int* item = items + snake.start(block) + i / BLOCKS;
        item[0 * MOST] = tile.number;
        item[1 * MOST] = plan.first[s];
        item[2 * MOST] = s * ENTRIES;
        item[3 * MOST] = plan.count(s);
        item[4 * MOST] = last + 1 - plan.skipped[s];
        item[5 * MOST] = i % Q;
        item[6 * MOST] = s;
    }
    for (int block = blockIdx.x * THREADS + threadIdx.x; block <= BLOCKS; block += GRID * THREADS)
        starts[block] = block == BLOCKS ? snake.items : snake.start(block);
}

// table, sequences, positions: the step's. floats: the sinks. out: rows of padding become zero, the others are FlashInfer's.
// pages [SEQUENCES, ENTRIES]: what a window's ring holds, from the first page that is looked at; with all keys the table
// itself serves.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_schedule(const int* table, const int* sequences, const int* positions, const u16* sinks, u16* out, int* items,
                   int* starts, float* floats, int* pages) {
    __shared__ Plan plan;
    trigger_next();
    wait_for_previous();
    find_sequences(plan, sequences, positions);
    order_tiles(plan, positions);
    write_items(items, starts, plan, positions);
    const int first = blockIdx.x * THREADS + threadIdx.x;
    for (int i = first; i < Q; i += GRID * THREADS) floats[i] = load_bf16(sinks + i);
    if (WINDOW)
        for (int i = first; i < SEQUENCES * ENTRIES; i += GRID * THREADS)
            pages[i] = load_4(table + i / ENTRIES * P + (plan.skipped[i / ENTRIES] / PAGE + i % ENTRIES) % P);
    for (int t = blockIdx.x; t < TOKENS; t += GRID)
        if ((int)load_4(positions + t) < 0)
            for (int i = threadIdx.x; i < Q * 8; i += THREADS)  // 16 bytes each
                store_16(out + ((long long)t * Q * 8 + i) * 8, make_uint4(0, 0, 0, 0));
}
