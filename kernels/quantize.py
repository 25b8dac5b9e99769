"""norm_quantize, moe_gate_up_grouped_mx: the experts' input in MXFP8, for targets with block-scaled MMA.

MXFP8 (OCP Microscaling Formats v1.0): e4m3 values, one e8m0 scale for 32 of them. Rows are padded with zeros to a
multiple of 128 values, the K step of the block-scaled product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import experts_up, ids_of_order, rms_norm, swiglu

E4M3_MAX = 448.0
K_MULTIPLE = 128
SMALLEST_SCALE = 2.0**-100  # of a block of zeros; keeps the quotient finite


def padded(hidden: int) -> int:
    return -(-hidden // K_MULTIPLE) * K_MULTIPLE


def _quantize_fake(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tokens, width = x.shape[0], padded(x.shape[1])
    return x.new_empty((tokens, width), dtype=torch.uint8), x.new_empty((tokens, width // 32), dtype=torch.uint8)


@kernel_op("norm_quantize(Tensor x, Tensor norm_weight, float eps) -> (Tensor, Tensor)", fake=_quantize_fake)
def norm_quantize(x: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rmsnorm(x) as e4m3 bytes [T, Hp] u8 and e8m0 scales [T, Hp/32] u8; x [T, H], Hp = H rounded up to 128.

    A block's scale is the smallest power of two with max|x| <= 448 · scale, so nothing saturates.
    """
    hidden = x.shape[1]
    normed = torch.nn.functional.pad(rms_norm(x, norm_weight, eps), (0, padded(hidden) - hidden))
    blocks = normed.unflatten(-1, (-1, 32))
    least = (blocks.abs().amax(-1) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    exponent = (least.view(torch.int32) + 0x7FFFFF) >> 23  # rounds up to a power of two
    factor = torch.bitwise_left_shift(254 - exponent, 23).view(torch.float32)  # 1 / scale
    values = (blocks * factor.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8)
    return values.flatten(-2), exponent.to(torch.uint8)


def mxfp8_dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """fp32 [T, Hp] of e4m3 bytes [T, Hp] and e8m0 scales [T, Hp/32]."""
    factor = torch.exp2(scales.float() - 127.0)
    return (values.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 32)) * factor.unsqueeze(-1)).flatten(-2)


def _gate_up_fake(q: Tensor, qscales: Tensor, order: Tensor, count: Tensor, weight: Tensor, scales: Tensor,
                  bias: Tensor, alpha: float, limit: float, top_k: int) -> Tensor:
    return bias.new_empty((q.shape[0], top_k, weight.shape[1] // 2))


@kernel_op("moe_gate_up_grouped_mx(Tensor q, Tensor qscales, Tensor order, Tensor count, Tensor weight, Tensor scales,"
           " Tensor bias, float alpha, float limit, int top_k) -> Tensor", fake=_gate_up_fake)
def moe_gate_up_grouped_mx(q: Tensor, qscales: Tensor, order: Tensor, count: Tensor, weight: Tensor, scales: Tensor,
                           bias: Tensor, alpha: float, limit: float, top_k: int) -> Tensor:
    """`moe_gate_up_grouped` of input quantised by `norm_quantize`: [T, A, I] in the bias's dtype.

    q [T, Hp] u8, qscales [T, Hp/32] u8, weight [E, 2I, H/32, 16] u8, scales [E, 2I, H/32] u8, bias [E, 2I].
    """
    x = mxfp8_dequantize(q, qscales)[:, : weight.shape[2] * 32]
    up = experts_up(x, ids_of_order(order, top_k), weight, scales, bias)
    return swiglu(up, alpha, limit).to(bias.dtype)
