"""FlashInfer's paged attention with sinks on Hopper, built ahead: attention_schedule.cu, then flashinfer_attention.cu.

FlashInfer's own module schedules on the host, for lengths that the host knows, and copies the schedule to the device; its
kernel only reads that. Here a kernel of ours writes it, in the same step, so that a captured graph serves any lengths. The
kernel takes our cache as it is, by strides, and a full layer's page table too, which must not wrap; a window's ring is
unrolled from the oldest page that is looked at. Values in that page of keys that nobody sees are multiplied by zero: they
must be numbers, as what a sequence has stored in its own pages is.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.kernels.common import cuda_launch, integer, tensor
from gptoss_compile.kernels.spec import KernelSpec, Launch, LibrarySource, Operand, TensorSpec
from gptoss_compile.target import Target

QUERIES = 192  # tokens whose queries of one head a thread block of FlashInfer's takes at once
THREADS = 512
MAX_SEQUENCES = 1024
SOURCE = LibrarySource("flashinfer_attention.cu", "attention")


def key(operands: Mapping[str, Operand]) -> dict[str, int]:
    """What its time depends on."""
    (tokens, heads, _), (sequences, _) = tensor(operands, "q").shape, tensor(operands, "table").shape
    return {"tokens": tokens, "sequences": sequences, "heads": heads, "kv_heads": tensor(operands, "cache").shape[2],
            "window": integer(operands, "window")}


def supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    """Heads of 64 dims in bf16; pages of any size."""
    cache, heads = tensor(operands, "cache"), tensor(operands, "q").shape[1]
    return (target.name == "sm90" and cache.dtype == "bf16" and cache.shape[4] == 64 and heads % cache.shape[2] == 0
            and tensor(operands, "sinks").dtype == "bf16" and tensor(operands, "table").shape[0] <= MAX_SEQUENCES)


def launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """Cost: half of the tokens' own sequence, the least a prompt's chunk can mean."""
    q, (sequences, entries), (_, _, _, page, _) = (tensor(operands, "q"), tensor(operands, "table").shape,
                                                   tensor(operands, "cache").shape)
    (tokens, heads, dim), window = q.shape, integer(operands, "window")
    reach = min(window, entries * page) if window else entries * page
    keys, tiles = min(tokens, reach), tokens // QUERIES + min(tokens, sequences)
    width = entries + 1 if window else entries  # the oldest page may be the newest too, whose slots come round
    constants: dict[str, int | float | str] = {
        "TOKENS": tokens, "SEQUENCES": sequences, "Q": heads, "PAGE": page, "P": entries, "ENTRIES": width, "WINDOW": window,
        "TILES": tiles, "QUERIES": QUERIES, "BLOCKS": target.processors, "GRID": target.processors, "THREADS": THREADS}
    common = {"items": TensorSpec((7, tiles * heads), "i32"), "starts": TensorSpec((target.processors + 1,), "i32"),
              "floats": TensorSpec((heads,), "fp32")}
    if window:
        common["pages"] = TensorSpec((sequences, width), "i32")
    pages = "pages" if window else "table"
    schedule = cuda_launch(
        "attention_schedule.cu", "attention_schedule", constants,
        ("table", "sequences", "positions", "sinks", "out0", "items", "starts", "floats", pages), grid=target.processors,
        threads=THREADS, moved=0, common=common)
    attention = Launch(
        SOURCE, (1, 1, 1), ("q", "cache", pages, "items", "starts", "floats", "out0", "window", "scale"),
        common=tuple(common.items()), moved=2 * q.bytes + keys * 2 * q.bytes // tokens,
        flops=2 * tokens * heads * dim * keys)
    return schedule, attention


SPECS = (KernelSpec("flashinfer_attention", "attention", supports, launches, key=key),)
