"""Where the two published layouts keep each logical weight. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptoss_compile.config import ModelConfig
from gptoss_compile.logical import logical_tensors

Layout = Literal["huggingface", "original"]


@dataclass(frozen=True)
class Placement:
    """A logical weight within the tensor `name` of full shape `shape`: its rows from `start`, possibly with
    the last
    two axes swapped."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    transposed: bool = False


_HUGGINGFACE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "q.bias": "self_attn.q_proj.bias",
    "k.weight": "self_attn.k_proj.weight",
    "k.bias": "self_attn.k_proj.bias",
    "v.weight": "self_attn.v_proj.weight",
    "v.bias": "self_attn.v_proj.bias",
    "o.weight": "self_attn.o_proj.weight",
    "o.bias": "self_attn.o_proj.bias",
    "sinks": "self_attn.sinks",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.router.weight",
    "router.bias": "mlp.router.bias",
    "gate_up.weight": "mlp.experts.gate_up_proj",
    "gate_up.blocks": "mlp.experts.gate_up_proj_blocks",
    "gate_up.scales": "mlp.experts.gate_up_proj_scales",
    "gate_up.bias": "mlp.experts.gate_up_proj_bias",
    "down.weight": "mlp.experts.down_proj",
    "down.blocks": "mlp.experts.down_proj_blocks",
    "down.scales": "mlp.experts.down_proj_scales",
    "down.bias": "mlp.experts.down_proj_bias",
}
_ORIGINAL = {
    "embed.weight": "embedding.weight",
    "norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "attn_norm.weight": "attn.norm.scale",
    "q.weight": "attn.qkv.weight",
    "q.bias": "attn.qkv.bias",
    "k.weight": "attn.qkv.weight",
    "k.bias": "attn.qkv.bias",
    "v.weight": "attn.qkv.weight",
    "v.bias": "attn.qkv.bias",
    "o.weight": "attn.out.weight",
    "o.bias": "attn.out.bias",
    "sinks": "attn.sinks",
    "moe_norm.weight": "mlp.norm.scale",
    "router.weight": "mlp.gate.weight",
    "router.bias": "mlp.gate.bias",
    "gate_up.weight": "mlp.mlp1_weight",
    "gate_up.blocks": "mlp.mlp1_weight.blocks",
    "gate_up.scales": "mlp.mlp1_weight.scales",
    "gate_up.bias": "mlp.mlp1_bias",
    "down.weight": "mlp.mlp2_weight",
    "down.blocks": "mlp.mlp2_weight.blocks",
    "down.scales": "mlp.mlp2_weight.scales",
    "down.bias": "mlp.mlp2_bias",
}


def placements(config: ModelConfig, layout: Layout) -> dict[str, Placement]:
    """The place of every logical weight of the model."""
    names, prefix = (_HUGGINGFACE, "model.layers.") if layout == "huggingface" else (_ORIGINAL, "block.")
    merged = {"q": 0, "k": config.q_size, "v": config.q_size + config.kv_size}
    found = {}
    for logical, info in logical_tensors(config).items():
        in_layer = logical.startswith("layers.")
        _, layer, local = logical.split(".", 2) if in_layer else ("", "", logical)
        name = f"{prefix}{layer}.{names[local]}" if in_layer else names[local]
        shape, start = info.shape, 0
        transposed = layout == "huggingface" and local in ("gate_up.weight", "down.weight")
        if transposed:
            shape = (shape[0], shape[2], shape[1])
        elif layout == "original" and local.split(".")[0] in merged:
            start = merged[local.split(".")[0]]
            shape = (config.q_size + 2 * config.kv_size, *shape[1:])
        found[logical] = Placement(name, shape, start, transposed)
    return found
