"""The printed form of a graph: Python that runs.

    gptoss-compile ... --dump-ir DIR        writes 00-trace.py, 01-canonicalize.py, ... and a diff between neighbours
    python -m gptoss_compile.ir run FILE    runs one of them, edited or not, on random tensors
"""

from __future__ import annotations

import argparse
import difflib
import json
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.kernels import registry  # noqa: F401  declares the kernel operators
from gptoss_compile.launch_plan import Weight
from gptoss_compile.match import describe
from gptoss_compile.passes.base import Context
from gptoss_compile.target import Target
from gptoss_compile.trace import DTYPE_NAMES, DTYPES, Geometry, Role


class IRError(ValueError):
    """A dump that cannot be run; the message says which line or field is wrong."""


def print_graph(graph: fx.Graph, ctx: Context, stage: str) -> str:
    """The graph as a Python module with one function, `forward`, and a description of its parameters."""
    names = {n: n.name for n in graph.nodes}
    parameters = [n for n in graph.nodes if n.op == "placeholder"]
    lines = [f'"""{stage}: bucket {ctx.bucket.name} for {ctx.target.name}. Run: python -m gptoss_compile.ir run FILE"""',
             "import json", "", "import torch", "", "ops = torch.ops", "", f"CONTEXT = json.loads({_context(ctx)!r})",
             "PARAMETERS = [  # name in the function, what it is, dtype and shape"]
    lines += [f"    ({names[n]!r}, {n.meta['role'].kind!r}, {n.meta['role'].name!r}, "
              f"{DTYPE_NAMES[n.meta['val'].dtype]!r}, {list(n.meta['val'].shape)}, {list(_parts(n))})," for n in parameters]
    lines += ["]", "", "", f"def forward({', '.join(names[n] for n in parameters)}):"]
    for node in graph.nodes:
        if node.op == "call_function":
            lines.append(f"    {names[node]} = {_call(node, names)}  # {describe(node.meta['val'])}")
        elif node.op == "output":
            lines.append(f"    return {_show(tuple(node.args[0]), names)}")
    return "\n".join(lines) + "\n"


class Dumper:
    """An observer of the pipeline that writes each stage, and its difference from the one before, into a directory."""

    def __init__(self, directory: Path, ctx: Context) -> None:
        self.directory, self.ctx, self.count, self.last = directory, ctx, 0, ""
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, graph: fx.Graph) -> None:
        self.write(f"{name}.py", print_graph(graph, self.ctx, f"{self.count:02d}-{name}"))

    def write(self, name: str, text: str) -> None:
        """Add a stage's text; also used for the plan behind the last pass."""
        stem = f"{self.count:02d}-{name}"
        (self.directory / stem).write_text(text)
        if self.count and name.endswith(".py"):
            diff = difflib.unified_diff(self.last.splitlines(), text.splitlines(), lineterm="", n=1)
            (self.directory / f"{Path(stem).stem}.diff").write_text("\n".join(diff) + "\n")
        self.count, self.last = self.count + 1, text


def load(path: Path) -> tuple[Callable[..., Any], Context, list[tuple[str, Role, torch.dtype, tuple[int, ...]]]]:
    """The function of a dump, its context and its parameters. Raises IRError."""
    scope: dict[str, Any] = {}
    try:
        exec(compile(path.read_text(), str(path), "exec"), scope)
        data = scope["CONTEXT"]
        ctx = Context(ModelConfig.from_json(data["config"]), Bucket(**data["bucket"]), Target.parse(data["target"]),
                      Geometry(**data["geometry"]), DTYPES[data["dtype"]], data["ranks"], rank=data["rank"])
        parameters = []
        for name, kind, role, dtype, shape, parts in scope["PARAMETERS"]:
            values = tuple(ctx.config.rope_inverse_frequencies()) if role == "rope.weight" else ()
            weight = Weight(role, dtype, tuple(shape), tuple(parts), values) if kind == "weight" else None
            parameters.append((name, Role(kind, role, weight), DTYPES[dtype], tuple(shape)))
        return scope["forward"], ctx, parameters
    except OSError as error:
        raise IRError(f"{path} cannot be read: {error.strerror}") from None
    except (SyntaxError, NameError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IRError(f"{path} is not a dump that can run: {type(error).__name__}: {error}") from error


def run_file(path: Path, seed: int = 0) -> tuple[Tensor, ...]:
    """Run a dump on random tensors drawn from the seed; dumps of one compilation get the same numbers by name."""
    from gptoss_compile.testing import parameter_values

    function, ctx, parameters = load(path)
    values = parameter_values(ctx, [(role, shape, dtype) for _, role, dtype, shape in parameters], seed)
    return tuple(function(**{name: values[role.name] for name, role, _, _ in parameters}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gptoss_compile.ir", description="Run a dumped graph.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a dump on random tensors and print a summary of its outputs")
    run.add_argument("file", type=Path)
    run.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        outputs = run_file(options.file, options.seed)
    except IRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for i, value in enumerate(outputs):
        name = "logits" if i == 0 else f"cache.{i - 1}"
        wide = value.double()
        print(f"{name:10} {describe(value):28} norm {wide.norm():.9e}  max {wide.abs().max():.6e}  finite "
              f"{bool(torch.isfinite(wide).all())}")
    return 0


def _context(ctx: Context) -> str:
    return json.dumps({"config": ctx.config.to_json(), "bucket": asdict(ctx.bucket), "target": ctx.target.name,
                       "geometry": asdict(ctx.geometry), "dtype": DTYPE_NAMES[ctx.dtype], "ranks": ctx.ranks,
                       "rank": ctx.rank})


def _parts(node: fx.Node) -> tuple[str, ...]:
    weight = node.meta["role"].weight
    return weight.parts if weight else ()


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.target is operator.getitem:
        source, at = node.args
        assert isinstance(source, fx.Node)
        return f"{names[source]}[{at}]"
    arguments = [_show(a, names) for a in node.args] + [f"{k}={_show(v, names)}" for k, v in node.kwargs.items()]
    return f"ops.{node.target}({', '.join(arguments)})"


def _show(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        inner = ", ".join(_show(v, names) for v in value)
        return f"({inner},)" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return "torch.device('cpu')"  # graphs are traced on meta tensors and run on a CPU
    return repr(value)


if __name__ == "__main__":
    raise SystemExit(main())
