"""The weights of a model under their logical names, those of `model.Model`'s parameters. Stdlib only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptoss_compile.config import MXFP4_BLOCK, ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one weight."""

    shape: tuple[int, ...]
    dtype: Literal["bf16", "fp32", "u8"]


def logical_tensors(config: ModelConfig) -> dict[str, TensorInfo]:
    """Every weight of the model, in the order in which a step uses them, dense ones as bf16.

    Experts are [experts, out, in]: packed blocks [.., in/32, 16] with scales [.., in/32], or bf16.
    """
    def dense(*shape: int) -> TensorInfo:
        return TensorInfo(shape, "bf16")

    def linear(name: str, outputs: int, inputs: int) -> dict[str, TensorInfo]:
        return {f"{name}.weight": dense(outputs, inputs), f"{name}.bias": dense(outputs)}

    def experts(name: str, outputs: int, inputs: int) -> dict[str, TensorInfo]:
        bias = {f"{name}.bias": dense(config.num_experts, outputs)}
        if config.expert_format == "bf16":
            return {f"{name}.weight": dense(config.num_experts, outputs, inputs), **bias}
        shape = (config.num_experts, outputs, inputs // MXFP4_BLOCK)
        packed = {f"{name}.blocks": TensorInfo((*shape, 16), "u8"), f"{name}.scales": TensorInfo(shape, "u8")}
        return {**packed, **bias}

    hidden, vocab = config.hidden, config.vocab_size
    tensors = {"embed.weight": dense(vocab, hidden)}
    for i in range(config.num_layers):
        at = f"layers.{i}."
        tensors |= {
            f"{at}attn_norm.weight": dense(hidden),
            **linear(f"{at}q", config.q_size, hidden),
            **linear(f"{at}k", config.kv_size, hidden),
            **linear(f"{at}v", config.kv_size, hidden),
            **linear(f"{at}o", hidden, config.q_size),
            f"{at}sinks": dense(config.num_heads),
            f"{at}moe_norm.weight": dense(hidden),
            **linear(f"{at}router", config.num_experts, hidden),
            **experts(f"{at}gate_up", 2 * config.intermediate, hidden),
            **experts(f"{at}down", hidden, config.intermediate),
        }
    return {**tensors, "norm.weight": dense(hidden), "lm_head.weight": dense(vocab, hidden)}


def row_slices(shape: Sequence[int], item_bytes: int, limit: int = 32 << 20) -> list[tuple[int, int]]:
    """[start, stop) ranges that cover axis 0, each of at most `limit` bytes unless one row is larger."""
    row = item_bytes
    for extent in shape[1:]:
        row *= extent
    step = max(1, limit // max(row, 1))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
