"""The `cpu` target's machine code: the final graph, its kernel operators decomposed into their references, compiled ahead
by AOTInductor to one shared library a bucket. One library runs all ranks, in lockstep: there is one processor."""

from __future__ import annotations

import operator
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gptoss_compile.dialect import OPS, op_name
from gptoss_compile.interpreter import call_ranks


class Decomposed(torch.nn.Module):
    """The ranks' graphs as one module of the inputs, then each rank's caches and weights, in its plan's order.

    Caches are updated in place; the logits are returned.
    """

    def __init__(self, graphs: Sequence[fx.Graph]) -> None:
        super().__init__()
        self.graphs = graphs

    def forward(self, *tensors: Tensor) -> Tensor:
        ranks: list[dict[fx.Node, Any]] = [{} for _ in self.graphs]
        for (rank, node), tensor in zip(parameters(self.graphs), tensors, strict=True):
            ranks[rank][node] = tensor
        for graph, values in zip(self.graphs[1:], ranks[1:], strict=True):
            values |= zip(_placeholders(graph, "input"), tensors, strict=False)
        for nodes in zip(*(_calls(graph) for graph in self.graphs), strict=True):
            target = nodes[0].target
            call_ranks(nodes, ranks, target if target is operator.getitem else OPS[op_name(nodes[0])].reference)
        results: list[Tensor] = []
        for graph, values in zip(self.graphs, ranks, strict=True):
            logits, *caches = (values[n] for n in next(n for n in graph.nodes if n.op == "output").args[0])
            for old, new in zip(_placeholders(graph, "cache"), caches, strict=True):
                values[old].copy_(new)
            results.append(logits)
        return results[0]


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _placeholders(graph: fx.Graph, kind: str) -> list[fx.Node]:
    """Those of a kind; of weights, those that are used."""
    found = (n for n in graph.find_nodes(op="placeholder") if n.meta["role"].kind == kind)
    return [n for n in found if n.users or kind != "weight"]


def parameters(graphs: Sequence[fx.Graph]) -> list[tuple[int, fx.Node]]:
    """(rank, placeholder) of each of the module's parameters: the inputs, then rank by rank caches and weights."""
    inputs = [(0, n) for n in _placeholders(graphs[0], "input")]
    return inputs + [(rank, n) for rank, graph in enumerate(graphs) for kind in ("cache", "weight")
                     for n in _placeholders(graph, kind)]


def compile_graphs(graphs: Sequence[fx.Graph], path: str) -> None:
    """Write the AOTInductor package of the ranks' graphs to `path` (*.pt2). The pools' sizes stay open: a server chooses
    them."""
    nodes = [node for _, node in parameters(graphs)]
    pages = {n: n.meta["val"].shape[0] for n in nodes if n.meta["role"].kind == "cache"}
    pools = {count: Dim(f"pages_{count}", min=2) for count in sorted(set(pages.values()))}
    dynamic = tuple({0: pools[pages[n]]} if n in pages else None for n in nodes)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False):
        tensors = tuple(torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about PyTorch's own
        program = torch.export.export(Decomposed(graphs), tensors, dynamic_shapes=(dynamic,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    _normalize(Path(path))


def _normalize(package: Path) -> None:
    """Keep of a package what loading needs, and make equal input give equal bytes: the generated C++ and the debug
    sections name temporary directories, and each package has a random id."""
    with zipfile.ZipFile(package) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            data = members[name]
            if name.endswith((".kernel.cpp", ".kernel_metadata.json")):
                continue
            if name.endswith(".cpp"):
                data = b""  # PyTorch 2.11 finds the metadata by this name
            if name.endswith(".so"):
                data = _stripped(data)
            if name.endswith("serialization_id"):
                data = b"0" * len(data)
            archive.writestr(zipfile.ZipInfo(name), data)


def _stripped(library: bytes) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        Path(file.name).write_bytes(library)
        subprocess.run(["strip", "--strip-debug", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()
