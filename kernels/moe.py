"""moe_gate_up, moe_down: the experts of a few tokens, one (token, expert) pair at a time.

Weights are MXFP4 blocks [E, N, K/32, 16] u8 with scales [E, N, K/32] u8, or plain [E, N, K] without scales. Row 2i of
gate_up is the gate of feature i, row 2i + 1 its up. Both kernels are dot products of weight rows in registers with one
vector; nothing is worth a matrix instruction.

`moe_gate_up` triggers its dependents only behind its own wait, hence behind the router's end: `moe_down` reads the ids,
and with them its first weights, before its wait.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import (
    cdiv,
    expert_tile,
    integer,
    jit,
    launch,
    number,
    on_gpu,
    pow2,
    swiglu,
    tensor,
    total_bytes,
    touched_experts,
    trigger,
    wait,
)
from gptoss_compile.kernels.maths import experts_down, experts_up, rms_norm
from gptoss_compile.kernels.maths import swiglu as swiglu_twin
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


def _gate_up_fake(x: Tensor, norm_weight: Tensor, ids: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*ids.shape, weight.shape[1] // 2))


@kernel_op("moe_gate_up(Tensor x, Tensor norm_weight, Tensor ids, Tensor weight, Tensor? scales, Tensor bias,"
           " float eps, float alpha, float limit, int early=1) -> Tensor", fake=_gate_up_fake)
def moe_gate_up(x: Tensor, norm_weight: Tensor, ids: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
                eps: float, alpha: float, limit: float, early: int = 1) -> Tensor:
    """swiglu(W[e] rmsnorm(x) + b[e]) for the A experts of each token: [T, A, I].

    x [T, H], ids [T, A] i32, bias [E, 2I]. early: the kernel may read x before the one before it has ended, which wrote
    ids; 0 where that also wrote x.
    """
    up = experts_up(rms_norm(x, norm_weight, eps), ids, weight, scales, bias)
    return swiglu_twin(up, alpha, limit).to(x.dtype)


def _down_fake(h: Tensor, ids: Tensor, probs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
               residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


@kernel_op("moe_down(Tensor h, Tensor ids, Tensor probs, Tensor weight, Tensor? scales, Tensor bias,"
           " Tensor residual) -> Tensor", fake=_down_fake)
def moe_down(h: Tensor, ids: Tensor, probs: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
             residual: Tensor) -> Tensor:
    """residual + sum over a of probs[a] (W[e_a] h[a] + b[e_a]): [T, H].

    h [T, A, I], ids [T, A] i32, probs [T, A] fp32, bias [E, H], residual [T, H].
    """
    y = experts_down(h, ids, weight, scales, bias)
    return (residual.float() + (y * probs.unsqueeze(-1)).sum(1)).to(residual.dtype)


@jit
def moe_gate_up_kernel(x_ptr: tl.tensor, norm_weight_ptr: tl.tensor, ids_ptr: tl.tensor, weight_ptr: tl.tensor,
                       scales_ptr: tl.tensor, bias_ptr: tl.tensor, out0_ptr: tl.tensor, I: tl.constexpr,
                       H: tl.constexpr, TOP_K: tl.constexpr, EPS: tl.constexpr, ALPHA: tl.constexpr,
                       LIMIT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, HP: tl.constexpr,
                       EARLY: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (pair, part), part fastest: features part·ROWS … of one (token, expert) pair."""
    parts: tl.constexpr = (I + ROWS - 1) // ROWS
    pair = tl.program_id(0) // parts
    i = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    line = x_ptr + pair // TOP_K * H
    every = tl.arange(0, HP)
    if not EARLY:
        wait(PDL)
    whole = tl.load(line + every, mask=every < H, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(whole * whole) / H + EPS)
    if EARLY:
        wait(PDL)
    trigger(PDL)
    expert = tl.load(ids_ptr + pair)
    gates = tl.zeros((ROWS, BK), tl.float32)
    ups = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(line + k, mask=k < H, other=0.0).to(tl.float32)
        x *= tl.load(norm_weight_ptr + k, mask=k < H, other=0.0).to(tl.float32)
        gates += expert_tile(weight_ptr, scales_ptr, expert, 2 * i, start, 2 * I, H, BK, tl.float32) * x[None, :]
        ups += expert_tile(weight_ptr, scales_ptr, expert, 2 * i + 1, start, 2 * I, H, BK, tl.float32) * x[None, :]
    bias = bias_ptr + expert * 2 * I + 2 * i
    gate = tl.sum(gates, 1) * factor + tl.load(bias, mask=i < I, other=0.0).to(tl.float32)
    up = tl.sum(ups, 1) * factor + tl.load(bias + 1, mask=i < I, other=0.0).to(tl.float32)
    h = swiglu(gate, up, ALPHA, LIMIT)
    tl.store(out0_ptr + pair * I + i, h.to(out0_ptr.dtype.element_ty), mask=i < I)


