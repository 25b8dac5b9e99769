"""From the plain model to an FX graph: torch.export on meta tensors, once a bucket. No weight is loaded.

The graph that the passes work on is a plain `torch.fx.GraphModule`. Each node carries `meta["val"]`, a meta tensor of
its shape and dtype (or a tuple of them); each placeholder carries `meta["role"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.kernels.spec import DType
from gptoss_compile.launch_plan import Weight
from gptoss_compile.model import Model

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_NOISE = {torch.ops.aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class Geometry:
    """Sizes of the paged cache that a graph is specialised to.

    page_size: tokens a page; max_context: longest sequence in tokens; window_ring: pages in a sequence's ring for
    window layers; pages and window_pages: sizes of the two pools. A server chooses them: here they only have to differ,
    so that the two kinds of cache can be told apart.
    """

    page_size: int
    max_context: int
    window_ring: int
    pages: int = 3
    window_pages: int = 2

    @property
    def table_width(self) -> int:
        return -(-self.max_context // self.page_size)

    @classmethod
    def of(cls, config: ModelConfig, buckets: Sequence[Bucket], page_size: int, max_context: int) -> Geometry:
        """A ring wide enough that a step's own tokens never overwrite a key that one of them still sees."""
        widest = max(b.tokens for b in buckets)
        return cls(page_size, max_context, -(-(config.sliding_window + widest) // page_size))


@dataclass(frozen=True)
class Role:
    """What a placeholder is: `input`, `weight` or `cache` (of one layer)."""

    kind: str
    name: str
    weight: Weight | None = None


def step_inputs(bucket: Bucket, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a step's inputs, all int32."""
    t, s = bucket.tokens, bucket.sequences
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (t,), "positions": (t,), "sequences": (t,),
        "full_table": (s, geometry.table_width), "window_table": (s, geometry.window_ring)}
    if bucket.kind == "extend":
        shapes["rows"] = (bucket.rows,)
    return shapes


def cache_shapes(config: ModelConfig, geometry: Geometry) -> list[tuple[int, ...]]:
    """Shape of each layer's cache: [pages, keys and values, K, B, D]."""
    return [(geometry.window_pages if windowed else geometry.pages, 2, config.num_kv_heads, geometry.page_size,
             config.head_dim) for windowed in config.windowed]


def trace_model(config: ModelConfig, bucket: Bucket, geometry: Geometry, dtype: torch.dtype,
                ranks: int = 1, model: type[Model] = Model, rank: int = 0) -> fx.GraphModule:
    """The graph of one step. Placeholders: weights, then inputs, then caches; output: logits, then new caches.

    With several ranks: of one rank's step, and config is the rank's.
    """
    with torch.device("meta"):
        module = model(config, dtype, ranks, rank)
        inputs = {name: torch.empty(shape, dtype=torch.int32) for name, shape in step_inputs(bucket, geometry).items()}
        caches = [torch.empty(shape, dtype=dtype) for shape in cache_shapes(config, geometry)]
    args = (*inputs.values(), *([] if "rows" in inputs else [None]), caches)
    program = torch.export.export(module, args, strict=False)
    graph = _plain(program.graph)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs_left, layer = list(inputs), 0
    for node in graph.find_nodes(op="placeholder"):
        if node.name in names:
            node.meta["role"] = Role("weight", names[node.name], _weight(config, names[node.name], node.meta["val"]))
        elif node.target in inputs:
            node.meta["role"] = Role("input", inputs_left.pop(0))
        elif node.meta["val"] is None:
            graph.erase_node(node)
        else:
            node.meta["role"] = Role("cache", f"cache.{layer}")
            layer += 1
    assert not inputs_left and layer == config.num_layers, "torch.export renamed the step's inputs"
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def trace_function(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.Graph:
    """The graph of a function of meta tensors, by the same tracer as the model's: what patterns are made of."""

    class Wrapper(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return function(*args)

    return _plain(torch.export.export(Wrapper(), tuple(inputs), strict=False).graph)


def _weight(config: ModelConfig, name: str, value: Tensor) -> Weight:
    values = tuple(config.rope_inverse_frequencies()) if name == "rope.weight" else ()
    parts = () if values else (name,)
    return Weight(name, DTYPE_NAMES[value.dtype], tuple(value.shape), parts, values)


def _plain(graph: fx.Graph) -> fx.Graph:
    """A copy without the tracer's assertions, its values plain meta tensors."""
    copy = fx.Graph()
    seen: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target in _NOISE:
            continue
        seen[node] = new = copy.node_copy(node, seen.__getitem__)
        new.meta = {"val": pytree.tree_map(_meta, node.meta.get("val"))}
    return copy


def _meta(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") \
        if isinstance(value, Tensor) else value
