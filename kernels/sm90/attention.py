"""Attention with sinks on Hopper: attention_decode.cu for decode steps, attention_extend.cu for prompts and mixed chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from gptoss_compile.kernels.common import cdiv, cuda_launch, integer, number, tensor
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.kernels.tuned import choose
from gptoss_compile.target import Target

DIM, GROUP = 64, 8  # of a head; query heads a kv head, at most
KEYS = 16  # a block of keys, which a warp takes at once; it never straddles a page
FEW_BLOCKS = 9  # of keys, which one thread block takes at once: a window of 128
MAX_SPLIT = 32  # blocks that share a pair: a warp puts them together, a lane for each
REGISTERS = 65536  # of a processor
SEGMENTS = {24: (160, 32), 16: (232, 40)}  # registers of threads that compute and of those that copy, by length
STAGES = 6  # blocks of keys or values that are on their way to a thread block or in it
MAX_TOKENS = 8192


def _supports(target: Target, operands: Mapping[str, Operand], heads: int) -> bool:
    """Heads of 64 dims in bf16, at most eight query heads a kv head, pages of whole blocks of keys."""
    _, _, kv_heads, page, dim = tensor(operands, "cache").shape
    return (target.name == "sm90" and tensor(operands, "cache").dtype == "bf16" and dim == DIM and heads % kv_heads == 0
            and heads // kv_heads <= GROUP and page % KEYS == 0)


def _heads(operands: Mapping[str, Operand]) -> int:
    _, _, kv_heads, _, dim = tensor(operands, "cache").shape
    return tensor(operands, "qkv").shape[1] // dim - 2 * kv_heads


def _constants(operands: Mapping[str, Operand], heads: int) -> dict[str, int | float | str]:
    """REACH: how many positions, the query's own included, a query may see."""
    _, _, kv_heads, page, _ = tensor(operands, "cache").shape
    entries, window = tensor(operands, "table").shape[1], integer(operands, "window")
    reach = min(window, entries * page) if window else entries * page
    return {"Q": heads, "KV": kv_heads, "PAGE": page, "P": entries, "REACH": reach, "SCALE": number(operands, "scale")}


@dataclass(frozen=True)
class Split:
    """How a (token, kv head)'s keys are shared: among thread blocks; warps of a block; blocks of keys that a warp has in
    flight; thread blocks that a processor must hold."""

    split: int
    warps: int
    depth: int
    resident: int


def split_of(target: Target, pairs: int, blocks: int) -> Split:
    """For pairs of a token and a kv head with up to so many blocks of keys.

    A short window is one thread block's, a warp for each of its up to nine blocks of keys, or, where there are many tokens,
    for three. Else several share a pair, as many as can be without more than two for each processor: small ones start
    beside those of the kernel before, for which one large block would have to wait.
    """
    if blocks <= FEW_BLOCKS:
        return Split(1, blocks, 1, 2) if pairs <= target.processors else Split(1, cdiv(blocks, 3), 3, 4)
    split = 1
    while split < MAX_SPLIT and split * pairs <= target.processors:
        split *= 2
    return Split(split, 8, 2, 2)


def splits(target: Target, pairs: int, blocks: int) -> Iterator[Split]:
    """Those worth measuring: no warp without keys, as many thread blocks on a processor as their registers allow, splits
    that leave neither most processors idle, if larger ones do not, nor thread blocks waiting."""
    for split, depth in product((1, 2, 4, 8, 16, 32), (1, 2, 3, 4)):
        few = {cdiv(blocks, n) for n in (1, 2, 3)} if blocks <= FEW_BLOCKS else {4, 8, 16}
        for warps in sorted(few):
            resident = REGISTERS // (32 * warps * (64 + 32 * depth))  # of a thread: 32 for each block of keys
            idle = split < MAX_SPLIT and 4 * split * pairs < target.processors and 2 * split * warps <= blocks
            waiting = split > 1 and split * pairs > resident * target.processors
            if split * warps <= blocks and resident and not idle and not waiting:
                yield Split(split, warps, depth, resident)


