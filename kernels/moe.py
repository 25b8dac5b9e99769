"""moe_gate_up, moe_down: the experts of a few tokens, one (token, expert) pair at a time.

Weights are MXFP4 blocks [E, N, K/32, 16] u8 with scales [E, N, K/32] u8, or plain [E, N, K] without scales. Row 2i of
gate_up is the gate of feature i, row 2i + 1 its up.
"""

from __future__ import annotations

from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.maths import experts_down, experts_up, rms_norm, swiglu


def _gate_up_fake(x: Tensor, norm_weight: Tensor, ids: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*ids.shape, weight.shape[1] // 2))


@kernel_op("moe_gate_up(Tensor x, Tensor norm_weight, Tensor ids, Tensor weight, Tensor? scales, Tensor bias,"
           " float eps, float alpha, float limit) -> Tensor", fake=_gate_up_fake)
def moe_gate_up(x: Tensor, norm_weight: Tensor, ids: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
                eps: float, alpha: float, limit: float) -> Tensor:
    """swiglu(W[e] rmsnorm(x) + b[e]) for the A experts of each token: [T, A, I].

    x [T, H], ids [T, A] i32, bias [E, 2I].
    """
    up = experts_up(rms_norm(x, norm_weight, eps), ids, weight, scales, bias)
    return swiglu(up, alpha, limit).to(x.dtype)


@kernel_op("moe_down(Tensor h, Tensor ids, Tensor probs, Tensor weight, Tensor? scales, Tensor bias, Tensor residual)"
           " -> Tensor", fake=lambda h, ids, probs, weight, scales, bias, residual: residual.new_empty(residual.shape))
def moe_down(h: Tensor, ids: Tensor, probs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
             residual: Tensor) -> Tensor:
    """residual + sum over a of probs[a] (W[e_a] h[a] + b[e_a]): [T, H].

    h [T, A, I], ids [T, A] i32, probs [T, A] fp32, bias [E, H], residual [T, H].
    """
    y = experts_down(h, ids, weight, scales, bias)
    return (residual.float() + (y * probs.unsqueeze(-1)).sum(1)).to(residual.dtype)
