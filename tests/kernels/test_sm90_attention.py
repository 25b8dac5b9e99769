"""sm90's attention kernels at the step sizes that choose their shapes: they compile, without spills, and pass the lint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.registry import SPECS
from gptoss_compile.kernels.spec import CudaSource, Launch, TensorSpec
from gptoss_compile.kernels.tuned import trying
from gptoss_compile.lint import check_all
from gptoss_compile.target import Target

SM90 = Target.parse("sm90")
ENTRIES = {0: 8192, 128: 136}  # of a page table's row, by window


def operands(tokens: int, window: int, page: int = 16, kv_heads: int = 8) -> dict[str, Any]:
    cache, index = TensorSpec((4096, 2, kv_heads, page, 64), "bf16"), TensorSpec((tokens,), "i32")
    return {"cache": cache, "table": TensorSpec((tokens, ENTRIES[window]), "i32"), "sequences": index, "positions": index,
            "sinks": TensorSpec((64,), "bf16"), "window": window, "scale": 0.125}


def decode(tokens: int, window: int, **geometry: int) -> Launch:
    qkv, cos_sin = TensorSpec((tokens, 80 * 64), "bf16"), TensorSpec((tokens, 2, 32), "fp32")
    return _launch("rope_kv_attention", {"qkv": qkv, "cos_sin": cos_sin, **operands(tokens, window, **geometry)})


def extend(tokens: int, window: int) -> Launch:
    return _launch("attention", {"q": TensorSpec((tokens, 64, 64), "bf16"), **operands(tokens, window)})


def _launch(op: str, given: dict[str, Any]) -> Launch:
    spec = next(s for s in SPECS if s.op == op and s.supports(SM90, given))
    assert spec.name.startswith("sm90_")
    (launch,) = spec.instantiate(SM90, given)
    return launch


def other_tilings(tokens: int, window: int) -> list[Launch]:
    with trying({}) as seen:
        extend(tokens, window)
    ((name, choice),) = seen.items()
    found = []
    for candidate in choice.candidates[1:]:
        with trying({name: candidate}):
            found.append(extend(tokens, window))
    return found


def shape(launch: Launch) -> tuple[int, int, int]:
    """(blocks, blocks that share a pair, threads)."""
    assert isinstance(launch.source, CudaSource)
    return launch.grid[0], int(dict(launch.source.defines)["SPLIT"]), launch.source.threads


def test_every_processor_has_a_block_or_two() -> None:
    assert [shape(decode(t, 0)) for t in (1, 2, 3, 8, 16, 256)] == [
        (128, 16, 256), (256, 16, 256), (192, 8, 256), (256, 4, 256), (256, 2, 256), (2048, 1, 256)]
    assert [shape(decode(t, 128)) for t in (1, 16, 256)] == [(8, 1, 288), (128, 1, 288), (2048, 1, 96)]


def test_what_they_do_not_support_goes_to_triton() -> None:
    for change in ({"page": 8}, {"kv_heads": 4}):
        given = {"qkv": TensorSpec((1, 80 * 64), "bf16"), "cos_sin": TensorSpec((1, 2, 32), "fp32"),
                 **operands(1, 0, **change)}
        assert next(s for s in SPECS if s.op == "rope_kv_attention" and s.supports(SM90, given)).name == "rope_kv_attention"


@pytest.mark.slow
def test_they_compile_and_keep_their_contract(tmp_path: Path) -> None:
    launches = [*(decode(t, w) for t in (1, 2, 4, 32) for w in ENTRIES), decode(3, 0, page=128),
                *(extend(t, w) for t in (16, 512) for w in ENTRIES), *other_tilings(8192, 0), *other_tilings(512, 128)]
    binaries = build_all([launch.source for launch in launches], SM90, tmp_path)
    pairs = [(launch, binaries[key_of(launch.source, SM90)]) for launch in launches]
    assert check_all(pairs, SM90) == []
    assert all(binary.spilled == 0 for _, binary in pairs)
    assert all(binary.shared <= SM90.shared_bytes for _, binary in pairs)