@jit
def moe_down_kernel(h_ptr: tl.tensor, ids_ptr: tl.tensor, probs_ptr: tl.tensor, weight_ptr: tl.tensor,
                    scales_ptr: tl.tensor, bias_ptr: tl.tensor, residual_ptr: tl.tensor, out0_ptr: tl.tensor,
                    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
                    PDL: tl.constexpr) -> tl.tensor:
    """Program (token, part), part fastest: features part·ROWS … of one token, over all its experts in order."""
    trigger(PDL)
    parts: tl.constexpr = (H + ROWS - 1) // ROWS
    t = tl.program_id(0) // parts
    n = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    expert = tl.load(ids_ptr + t * TOP_K)
    first = expert_tile(weight_ptr, scales_ptr, expert, n, 0, H, I, BK, tl.float32)
    wait(PDL)
    k = tl.arange(0, BK)
    h = tl.load(h_ptr + t * TOP_K * I + k, mask=k < I, other=0.0).to(tl.float32)
    acc = first * (h * tl.load(probs_ptr + t * TOP_K))[None, :]
    y = tl.zeros((ROWS,), tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + t * H + n, mask=n < H, other=0.0).to(tl.float32)
    for a in tl.static_range(TOP_K):
        pair = t * TOP_K + a
        expert = tl.load(ids_ptr + pair)
        prob = tl.load(probs_ptr + pair)
        for start in range(BK if a == 0 else 0, I, BK):
            k = start + tl.arange(0, BK)
            h = tl.load(h_ptr + pair * I + k, mask=k < I, other=0.0).to(tl.float32) * prob
            acc += expert_tile(weight_ptr, scales_ptr, expert, n, start, H, I, BK, tl.float32) * h[None, :]
        y += tl.load(bias_ptr + expert * H + n, mask=n < H, other=0.0).to(tl.float32) * prob
    y += tl.sum(acc, 1)
    tl.store(out0_ptr + t * H + n, y.to(out0_ptr.dtype.element_ty), mask=n < H)


def expert_bytes(operands: Mapping[str, Operand], pairs: int) -> int:
    """Bytes of the weights, scales and biases that `pairs` random choices of experts touch."""
    experts = tensor(operands, "weight").shape[0]
    every = total_bytes(operands["weight"], operands["scales"], operands["bias"])
    return round(every * touched_experts(experts, pairs) / experts)


def gate_up_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    x, (tokens, top_k) = tensor(operands, "x"), tensor(operands, "ids").shape
    hidden, inner = x.shape[1], tensor(operands, "weight").shape[1] // 2
    out = TensorSpec((tokens, top_k, inner), x.dtype)
    rows, early = 8, integer(operands, "early")
    constants = {"EARLY": early, "I": inner, "H": hidden, "TOP_K": top_k, "EPS": number(operands, "eps"), "ROWS": rows,
                 "BK": 256, "ALPHA": number(operands, "alpha"), "LIMIT": number(operands, "limit"), "HP": pow2(hidden)}
    pairs = tokens * top_k
    return (launch(moe_gate_up_kernel, target, {**operands, "out0": out}, constants, grid=pairs * cdiv(inner, rows),
                   moved=x.bytes + out.bytes + expert_bytes(operands, pairs), flops=4 * pairs * inner * hidden,
                   preloads=("x",) if early else (), late_trigger=True),)


def down_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """moe_down, or without a residual moe_down_partial.

    Few rows and deep tiles: with one token it is programs and bytes in flight that are short.
    """
    (tokens, top_k, inner), hidden = tensor(operands, "h").shape, tensor(operands, "bias").shape[1]
    residual = operands.get("residual")
    out = residual if isinstance(residual, TensorSpec) else TensorSpec((tokens, hidden), "fp32")
    rows, depth = (4, 1024) if isinstance(operands["scales"], TensorSpec) else (8, 256)
    constants = {"H": hidden, "I": inner, "TOP_K": top_k, "ROWS": rows, "BK": depth}
    pairs = tokens * top_k
    return (launch(moe_down_kernel, target, {**operands, "out0": out}, constants, grid=tokens * cdiv(hidden, rows),
                   moved=total_bytes(operands["h"], out, residual) + expert_bytes(operands, pairs),
                   flops=2 * pairs * inner * hidden, preloads=("ids", "weight", "scales")),)


SPECS = (
    KernelSpec("moe_gate_up", "moe_gate_up", on_gpu, gate_up_launch),
    KernelSpec("moe_down", "moe_down", on_gpu, down_launch),
)
