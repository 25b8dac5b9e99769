"""Laid out experts, decoded as the kernels decode them, are the weights they were made of, and zeros behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_compile.dialect import mxfp4_dequantize
from gptoss_compile.kernels.layouts import REFERENCES
from gptoss_compile.launch_plan import LARGEST_SCALE, Layout

VALUE, LEFT_OVER = 0x81C081C0, 0x60306030


def experts(count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(256, (count, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(LARGEST_SCALE + 1, blocks.shape[:-1], dtype=torch.uint8)


def rotated(word: Tensor, bits: int) -> Tensor:
    return (word << bits | word >> 32 - bits) & 0xFFFFFFFF


def decoded(kind: str, laid: Tensor) -> Tensor:
    """[E, N, K'] fp64 of [E, N/192, K'/64, 3, 2176]: in `moe_grouped.cu`'s words, lane 4g + t of warp w."""
    experts, triples, depth = laid.shape[:3]
    slabs = laid.transpose(2, 3).reshape(experts, triples * 3, depth, 2176)
    words = slabs[..., :2048].contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    words = words.reshape(experts, triples * 3, depth, 4, 8, 4, 2, 2)  # [.., w, g, t, step, word]
    w0, w1 = words.unbind(-1)
    merged = w0 & LEFT_OVER | rotated(w1, 2) & ~LEFT_OVER
    registers = VALUE & torch.stack(
        (w0, w0 << 6, rotated(w0, 12), merged << 2, w1, w1 << 6, rotated(w1, 12), rotated(merged, 8)), -1)
    halves = torch.stack((registers & 0xFFFF, registers >> 16), -1)  # [.., w, g, t, step, register, half]
    values = (halves << 16).to(torch.int32).view(torch.float32).double()
    scales = slabs[..., 2048:].reshape(experts, triples * 3, depth, 4, 8, 2, 2)  # [.., w, g, g or g + 8, step]
    found = torch.zeros(experts, triples * 3, depth, 64, 64, dtype=torch.float64)
    for warp in range(4):
        for g in range(8):
            for high in range(2):
                r = 2 * (8 * warp + g) + high if kind == "mxfp4_gate_up" else 16 * warp + 4 * (g // 2) + g % 2 + 2 * high
                factor = torch.exp2(scales[..., warp, g, high, :].double() - 127)  # [.., step]
                for t in range(4):
                    for register in range(high, 8, 2):
                        column = 16 * (register // 4) + 2 * t + 8 * (register % 4 // 2)
                        for step in range(2):
                            pair = values[..., warp, g, t, step, register, :] * factor[..., step, None]
                            found[..., r, 32 * step + column : 32 * step + column + 2] = pair
    return found.transpose(2, 3).reshape(experts, triples * 192, depth * 64)


@pytest.mark.parametrize("kind", ["mxfp4_gate_up", "mxfp4_down"])
@pytest.mark.parametrize("columns", [32, 96, 192, 288, 672, 1440])
def test_a_laid_out_weight_is_the_weight_and_zeros(kind: str, columns: int) -> None:
    blocks, scales = experts(2, 192 if columns > 288 else 384, columns)
    laid = REFERENCES[kind](blocks, scales)
    assert laid.numel() == Layout(kind, ("weight", "scales")).bytes(tuple(blocks.shape))
    weight = decoded(kind, laid)
    assert weight.shape[2] == -(-columns // 192) * 192
    assert torch.equal(weight[..., :columns], mxfp4_dequantize(blocks, scales, torch.float64))
    assert (weight[..., columns:] == 0).all()
    x = torch.randn(2, weight.shape[2], dtype=torch.float64)
    expected = torch.einsum("enk,ek->en", mxfp4_dequantize(blocks, scales, torch.float64), x[:, :columns])
    assert torch.allclose(torch.einsum("enk,ek->en", weight, x), expected, rtol=1e-12, atol=0)


def test_scales_beyond_the_columns_are_finite_factors() -> None:
    """Both as an fp32's exponent and as a bf16's, 255 would be infinite or no number."""
    blocks, scales = experts(1, 192, 96)
    laid = REFERENCES["mxfp4_down"](blocks, scales)
    assert laid.shape == (1, 1, 3, 3, 2176) and int(laid[..., 2048:].max()) < 255
