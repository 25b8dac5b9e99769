"""advance: the end of a greedy decode step, which makes the next step's inputs on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import cdiv, is_last, jit, launch, on_gpu, pow2, tensor, total_bytes, trigger, wait
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


@kernel_op("advance(Tensor logits, Tensor tokens, Tensor positions) -> (Tensor, Tensor)",
           fake=lambda logits, tokens, positions: (torch.empty_like(tokens), torch.empty_like(positions)),
           updates={0: "tokens", 1: "positions"})
def advance(logits: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(the greatest logit's token, the lowest one on ties; positions + 1), [T] each; padding (position -1) stays.

    logits [T, V] fp32, tokens and positions [T] i32.
    """
    used = positions >= 0
    return torch.where(used, logits.argmax(-1).int(), tokens), positions + used.int()


@jit
def first_of_greatest(values: tl.tensor, indices: tl.tensor) -> tl.tensor:
    """(the greatest value, the lowest of its indices)."""
    top = tl.max(values)
    return top, tl.min(tl.where(values == top, indices, 0x7FFFFFFF))


@jit
def advance_kernel(logits_ptr: tl.tensor, tokens_ptr: tl.tensor, positions_ptr: tl.tensor, scratch0_ptr: tl.tensor,
                   scratch1_ptr: tl.tensor, scratch2_ptr: tl.tensor, V: tl.constexpr, PARTS: tl.constexpr,
                   PP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (token, part), part fastest: the greatest of its share of the token's logits; the last one compares.

    scratch0 and scratch1 [T, PARTS]: what each part found; scratch2 [T]: counters.
    """
    trigger(PDL)
    wait(PDL)
    t = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    share: tl.constexpr = ((V + PARTS - 1) // PARTS + BLOCK - 1) // BLOCK * BLOCK
    low = part * share
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = low + tl.arange(0, BLOCK)
    for start in range(low, tl.minimum(low + share, V), BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + t.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
        where = tl.where(x > best, v, where)
        best = tl.maximum(x, best)
    top, token = first_of_greatest(best, where)
    tl.store(scratch0_ptr + t * PARTS + part, top)
    tl.store(scratch1_ptr + t * PARTS + part, token)
    if is_last(scratch2_ptr + t, PARTS):
        p = tl.arange(0, PP)
        tops = tl.load(scratch0_ptr + t * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(scratch1_ptr + t * PARTS + p, mask=p < PARTS, other=0x7FFFFFFF, cache_modifier=".cg")
        _, token = first_of_greatest(tops, found)
        position = tl.load(positions_ptr + t)
        tl.store(tokens_ptr + t, token, mask=position >= 0)
        tl.store(positions_ptr + t, position + 1, mask=position >= 0)


def instantiate(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """Parts: enough programs for two on every processor."""
    tokens, vocab = tensor(operands, "logits").shape
    block = 1024
    parts = max(min(2 * target.processors // tokens, cdiv(vocab, block)), 1)
    scratch = (TensorSpec((tokens, parts), "fp32"), TensorSpec((tokens, parts), "i32"), TensorSpec((tokens,), "i32"))
    constants = {"V": vocab, "PARTS": parts, "PP": pow2(parts), "BLOCK": block}
    return (launch(advance_kernel, target, operands, constants, grid=tokens * parts, moved=total_bytes(*operands.values()),
                   scratch=scratch, zeroed=(2,)),)


SPECS = (KernelSpec("advance", "advance", on_gpu, instantiate),)
