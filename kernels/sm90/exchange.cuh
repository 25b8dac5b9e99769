// How ranks exchange: GPUs that read and write each other's *exchange area*, an allocation of the same layout on every rank.
// kernels/exchange.py has the same constants.
//
// Two ways. Few tokens: producers *push* every value, with a tag that names the step, as one 8-byte store into slots on
// every rank, and consumers poll their own slots until the tags are there. Value and tag cannot come apart, so nothing needs
// an order. Many: producers store plainly, and the next kernel *announces* with a flag on every rank that it may be read.
// If rows are so many that ranks share the work of adding them, producers store each row on the rank whose share it is in.
//
// No wait for a rank can lock up. A kernel waits behind wait_for_previous() only, when all its rank's kernels before it have
// ended; and what it waits for comes from its peers' kernels before, or from the first block of their same kernel.
#pragma once
#include "common.cuh"

constexpr int MOST_RANKS = 8;

struct __align__(16) Header {  // what an area begins with
    u64 base[MOST_RANKS];  // every rank's area as this rank sees it, its own included
    u32 step;              // the number of the step that runs; the last kernel of a step, all_gather, counts
    u32 rank, ranks;
    u32 limit_ms;  // how long a kernel waits for a rank
    u64 report;    // a word on the host, where it leaves 1 + the rank that it waited for in vain
};
struct Flags {  // of one operator's exchange: by rank, the tag of the last step in which it had come so far
    u32 ready[MOST_RANKS], done[MOST_RANKS];
};

// ---- memory that other GPUs see -------------------------------------------------------------------

