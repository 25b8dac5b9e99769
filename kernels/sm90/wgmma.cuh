// Matrix products of a warpgroup (wgmma), A and B in shared memory.
#pragma once
#include "common.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last PENDING groups have ended: their accumulators may be read and their shared memory refilled.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operand of rows x 64 columns of bf16 as they lie in the layout `tiles` and in activation tiles: a row is 128 bytes, eight
// rows 1,024, with the 128-byte swizzle. Sixteen columns further is `+ 2`. The address must be a multiple of 1,024.
DEVICE u64 wgmma_operand(u32 address) {
    constexpr u64 SWIZZLE_128 = 1ull << 62, GROUP_STRIDE = (u64)(1024 / 16) << 32;
    return SWIZZLE_128 | GROUP_STRIDE | (1 << 16) | (address & 0x3FFFF) >> 4;
}

// Wgmma<N>::multiply: d[64 x N] = a[64 x 16] b[16 x N] (+ d if `add`), b given as N rows of 16 columns. Lane 4g + c of the
// warpgroup's warp w holds rows 16w + g (d[4j], d[4j + 1]) and 16w + g + 8 (d[4j + 2], d[4j + 3]) at columns 8j + 2c and
// 8j + 2c + 1.
template <int n>
struct Wgmma;  // n: N has become a macro in some kernels
#define WGMMA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_48 WGMMA_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_NAMES_64 WGMMA_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_80 WGMMA_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NAMES_96 WGMMA_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_112 WGMMA_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NAMES_128 WGMMA_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_144 WGMMA_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_NAMES_160 WGMMA_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_176 WGMMA_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_NAMES_192 WGMMA_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_208 WGMMA_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_NAMES_224 WGMMA_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_NAMES_240 WGMMA_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_NAMES_256 WGMMA_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_VALUES_16 WGMMA_EIGHT(0)
#define WGMMA_VALUES_32 WGMMA_VALUES_16, WGMMA_EIGHT(8)
#define WGMMA_VALUES_48 WGMMA_VALUES_32, WGMMA_EIGHT(16)
#define WGMMA_VALUES_64 WGMMA_VALUES_48, WGMMA_EIGHT(24)
#define WGMMA_VALUES_80 WGMMA_VALUES_64, WGMMA_EIGHT(32)
#define WGMMA_VALUES_96 WGMMA_VALUES_80, WGMMA_EIGHT(40)
#define WGMMA_VALUES_112 WGMMA_VALUES_96, WGMMA_EIGHT(48)
#define WGMMA_VALUES_128 WGMMA_VALUES_112, WGMMA_EIGHT(56)
#define WGMMA_VALUES_144 WGMMA_VALUES_128, WGMMA_EIGHT(64)
#define WGMMA_VALUES_160 WGMMA_VALUES_144, WGMMA_EIGHT(72)
#define WGMMA_VALUES_176 WGMMA_VALUES_160, WGMMA_EIGHT(80)
#define WGMMA_VALUES_192 WGMMA_VALUES_176, WGMMA_EIGHT(88)
#define WGMMA_VALUES_208 WGMMA_VALUES_192, WGMMA_EIGHT(96)
#define WGMMA_VALUES_224 WGMMA_VALUES_208, WGMMA_EIGHT(104)
#define WGMMA_VALUES_240 WGMMA_VALUES_224, WGMMA_EIGHT(112)
#define WGMMA_VALUES_256 WGMMA_VALUES_240, WGMMA_EIGHT(120)
#define WGMMA_SHAPE(N, A, B, ADD) \
    template <> \
    struct Wgmma<N> { \
        static DEVICE void multiply(float (&d)[N / 2], u64 a, u64 b, int add) { \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                         "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}" \
                         : WGMMA_VALUES_##N : "l"(a), "l"(b), "r"(add)); \
        } \
    };
WGMMA_SHAPE(16, 8, 9, 10) WGMMA_SHAPE(32, 16, 17, 18) WGMMA_SHAPE(48, 24, 25, 26) WGMMA_SHAPE(64, 32, 33, 34)
WGMMA_SHAPE(80, 40, 41, 42) WGMMA_SHAPE(96, 48, 49, 50) WGMMA_SHAPE(112, 56, 57, 58) WGMMA_SHAPE(128, 64, 65, 66)
WGMMA_SHAPE(144, 72, 73, 74) WGMMA_SHAPE(160, 80, 81, 82) WGMMA_SHAPE(176, 88, 89, 90) WGMMA_SHAPE(192, 96, 97, 98)
WGMMA_SHAPE(208, 104, 105, 106) WGMMA_SHAPE(224, 112, 113, 114) WGMMA_SHAPE(240, 120, 121, 122)
WGMMA_SHAPE(256, 128, 129, 130)
