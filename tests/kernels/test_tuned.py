"""Choices: the rule's, the table's, a trial's; what is compiled follows the table, and so do the caches' keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptoss_compile import compiler
from gptoss_compile.build import key_of
from gptoss_compile.kernels import tuned
from gptoss_compile.kernels.moe_grouped import Sizes
from gptoss_compile.kernels.sm90 import attention, gemm, gemv, linear, moe_grouped
from gptoss_compile.kernels.spec import Launch, TensorSpec
from gptoss_compile.target import Target

SM90 = Target.parse("sm90")


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuned, "path", lambda target: tmp_path / f"{target}.json")
    tuned.table.cache_clear()
    yield tmp_path
    tuned.table.cache_clear()


def write(folder: Path, choices: dict[str, Any]) -> None:
    (folder / "sm90.json").write_text(json.dumps({"gpu": "", "tools": {}, "choices": choices}))
    tuned.table.cache_clear()


def choose(tokens: int = 5) -> int:
    candidates = (Shape(tokens, width) for width in (8, 16, 24))
    return tuned.choose(SM90, "some", {"tokens": tokens, "norm": 1}, Shape(tokens, 16), candidates).width


def test_the_rule_where_the_table_says_nothing(tables: Path) -> None:
    assert choose() == 16
    write(tables, {"other": {"tokens=5 norm=1": {"width": 8}}, "some": {"tokens=6 norm=1": {"width": 8}}})
    assert choose(5) == 16 and choose(6) == 8


def test_an_entry_that_is_no_candidate_any_more(tables: Path) -> None:
    write(tables, {"some": {"tokens=5 norm=1": {"width": 32}}})
    assert choose() == 16
    write(tables, {"some": {"tokens=5 norm=1": {"width": 8, "depth": 1}}})
    assert choose() == 16


def test_a_trial_notes_choices_and_takes_others(tables: Path) -> None:
    write(tables, {"some": {"tokens=5 norm=1": {"width": 8}}})
    name = "some", "tokens=5 norm=1"
    with tuned.trying({}) as seen:
        assert choose() == 8
    assert list(seen) == [name] and seen[name].taken == Shape(5, 8) and seen[name].rule == Shape(5, 16)
    assert seen[name].candidates == (Shape(5, 16), Shape(5, 8), Shape(5, 24))
    assert seen[name].entry(Shape(5, 24)) == {"width": 24}, "what the key says is not repeated"
    with tuned.trying({name: Shape(5, 24)}) as seen:
        assert choose() == 24 and seen[name].taken == Shape(5, 24) and choose(6) == 16
    assert choose() == 8


def dense(tokens: int, features: int, inner: int) -> tuple[Launch, ...]:
    def bf16(*shape: int) -> TensorSpec:
        return TensorSpec(shape, "bf16")

    operands = {"x": bf16(tokens, inner), "weight": bf16(features, inner), "bias": bf16(features),
                "residual": bf16(tokens, features)}
    return linear.launches(SM90, operands)


@pytest.mark.parametrize(("tokens", "kernel", "define"), [(2, "gemv", "ROWS"), (300, "gemm", "WIDTH")])
def test_a_table_changes_launches_and_their_keys(tables: Path, tokens: int, kernel: str, define: str) -> None:
    before = dense(tokens, 2880, 4096)[-1]
    with tuned.trying({}) as seen:
        dense(tokens, 2880, 4096)
    ((name, choice),) = seen.items()
    assert name[0] == kernel and choice.taken == choice.rule
    other = next(c for c in choice.candidates if getattr(c, define.lower()) != getattr(choice.rule, define.lower()))
    write(tables, {name[0]: {name[1]: choice.entry(other)}})
    after = dense(tokens, 2880, 4096)[-1]
    assert dict(after.source.defines)[define] == getattr(other, define.lower())  # type: ignore[union-attr]
    assert key_of(before.source, SM90) != key_of(after.source, SM90)
    assert dense(tokens, 2880, 2880)[-1].source != after.source, "other shapes, another key"


def test_the_table_is_part_of_what_compiled_buckets_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    found = [compiler.source_digest()]
    (tmp_path / "kernels" / "tables").mkdir(parents=True)
    for width in (8, 16):
        (tmp_path / "kernels" / "tables" / "sm90.json").write_text(json.dumps({"choices": {"some": {"": {"width": width}}}}))
        found.append(compiler.source_digest())
    assert len(set(found)) == 3
    inside = Path(tuned.__file__).parent
    assert tuned.path("sm90") == inside / "tables" / "sm90.json" and inside.name == "kernels"


def test_a_steps_carveout(tables: Path) -> None:
    launches = dense(300, 2880, 4096)
    step = {"extend": 300, "sequences": 4}
    assert tuned.of_step(SM90, step, launches) == launches
    write(tables, {"step": {"extend=300 sequences=4": {"percent": 50}}})
    changed = tuned.of_step(SM90, step, launches)
    assert [x.carveout for x in changed] == [50, 50] and [x.source for x in changed] == [x.source for x in launches]
    assert tuned.of_step(SM90, {**step, "sequences": 5}, launches) == launches
    assert tuned.of_step(Target.parse("gfx950"), step, launches) == launches


@pytest.mark.parametrize(("features", "columns"), [(5120, 2880), (2880, 4096), (201088, 2880), (128, 64), (96, 192)])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_shapes_of_few_tokens(features: int, columns: int, tokens: int, norm: bool) -> None:
    found = list(gemv.shapes(SM90, features, columns, tokens, norm))
    assert len(set(found)) == len(found) < 50
    for shape in found:
        steps = -(-columns // 64 // shape.parts)
        assert shape.threads <= 1024 and 1 <= shape.ring <= steps and (64 % shape.rows == 0 or features % shape.rows == 0)
        assert shape.min_blocks * shape.threads * (8 * shape.ring + 48) <= 65536, "registers"


@pytest.mark.parametrize("tokens", [9, 16, 128, 300, 8192])
def test_shapes_of_many_tokens(tokens: int) -> None:
    found = list(gemm.near_shapes(SM90, tokens, 5120, 2880))
    assert gemm.best_shape(SM90, tokens, 5120, 2880) == found[0] and 1 < len(found) <= gemm.NEAR


@pytest.mark.parametrize("blocks", [1, 9, 10, 8192])
@pytest.mark.parametrize("pairs", [1, 8, 64, 2048])
def test_splits_of_attention(pairs: int, blocks: int) -> None:
    found = list(attention.splits(SM90, pairs, blocks))
    assert len(set(found)) == len(found) < 40
    for split in found:
        assert split.split * split.warps <= blocks and split.resident * split.warps <= 64
    if blocks >= 16 * 8:
        assert attention.split_of(SM90, pairs, blocks) in found


@pytest.mark.parametrize("tokens", [16, 64, 8192])
def test_variants_of_grouped_experts(tokens: int) -> None:
    size = Sizes(tokens, 2880, 4, 128, 2880, "bf16")
    found = list(moe_grouped.variants(SM90, size))
    assert moe_grouped.variant(size) in found and {variant.blocks for variant in found} == {1, 2}
