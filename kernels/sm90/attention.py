"""Attention with sinks on Hopper: one kernel for decode steps (attention_decode.cu)."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.kernels.common import cdiv, cuda_launch, integer, number, tensor
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

KEYS = 16  # a block of keys, which a warp takes at once; it never straddles a page
MAX_CLUSTER = 8  # the portable limit


def _supports(target: Target, operands: Mapping[str, Operand], heads: int) -> bool:
    """Heads of 64 dims in bf16, at most eight query heads a kv head, pages of whole blocks of keys."""
    _, _, kv_heads, page, dim = tensor(operands, "cache").shape
    return (target.name == "sm90" and tensor(operands, "cache").dtype == "bf16" and dim == 64 and heads % kv_heads == 0
            and heads // kv_heads <= 8 and page % KEYS == 0)


def _heads(operands: Mapping[str, Operand]) -> int:
    _, _, kv_heads, _, dim = tensor(operands, "cache").shape
    return tensor(operands, "qkv").shape[1] // dim - 2 * kv_heads


def _constants(operands: Mapping[str, Operand], heads: int) -> dict[str, int | float | str]:
    """REACH: how many positions, the query's own included, a query may see."""
    _, _, kv_heads, page, _ = tensor(operands, "cache").shape
    entries, window = tensor(operands, "table").shape[1], integer(operands, "window")
    reach = min(window, entries * page) if window else entries * page
    return {"Q": heads, "KV": kv_heads, "PAGE": page, "P": entries, "REACH": reach, "SCALE": number(operands, "scale")}


def decode_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """A short window is one block, each of its warps with one block of keys. Else a cluster of up to eight blocks shares a
    (token, kv head), as long as that does not need more blocks than there are processors.

    Cost: the least, a context of one key.
    """
    qkv, heads = tensor(operands, "qkv"), _heads(operands)
    constants = _constants(operands, heads)
    tokens, pairs = qkv.shape[0], qkv.shape[0] * tensor(operands, "cache").shape[2]
    blocks = cdiv(int(constants["REACH"]) - 1, KEYS) + 1  # the range need not start with a block
    warps, depth, cluster = (blocks, 1, 1) if blocks <= 9 else (8, 2, 1)
    while depth > 1 and cluster < MAX_CLUSTER and 2 * cluster * pairs <= target.processors and cluster * warps < blocks:
        cluster *= 2
    constants |= {"CTAS": cluster, "WARPS": warps, "DEPTH": depth, "MIN_BLOCKS": 2}
    out = TensorSpec((tokens, heads * 64), qkv.dtype)
    return (cuda_launch(
        "attention_decode.cu", "attention_decode", constants,
        ("qkv", "cos_sin", "cache", "table", "sequences", "positions", "sinks", "out0"), grid=pairs * cluster,
        threads=32 * warps, moved=qkv.bytes + out.bytes, flops=4 * tokens * heads * 64,
        preloads=("cache", "table", "sequences", "positions", "sinks")),)


SPECS = (
    KernelSpec("sm90_attention_decode", "rope_kv_attention",
               lambda target, operands: _supports(target, operands, _heads(operands)), decode_launch),
)
