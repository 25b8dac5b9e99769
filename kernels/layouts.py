"""How weights lie in memory where a kernel does not read them row by row, as PyTorch references.

    tiles           a dense bf16 weight [N, K] as [ceil(N/64)][K/64] tiles of 64 rows × 64 columns, rows beyond N zero.
                    Row r of a tile is 128 bytes, whose 16-byte chunk c lies at place c ^ (r mod 8): the 128-byte swizzle,
                    so a tile is an operand of wgmma as it is, and one bulk copy brings it.
    mxfp4_gate_up   an expert projection's blocks [E, N, K/32, 16] and scales [E, N, K/32] as [E][N/192][K'/64] stages of
    mxfp4_down      three slabs. A slab is 64 rows × 64 columns: 2,048 bytes of values in the order in which a warpgroup's
                    lanes feed them to the tensor cores, then 128 bytes of scales. K' is K rounded up to a multiple of 192:
                    columns beyond K are zeros with a scale of 2^-127.

A slab's rows are dealt to fragments so that a projection's results lie well (`_slab_rows`): in gate_up a lane holds gate and
up of one feature, in down four neighbouring features. A lane's 16 bytes are two steps of 32 columns, each two words w0, w1
that decode into eight registers of a bf16 matrix instruction: register 4q + a is row g (a even) or g + 8, columns
16q + 2t + 8(a / 2) and the next. Three rotations of each word bring values to bits 15 | 8, 7, 6 of both halves of a
register, where a bf16 has their sign, exponent and mantissa, and the bits that this leaves over in both words are the last
two registers (`_source_bit`). Scales are stored as s + 126, the exponent of 2^(s - 127) · 2^126, which undoes the bias of
such a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptoss_compile.launch_plan import SLAB_BYTES, SLABS, TILE

_ROTATIONS = (0, 6, 12, 2, 0, 6, 12, 8)
_PLACES = (6, 7, 8, 15)  # of a value's four bits, lowest first, in a half of a register


def tiles(weight: Tensor) -> Tensor:
    """[ceil(N/64), K/64, 64, 64] bf16 of a weight [N, K], K a multiple of 64."""
    rows, columns = weight.shape
    padded = torch.zeros((-(-rows // TILE) * TILE, columns), dtype=weight.dtype, device=weight.device)
    padded[:rows] = weight
    by_tile = padded.reshape(-1, TILE, columns // TILE, TILE // 8, 8).transpose(1, 2)
    row = torch.arange(TILE, device=weight.device)[:, None]
    chunk = torch.arange(TILE // 8, device=weight.device)[None] ^ (row % 8)
    return by_tile[:, :, row, chunk].reshape(-1, columns // TILE, TILE, TILE)


def _slab_rows(name: str) -> Tensor:
    """[64]: for fragment row 16w + r of a slab the weight row within it (gate_up: within the slab's 64 rows too)."""
    at = torch.arange(TILE)
    warp, r = at // 16, at % 16
    low, high = r % 8, r // 8
    return 2 * (warp * 8 + low) + high if name == "mxfp4_gate_up" else warp * 16 + 4 * (low // 2) + low % 2 + 2 * high


def _source_bit(register: int, place: int) -> int:
    """Bit `place` of a decoded register comes from this bit of the pair (w1 : w0)."""
    bit = (place - _ROTATIONS[register]) % 32
    if register in (3, 7):
        return bit if bit % 16 in (4, 5, 13, 14) else 32 + (bit - 2) % 32
    return bit + (32 if register >= 4 else 0)


def _slabs(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, N/192, K'/64, 3, 2176] u8 of blocks [E, N, K/32, 16] and scales [E, N, K/32]; N a multiple of 192.

    Expert by expert: on the way there 4 bits take up 64.
    """
    experts = zip(torch.split(blocks, 1), torch.split(scales, 1), strict=True)
    return torch.cat([_expert_slabs(name, *expert) for expert in experts])


def _expert_slabs(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    missing = -scales.shape[2] % (SLABS * TILE // 32)
    blocks, scales = pad(blocks, (0, 0, 0, missing)), pad(scales, (0, missing))
    experts, rows, groups = scales.shape
    where = _slab_rows(name).to(blocks.device)

    def by_fragment(x: Tensor, each: int) -> Tensor:  # [E, N, K/64 · each] -> [E, N/64, K/64, warp, a, g, each]
        slabs = x.reshape(experts, rows // TILE, TILE, groups // 2, each)[:, :, where]
        return slabs.reshape(experts, rows // TILE, 4, 2, 8, groups // 2, each).permute(0, 1, 5, 2, 3, 4, 6)

    values = torch.stack((blocks & 15, blocks >> 4), -1).reshape(experts, rows, groups * 32)
    nibbles = by_fragment(values, 64)
    lead = nibbles.shape[:3]
    # columns 32 half + 16 q + 8 a2 + 2 t + h: [.., warp, row half, g, half, q, a2, t, h]
    nibbles = nibbles.reshape(*lead, 4, 2, 8, 2, 2, 2, 4, 2).to(torch.int64)
    words = torch.zeros((*lead, 4, 8, 4, 2), dtype=torch.int64, device=blocks.device)  # [.., warp, g, t, half]
    for register in range(8):
        q, row_half, a2 = register // 4, register % 2, register % 4 // 2
        part = nibbles[..., :, row_half, :, :, q, a2, :, :].transpose(-3, -2)  # [.., warp, g, t, half, h]
        for h in range(2):
            for bit, place in enumerate(_PLACES):
                words |= (part[..., h] >> bit & 1) << _source_bit(register, place + 16 * h)
    packed = words.view(torch.uint8).reshape(*lead, 2048)
    factors = by_fragment(scales.to(torch.int32) + 126, 2).to(torch.uint8)  # [.., warp, a, g, half]
    factors = factors.permute(0, 1, 2, 3, 5, 4, 6).reshape(*lead, 128)
    slabs = torch.cat((packed, factors), -1)  # [E, N/64, K/64, 2176]
    return slabs.reshape(experts, rows // (SLABS * TILE), SLABS, groups // 2, SLAB_BYTES).transpose(2, 3).contiguous()


def mxfp4_gate_up(blocks: Tensor, scales: Tensor) -> Tensor:
    return _slabs("mxfp4_gate_up", blocks, scales)


def mxfp4_down(blocks: Tensor, scales: Tensor) -> Tensor:
    return _slabs("mxfp4_down", blocks, scales)


def layout_sources(operand: str, kind: str) -> tuple[str, ...]:
    """The operands of a kernel that the laid out weight in place of `operand` is made of."""
    if kind == "tiles":
        return (operand,)
    return operand, "scales" if operand == "weight" else f"{operand}_scales"


REFERENCES: dict[str, Callable[..., Tensor]] = {"tiles": tiles, "mxfp4_gate_up": mxfp4_gate_up, "mxfp4_down": mxfp4_down}
