"""moe_grouped_mx: `moe_grouped` whose experts get their input in MXFP8, for targets with block-scaled MMA.

MXFP8 (OCP Microscaling Formats v1.0): e4m3 values, one e8m0 scale for 32 of them. Rows are padded with zeros to a
multiple of 128 values, the K step of the block-scaled product, which takes weights and activations as they are stored.
In place of the norm that the experts' kernel would repeat for every tile, one more launch makes `q` [T, Hp] u8, e4m3
bytes of the normed rows with Hp = H rounded up to 128, and `qscales` [T, Hp/32] u8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    jit,
    launch,
    mxfp4,
    number,
    pow2,
    tensor,
    total_bytes,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import experts_up, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.moe_grouped import (
    Sizes,
    activated,
    combine_launch,
    down_launch,
    find_tile,
    mixed,
    sort_launch,
)
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

E4M3_MAX = 448.0
K_MULTIPLE = 128
SMALLEST_SCALE = 2.0**-100  # of a block of zeros; keeps the quotient finite


def padded(hidden: int) -> int:
    return -(-hidden // K_MULTIPLE) * K_MULTIPLE


def mxfp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 bytes [T, Hp] u8 and e8m0 scales [T, Hp/32] u8 of fp32 x [T, H], Hp = H rounded up to 128.

    A block's scale is the smallest power of two with max|x| <= 448 · scale, so nothing saturates.
    """
    hidden = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, padded(hidden) - hidden)).reshape(x.shape[0], -1, 32)
    least = (blocks.abs().amax(-1) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    exponent = (least.view(torch.int32) + 0x7FFFFF) >> 23  # rounds up to a power of two
    factor = torch.bitwise_left_shift(254 - exponent, 23).view(torch.float32)  # 1 / scale
    values = (blocks * factor.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8)
    return values.flatten(-2), exponent.to(torch.uint8)


def mxfp8_dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """fp32 [T, Hp] of e4m3 bytes [T, Hp] and e8m0 scales [T, Hp/32]."""
    factor = torch.exp2(scales.float() - 127.0)
    blocks = values.view(torch.float8_e4m3fn).float().reshape(*scales.shape, 32)
    return torch.flatten(blocks * factor.unsqueeze(-1), -2)


@kernel_op("moe_grouped_mx(Tensor x, Tensor norm_weight, Tensor ids, Tensor probs, Tensor up, Tensor up_scales,"
           " Tensor up_bias, Tensor down, Tensor down_scales, Tensor down_bias, float eps, float alpha, float limit)"
           " -> Tensor", fake=lambda x, *_: torch.empty_like(x))
def moe_grouped_mx(x: Tensor, norm_weight: Tensor, ids: Tensor, probs: Tensor, up: Tensor, up_scales: Tensor,
                   up_bias: Tensor, down: Tensor, down_scales: Tensor, down_bias: Tensor, eps: float, alpha: float,
                   limit: float) -> Tensor:
    """`moe_grouped` of MXFP4 experts with the normed x rounded to MXFP8: [T, H]."""
    normed = mxfp8_dequantize(*mxfp8_quantize(rms_norm(x, norm_weight, eps)))[:, : x.shape[1]]
    h = swiglu_twin(experts_up(normed, ids, up, up_scales, up_bias), alpha, limit).to(x.dtype)
    return mixed(x, h, ids, probs, down, down_scales, down_bias)


@jit
def norm_quantize_kernel(x_ptr: tl.tensor, norm_weight_ptr: tl.tensor, q_ptr: tl.tensor, qscales_ptr: tl.tensor,
                         H: tl.constexpr, HP: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
                         PDL: tl.constexpr) -> tl.tensor:
    """Program t quantises token t. BLOCK >= HP, the padded row."""
    trigger(PDL)
    t = tl.program_id(0)
    h = tl.arange(0, BLOCK)
    g = tl.arange(0, BLOCK // 32)
    norm = tl.load(norm_weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    wait(PDL)
    x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    x = tl.reshape(x * tl.rsqrt(tl.sum(x * x) / H + EPS) * norm, (BLOCK // 32, 32))
    least = tl.maximum(tl.max(tl.abs(x), 1) * (1 / 448.0), 2.0**-100)
    exponent = (least.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    x *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    values = tl.reshape(x, (BLOCK,)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(q_ptr + t * HP + h, values, mask=h < HP)
    tl.store(qscales_ptr + t * (HP // 32) + g, exponent.to(tl.uint8), mask=g < HP // 32)


@jit
def mxfp8(values: tl.tensor, scales: tl.tensor) -> tl.tensor:
    """fp32 [K, BT] of e4m3 bytes [K, BT] and e8m0 scales [BT, K/32], by hand: e4m3's bits s|eeee|mmm are an fp16's
    15|13…10|9…7, and its value 2^-8 of e4m3's."""
    bits = values.to(tl.int16)
    wide = (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    factor = (tl.trans(scales).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    blocks = tl.reshape(wide, (factor.shape[0], 32, factor.shape[1])) * factor[:, None, :]
    return tl.reshape(blocks, (values.shape[0], values.shape[1]))


@jit
def moe_gate_up_grouped_mx_kernel(q_ptr: tl.tensor, qscales_ptr: tl.tensor, order_ptr: tl.tensor,
                                  count_ptr: tl.tensor, up_ptr: tl.tensor, up_scales_ptr: tl.tensor,
                                  up_bias_ptr: tl.tensor, h_ptr: tl.tensor, T: tl.constexpr, E: tl.constexpr,
                                  I: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, TOP_K: tl.constexpr,
                                  ALPHA: tl.constexpr, LIMIT: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
                                  BT: tl.constexpr, BK: tl.constexpr, SCALED_MMA: tl.constexpr,
                                  PDL: tl.constexpr) -> tl.tensor:
    """Program (tile, part), part fastest: weight rows part·BN …, that is BN/2 features, of BT pairs of one expert."""
    trigger(PDL)
    parts: tl.constexpr = (2 * I + BN - 1) // BN
    part = tl.program_id(0) % parts
    n = part * BN + tl.arange(0, BN)
    inside = (n < 2 * I)[:, None]
    wait(PDL)
    expert, pair, exists = find_tile(count_ptr, order_ptr, tl.program_id(0) // parts, T, E, EP, BT)
    if expert < E:
        row = expert.to(tl.int64) * (2 * I) + n[:, None]
        token = pair // TOP_K
        acc = tl.zeros((BN, BT), tl.float32)
        for start in range(0, HP, BK):
            k = start + tl.arange(0, BK)
            byte = start // 2 + tl.arange(0, BK // 2)
            block = start // 32 + tl.arange(0, BK // 32)
            w = tl.load(up_ptr + row * (H // 2) + byte[None, :], mask=inside & (byte < H // 2)[None, :], other=0)
            ws = tl.load(up_scales_ptr + row * (H // 32) + block[None, :], mask=inside & (block < H // 32)[None, :], other=0)
            x = tl.load(q_ptr + token[None, :] * HP + k[:, None], mask=exists[None, :], other=0)
            xs = tl.load(qscales_ptr + token[:, None] * (HP // 32) + block[None, :], mask=exists[:, None], other=0)
            if SCALED_MMA:
                acc = tl.dot_scaled(w, ws, "e2m1", x.to(tl.float8e4nv, bitcast=True), xs, "e4m3", acc)
            else:
                acc = tl.dot(mxfp4(w, ws), mxfp8(x, xs), acc, input_precision="ieee")
        h = activated(acc, up_bias_ptr + expert * 2 * I, n, 2 * I, ALPHA, LIMIT)
        i = part * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(h_ptr + pair[None, :] * I + i[:, None], h.to(h_ptr.dtype.element_ty),
                 mask=(i < I)[:, None] & exists[None, :])


def has_block_scaling(target: Target, operands: Mapping[str, Operand]) -> bool:
    return target.has("block_scaled_mma")


def quantised(size: Sizes) -> dict[str, TensorSpec]:
    width = padded(size.hidden)
    return {"q": TensorSpec((size.tokens, width), "u8"), "qscales": TensorSpec((size.tokens, width // 32), "u8")}


def quantize_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size, x = Sizes.of(operands), tensor(operands, "x")
    width, outputs = padded(size.hidden), quantised(size)
    constants = {"H": size.hidden, "HP": width, "EPS": number(operands, "eps"), "BLOCK": pow2(width)}
    return launch(norm_quantize_kernel, target, operands, constants, grid=size.tokens, common=outputs,
                  moved=total_bytes(x, *outputs.values()), flops=8 * size.tokens * size.hidden, preloads=("norm_weight",))


def gate_up_mx_launch(target: Target, operands: Mapping[str, Operand]) -> Launch:
    size = Sizes.of(operands)
    inputs, (constants, _) = quantised(size), size.tiles(2 * size.inner)
    constants |= {"BN": 128, "BK": K_MULTIPLE, "HP": padded(size.hidden), "TOP_K": size.top_k, "SCALED_MMA": True,
                  "ALPHA": number(operands, "alpha"), "LIMIT": number(operands, "limit")}
    grid = size.most_tiles * cdiv(2 * size.inner, 128)
    return launch(moe_gate_up_grouped_mx_kernel, target, operands, constants, grid=grid,
                  common={**inputs, **size.groups, "h": size.h},
                  moved=total_bytes(inputs["q"], size.h) + size.weight_bytes(operands, "up"),
                  flops=4 * size.pairs * size.inner * size.hidden,
                  promises=("UTCQMMA" if target.has("tcgen05") else "v_mfma_scale",),
                  num_warps=8 if constants["BT"] >= 64 else 4)


def mx_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    makers = (sort_launch, quantize_launch, gate_up_mx_launch, down_launch, combine_launch)
    return tuple(make(target, operands) for make in makers)


SPECS = (KernelSpec("moe_grouped_mx", "moe_grouped_mx", has_block_scaling, mx_launches),)
