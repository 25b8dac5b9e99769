// out[i] = residual[row] + the sum of the ranks' partial[row], in rank order in fp32, rounded once; row = i, with GATHER
// rows[i].
//
// Macros: ROWS of out, TOKENS of partial, COLUMNS (a multiple of 8), GATHER; CHUNKS of 8 columns that a thread has in flight
// of TOGETHER ranks; THREADS, MIN_BLOCKS. PUSHED: partial lies in shares. SHARE: each rank sums its share of the rows, which
// has been pushed to it, and stores them in out on every rank, where it is in the exchange area; with DONE the kernel ends
// when all have, and without it a later one does. Else each sums all rows for itself, and partial must last until the step
// ends, since peers may still read it.
#include "exchange.cuh"

constexpr int ROW_CHUNKS = COLUMNS / 8;
static_assert(COLUMNS % 8 == 0 && !(SHARE && (GATHER || !PUSHED)) && (SHARE || !DONE), "");

DEVICE void add(float (&sum)[8], uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] += low_bf16(pairs[i]);
        sum[2 * i + 1] += high_bf16(pairs[i]);
    }
}
DEVICE uint4 rounded(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
exchange_rows(u16* partial, const u16* residual,
#if GATHER
              const int* rows,
#endif
              const Header* exchange, Flags* flags,
#if DONE
              u32* counter,
#endif
              u16* out) {
    __shared__ Header known;
    trigger_next();  // the next kernel starts when all blocks of this one run, and takes no place from them
    copy_header(known, exchange);
    wait_for_copies();
    __syncthreads();
    const Ranks ranks{exchange, known};
    wait_for_previous();
    const u32 tag = tag_of(exchange), count = ranks.count();
    await_ready(flags, tag, ranks);

#if PUSHED
    const Shares shares(count, TOKENS);
    const u64 apart = (u64)shares.most * COLUMNS;  // from one rank's to the next
#endif
#if SHARE
    const int end = (int)shares.count(ranks.own(), ROWS) * ROW_CHUNKS;
#else
    constexpr int end = ROWS * ROW_CHUNKS;
#endif
#pragma unroll 1
    for (int start = blockIdx.x * (CHUNKS * THREADS) + threadIdx.x; start < end; start += gridDim.x * (CHUNKS * THREADS)) {
        int place[CHUNKS];  // in residual, and in out if that is a share's
        u16* from[CHUNKS];  // rank 0's, or where that would be in this rank's area
        uint4 own[CHUNKS];
        float sum[CHUNKS][8] = {};
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int chunk = start + i * THREADS;
            int row = chunk / ROW_CHUNKS;
#if SHARE
            row = row * (int)count + (int)ranks.own();
#elif GATHER
            row = chunk < end ? (int)load_4(rows + row) : 0;
#endif
            place[i] = row * ROW_CHUNKS + chunk % ROW_CHUNKS;
#if SHARE
            from[i] = partial + (u64)chunk * 8;
#elif PUSHED
            from[i] = shares.place(ranks, partial, 0, row, COLUMNS) + chunk % ROW_CHUNKS * 8;
#else
            from[i] = partial + (u64)place[i] * 8;
#endif
            own[i] = chunk < end ? load_16(residual + (u64)place[i] * 8) : uint4{};
        }
        const auto source = [&](u32 r, int i) {
#if PUSHED
            return from[i] + r * apart;
#else
            return ranks.at(r, from[i]);
#endif
        };
#pragma unroll 1
        for (u32 r = 0; r < count; r += TOGETHER) {
            uint4 v[TOGETHER][CHUNKS];
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i)
                    v[k][i] = r + k < count && start + i * THREADS < end ? load_system_16(source(r + k, i)) : uint4{};
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i) add(sum[i], v[k][i]);
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            add(sum[i], own[i]);
            own[i] = rounded(sum[i]);
        }
#pragma unroll 1
        for (u32 r = 0; r < (SHARE ? count : 1); ++r) {
            u16* to = SHARE ? ranks.at(r, out) : out;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                if (start + i * THREADS < end) store_16(to + (u64)(SHARE ? place[i] : start + i * THREADS) * 8, own[i]);
        }
    }
#if DONE
    await_done(flags, tag, ranks, counter);
#elif SHARE
    finish_pushes();
#endif
}
