"""Drops calls that do nothing: casts to the same dtype, views of the same shape, whole slices. Patterns are prepared by
the same function (`match.simplify`), so that no pattern need know of them."""

from __future__ import annotations

from torch import fx

from gptoss_compile.match import simplify
from gptoss_compile.passes.base import Context, Pass, PassResult


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    return PassResult(simplify(graph))


CANONICALIZE = Pass("canonicalize", run, lambda ctx: None, "bitwise")
