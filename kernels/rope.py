"""rope_table: the cosines and sines of a step's positions, computed once and read by every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op


@kernel_op("rope_table(Tensor positions, Tensor inv_freq, float scale) -> Tensor",
           fake=lambda positions, inv_freq, scale: inv_freq.new_empty((positions.shape[0], 2, inv_freq.shape[0])))
def rope_table(positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    """[T, 2, D/2] fp32: scale·cos and scale·sin of positions [T] i32 times inv_freq [D/2] fp32 (radians)."""
    angle = positions.float().unsqueeze(-1) * inv_freq
    return torch.stack((angle.cos(), angle.sin()), 1) * scale
