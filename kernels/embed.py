"""embed: rows of the embedding table."""

from __future__ import annotations

from collections.abc import Mapping

import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import cdiv, jit, launch, on_gpu, pow2, tensor, total_bytes, trigger, wait
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


@kernel_op("embed(Tensor tokens, Tensor weight) -> Tensor",
           fake=lambda tokens, weight: weight.new_empty((tokens.shape[0], weight.shape[1])))
def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """weight[tokens]: [T, H] of tokens [T] i32 and weight [V, H]."""
    return weight[tokens.long()]


@jit
def embed_kernel(tokens_ptr: tl.tensor, weight_ptr: tl.tensor, out0_ptr: tl.tensor, H: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (t, j) copies columns j·BLOCK … of token t's row."""
    trigger(PDL)
    parts: tl.constexpr = (H + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // parts
    h = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + t)
    row = tl.load(weight_ptr + token.to(tl.int64) * H + h, mask=h < H)
    wait(PDL)  # nothing read depends on a kernel, but what is overwritten may still be in use
    tl.store(out0_ptr + t * H + h, row, mask=h < H)


def instantiate(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    tokens, weight = tensor(operands, "tokens"), tensor(operands, "weight")
    count, hidden = tokens.shape[0], weight.shape[1]
    out = TensorSpec((count, hidden), weight.dtype)
    block = min(pow2(hidden), 1024)
    return (launch(embed_kernel, target, {**operands, "out0": out}, {"H": hidden, "BLOCK": block},
                   grid=count * cdiv(hidden, block), moved=2 * out.bytes + total_bytes(tokens),
                   preloads=("tokens", "weight")),)


SPECS = (KernelSpec("embed", "embed", on_gpu, instantiate),)
