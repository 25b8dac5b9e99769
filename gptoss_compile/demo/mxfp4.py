"""Rounding to MXFP4: as packed bytes for a checkpoint, and as a step of training that gradients pass through."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.config import MXFP4_BLOCK

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_CLIPPED = 7.0  # from here on clipping to 6 costs more than a scale twice as large would


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 of weight [..., N]: blocks [..., N/32, 16] u8 (low nibble = even element) and scales [..., N/32] u8."""
    codes, exponents = _codes(weight)
    pairs = codes.view(*codes.shape[:-1], MXFP4_BLOCK // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponents.squeeze(-1) + 127).to(torch.uint8)


def fake_quantize(weight: Tensor) -> Tensor:
    """The values MXFP4 would keep, with the gradient of the identity (Bengio et al., 2013)."""
    with torch.no_grad():
        codes, exponents = _codes(weight)
        table = torch.tensor(_MAGNITUDES, device=weight.device)
        values = table[(codes & 7).int()] * (1 - 2 * (codes >> 3).float()) * torch.exp2(exponents)
        error = values.view_as(weight).to(weight.dtype) - weight
    return weight + error


def fake_bf16(weight: Tensor) -> Tensor:
    """The value bf16 would keep, with the gradient of the identity."""
    return weight + (weight.to(torch.bfloat16).to(weight.dtype) - weight).detach()


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1 codes [..., N/32, 32] u8, sign in bit 3, and the exponents of their blocks' scales [..., N/32, 1] fp32."""
    blocks = weight.detach().float().reshape(*weight.shape[:-1], -1, MXFP4_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    exponents = torch.ceil(torch.log2(largest / _CLIPPED)).clamp(-126, 125)
    scaled = blocks / torch.exp2(exponents)
    midpoints = torch.tensor(_MIDPOINTS, device=weight.device)
    codes = torch.bucketize(scaled.abs(), midpoints) | (scaled < 0).long() << 3
    return codes.to(torch.uint8), exponents
