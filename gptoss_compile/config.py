"""What is compiled: the model's hyper-parameters and one step's shape. Standard library only, shared with the runtime.

The figures and their names come from the published `config.json` files of openai/gpt-oss-20b and -120b.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

SWIGLU_ALPHA = 1.702  # the sigmoid's slope; a constant of the architecture, in no config.json
MXFP4_BLOCK = 32  # values that share one e8m0 scale


class ConfigError(ValueError):
    """A model configuration that cannot be compiled; the message names the field and what it must be."""


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one GPT-OSS model. Frozen; what follows from them is a property."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    sliding_window: int
    windowed: tuple[bool, ...]  # one a layer: True = attention over the last `sliding_window` keys
    rms_eps: float = 1e-5
    swiglu_limit: float = 7.0
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original_context: int = 4096
    rope_truncate: bool = False
    max_position: int = 131072
    expert_format: Literal["mxfp4", "bf16"] = "mxfp4"
    eos_ids: tuple[int, ...] = (200002, 199999, 200012)

    def __post_init__(self) -> None:
        positive = ("num_layers hidden intermediate num_heads num_kv_heads head_dim num_experts experts_per_token "
                    "vocab_size sliding_window rope_original_context max_position")
        for name in positive.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, found {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})")
        if len(self.windowed) != self.num_layers:
            raise ConfigError(f"layer_types has {len(self.windowed)} entries for {self.num_layers} layers")
        if self.expert_format == "mxfp4":
            for name in ("hidden", "intermediate"):
                if getattr(self, name) % MXFP4_BLOCK:
                    raise ConfigError(f"{name} ({getattr(self, name)}) must be a multiple of {MXFP4_BLOCK} for MXFP4 "
                                      "experts; a BF16 checkpoint has no such limit")
        if not (self.rope_theta > 1 and self.rope_factor >= 1 and self.rms_eps > 0 and self.swiglu_limit > 0):
            raise ConfigError("rope_theta must be > 1, rope_factor >= 1, rms_eps and swiglu_limit > 0")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def rope_concentration(self) -> float:
        """YaRN's attention temperature, applied to cos and sin: 0.1 ln(factor) + 1."""
        return 0.1 * math.log(self.rope_factor) + 1.0 if self.rope_factor > 1 else 1.0

    def rope_inverse_frequencies(self) -> list[float]:
        """YaRN's rotation per position for each of the head_dim/2 pairs, in radians (Peng et al., arXiv 2309.00071).

        Pairs that turn more than `beta_fast` times within the original context keep their frequency, those that turn
        less than `beta_slow` times are slowed by `factor`, and a linear ramp over the pair's index joins the two.
        """
        half = self.head_dim // 2
        base = [self.rope_theta ** (-i / half) for i in range(half)]
        if self.rope_factor <= 1:
            return base

        def pair_at(turns: float) -> float:
            return half * math.log(self.rope_original_context / (turns * 2 * math.pi)) / math.log(self.rope_theta)

        low, high = pair_at(self.rope_beta_fast), pair_at(self.rope_beta_slow)
        if self.rope_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(half)]
        return [b / self.rope_factor * r + b * (1 - r) for b, r in zip(base, ramp, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        return cls(**{**data, "windowed": tuple(data["windowed"]), "eos_ids": tuple(data["eos_ids"])})


@dataclass(frozen=True)
class Bucket:
    """The shape of one step. Every bucket is traced, planned and captured on its own.

    kind:      `decode` (each sequence brings exactly one token, so tokens == sequences == rows) or `extend` (prompt
               chunks, alone or mixed with decoding sequences).
    tokens:    T, rows of the step, of which the last ones may be padding (position -1).
    sequences: S, rows of the page tables.
    rows:      R, tokens whose logits are computed.
    """

    kind: Literal["decode", "extend"]
    tokens: int
    sequences: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.tokens}" + ("" if self.kind == "decode" else f"x{self.sequences}")

    @classmethod
    def decode(cls, batch: int) -> Bucket:
        return cls("decode", batch, batch, batch)

    @classmethod
    def extend(cls, tokens: int, sequences: int, rows: int = 64) -> Bucket:
        return cls("extend", tokens, sequences, min(tokens, max(sequences, rows)))
