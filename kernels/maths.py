"""Maths that several twins share, in plain PyTorch and fp32. Shape suffixes as in gptoss_compile/dialect.py."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile import dialect


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis, in fp32 and returned so."""
    wide = x.float()
    factor = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return wide * factor * weight.float()


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """GPT-OSS's clamped SwiGLU of [..., 2I] with gate in the even and up in the odd columns: [..., I].

    g = min(gate, limit), u = clamp(up, ±limit): g · sigmoid(alpha · g) · (u + 1).
    """
    gate, up = gate_up.reshape(*gate_up.shape[:-1], -1, 2).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def expert_weights(weight: Tensor, scales: Tensor | None) -> Tensor:
    """fp32 weights [..., N, K] of MXFP4 blocks [..., N, K/32, 16] and their scales, or of plain weights."""
    return weight.float() if scales is None else dialect.mxfp4_dequantize(weight, scales, torch.float32)


def experts_up(x_TH: Tensor, ids_TA: Tensor, weight: Tensor, scales: Tensor | None,
               bias_EN: Tensor) -> Tensor:
    """W[e] x + b[e] for the A experts of each token: [T, A, N] fp32.

    With few pairs only their experts are dequantised, with many every expert once.
    """
    ids = ids_TA.long()
    tokens, top_k = ids.shape
    if tokens * top_k >= weight.shape[0]:
        dense_ENH = expert_weights(weight, scales)
        all_TEN = (x_TH.float() @ dense_ENH.flatten(0, 1).T).reshape(tokens, *dense_ENH.shape[:2])
        y = all_TEN.gather(1, ids.unsqueeze(-1).expand(-1, -1, all_TEN.shape[-1]))
    else:
        chosen = expert_weights(weight[ids], None if scales is None else scales[ids])  # [T, A, N, H]
        y = torch.matmul(chosen, x_TH.float()[:, None, :, None]).squeeze(-1)
    return y + bias_EN.float()[ids]


def experts_down(h_TAI: Tensor, ids_TA: Tensor, weight: Tensor, scales: Tensor | None,
                 bias_EH: Tensor) -> Tensor:
    """W[e] h + b[e] for each (token, expert) pair: [T, A, H] fp32."""
    ids = ids_TA.long()
    tokens, top_k, inner = h_TAI.shape
    experts = weight.shape[0]
    if tokens * top_k >= experts:
        index = ids.unsqueeze(-1)
        by_expert = h_TAI.new_zeros((tokens, experts, inner), dtype=torch.float32)
        by_expert = by_expert.scatter(1, index.expand(-1, -1, inner), h_TAI.float())
        all_ETH = torch.bmm(by_expert.transpose(0, 1), expert_weights(weight, scales).transpose(1, 2))
        y = all_ETH.transpose(0, 1).gather(1, index.expand(-1, -1, all_ETH.shape[-1]))
    else:
        chosen = expert_weights(weight[ids], None if scales is None else scales[ids])  # [T, A, H, I]
        y = torch.matmul(chosen, h_TAI.float().unsqueeze(-1)).squeeze(-1)
    return y + bias_EH.float()[ids]
