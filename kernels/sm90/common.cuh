// Device helpers of all Hopper kernels. NVRTC compiles them without any header: bf16 travels as u16, pairs as u32.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// ---- programmatic dependent launch --------------------------------------------------------------

// Everything that the previous kernel wrote is visible behind this.
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel start; it still waits for this one's end before it reads what this one writes.
DEVICE void trigger_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- global memory ------------------------------------------------------------------------------

// Weights, read once. Volatile and no .nc: ptxas moves non-coherent loads behind griddepcontrol.wait.
DEVICE uint4 load_weight(const void* p) {
    uint4 r;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
    return r;
}
DEVICE u32 load_weight_word(const void* p) {
    u32 r;
    asm volatile("ld.global.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    return r;
}
// What other kernels of the step write: through the L2.
DEVICE uint4 load_16(const void* p) {
    uint4 r;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
    return r;
}
// As one instruction: NVRTC's own uint4 and uint2 are aligned to 4 bytes only, so an assignment is several.
DEVICE void store_16(void* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_8(void* p, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE uint2 load_8(const void* p) {
    uint2 r;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
    return r;
}
DEVICE u32 load_4(const void* p) {
    u32 r;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    return r;
}
// For words that other blocks of this kernel may be writing: a loop around weak loads may be taken for one of them.
DEVICE uint2 poll_8(const void* p) {
    uint2 r;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
    return r;
}
// What other blocks of this kernel announce: what they wrote before add_release is visible behind a load_acquire that sees
// it.
DEVICE int load_acquire(const int* p) {
    int r;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    return r;
}
DEVICE void add_release(int* p, int v) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEVICE float load_bf16(const u16* p) {
    u16 r;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(r) : "l"(p) : "memory");
    return __uint_as_float((u32)r << 16);
}

// ---- shared memory ------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy_16_async(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void copy_4_async(u32 shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }  // this thread's own
DEVICE uint4 load_shared_16(u32 address) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address) : "memory");
    return r;
}
DEVICE u32 load_shared_4(u32 address) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    return r;
}
DEVICE void store_shared_4(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
DEVICE void store_shared_16(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8x8 matrices of 16-bit elements: lane 8m + r gives the address of row r of matrix m; lane 4g + t gets elements 2t and
// 2t + 1 of row g of each.
DEVICE uint4 load_matrices(u32 address) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address) : "memory");
    return r;
}

// ---- arithmetic ---------------------------------------------------------------------------------

DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u16 to_bf16(float x) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
DEVICE u32 multiply_bf16(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// a b - product: exactly what rounding took from a b, if product is a b rounded.
DEVICE u32 rounding_error(u32 a, u32 b, u32 product) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(product ^ 0x80008000u));
    return r;
}
DEVICE uint4 multiply_8(uint4 a, uint4 b) {
    return make_uint4(multiply_bf16(a.x, b.x), multiply_bf16(a.y, b.y), multiply_bf16(a.z, b.z), multiply_bf16(a.w, b.w));
}
DEVICE uint4 rounding_errors(uint4 a, uint4 b, uint4 product) {
    return make_uint4(rounding_error(a.x, b.x, product.x), rounding_error(a.y, b.y, product.y),
                      rounding_error(a.z, b.z, product.z), rounding_error(a.w, b.w, product.w));
}
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, offset));
    return v;
}
// c[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4g + t holds: a0 row g, columns 2t, 2t + 1; a1 row g + 8; a2, a3 the same rows,
// columns + 8; b0 column g, rows 2t, 2t + 1; b1 rows + 8; c0, c1 row g, columns 2t, 2t + 1; c2, c3 row g + 8.
DEVICE void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- softmax --------------------------------------------------------------------------------------

#define INFINITE __int_as_float(0x7F800000)  // NVRTC has no name for it
constexpr float LOG2E = 1.4426950408889634f;

DEVICE float exp2_fast(float x) {  // 0 for -infinity
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// The transpose of an 8x8 matrix of 16-bit elements whose row g lies in lanes (g, t): 2t and 2t + 1.
DEVICE u32 transpose_8x8(u32 row) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(row));
    return r;
}
// The transposes of two such matrices go to shared memory: lane 8m + r < 16 says where the 16 bytes of column r of matrix m do.
DEVICE void store_transposed(u32 address, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second)
                 : "memory");
}

// ---- clusters -------------------------------------------------------------------------------------

// All threads of the cluster arrive, then wait. Relaxed: no store is waited for, only the barriers' own initialisation
// (with `fence_barrier_init`) is visible behind it.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The address of the same shared variable in block `rank` of the cluster
DEVICE u32 peer_address(u32 address, int rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
// Stores 8 bytes in a peer's shared memory and counts them on the peer's barrier.
DEVICE void store_async(u32 peer, u32 peer_barrier, float2 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 ::"r"(peer), "f"(v.x), "f"(v.y), "r"(peer_barrier) : "memory");
}
DEVICE void store_async(u32 peer, u32 peer_barrier, float4 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(peer), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(peer_barrier) : "memory");
}

// ---- barriers in shared memory (mbarrier) ---------------------------------------------------------

DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for so many bytes more.
DEVICE void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\nwaiting:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra waiting;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// Whether a barrier_wait would return at once
DEVICE bool barrier_test(u32 barrier, u32 parity) {
    u32 r;
    asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                 : "=r"(r) : "r"(barrier), "r"(parity) : "memory");
    return r;
}

// ---- bulk copies from global to shared memory -----------------------------------------------------

// One thread copies `bytes`, a multiple of 16; they count on the barrier. It costs that thread some 200 cycles.
DEVICE void bulk_copy(u32 shared, const void* global, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}
// What is read once in a step and had better not displace the rest of the L2.
DEVICE void bulk_copy_once(u32 shared, const void* global, int bytes, u32 barrier) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
                 "policy;\n}"
                 ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}
// What this thread stored in shared memory becomes visible to wgmma and bulk copies; a barrier must follow.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for what is in global memory, on both sides of an announcement.
DEVICE void fence_async_global() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- registers: a warpgroup gives up what it does not need, and another takes it -------------------

template <int COUNT>
DEVICE void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
