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
from gptoss_compile.random_weights import BF16, BYTES
from gptoss_compile.target import Target

_WORD = 0xFFFFFFFF
_FIELDS = 11  # of `parameters`: key 0, key 1, counters, first word, mode, a, b, width, stride, offset, single


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 of 32-bit words held in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


@kernel_op("random_weights(Tensor parameters, Tensor out) -> Tensor",
           fake=lambda parameters, out: torch.empty_like(out), updates={0: "out"})
def random_weights(parameters: Tensor, out: Tensor) -> Tensor:
    """`out`, 32-bit words, with some of them random. parameters: see `random_weights.DeviceParameters`, i32 [12].

    Word c of the generator (c < counters) becomes word `first + c` of out: four bytes (each & a) + b in mode `bytes`;
    in mode `bf16` two bf16 (half + a) · b, low half first; in mode `fp32` words `first + 2c` and + 1, the same widened.
    Where the weight is a part of a tensor, word c of out is made of word `offset + c // width · stride + c % width`; or, if
    it is `single`, so is each value, counted as c is.
    """
    counters, first = parameters.tolist()[2:4]
    made = generated(parameters, 0, counters)
    result = out.clone()
    result[first : first + len(made)] = made
    return result


def generated(parameters: Tensor, start: int, stop: int) -> Tensor:
    """What `start` … `stop` of the words that are wanted become, i32, on the parameters' device."""
    key0, key1, _, _, mode, a, b, width, stride, offset, single = parameters.tolist()[:_FIELDS]

    def word(counters: Tensor) -> Tensor:
        return _mixed((_mixed(counters ^ (key0 & _WORD)) + (key1 & _WORD)) & _WORD)

    per_word = 4 if mode == BYTES else 2
    bits = 32 // per_word
    units = torch.arange(start, stop, device=parameters.device)
    if single:
        units = torch.arange(start * per_word, stop * per_word, device=parameters.device)
    if width:
        units = units // width * stride + offset + units % width
    if mode == BYTES and not single:
        masked: Tensor = (word(units) & (a & _WORD)) + (b & _WORD)
        return masked.int()
    if single:
        values = word(units // per_word) >> units % per_word * bits & (1 << bits) - 1
    else:
        values = torch.stack([word(units) >> lane * bits & (1 << bits) - 1 for lane in range(per_word)], -1).reshape(-1)
    if mode == BYTES:
        bytes_: Tensor = ((values & a & 0xFF) + (b & 0xFF)).to(torch.uint8)
        return bytes_.view(torch.int32)
    scale = torch.tensor([b], dtype=torch.int32, device=values.device).view(torch.float32)
    rounded: Tensor = (((values ^ 0x8000) - 0x8000 + a).float() * scale).bfloat16()
    return (rounded if mode == BF16 else rounded.float()).view(torch.int32)


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
def place_in(units: tl.tensor, width: tl.tensor, stride: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """Where in the whole tensor the units of a part are."""
    return units // width * stride + offset + units % width


@jit
def single(units: tl.tensor, key0: tl.tensor, key1: tl.tensor, PER_WORD: tl.constexpr) -> tl.tensor:
    """Values of the generator, counted one by one, each in the low bits of a word."""
    word = mix(mix((units // PER_WORD).to(tl.uint32, bitcast=True) ^ key0) + key1).to(tl.int32, bitcast=True)
    return word >> (units % PER_WORD * (32 // PER_WORD))


@jit
def random_weights_kernel(parameters_ptr: tl.tensor, out_ptr: tl.tensor, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
                          PDL: tl.constexpr) -> tl.tensor:
    """Program i: blocks i, i + PROGRAMS, … of the words that are wanted."""
    trigger(PDL)
    wait(PDL)
    key0 = tl.load(parameters_ptr).to(tl.uint32, bitcast=True)
    key1 = tl.load(parameters_ptr + 1).to(tl.uint32, bitcast=True)
    counters = tl.load(parameters_ptr + 2)
    out = out_ptr + tl.load(parameters_ptr + 3)
    mode = tl.load(parameters_ptr + 4)
    a = tl.load(parameters_ptr + 5)
    b = tl.load(parameters_ptr + 6)
    width = tl.load(parameters_ptr + 7)
    stride = tl.load(parameters_ptr + 8)
    offset = tl.load(parameters_ptr + 9)
    one_by_one = tl.load(parameters_ptr + 10)
    scale = b.to(tl.float32, bitcast=True)
    for start in range(tl.program_id(0) * BLOCK, counters, PROGRAMS * BLOCK):
        c = start + tl.arange(0, BLOCK)
        if one_by_one != 0:
            if mode == 0:
                word = tl.zeros((BLOCK,), tl.int32)
                for lane in tl.static_range(4):
                    byte = single(place_in(4 * c + lane, width, stride, offset), key0, key1, 4) & 0xFF
                    word = word | (byte << (8 * lane))
            else:
                low = single(place_in(2 * c, width, stride, offset), key0, key1, 2) & 0xFFFF
                high = single(place_in(2 * c + 1, width, stride, offset), key0, key1, 2)
                word = low | (high << 16)
        else:
            source = c
            if width != 0:
                source = place_in(c, width, stride, offset)
            word = mix(mix(source.to(tl.uint32, bitcast=True) ^ key0) + key1).to(tl.int32, bitcast=True)
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
