"""The kernels of a step that several ranks run together, and where they exchange.

Producers leave partial sums in fp32. Consumers begin with the sum of the ranks' partials, added in rank order, so that all
ranks hold the same bits; they add the residual, normalise and go on as their one-rank namesakes do, which is their
reference:

    linear_partial   moe_down_partial   moe_grouped_partial      then    reduce_norm_linear   reduce_norm_route
                                                                         reduce_norm_head

No kernel stands between a producer and its consumer. gptoss::all_gather puts the logits together. For GPUs none of these is
written yet: they have no KernelSpec.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import experts_down, experts_up, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.norm_linear import norm_head, norm_linear
from gptoss_compile.kernels.router import norm_route

OPERATORS = ("linear_partial", "moe_down_partial", "moe_grouped_partial", "reduce_norm_linear", "reduce_norm_route",
             "reduce_norm_head", "all_gather")


def _partial_fake(x: Tensor, outputs: int) -> Tensor:
    return x.new_empty((x.shape[0], outputs), dtype=torch.float32)


@kernel_op("linear_partial(Tensor x, Tensor weight, Tensor bias) -> Tensor",
           fake=lambda x, weight, bias: _partial_fake(x, weight.shape[0]))
def linear_partial(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b: [T, H] fp32 of x [T, K], weight [H, K], bias [H]; K is the rank's part of the sum."""
    return x.float() @ weight.float().T + bias.float()


@kernel_op("moe_down_partial(Tensor h, Tensor ids, Tensor probs, Tensor weight, Tensor? scales, Tensor bias) -> Tensor",
           fake=lambda h, ids, probs, weight, scales, bias: _partial_fake(h, bias.shape[1]))
def moe_down_partial(h: Tensor, ids: Tensor, probs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor) -> Tensor:
    """sum over a of probs[a] (W[e_a] h[a] + b[e_a]): [T, H] fp32; see `moe_down`."""
    return (experts_down(h, ids, weight, scales, bias) * probs.unsqueeze(-1)).sum(1)


@kernel_op("moe_grouped_partial(Tensor x, Tensor norm_weight, Tensor ids, Tensor probs, Tensor up, Tensor? up_scales,"
           " Tensor up_bias, Tensor down, Tensor? down_scales, Tensor down_bias, float eps, float alpha, float limit)"
           " -> Tensor", fake=lambda x, *_: _partial_fake(x, x.shape[1]))
def moe_grouped_partial(x: Tensor, norm_weight: Tensor, ids: Tensor, probs: Tensor, up: Tensor, up_scales: Tensor | None,
                        up_bias: Tensor, down: Tensor, down_scales: Tensor | None, down_bias: Tensor, eps: float,
                        alpha: float, limit: float) -> Tensor:
    """`moe_grouped` without the residual: [T, H] fp32."""
    h = swiglu_twin(experts_up(rms_norm(x, norm_weight, eps), ids, up, up_scales, up_bias), alpha, limit).to(x.dtype)
    y = experts_down(h, ids, down, down_scales, down_bias).to(x.dtype)
    return (y.float() * probs.unsqueeze(-1)).sum(1)


def added(partial: Tensor, residual: Tensor) -> Tensor:
    """The residual stream behind an exchange: residual + partial, in fp32, rounded to the residual's dtype."""
    return (residual.float() + partial.float()).to(residual.dtype)


@kernel_op("reduce_norm_linear(Tensor partial, Tensor residual, Tensor norm_weight, Tensor weight, Tensor bias, float eps)"
           " -> (Tensor, Tensor)", exchange="sum",
           fake=lambda partial, residual, norm_weight, weight, bias, eps: (
               torch.empty_like(residual), residual.new_empty((residual.shape[0], weight.shape[0]))))
def reduce_norm_linear(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor,
                       eps: float) -> tuple[Tensor, Tensor]:
    """(x, norm_linear(x)) of x = residual + sum of partial: [T, H] and [T, N]. partial [T, H] fp32, residual [T, H]."""
    x = added(partial, residual)
    return x, norm_linear(x, norm_weight, weight, bias, eps)


def _route_fake(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
                top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (residual.shape[0], top_k)
    return (torch.empty_like(residual), residual.new_empty(shape, dtype=torch.float32),
            residual.new_empty(shape, dtype=torch.int32))


@kernel_op("reduce_norm_route(Tensor partial, Tensor residual, Tensor norm_weight, Tensor weight, Tensor bias, float eps,"
           " int top_k) -> (Tensor, Tensor, Tensor)", exchange="sum", fake=_route_fake)
def reduce_norm_route(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
                      top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, *norm_route(x)) of x = residual + sum of partial: [T, H], probabilities and experts [T, A]."""
    x = added(partial, residual)
    return x, *norm_route(x, norm_weight, weight, bias, eps, top_k)


def _head_fake(partial: Tensor, residual: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor,
               eps: float) -> Tensor:
    return _partial_fake(residual if rows is None else rows, weight.shape[0])


@kernel_op("reduce_norm_head(Tensor partial, Tensor residual, Tensor? rows, Tensor norm_weight, Tensor weight, float eps)"
           " -> Tensor", exchange="sum", fake=_head_fake)
def reduce_norm_head(partial: Tensor, residual: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor,
                     eps: float) -> Tensor:
    """norm_head(residual + sum of partial): the rank's columns of the logits, fp32 [R, its rows of lm_head]."""
    logits: Tensor = norm_head(added(partial, residual), rows, norm_weight, weight, eps)
    return logits
