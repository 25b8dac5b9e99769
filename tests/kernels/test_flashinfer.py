"""FlashInfer's attention as a kernel of ours: which steps take it, what is planned, and its schedule, run on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptoss_compile import library, nvrtc
from gptoss_compile.build import build, build_all, key_of
from gptoss_compile.kernels.attention import attention
from gptoss_compile.kernels.registry import EXTERN
from gptoss_compile.kernels.sm90.flashinfer import QUERIES, SOURCE
from gptoss_compile.kernels.spec import CudaSource, Launch, LibrarySource, TensorSpec
from gptoss_compile.lint import check_all
from gptoss_compile.target import Target

SM90 = Target.parse("sm90")
SPEC = next(spec for spec in EXTERN if spec.name == "flashinfer_attention")
PAGE, WINDOW = 16, 128
SHIM = """
#include <algorithm>
#include <cstring>
using std::max; using std::min;
typedef unsigned short u16; typedef unsigned int u32;
struct uint4 { u32 x, y, z, w; };
#define DEVICE inline
#define __global__
#define __shared__ static
#define __launch_bounds__(n)
static struct { int x; } threadIdx, blockIdx;
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline void __syncthreads() {}
inline void trigger_next() {}
inline void wait_for_previous() {}
inline u32 load_4(const void* p) { u32 r; memcpy(&r, p, 4); return r; }
inline float load_bf16(const u16* p) { u32 bits = (u32)*p << 16; float r; memcpy(&r, &bits, 4); return r; }
inline void store_16(void* p, uint4 v) { memcpy(p, &v, 16); }
"""


def operands(tokens: int, sequences: int, entries: int, window: int, heads: int = 64, kv_heads: int = 8) -> dict[str, Any]:
    index = TensorSpec((tokens,), "i32")
    return {"q": TensorSpec((tokens, heads, 64), "bf16"), "cache": TensorSpec((999, 2, kv_heads, PAGE, 64), "bf16"),
            "table": TensorSpec((sequences, entries), "i32"), "sequences": index, "positions": index,
            "sinks": TensorSpec((heads,), "bf16"), "window": window, "scale": 0.125}


def test_what_it_does_not_support() -> None:
    good = operands(48, 3, 40, WINDOW)
    assert SPEC.supports(SM90, good)
    assert not SPEC.supports(Target.parse("sm100"), good)
    assert not SPEC.supports(SM90, {**good, "cache": TensorSpec((9, 2, 8, PAGE, 32), "bf16")})
    assert not SPEC.supports(SM90, {**good, "cache": TensorSpec((9, 2, 8, PAGE, 64), "fp32")})


def test_its_schedule_compiles_and_keeps_its_contract(tmp_path: Path) -> None:
    launches = [SPEC.instantiate(SM90, operands(*shape))[0] for shape in (
        (48, 3, 40, 0), (2048, 64, 8192, 0), (2048, 64, 136, WINDOW), (8192, 1024, 520, WINDOW))]
    binaries = build_all([launch.source for launch in launches], SM90, tmp_path)
    pairs = [(launch, binaries[key_of(launch.source, SM90)]) for launch in launches]
    assert check_all(pairs, SM90) == [] and all(binary.spilled == 0 for _, binary in pairs)


@pytest.mark.slow
def test_the_library_compiles(tmp_path: Path) -> None:
    if missing := library.missing():
        pytest.skip(f"what makes the library is not installed: {', '.join(missing)}")
    binary = build(SOURCE, SM90, tmp_path)
    assert binary.suffix == "so" and binary.symbol == "attention" and binary.code.startswith(b"\x7fELF")


# The schedule ------------------------------------------------------------------------------------------------------


def emulated(launch: Launch) -> Any:
    """The kernel's source as a function for the CPU: one thread of one block, whose loops then go over everything."""
    source = launch.source
    assert isinstance(source, CudaSource)
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    text = nvrtc.texts(source, SM90)[source.file].replace('#include "common.cuh"', "")
    defines = {**dict(source.defines), "THREADS": 1, "GRID": 1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "schedule.cpp")
        path.write_text(SHIM + "".join(f"#define {k} {v}\n" for k, v in defines.items()) + text)
        built = path.with_suffix(".so")
        subprocess.run([compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", path, "-o", built], check=True)
        return ctypes.CDLL(str(built)).attention_schedule


def scheduled(launches: tuple[Launch, ...], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the library's function gets: the step's tensors and what the schedule's kernel writes."""
    kinds = {"i32": torch.int32, "fp32": torch.float32}
    buffers = {name: torch.full(spec.shape, -77, dtype=kinds[spec.dtype]) for name, spec in launches[0].common}
    out = torch.full((given["q"].shape[0], given["q"].shape[1] * 64), float("nan"), dtype=torch.bfloat16)
    named = {**given, **buffers, "out0": out}
    emulated(launches[0])(*(ctypes.c_void_p(named[name].data_ptr()) for name in launches[0].args))
    return named


def attended(named: Mapping[str, Tensor], pages: Tensor, window: int, scale: float) -> tuple[Tensor, list[list[int]]]:
    """What FlashInfer's kernel makes of a schedule, in fp32, and the keys that each block's items see.

    Query i of `count` sees keys up to `keys - count + i`, in a window the last `window` of them, none of which is outside
    the first `keys` of its sequence's pages.
    """
    q, cache, out = named["q"].float(), named["cache"].float(), named["out0"].float()
    kv_heads = cache.shape[2]
    work: list[list[int]] = []
    starts, written = named["starts"].tolist(), torch.zeros(q.shape[:2], dtype=torch.int32)
    for block in range(len(starts) - 1):
        work.append([])
        for item in range(starts[block], starts[block + 1]):
            number, first, place, count, keys, head, _ = named["items"][:, item].tolist()
            low, high = number * QUERIES, min((number + 1) * QUERIES, count)
            assert 0 <= low < high and keys >= count
            kv = head // (q.shape[1] // kv_heads)
            both = cache[pages.reshape(-1)[place: place + -(-keys // PAGE)].long(), :, kv].transpose(0, 1).reshape(2, -1, 64)
            age = torch.arange(low, high)[:, None] + keys - count - torch.arange(both.shape[1])
            seen = (age >= 0) & ((age < window) if window else True)
            score = (q[first + low: first + high, head] @ both[0].T * scale).masked_fill(~seen, float("-inf"))
            sink = named["floats"][head].expand(high - low, 1)
            weight = torch.cat((score, sink), 1).softmax(1)[:, :-1]
            values = torch.where(seen.any(0)[:, None], both[1], 0.0)
            out[first + low: first + high, 64 * head: 64 * (head + 1)] = weight @ values
            written[first + low: first + high, head] += 1
            work[-1].append(int(seen.any(0).sum()))
    tokens = (written > 0).any(1)
    assert torch.equal(written, tokens[:, None].int().expand_as(written)), "every query once"
    assert torch.equal(tokens, named["positions"] >= 0)
    return out, work


def check(chunks: list[tuple[int, int]], window: int, padding: int = 0, *, entries: int = 0, rows: int = 0,
          processors: int = 132) -> list[list[int]]:
    """chunks: (tokens in the cache already, tokens of this step) by sequence; one without tokens is not in the step."""
    heads, kv_heads, tokens = 4, 2, sum(count for _, count in chunks) + padding
    ring = entries or (-(-(WINDOW + tokens) // PAGE) if window else max(sum(c) for c in chunks) // PAGE + 2)
    positions = [p for before, count in chunks for p in range(before, before + count)]
    sequences = [s for s, (_, count) in enumerate(chunks) for _ in range(count)]
    rows = rows or len(chunks)
    table = (torch.randperm(rows * ring) + 1).reshape(rows, ring).int()
    cache = torch.randn(rows * ring + 1, 2, kv_heads, PAGE, 64)
    given = {"q": torch.randn(tokens, heads, 64).bfloat16() * 2, "cache": cache, "table": table,
             "sequences": torch.tensor([*sequences, *[sequences[-1]] * padding], dtype=torch.int32),
             "positions": torch.tensor([*positions, *[-1] * padding], dtype=torch.int32),
             "sinks": torch.randn(heads).bfloat16()}
    target = replace(SM90, processors=processors)
    launches = SPEC.instantiate(target, operands(tokens, rows, ring, window, heads, kv_heads))
    named = scheduled(launches, given)
    assert isinstance(launches[1].source, LibrarySource)
    got, work = attended(named, named[launches[1].args[2]], window, 0.125)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    expected = attention(**floats, window=window, scale=0.125)
    live = given["positions"] >= 0
    assert torch.allclose(got[live], expected[live], atol=1e-4) and bool((got[~live] == 0).all())
    return work


@pytest.mark.parametrize("window", [0, WINDOW])
def test_its_schedule_says_what_the_twin_computes(window: int, seed: int) -> None:
    """Prompts, chunks of prompts and single tokens, of odd lengths, some sequences absent; padding behind."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    edges = [0, 1, 15, 16, 17, 126, 127, 128, 129, 700]
    chunks = [(int(rng.choice(edges)), int(n)) for n in rng.integers(1, 60, 8)]
    chunks += [(3, 400), (200, 193), (500, 0), (9, 192), (40, 1)]
    check([chunks[i] for i in rng.permutation(len(chunks))], window, int(rng.integers(0, 40)), rows=len(chunks) + 2)


def test_a_rings_newest_page_may_be_its_oldest(seed: int) -> None:
    torch.manual_seed(seed)
    for before in (1000, 1007, 1015):
        check([(before, 64)], WINDOW, entries=12)


def test_blocks_have_as_much_to_do(seed: int) -> None:
    """A long prompt: no block sees many more keys than the mean, and each one's items come with the most keys first."""
    torch.manual_seed(seed)
    work = check([(0, 1500)], 0, processors=5)
    keys = [sum(items) for items in work]
    assert max(keys) < 1.2 * sum(keys) / len(keys) and all(items == sorted(items, reverse=True) for items in work)
