"""What stands around the graph of a served step: `feed` gives it the tokens that the step before chose, `sample` chooses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile import gumbel
from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import cdiv, is_last, jit, launch, on_gpu, pow2, tensor, total_bytes, trigger, wait
from gptoss_compile.kernels.generate import mix
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target


@kernel_op("feed(Tensor tokens, Tensor source, Tensor sampled) -> Tensor",
           fake=lambda tokens, source, sampled: torch.empty_like(tokens), updates={0: "tokens"})
def feed(tokens: Tensor, source: Tensor, sampled: Tensor) -> Tensor:
    """`tokens` [T], with sampled[source] where source [T] is not negative. i32; where there was no token, 0 stands in."""
    return torch.where(source >= 0, sampled[source.clamp(min=0).long()].clamp(min=0), tokens)


@jit
def feed_kernel(tokens_ptr: tl.tensor, source_ptr: tl.tensor, sampled_ptr: tl.tensor, T: tl.constexpr, BLOCK: tl.constexpr,
                PDL: tl.constexpr) -> tl.tensor:
    """Program i: a block of tokens."""
    trigger(PDL)
    wait(PDL)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + t, mask=t < T, other=-1)
    token = tl.load(sampled_ptr + source, mask=source >= 0)
    tl.store(tokens_ptr + t, tl.maximum(token, 0), mask=source >= 0)


@kernel_op("sample(Tensor logits, Tensor words, Tensor sampled) -> Tensor",
           fake=lambda logits, words, sampled: torch.empty_like(sampled), updates={0: "sampled"})
def sample(logits: Tensor, words: Tensor, sampled: Tensor) -> Tensor:
    """`sampled`, i32, with its first R values the tokens that gptoss_compile/gumbel.py chooses.

    logits [R, V] fp32, words [R, 5] i32.
    """
    chosen = torch.from_numpy(gumbel.choose(logits.numpy(), words.numpy()))
    return torch.cat((chosen, sampled[len(chosen):]))


@jit
def noise(ids: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """gumbel.noise of ids, which must not be negative."""
    word = mix(mix(ids.to(tl.uint32, bitcast=True) ^ key0) + key1)
    v = tl.minimum(word.to(tl.float32) * (1.0 / 4294967296.0) + 0.5 / 4294967296.0, 1.0 - 1.0 / 16777216.0)
    near = v * (1.0 + v * (0.5 + v * (1.0 / 3.0)))
    return -tl.log(tl.where(v < 0.015625, near, -tl.log(1.0 - v)))


@jit
def first_of_greatest(values: tl.tensor, indices: tl.tensor) -> tl.tensor:
    """(the greatest value, the lowest of its indices)."""
    top = tl.max(values)
    return top, tl.min(tl.where(values == top, indices, 0x7FFFFFFF))


@jit
def sample_kernel(logits_ptr: tl.tensor, words_ptr: tl.tensor, sampled_ptr: tl.tensor, scratch0_ptr: tl.tensor,
                  scratch1_ptr: tl.tensor, scratch2_ptr: tl.tensor, V: tl.constexpr, FIELDS: tl.constexpr,
                  PARTS: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program (row, part), part fastest: the greatest of its share of the row's values; the last one compares.

    NaN counts as infinity, and neither is chosen. scratch0 and scratch1 [R, PARTS]: what each part found; scratch2 [R]:
    counters.
    """
    trigger(PDL)
    wait(PDL)
    r = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    row = words_ptr + r * FIELDS
    temperature = tl.load(row).to(tl.float32, bitcast=True)
    if temperature >= 0:
        limit = tl.minimum(tl.load(row + 1), V)
        counter = tl.load(row + 4).to(tl.uint32, bitcast=True)
        key0 = mix(tl.load(row + 2).to(tl.uint32, bitcast=True) + mix(counter))
        key1 = mix(tl.load(row + 3).to(tl.uint32, bitcast=True) ^ key0)
        share: tl.constexpr = ((V + PARTS - 1) // PARTS + BLOCK - 1) // BLOCK * BLOCK
        low = part * share
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = low + tl.arange(0, BLOCK)
        for start in range(low, tl.minimum(low + share, limit), BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + r.to(tl.int64) * V + v, mask=v < limit, other=float("-inf"))
            if temperature > 0:
                x += temperature * noise(v, key0, key1)
            x = tl.where(x == x, x, float("inf"))
            where = tl.where(x > best, v, where)
            best = tl.maximum(x, best)
        top, token = first_of_greatest(best, where)
        tl.store(scratch0_ptr + r * PARTS + part, top)
        tl.store(scratch1_ptr + r * PARTS + part, token)
        if is_last(scratch2_ptr + r, PARTS):
            p = tl.arange(0, PP)
            tops = tl.load(scratch0_ptr + r * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
            found = tl.load(scratch1_ptr + r * PARTS + p, mask=p < PARTS, other=0x7FFFFFFF, cache_modifier=".cg")
            top, token = first_of_greatest(tops, found)
            tl.store(sampled_ptr + r, tl.where(tl.abs(top) < float("inf"), token, -1))
    elif part == 0:
        tl.store(sampled_ptr + r, -1)


def instantiate_feed(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    (count,) = tensor(operands, "tokens").shape
    block = min(pow2(count), 1024)
    return (launch(feed_kernel, target, operands, {"T": count, "BLOCK": block}, grid=cdiv(count, block),
                   moved=total_bytes(operands["tokens"], operands["source"])),)


def instantiate_sample(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """Parts: enough programs for eight on every processor, as each waits for what it loads."""
    rows, vocab = tensor(operands, "logits").shape
    block = 1024
    parts = max(min(8 * target.processors // rows, cdiv(vocab, block)), 1)
    scratch = (TensorSpec((rows, parts), "fp32"), TensorSpec((rows, parts), "i32"), TensorSpec((rows,), "i32"))
    constants = {"V": vocab, "FIELDS": gumbel.FIELDS, "PARTS": parts, "PP": pow2(parts), "BLOCK": block}
    return (launch(sample_kernel, target, operands, constants, grid=rows * parts, scratch=scratch, zeroed=(2,),
                   moved=total_bytes(operands["logits"], operands["words"])),)


SPECS = (KernelSpec("feed", "feed", on_gpu, instantiate_feed), KernelSpec("sample", "sample", on_gpu, instantiate_sample))
