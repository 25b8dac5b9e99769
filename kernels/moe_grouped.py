"""moe_sort, moe_gate_up_grouped, moe_down_grouped, moe_combine: the experts of many tokens, grouped by expert.

`moe_sort` lists each expert's (token, expert) pairs; the products then read every expert's weights once a tile of
pairs. A pair is the flat index t·A + a. Weights as in moe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import experts_down, experts_up, ids_of_order, rms_norm, swiglu


def _sort_fake(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty((experts, ids.shape[0])), ids.new_empty((experts,))


@kernel_op("moe_sort(Tensor ids, int experts) -> (Tensor, Tensor)", fake=_sort_fake)
def moe_sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order [E, T] i32, the pairs routed to each expert, ascending, -1 beyond; count [E] i32, how many those are.

    ids [T, A] i32; the experts of one token are distinct.
    """
    tokens, top_k = ids.shape
    matches_ETA = ids[None] == torch.arange(experts, dtype=ids.dtype, device=ids.device)[:, None, None]
    member_ET = matches_ETA.any(-1)
    slot = torch.arange(tokens, device=ids.device)[None] * top_k + matches_ETA.int().argmax(-1)
    target = torch.where(member_ET, member_ET.int().cumsum(-1) - 1, tokens)  # the last column takes what is no member
    order = torch.full((experts, tokens + 1), -1, dtype=torch.int32, device=ids.device)
    order = order.scatter(1, target.long(), slot.int())[:, :tokens]
    return order.contiguous(), member_ET.sum(-1, dtype=torch.int32)


def _gate_up_fake(x: Tensor, norm_weight: Tensor, order: Tensor, count: Tensor, weight: Tensor, scales: Tensor | None,
                  bias: Tensor, eps: float, alpha: float, limit: float, top_k: int) -> Tensor:
    return x.new_empty((x.shape[0], top_k, weight.shape[1] // 2))


@kernel_op("moe_gate_up_grouped(Tensor x, Tensor norm_weight, Tensor order, Tensor count, Tensor weight,"
           " Tensor? scales, Tensor bias, float eps, float alpha, float limit, int top_k) -> Tensor",
           fake=_gate_up_fake)
def moe_gate_up_grouped(x: Tensor, norm_weight: Tensor, order: Tensor, count: Tensor, weight: Tensor,
                        scales: Tensor | None, bias: Tensor, eps: float, alpha: float, limit: float,
                        top_k: int) -> Tensor:
    """`moe_gate_up` of pairs sorted by expert: [T, A, I]. x [T, H], order [E, T], count [E], bias [E, 2I]."""
    up = experts_up(rms_norm(x, norm_weight, eps), ids_of_order(order, top_k), weight, scales, bias)
    return swiglu(up, alpha, limit).to(x.dtype)


def _down_fake(h: Tensor, order: Tensor, count: Tensor, weight: Tensor, *_: object) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[1], weight.shape[1]))


@kernel_op("moe_down_grouped(Tensor h, Tensor order, Tensor count, Tensor weight, Tensor? scales, Tensor bias)"
           " -> Tensor", fake=_down_fake)
def moe_down_grouped(h: Tensor, order: Tensor, count: Tensor, weight: Tensor, scales: Tensor | None,
                     bias: Tensor) -> Tensor:
    """W[e] h + b[e] of every pair: [T, A, H]. h [T, A, I], order [E, T], count [E], bias [E, H]."""
    return experts_down(h, ids_of_order(order, h.shape[1]), weight, scales, bias).to(h.dtype)


@kernel_op("moe_combine(Tensor y, Tensor probs, Tensor residual) -> Tensor",
           fake=lambda y, probs, residual: residual.new_empty(residual.shape))
def moe_combine(y: Tensor, probs: Tensor, residual: Tensor) -> Tensor:
    """residual + sum over a of probs[a] y[a]: [T, H] of y [T, A, H], probs [T, A] fp32, residual [T, H]."""
    return (residual.float() + (y.float() * probs.unsqueeze(-1)).sum(1)).to(residual.dtype)
