"""random_weights: the values of gptoss_compile/random_weights.py, made where they are needed, bit for bit.

One launch fills one part of a weight. What differs from part to part comes from memory, so that one binary serves all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

from gptoss_compile.dialect import kernel_op
from gptoss_compile.kernels.common import jit, launch, on_gpu, tensor, trigger, wait
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand
from gptoss_compile.random_weights import BYTES
from gptoss_compile.target import Target

_WORD = 0xFFFFFFFF
_FIELDS = 7  # of `parameters`: key 0, key 1, counters, first word, mode, a, b


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 of 32-bit words held in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


@kernel_op("random_weights(Tensor parameters, Tensor out) -> Tensor",
           fake=lambda parameters, out: torch.empty_like(out), updates={0: "out"})
def random_weights(parameters: Tensor, out: Tensor) -> Tensor:
    """`out`, 32-bit words, with some of them random. parameters: see `random_weights.DeviceParameters`, i32 [8].

    Word c of the generator (c < counters) becomes word `first + c` of out: four bytes (each & a) + b in mode `bytes`;
    in mode `bf16` two bf16 (half + a) · b, low half first; in mode `fp32` words `first + 2c` and + 1, the same widened.
    """
    counters, first = parameters.tolist()[2:4]
    made = generated(parameters, 0, counters)
    result = out.clone()
    result[first : first + len(made)] = made
    return result


def generated(parameters: Tensor, start: int, stop: int) -> Tensor:
    """What words start … stop of the generator become, i32, on the parameters' device."""
    key0, key1, _, _, mode, a, b = parameters.tolist()[:_FIELDS]
    counters = torch.arange(start, stop, device=parameters.device)
    words = _mixed((_mixed(counters ^ (key0 & _WORD)) + (key1 & _WORD)) & _WORD)
    if mode == BYTES:
        masked: Tensor = (words & (a & _WORD)) + (b & _WORD)
        return masked.int()
    halves = torch.stack((words << 48 >> 48, words << 32 >> 48), -1).reshape(-1)
    values = (halves + a).float() * torch.tensor([b], dtype=torch.int32, device=words.device).view(torch.float32)
    rounded: Tensor = values.bfloat16()
    return (rounded if mode == 1 else rounded.float()).view(torch.int32)


@jit
def mix(x: tl.tensor) -> tl.tensor:
    """lowbias32 of unsigned words."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@jit
def bf16_bits(half: tl.tensor, offset: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The bits, in 32-bit words, of (half + offset) · scale rounded to bf16."""
    bits = ((half + offset).to(tl.float32) * scale).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@jit
def random_weights_kernel(parameters_ptr: tl.tensor, out_ptr: tl.tensor, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
                          PDL: tl.constexpr) -> tl.tensor:
    """Program i: blocks i, i + PROGRAMS, … of the generator's words."""
    trigger(PDL)
    wait(PDL)
    key0 = tl.load(parameters_ptr).to(tl.uint32, bitcast=True)
    key1 = tl.load(parameters_ptr + 1).to(tl.uint32, bitcast=True)
    counters = tl.load(parameters_ptr + 2)
    out = out_ptr + tl.load(parameters_ptr + 3)
    mode = tl.load(parameters_ptr + 4)
    a = tl.load(parameters_ptr + 5)
    b = tl.load(parameters_ptr + 6)
    scale = b.to(tl.float32, bitcast=True)
    for start in range(tl.program_id(0) * BLOCK, counters, PROGRAMS * BLOCK):
        c = start + tl.arange(0, BLOCK)
        word = mix(mix(c.to(tl.uint32, bitcast=True) ^ key0) + key1).to(tl.int32, bitcast=True)
        if mode == 0:
            tl.store(out + c, (word & a) + b, mask=c < counters)
        else:
            low = bf16_bits((word << 16) >> 16, a, scale)
            high = bf16_bits(word >> 16, a, scale)
            if mode == 1:
                tl.store(out + c, low | (high << 16), mask=c < counters)
            else:
                tl.store(out + 2 * c, low << 16, mask=c < counters)
                tl.store(out + 2 * c + 1, high << 16, mask=c < counters)


def instantiate(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """One grid for parts of any size: what fills the GPU."""
    programs = 8 * target.processors
    return (launch(random_weights_kernel, target, operands, {"PROGRAMS": programs, "BLOCK": 1024}, grid=programs,
                   moved=tensor(operands, "out").bytes),)


SPECS = (KernelSpec("random_weights", "random_weights", on_gpu, instantiate),)
