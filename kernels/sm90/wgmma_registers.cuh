// Matrix products of a warpgroup (wgmma) with A in registers, at every multiple of 8 tokens up to 144.
#pragma once
#include "wgmma.cuh"

#define WGMMA_NAMES_8 "%0, %1, %2, %3"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_VALUES_8 WGMMA_FOUR(0)
#define WGMMA_VALUES_24 WGMMA_VALUES_16, WGMMA_FOUR(8)
#define WGMMA_VALUES_40 WGMMA_VALUES_32, WGMMA_FOUR(16)
#define WGMMA_VALUES_56 WGMMA_VALUES_48, WGMMA_FOUR(24)
#define WGMMA_VALUES_72 WGMMA_VALUES_64, WGMMA_FOUR(32)
#define WGMMA_VALUES_88 WGMMA_VALUES_80, WGMMA_FOUR(40)
#define WGMMA_VALUES_104 WGMMA_VALUES_96, WGMMA_FOUR(48)
#define WGMMA_VALUES_120 WGMMA_VALUES_112, WGMMA_FOUR(56)
#define WGMMA_VALUES_136 WGMMA_VALUES_128, WGMMA_FOUR(64)

// d[64 x N] += a[64 x 16] b[16 x N], d and b as in `Wgmma`. Of a, lane 4g + c of warp w holds rows 16w + g (a[0], a[2]) and
// 16w + g + 8 (a[1], a[3]), columns 2c and 2c + 1 (a[0], a[1]) or these + 8. ptxas does not guard these registers: they must
// not change before `wgmma_wait` says that the product has read them.
template <int N>
struct WgmmaRegisters;
#define WGMMA_REGISTERS(N, A0, A1, A2, A3, B)                                                                              \
    template <>                                                                                                           \
    struct WgmmaRegisters<N> {                                                                                            \
        static DEVICE void multiply(float (&d)[N / 2], const u32* a, u64 b) {                                             \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_NAMES_##N "}, {%" #A0 ", %" #A1 \
                         ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 0;"                                                    \
                         : WGMMA_VALUES_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
        }                                                                                                                 \
    };
WGMMA_REGISTERS(8, 4, 5, 6, 7, 8) WGMMA_REGISTERS(16, 8, 9, 10, 11, 12) WGMMA_REGISTERS(24, 12, 13, 14, 15, 16)
WGMMA_REGISTERS(32, 16, 17, 18, 19, 20) WGMMA_REGISTERS(40, 20, 21, 22, 23, 24) WGMMA_REGISTERS(48, 24, 25, 26, 27, 28)
WGMMA_REGISTERS(56, 28, 29, 30, 31, 32) WGMMA_REGISTERS(64, 32, 33, 34, 35, 36) WGMMA_REGISTERS(72, 36, 37, 38, 39, 40)
WGMMA_REGISTERS(80, 40, 41, 42, 43, 44) WGMMA_REGISTERS(88, 44, 45, 46, 47, 48) WGMMA_REGISTERS(96, 48, 49, 50, 51, 52)
WGMMA_REGISTERS(104, 52, 53, 54, 55, 56) WGMMA_REGISTERS(112, 56, 57, 58, 59, 60) WGMMA_REGISTERS(120, 60, 61, 62, 63, 64)
WGMMA_REGISTERS(128, 64, 65, 66, 67, 68) WGMMA_REGISTERS(136, 68, 69, 70, 71, 72) WGMMA_REGISTERS(144, 72, 73, 74, 75, 76)