DEVICE u64 load_fixed_8(const u64* p) {  // what no kernel writes
    u64 r;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(r) : "l"(p) : "memory");
    return r;
}
DEVICE u32 load_system(const u32* p) {
    u32 r;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    return r;
}
DEVICE uint4 load_system_16(const void* p) {
    uint4 r;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
    return r;
}
DEVICE void store_system(u32* p, u32 v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE void store_system_8(u64* p, u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEVICE void store_release(u32* p, u32 v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEVICE u32 load_acquire_system(const u32* p) {
    u32 r;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    return r;
}
DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// ---- ranks ----------------------------------------------------------------------------------------

// A step's tag. As a float it is a NaN, and so are its upper two bytes as bf16: what other buckets' steps may have left in
// these places of the area is none.
DEVICE u32 tag_of(const Header* header) { return load_system(&header->step) | 0xFF800000u; }

// Asks for the header in shared memory, where all but the step, which changes, may be looked up behind wait_for_copies() and
// a barrier.
DEVICE void copy_header(Header& known, const Header* header) {
    if (threadIdx.x < sizeof(Header) / 16)
        copy_16_async(shared_address(&known) + threadIdx.x * 16, (const char*)header + threadIdx.x * 16);
}

struct Ranks {
    const Header* header;  // where this rank's area begins
    const Header& known;   // a copy in shared memory
    DEVICE u32 own() const { return known.rank; }
    DEVICE u32 count() const { return known.ranks; }
    // What is at p in this rank's area, in rank r's
    template <typename P>
    DEVICE P* at(u32 r, P* p) const { return (P*)((u64)p + (known.base[r] - (u64)header)); }
};

// Counts the rounds of a thread's polls, and ends them if a rank takes too long, or if this rank waited in vain before.
struct Patience {
    static constexpr u32 ROUNDS = 4096;  // between two looks at the clock and at the report, which is far away
    const Header* header;
    u32 rounds = 0;
    u64 deadline = 0;
    bool lost = false;

    DEVICE explicit Patience(const Header* header) : header(header) {}

    DEVICE bool lasts(u32 late) {
        if (lost) return false;
        if (++rounds % ROUNDS) return true;
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));  // nanoseconds
        u32* report = (u32*)load_fixed_8(&header->report);
        if (deadline == 0) deadline = now + load_4(&header->limit_ms) * 1000000ull;
        if (load_system(report) != 0) {
            lost = true;
        } else if (now > deadline) {
            store_system(report, 1 + late);
            lost = true;
        }
        return !lost;
    }
};

// ---- slots: values with their tags ----------------------------------------------------------------

// Slots are [ranks][rows][columns]. Stores a value of this rank, whose slots are `size`, at `index` on every rank. Behind a
// step's last kernel no rank is still in the step, so nobody reads what the next step overwrites.
DEVICE void push(u64* slots, int size, int index, float value, u32 tag, const Ranks& ranks) {
    u64* slot = slots + (ranks.own() * size + index);
    const u32 count = ranks.count();
#pragma unroll
    for (u32 r = 0; r < MOST_RANKS; ++r)
        if (r < count) store_system_8(ranks.at(r, slot), (u64)tag << 32 | __float_as_uint(value));
}

struct TwoSlots {
    u64 first, second;
    DEVICE bool arrived(u32 tag) const { return ((u32)(first >> 32) == tag) & ((u32)(second >> 32) == tag); }
    // Each of the two is read at once, if not both of them together.
    DEVICE void load_unless(bool arrived, const u64* p) {
        asm volatile("{\n.reg .pred missing;\nsetp.eq.u32 missing, %3, 0;\n"
                     "@missing ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];\n}"
                     : "+l"(first), "+l"(second) : "l"(p), "r"((u32)arrived) : "memory");
    }
};

// residual + the ranks' partial sums, added in rank order in fp32 and rounded once, for items begin, begin + STRIDE, ...
// below end: put(item, a pair of bf16). An item is two neighbouring columns; a rank has `items` of them. A thread has AHEAD
// items of RANKS_AHEAD ranks in flight, and asks again for all that it misses at once: what comes while it looks costs one
// more round, not one each.
template <int AHEAD, int RANKS_AHEAD, int STRIDE, class Put>
DEVICE void collect(const u64* slots, int items, const u16* residual, int begin, int end, const Header* header, u32 ranks,
                    Put put) {
    const u32 tag = tag_of(header);
    Patience patience(header);
#pragma unroll 1
    for (int start = begin; start < end; start += AHEAD * STRIDE) {
        const auto exists = [&](int i) { return start + i * STRIDE < end; };
        float2 sum[AHEAD];
        u32 own[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            own[i] = exists(i) ? load_4(residual + (start + i * STRIDE) * 2) : 0;
            sum[i] = make_float2(0, 0);
        }
        const u64* first = slots + (u64)start * 2;
#pragma unroll 1
        for (u32 r = 0; r < ranks; r += RANKS_AHEAD, first += RANKS_AHEAD * items * 2) {
            TwoSlots v[RANKS_AHEAD][AHEAD] = {};
            const auto ask = [&](auto needless) {
#pragma unroll
                for (int k = 0; k < RANKS_AHEAD; ++k)
#pragma unroll
                    for (int i = 0; i < AHEAD; ++i)
                        v[k][i].load_unless((r + k >= ranks) | !exists(i) | needless(v[k][i]),
                                            first + k * items * 2 + i * STRIDE * 2);
            };
            ask([](TwoSlots) { return false; });  // before the tag is known
            while (true) {
                bool complete = true;
                u32 late = r;
#pragma unroll
                for (int k = 0; k < RANKS_AHEAD; ++k)
#pragma unroll
                    for (int i = 0; i < AHEAD; ++i)
                        if ((r + k < ranks) & exists(i) & !v[k][i].arrived(tag)) complete = false, late = r + k;
                if (complete || !patience.lasts(late)) break;
                ask([=](TwoSlots slots) { return slots.arrived(tag); });
            }
#pragma unroll
            for (int k = 0; k < RANKS_AHEAD; ++k)
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (r + k < ranks) {
                        sum[i].x += __uint_as_float((u32)v[k][i].first);
                        sum[i].y += __uint_as_float((u32)v[k][i].second);
                    }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (exists(i))
                put(start + i * STRIDE, pack_bf16(low_bf16(own[i]) + sum[i].x, high_bf16(own[i]) + sum[i].y));
    }
}

// ---- shares ---------------------------------------------------------------------------------------

// Row t of a partial sum of `rows` is in the share of rank t % ranks, as its row t / ranks: the producer of whatever rows has
// some for each rank all the time, so that no link is idle. In the rank's area the shares of all ranks' partial sums lie by
// rank, each in room for the largest share: [ranks][most][columns].
struct Shares {
    u32 ranks, most, inverse;  // 2^24 / ranks, so that there is no division
    DEVICE Shares(u32 ranks, u32 rows)
        : ranks(ranks), most((rows + ranks - 1) / ranks), inverse((1u << 24) / ranks + 1) {}
    // The rows of a rank's share
    DEVICE u32 count(u32 rank, u32 rows) const { return (rows + ranks - 1 - rank) / ranks; }
    // Where `row` of rank `source`'s partial sum lies, in the area of the rank whose share it is in. Exact for rows < 2^21.
    DEVICE u16* place(const Ranks& all, u16* partial, u32 source, u32 row, u32 columns) const {
        const u32 at = (u32)((u64)row * inverse >> 24), owner = row - at * ranks;
        return all.at(owner, partial) + (u64)(source * most + at) * columns;
    }
};

// What the block pushed is on its way no more, but where it belongs, before the kernel ends. The end of a kernel makes what
// it stored visible to this rank's next kernel, whose announcement makes visible to the peers what it has seen; but that has
// not looked at memory of other GPUs, and nothing promises that stores to these are there because stores to this one are.
// Thread 0's fence covers what the block's threads did before the barrier.
DEVICE void finish_pushes() {
    __syncthreads();
    if (threadIdx.x == 0) fence_system();
}

// ---- flags ----------------------------------------------------------------------------------------

// Threads 0 ... ranks - 1 tell a rank each. What happened before on this rank, as far as the thread knows of it (behind
// wait_for_previous(): all of the kernels before), is visible to who sees the flag: release and acquire of the system's
// scope are cumulative.
DEVICE void announce(u32* flag, u32 tag, const Ranks& ranks) {
    if (threadIdx.x < ranks.count()) store_release(ranks.at(threadIdx.x, flag), tag);
}
// Threads 0 ... ranks - 1 wait for a rank each, and the block for them.
DEVICE void await(const u32* flags, u32 tag, const Ranks& ranks) {
    if (threadIdx.x < ranks.count()) {
        Patience patience(ranks.header);
        while (load_acquire_system(flags + threadIdx.x) != tag && patience.lasts(threadIdx.x)) {}
    }
    __syncthreads();
}
// Every rank has come to this kernel: what the kernels before it stored in its area may be read, and what they read,
// overwritten.
DEVICE void await_ready(Flags* flags, u32 tag, const Ranks& ranks) {
    if (blockIdx.x == 0) announce(flags->ready + ranks.own(), tag, ranks);
    await(flags->ready, tag, ranks);
}
// Every rank has done what this kernel does in the others' areas; the kernel ends behind it. True in the last block, which
// alone waits: the next kernel waits for all. Thread 0's fence covers what the block's threads did before the barrier, the
// counter hands that on to the last block, and its announcement to the peers. The counter is 0 before and behind.
DEVICE bool await_done(Flags* flags, u32 tag, const Ranks& ranks, u32* counter) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before;
        fence_system();
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        last = before == gridDim.x - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return false;
    announce(flags->done + ranks.own(), tag, ranks);
    await(flags->done, tag, ranks);
    return true;
}
