"""The yardstick of the GPU benches: kernels that read memory and do nothing else, compiled here for use elsewhere.

    python bench/read_kernel.py [DIR] [--target sm90]

Each program reads one block of static data, as a kernel does with its weights, waits for its predecessor, and reads a vector
of activations. In `late` kernels the block is read behind the wait: the weights of experts, which the router chooses. `push`
and `collect` kernels exchange with other ranks as well, see kernels/sm90/read_exchange.cu.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import triton.language as tl

from gptoss_compile.artifact import canonical_json
from gptoss_compile.build import build
from gptoss_compile.kernels.common import cuda_launch, jit, launch, trigger, wait
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.lint import check_launch
from gptoss_compile.target import TARGETS, Target

SHAPES = ((8192, 4), (16384, 4), (16384, 8))  # (words of a program, warps); which is fastest depends on the card
VECTOR = 1440  # words: 2,880 bf16
BATCH = 3  # pairs of columns that a thread collects at a time: it has 12 of VECTOR, or 6


@jit
def read_kernel(source_ptr: tl.tensor, vector_ptr: tl.tensor, out_ptr: tl.tensor, BLOCK: tl.constexpr,
                VECTOR: tl.constexpr, VP: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    """Program i reads words i · BLOCK … of source. The sums keep the loads alive; storing one never happens."""
    words = source_ptr + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if LATE:
        wait(PDL)
        trigger(PDL)
        block = tl.load(words)
    else:
        trigger(PDL)
        block = tl.load(words)
        wait(PDL)
    v = tl.arange(0, VP)
    vector = tl.load(vector_ptr + v, mask=v < VECTOR, other=0)
    total = tl.sum(block ^ tl.load(vector_ptr)) + tl.sum(vector)  # the block stays in registers until the wait is over
    tl.store(out_ptr, total, mask=total == 0x5EED1E55)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench/read"), metavar="DIR")
    parser.add_argument("--target", default="sm90", choices=[t for t in TARGETS if t.startswith("sm")])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    target = Target.parse(options.target)
    for name, launched in launches(target):
        binary = build(launched.source, target)
        for fault in check_launch(launched, binary, target):
            sys.exit(f"read_kernel: error: {fault}")
        (options.folder / f"{name}.cubin").write_bytes(binary.code)
        (options.folder / f"{name}.json").write_bytes(canonical_json(binary.metadata()))
        print(f"{options.folder / name}.cubin: {binary.registers} registers, {binary.threads} threads")
    return 0


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Each kernel of each shape, by name."""
    words = TensorSpec((1,), "i32")
    for block, warps in SHAPES:
        for late in (False, True):
            constants = {"BLOCK": block, "VECTOR": VECTOR, "VP": 2048, "LATE": late}
            yield f"{block}-{warps}-{'late' if late else 'early'}", launch(
                read_kernel, target, {"source": words, "vector": words, "out": words}, constants, grid=1, moved=0,
                preloads=() if late else ("source",), late_trigger=late, num_warps=warps)
        for collect in (False, True) if target.name == "sm90" else ():
            defines = {"WORDS": block, "VECTOR": VECTOR, "THREADS": 32 * warps, "COLLECT": int(collect), "BATCH": BATCH}
            yield f"{block}-{warps}-{'collect' if collect else 'push'}", cuda_launch(
                "read_exchange.cu", "read_exchange", defines, ("source", "vector", "exchange", "slots", "values", "out"),
                grid=1, threads=32 * warps, moved=0, preloads=("source", "values"))


if __name__ == "__main__":
    sys.exit(main())
