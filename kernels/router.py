"""norm_route: RMSNorm, the router's logits, top-k and the softmax over those k."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import rms_norm


def _route_fake(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
                top_k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@kernel_op("norm_route(Tensor x, Tensor norm_weight, Tensor weight, Tensor bias, float eps, int top_k)"
           " -> (Tensor, Tensor)", fake=_route_fake)
def norm_route(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, eps: float,
               top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities [T, A] fp32 and experts [T, A] i32, best first, the lowest id first on ties.

    x [T, H], weight [E, H], bias [E]. The softmax runs over the A chosen logits.
    """
    logits = rms_norm(x, norm_weight, eps) @ weight.float().T + bias.float()
    best, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return best[:, :top_k].softmax(-1), ids[:, :top_k].int()