def decode_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """One launch for all pairs; blocks that share one meet in slots. Cost: the least, a context of one key."""
    qkv, heads = tensor(operands, "qkv"), _heads(operands)
    constants = _constants(operands, heads)
    tokens, kv_heads = qkv.shape[0], tensor(operands, "cache").shape[2]
    pairs, blocks = tokens * kv_heads, cdiv(int(constants["REACH"]) - 1, KEYS) + 1  # the range need not start with a block
    key = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "window": integer(operands, "window")}
    chosen = choose(target, "attention_decode", key, split_of(target, pairs, blocks), splits(target, pairs, blocks))
    constants |= {"SPLIT": chosen.split, "WARPS": chosen.warps, "DEPTH": chosen.depth, "MIN_BLOCKS": chosen.resident}
    out = TensorSpec((tokens, heads * DIM), qkv.dtype)
    slots = (TensorSpec((pairs, GROUP, chosen.split, DIM + 2), "fp32"),) if chosen.split > 1 else ()
    return (cuda_launch(
        "attention_decode.cu", "attention_decode", constants,
        ("qkv", "cos_sin", "cache", "table", "sequences", "positions", "sinks", "out0", *(("scratch0",) if slots else ())),
        grid=pairs * chosen.split, threads=32 * chosen.warps, scratch=slots, zeroed=tuple(range(len(slots))),
        moved=qkv.bytes + out.bytes, flops=4 * tokens * heads * DIM,
        preloads=("cache", "table", "sequences", "positions", "sinks")),)


def _extends(target: Target, operands: Mapping[str, Operand]) -> bool:
    """Eight query heads a kv head, which fill the tiles; steps whose segments' starts fit in shared memory."""
    (tokens, heads, _), kv_heads = tensor(operands, "q").shape, tensor(operands, "cache").shape[2]
    return _supports(target, operands, heads) and heads == GROUP * kv_heads and tokens <= MAX_TOKENS


@dataclass(frozen=True)
class Tiling:
    """How prompts are cut: the tokens whose queries of one kv head a thread block attends for at once, eight a warpgroup,
    and the keys that it takes at a time."""

    segment: int
    block: int


def tiling_of(reach: int) -> Tiling:
    """Long segments read keys seldom. A window's have few keys, so smaller blocks of keys waste less."""
    return Tiling(24, 64 if reach <= 512 else 128)


def tilings() -> Iterator[Tiling]:
    """Those worth measuring: where a step has few items, shorter segments may leave fewer thread blocks without one."""
    return (Tiling(segment, block) for segment, block in product(SEGMENTS, (64, 128)))


def extend_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """A block a processor. Cost: half of the tokens' own sequence, the least a prompt's chunk can mean."""
    q, window = tensor(operands, "q"), integer(operands, "window")
    tokens, heads, dim = q.shape
    constants = _constants(operands, heads)
    keys, kv_heads = min(tokens, int(constants["REACH"])), int(constants["KV"])
    key = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "window": window}
    tiling = choose(target, "attention_extend", key, tiling_of(int(constants["REACH"])), tilings())
    registers, of_copier = SEGMENTS[tiling.segment]
    constants |= {"TOKENS": tokens, "SEGMENT": tiling.segment, "BLOCK": tiling.block, "STAGES": STAGES,
                  "REGISTERS": registers, "COPIER_REGISTERS": of_copier, "GRID": min(target.processors, tokens * kv_heads)}
    shared = 2 * tiling.segment * GROUP * 2 * dim + STAGES * tiling.block * 2 * dim + 6 * tokens + 4
    return (cuda_launch(
        "attention_extend.cu", "attention_extend", constants,
        ("q", "cache", "table", "sequences", "positions", "sinks", "out0"), grid=int(constants["GRID"]),
        threads=16 * tiling.segment + 128, shared=shared, moved=2 * q.bytes + keys * 2 * q.bytes // tokens,
        flops=2 * tokens * heads * dim * keys, promises=("HGMMA",), preloads=("sequences", "positions")),)


SPECS = (
    KernelSpec("sm90_attention_decode", "rope_kv_attention",
               lambda target, operands: _supports(target, operands, _heads(operands)), decode_launch),
    KernelSpec("sm90_attention_extend", "attention", _extends, extend_launch),
)
