"""norm_linear, linear_residual, norm_head: dense projections with RMSNorm in front or a residual behind."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import rms_norm


@kernel_op("norm_linear(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, float eps) -> Tensor",
           fake=lambda x, norm_weight, weight, bias, eps: x.new_empty((x.shape[0], weight.shape[0])))
def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """rmsnorm(x) Wᵀ + b: [T, N] of x [T, H], norm_weight [H], weight [N, H], bias [N]."""
    return (rms_norm(x, norm_weight, eps) @ weight.float().T + bias.float()).to(x.dtype)


@kernel_op("linear_residual(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
           fake=lambda x, weight, bias, residual: residual.new_empty(residual.shape))
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x Wᵀ + b + residual: [T, H] of x [T, K], weight [H, K], bias [H], residual [T, H]."""
    return (x.float() @ weight.float().T + bias.float() + residual.float()).to(residual.dtype)


def _head_fake(x: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    count = x.shape[0] if rows is None else rows.shape[0]
    return x.new_empty((count, weight.shape[0]), dtype=torch.float32)


@kernel_op("norm_head(Tensor x, Tensor? rows, Tensor norm_weight, Tensor weight, float eps) -> Tensor", fake=_head_fake)
def norm_head(x: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Logits rmsnorm(x[rows]) Wᵀ: [R, V] fp32 of x [T, H], rows [R] i32 (None: every row), weight [V, H]."""
    chosen = x if rows is None else x[rows.long()]
    return rms_norm(chosen, norm_weight, eps) @ weight.float().T
