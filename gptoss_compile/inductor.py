"""The `cpu` target's machine code: the final graph, its kernel operators decomposed into their references, compiled ahead
by AOTInductor to one shared library a bucket."""

from __future__ import annotations

import operator
import subprocess
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gptoss_compile.dialect import OPS
from gptoss_compile.plan import op_name


class Decomposed(torch.nn.Module):
    """A graph as a module of (inputs, caches, weights), in the plan's order; caches are updated in place."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *tensors: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = dict(zip(plan_order(self.graph), tensors, strict=True))
        for node in self.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                function = node.target if node.target is operator.getitem else OPS[op_name(node)].reference
                values[node] = function(*args, **kwargs)
        logits, *caches = (values[n] for n in next(n for n in self.graph.nodes if n.op == "output").args[0])
        for old, new in zip((n for n in self.graph.nodes if _kind(n) == "cache"), caches, strict=True):
            values[old].copy_(new)
        result: Tensor = logits
        return result


def _kind(node: fx.Node) -> str:
    return str(node.meta["role"].kind) if node.op == "placeholder" else ""


def plan_order(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders in the order of a plan: inputs, caches, then the weights that are used."""
    used = [n for n in graph.nodes if n.users or _kind(n) != "weight"]
    return [n for kind in ("input", "cache", "weight") for n in used if _kind(n) == kind]


def compile_graph(graph: fx.Graph, path: str) -> None:
    """Write the AOTInductor package of a graph to `path` (*.pt2). The pools' sizes stay open: a server chooses them."""
    nodes = plan_order(graph)
    pools = {shape: Dim(f"pages_{i}", min=2) for i, shape in enumerate(_pool_shapes(nodes))}
    dynamic = tuple({0: pools[n.meta["val"].shape]} if _kind(n) == "cache" else None for n in nodes)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False):
        tensors = tuple(torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about PyTorch's own
        program = torch.export.export(Decomposed(graph), tensors, dynamic_shapes=(dynamic,), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    _normalize(Path(path))


def _pool_shapes(nodes: list[fx.Node]) -> list[torch.Size]:
    return list(dict.fromkeys(n.meta["val"].shape for n in nodes if _kind(n) == "cache"))


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
