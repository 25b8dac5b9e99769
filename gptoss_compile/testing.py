"""What tests of the compiler, and its own `--verify`, share: small models, random tensors, graphs compared with graphs.

A before/after test of a pass:

    def before(x, weight): ...          # plain functions of tensors
    def after(x, weight): ...
    check_rewrite(MY_PASS, ctx, before, after, [example, ...])
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.interpreter import run_graph
from gptoss_compile.launch_plan import Cut, Weight
from gptoss_compile.logical import logical_tensors
from gptoss_compile.match import simplify
from gptoss_compile.passes.base import Context, Exactness, Pass
from gptoss_compile.sharding import cut_of, feature_unit, is_zero, kv_span
from gptoss_compile.target import Target
from gptoss_compile.trace import DTYPE_NAMES, Geometry, Role, cache_shapes, trace_function

TOLERANCE: dict[Exactness, float] = {"bitwise": 0.0, "ulp": 2e-6, "rtol": 2e-5}  # of ‖difference‖ / ‖before‖, in fp32


def tiny(config: ModelConfig, target: Target, ranks: int = 1) -> ModelConfig:
    """Two layers with the given model's traits (head grouping, expert format, window kinds) at a size for any CPU. Several
    ranks get unequal shares of it."""
    hidden, unit = 64 if config.expert_format == "mxfp4" else 48, feature_unit(config, target)
    kv_heads = max(2, ranks)
    return dataclasses.replace(
        config, num_layers=2, hidden=hidden, intermediate=hidden if ranks == 1 else (ranks + 1) * unit,
        num_heads=kv_heads * config.heads_per_kv, num_kv_heads=kv_heads, head_dim=min(config.head_dim, 16),
        num_experts=max(8, config.experts_per_token), vocab_size=256 if ranks == 1 else 257, sliding_window=8,
        windowed=(True, False), rope_original_context=16, max_position=256, eos_ids=(0,))


def tiny_context(config: ModelConfig, bucket: Bucket, target: Target, ranks: int = 1) -> Context:
    """A context of the whole small model, in fp32, for a bucket of the same kind; wide enough to run its passes for real."""
    small = tiny(config, target, ranks)
    mini = Bucket.decode(3) if bucket.kind == "decode" else Bucket.extend(24, 3)
    geometry = dataclasses.replace(Geometry.of(small, [mini], 4, 64), pages=64, window_pages=64)
    return Context(small, mini, target, geometry, torch.float32, ranks)


def random_weight(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """O(1 / sqrt(fan-in)) values; bytes are MXFP4 blocks, or scales around 2^-6 if the last extent is no 16; integers are
    0, 1 or 2."""
    if dtype == torch.int32:
        return torch.randint(0, 3, tuple(shape), generator=generator, dtype=torch.int32)
    if dtype == torch.uint8:
        low, high = (0, 256) if shape[-1] == 16 and len(shape) == 4 else (119, 124)
        return torch.randint(low, high, tuple(shape), generator=generator, dtype=torch.uint8)
    fan_in = shape[-1] if len(shape) > 1 else 4
    values: Tensor = torch.randn(tuple(shape), generator=generator) / fan_in**0.5
    return values.to(dtype)


def random_step(ctx: Context, seed: int) -> dict[str, Tensor]:
    """Inputs and caches of a step that exercises what varies: several sequences at different lengths, the ring's wrap, a
    padding row. Keys of earlier positions are random numbers already in the caches."""
    generator = torch.Generator().manual_seed(seed)
    bucket, g = ctx.bucket, ctx.geometry
    used = bucket.tokens - 1 if bucket.tokens > bucket.sequences else bucket.tokens
    share = [used // bucket.sequences + (i < used % bucket.sequences) for i in range(bucket.sequences)]
    positions: list[int] = []
    sequences: list[int] = []
    for row, count in enumerate(share):
        start = int(torch.randint(0, g.max_context - count, (1,), generator=generator))
        positions += range(start, start + count)
        sequences += [row] * count
    padding = bucket.tokens - used

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def table(width: int, pages: int) -> Tensor:
        assert bucket.sequences * width < pages, "the pools must hold every sequence's table"
        order = torch.randperm(pages - 1, generator=generator)[: bucket.sequences * width] + 1
        return order.view(bucket.sequences, width).to(torch.int32)

    step = {
        "tokens": torch.randint(0, ctx.config.vocab_size, (bucket.tokens,), generator=generator, dtype=torch.int32),
        "positions": ints([*positions, *[-1] * padding]),
        "sequences": ints([*sequences, *[bucket.sequences - 1] * padding]),
        "full_table": table(g.table_width, g.pages), "window_table": table(g.window_ring, g.window_pages)}
    if bucket.kind == "extend":
        step["rows"] = torch.randint(0, used, (bucket.rows,), generator=generator, dtype=torch.int32)
    for i, shape in enumerate(cache_shapes(ctx.config, g)):
        step[f"cache.{i}"] = torch.randn(shape, generator=generator).to(ctx.dtype)
    return step


Parameter = tuple[Role, tuple[int, ...], torch.dtype]


def parameter_values(ctx: Context, parameters: Sequence[Parameter], seed: int) -> dict[str, Tensor]:
    """A random value for each parameter by its role's name. A logical weight's numbers depend on its name and the seed
    alone, and a weight made of several is made of theirs: stages of one compilation compute with the same numbers."""
    values = random_step(ctx, seed)
    for role, shape, dtype in parameters:
        if role.weight is None:
            continue
        if role.weight.values:
            values[role.name] = torch.tensor(role.weight.values)
        else:
            values[role.name] = torch.cat([_part(ctx, part, shape, dtype, len(role.weight.parts), seed)
                                           for part in role.weight.parts])
    return values


def _part(ctx: Context, name: str, shape: tuple[int, ...], dtype: torch.dtype, count: int, seed: int) -> Tensor:
    c = ctx.config
    rows = {"q": c.q_size, "k": c.kv_size, "v": c.kv_size}[name.split(".")[-2]] if count > 1 else shape[0]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return random_weight((rows, *shape[1:]), dtype, generator)


def random_tensors(graph: fx.Graph, ctx: Context, seed: int) -> dict[str, Tensor]:
    """A value for every placeholder of a traced graph, by the name of its role."""
    return parameter_values(ctx, [(n.meta["role"], tuple(n.meta["val"].shape), n.meta["val"].dtype)
                                  for n in graph.find_nodes(op="placeholder")], seed)


def rank_tensors(ctx: Context, seed: int) -> list[dict[str, Tensor]]:
    """A value for every placeholder of each rank's traced graph: its part of what the whole model's, ctx's, would be."""
    weights: dict[str, Tensor] = {"rope.weight": torch.tensor(ctx.config.rope_inverse_frequencies())}
    for name, info in logical_tensors(ctx.config).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        weights[name] = random_weight(info.shape, torch.uint8 if info.dtype == "u8" else ctx.dtype, generator)
    values = {**random_step(ctx, seed), **weights}
    return [shard(values, ctx.config, rank, ctx.ranks, ctx.target) for rank in range(ctx.ranks)]


