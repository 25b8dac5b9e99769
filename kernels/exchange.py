"""The kernels of a step that several ranks run together, and where they exchange.

Producers leave partial sums. Consumers begin with the sum of the ranks' partials, added in fp32 and in rank order, so that
all ranks hold the same bits; they add the residual, normalise and go on as their one-rank namesakes do, which is their
reference:

    linear_partial   moe_down_partial   moe_grouped_partial      then    reduce_norm_linear   reduce_norm_route
                                                                         reduce_norm_head

No kernel stands between a producer and its consumer. gptoss::all_gather puts the logits together, of which rank r has the
columns [ceil(V r / ranks), ceil(V (r + 1) / ranks)). The kernels are in `kernels.sm90.exchange`.

On GPUs every rank has an *exchange area*: memory of one layout, which all ranks read and write. It begins with a header of
HEADER_BYTES, which a launch gets under the name `exchange`; a consumer's launches get FLAGS_BYTES of their step's own under
the name `flags`. Up to FEW_TOKENS tokens a partial sum is fp32 and its producer pushes it to all ranks, into "slots"; above,
it has the model's dtype. Up to ONE_SHOT_TOKENS the consumer pulls it, all of it on every rank; else each rank adds its share
of the rows, t with t % ranks == rank, which producers push to it, into "shares", and then gives the sums to all. The planner
places what peers touch there (see `gptoss_compile.exchange_area`).

The header: u64 base[8], every rank's area as this rank sees it; u32 step, 1 in the first step and then counted by
all_gather; u32 rank, ranks, and limit_ms, how long a kernel waits for a rank; u64 report, the address of a u32 on the host,
where it then leaves 1 + that rank. Kernels that find the report written wait for nobody any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import experts_down, experts_up, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.norm_linear import norm_head, norm_linear
from gptoss_compile.kernels.router import norm_route
from gptoss_compile.launch_plan import FLAGS_BYTES, HEADER_BYTES

__all__ = ["FEW_TOKENS", "FLAGS_BYTES", "HEADER_BYTES", "ONE_SHOT_TOKENS", "OPERATORS", "added", "partial_dtype"]

FEW_TOKENS = 4  # up to here partial sums are pushed to all ranks
ONE_SHOT_TOKENS = 64  # up to here every rank adds all rows
OPERATORS = ("linear_partial", "moe_down_partial", "moe_grouped_partial", "reduce_norm_linear", "reduce_norm_route",
             "reduce_norm_head", "all_gather")


def partial_dtype(x: Tensor) -> torch.dtype:
    """Of a partial sum whose producer reads x [T, ...]."""
    return torch.float32 if x.shape[0] <= FEW_TOKENS else x.dtype


def _partial_fake(x: Tensor, outputs: int) -> Tensor:
    return x.new_empty((x.shape[0], outputs), dtype=partial_dtype(x))


@kernel_op("linear_partial(Tensor x, Tensor weight, Tensor bias) -> Tensor",
           fake=lambda x, weight, bias: _partial_fake(x, weight.shape[0]))
def linear_partial(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b: [T, H] of x [T, K], weight [H, K], bias [H]; K is the rank's part of the sum. See `partial_dtype`."""
    return (x.float() @ weight.float().T + bias.float()).to(partial_dtype(x))


@kernel_op("moe_down_partial(Tensor h, Tensor ids, Tensor probs, Tensor weight, Tensor? scales, Tensor bias) -> Tensor",
           fake=lambda h, ids, probs, weight, scales, bias: _partial_fake(h, bias.shape[1]))
def moe_down_partial(h: Tensor, ids: Tensor, probs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor) -> Tensor:
    """sum over a of probs[a] (W[e_a] h[a] + b[e_a]): [T, H]; see `moe_down` and `partial_dtype`."""
    return (experts_down(h, ids, weight, scales, bias) * probs.unsqueeze(-1)).sum(1).to(partial_dtype(h))


@kernel_op("moe_grouped_partial(Tensor x, Tensor norm_weight, Tensor ids, Tensor probs, Tensor up, Tensor? up_scales,"
           " Tensor up_bias, Tensor down, Tensor? down_scales, Tensor down_bias, float eps, float alpha, float limit)"
           " -> Tensor", fake=lambda x, *_: _partial_fake(x, x.shape[1]))
def moe_grouped_partial(x: Tensor, norm_weight: Tensor, ids: Tensor, probs: Tensor, up: Tensor, up_scales: Tensor | None,
                        up_bias: Tensor, down: Tensor, down_scales: Tensor | None, down_bias: Tensor, eps: float,
                        alpha: float, limit: float) -> Tensor:
    """`moe_grouped` without the residual: [T, H]; see `partial_dtype`."""
    h = swiglu_twin(experts_up(rms_norm(x, norm_weight, eps), ids, up, up_scales, up_bias), alpha, limit).to(x.dtype)
    y = experts_down(h, ids, down, down_scales, down_bias).to(x.dtype)
    return (y.float() * probs.unsqueeze(-1)).sum(1).to(partial_dtype(x))


def added(partial: Tensor, residual: Tensor) -> Tensor:
    """The residual stream behind an exchange: residual + partial, in fp32, rounded once, to the residual's dtype."""
    return (residual.float() + partial.float()).to(residual.dtype)


@kernel_op("reduce_norm_linear(Tensor partial, Tensor residual, Tensor norm_weight, Tensor weight, Tensor bias, float eps)"
           " -> (Tensor, Tensor)", exchange="sum",
           fake=lambda partial, residual, norm_weight, weight, bias, eps: (
               torch.empty_like(residual), residual.new_empty((residual.shape[0], weight.shape[0]))))
def reduce_norm_linear(partial: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor,
                       eps: float) -> tuple[Tensor, Tensor]:
    """(x, norm_linear(x)) of x = residual + sum of partial: [T, H] and [T, N]. partial and residual [T, H]."""
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
    return residual.new_empty(((residual if rows is None else rows).shape[0], weight.shape[0]), dtype=torch.float32)


@kernel_op("reduce_norm_head(Tensor partial, Tensor residual, Tensor? rows, Tensor norm_weight, Tensor weight, float eps)"
           " -> Tensor", exchange="sum", fake=_head_fake)
def reduce_norm_head(partial: Tensor, residual: Tensor, rows: Tensor | None, norm_weight: Tensor, weight: Tensor,
                     eps: float) -> Tensor:
    """norm_head(residual + sum of partial): the rank's columns of the logits, fp32 [R, its rows of lm_head]."""
    logits: Tensor = norm_head(added(partial, residual), rows, norm_weight, weight, eps)
    return logits