def shard(tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, ranks: int,
          target: Target) -> dict[str, Tensor]:
    """A rank's part of inputs, caches and logical weights. The inputs are shared; all else is the rank's own.

    config: of the whole model.
    """
    parts = {}
    for name, value in tensors.items():
        if name.startswith("cache."):
            cut: Cut | None = Cut(2, *kv_span(config, rank, ranks))
        else:
            cut = cut_of(name, config, rank, ranks, target)
        if is_zero(name, rank):
            value = torch.zeros_like(value)
        parts[name] = value.narrow(cut.axis, cut.start, cut.stop - cut.start).clone() if cut else value
    return parts


def with_merged(tensors: Mapping[str, Tensor], graph: fx.Graph) -> dict[str, Tensor]:
    """The tensors with those added that passes made by concatenating weights."""
    result = dict(tensors)
    for node in graph.find_nodes(op="placeholder"):
        role: Role = node.meta["role"]
        if role.weight and role.name not in result:
            result[role.name] = torch.cat([result[part] for part in role.weight.parts])
    return result


def run(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The graph's outputs on those tensors."""
    return run_graph(graph, with_merged(tensors, graph))


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest ‖after - before‖ / ‖before‖ over pairs of outputs; infinite where one is not finite or shapes differ."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or not torch.isfinite(b.float()).all():
            return float("inf")
        if not torch.equal(a, b):
            gap = (b.double() - a.double()).norm() / a.double().norm().clamp(min=1e-30)
            worst = max(worst, float(gap))
    return worst


def function_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> fx.Graph:
    """A function of tensors as a graph whose placeholders are weights called w0, w1, ..."""
    graph = trace_function(function, [torch.empty_like(e) for e in examples])
    simplify(graph)
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta["val"]
        name = f"x.w{i}.{'weight' if value.ndim > 1 else 'bias'}"
        node.meta["role"] = Role("weight", name, Weight(name, DTYPE_NAMES[value.dtype], tuple(value.shape), (name,)))
    return graph


def structure(graph: fx.Graph) -> list[str]:
    """A canonical listing of a graph's calls: names of nodes do not matter, operators, constants and wiring do."""
    seen: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(n for n in graph.nodes if n.op != "placeholder" or n.users):
        seen[node] = f"%{i}"
        if node.op != "placeholder":
            lines.append(f"{node.target} {fx.map_arg((node.args, node.kwargs), seen.__getitem__)}")
    return lines


def check_rewrite(each: Pass, ctx: Context, before: Callable[..., Any], after: Callable[..., Any],
                  examples: Sequence[Tensor], *, after_examples: Sequence[Tensor] | None = None,
                  values: Mapping[int, Tensor] | None = None, seed: int = 0, matches: int = 1) -> None:
    """Assert that the pass turns `before` into `after`, structurally, and that it keeps the numbers.

    after_examples: the parameters of `after` where they are others, because the pass makes new weights.
    values: parameters (by index) that must not be just any numbers.
    """
    graph, wanted = function_graph(before, examples), function_graph(after, after_examples or examples)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n.meta["role"].name: random_weight(tuple(n.meta["val"].shape), n.meta["val"].dtype, generator)
               for n in graph.find_nodes(op="placeholder")}
    for i, value in (values or {}).items():
        tensors[list(tensors)[i]] = value
    old = run(graph, tensors)
    result = each.run(graph, ctx)
    graph.lint()
    assert result.matches == matches, f"{each.name} matched {result.matches} times; {list(map(str, result.near_misses))}"
    assert structure(graph) == structure(wanted), f"{each.name} gave\n{graph}\nexpected\n{wanted}"
    gap = difference(old, run(graph, tensors))
    assert gap <= TOLERANCE[each.exactness], f"{each.name} changed the result by {gap:.2e} (seed {seed})"
