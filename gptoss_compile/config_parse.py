"""From a checkpoint's config.json, in any of its three forms, to ModelConfig. Standard library only.

The forms: Hugging Face with `rope_scaling` and `rope_theta` (the published files), Hugging Face as
transformers 5 writes it (`rope_parameters`), and OpenAI's own `original/config.json`. What the compiler does
not implement is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gptoss_compile.config import SWIGLU_ALPHA, ConfigError, ModelConfig

O200K_HARMONY = 201088  # size of the vocabulary, with its reserved ids
_HARMONY_STOPS = (200002, 199999, 200012)  # return, endoftext, call
_ORIGINAL_STRETCH = 32.0


def parse_config(path: Path, original_experts: Literal["mxfp4", "bf16"]) -> ModelConfig:
    """The model that the config.json at `path` describes. Raises ConfigError that names the file and the
    field.

    original_experts: the format of the experts if this is OpenAI's form, which does not say.
    """
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    try:
        if not isinstance(data, dict):
            raise ConfigError("it must hold one JSON object")
        if "num_experts" in data and "model_type" not in data:
            return _original(_Fields(data), original_experts)
        return _huggingface(_Fields(data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Fields:
    """Typed access to a JSON object. Every error names the field."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self.data, self.prefix = data, prefix

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise ConfigError(f"field {self.prefix}{name} must be a positive integer, found {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"field {self.prefix}{name} must be a positive number, found {value!r}")
        return float(value)

    def must_be(self, name: str, expected: Any) -> None:
        """The field may be absent, but may not ask for anything else."""
        value = self.data.get(name, expected)
        if value != expected:
            raise ConfigError(f"field {self.prefix}{name} is {value!r}; only {expected!r} is supported")

    def section(self, name: str) -> _Fields:
        value = self.data.get(name) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"field {self.prefix}{name} must be an object, found {value!r}")
        return _Fields(value, f"{self.prefix}{name}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self.data.get(name, default)
        if value is None:
            raise ConfigError(f"field {self.prefix}{name} is missing")
        return value


def _huggingface(fields: _Fields) -> ModelConfig:
    fields.must_be("model_type", "gpt_oss")
    if "model_type" not in fields.data:
        raise ConfigError("field model_type is missing; it must be 'gpt_oss'")
    for name, expected in (("attention_bias", True), ("tie_word_embeddings", False), ("hidden_act", "silu"),
                           ("swiglu_alpha", SWIGLU_ALPHA)):
        fields.must_be(name, expected)
    top_k = "num_experts_per_tok" if "num_experts_per_tok" in fields.data else "experts_per_token"
    vocab = fields.integer("vocab_size")
    quantization = fields.section("quantization_config")
    if quantization.data:
        quantization.must_be("quant_method", "mxfp4")
    return ModelConfig(
        **_shape(fields, "num_local_experts", top_k),
        windowed=_windowed(fields, fields.integer("num_hidden_layers")),
        rms_eps=fields.number("rms_norm_eps", 1e-5),
        max_position=fields.integer("max_position_embeddings", 131072),
        expert_format="mxfp4" if quantization.data else "bf16",
        eos_ids=_stops(fields.data.get("eos_token_id"), vocab),
        **_rope(fields),
    )


def _original(fields: _Fields, experts: Literal["mxfp4", "bf16"]) -> ModelConfig:
    context = fields.integer("initial_context_length", 4096)
    factor = fields.number("rope_scaling_factor", _ORIGINAL_STRETCH)
    return ModelConfig(
        **_shape(fields, "num_experts", "experts_per_token"),
        windowed=_windowed(fields, fields.integer("num_hidden_layers")),
        rope_theta=fields.number("rope_theta", 150000.0),
        rope_factor=factor,
        rope_beta_fast=fields.number("rope_ntk_beta", 32.0),
        rope_beta_slow=fields.number("rope_ntk_alpha", 1.0),
        rope_original_context=context,
        max_position=int(context * factor),
        expert_format=experts,
        eos_ids=_stops(None, fields.integer("vocab_size")),
    )


def _shape(fields: _Fields, experts: str, top_k: str) -> dict[str, Any]:
    """The fields that both forms share, under ModelConfig's names."""
    return {
        "num_layers": fields.integer("num_hidden_layers"),
        "hidden": fields.integer("hidden_size"),
        "intermediate": fields.integer("intermediate_size"),
        "num_heads": fields.integer("num_attention_heads"),
        "num_kv_heads": fields.integer("num_key_value_heads"),
        "head_dim": fields.integer("head_dim", 64),
        "num_experts": fields.integer(experts),
        "experts_per_token": fields.integer(top_k),
        "vocab_size": fields.integer("vocab_size"),
        "sliding_window": fields.integer("sliding_window", 128),
        "swiglu_limit": fields.number("swiglu_limit", 7.0),
    }


def _windowed(fields: _Fields, layers: int) -> tuple[bool, ...]:
    """Even layers attend to the window, odd ones to everything, unless `layer_types` says otherwise."""
    kinds = fields.data.get("layer_types")
    if kinds is None:
        return tuple(i % 2 == 0 for i in range(layers))
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ConfigError(f"field layer_types must list {layers} times one of {', '.join(known)}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _rope(fields: _Fields) -> dict[str, Any]:
    """YaRN's parameters, from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta`."""
    modern = fields.data.get("rope_parameters") is not None
    rope = fields.section("rope_parameters" if modern else "rope_scaling")
    theta = (rope if "rope_theta" in rope.data else fields).number("rope_theta", 150000.0)
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_factor": 1.0}
    if kind != "yarn":
        raise ConfigError(f"field {rope.prefix}rope_type is {kind!r}; 'yarn' and 'default' are supported")
    factor = rope.number("factor")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.data.get(name) is not None and not (
                name == "attention_factor" and math.isclose(rope.number(name), 0.1 * math.log(factor) + 1)):
            raise ConfigError(f"field {rope.prefix}{name} asks for another temperature than YaRN's 0.1 "
                              "ln(factor) + 1, which is not supported")
    return {
        "rope_theta": theta,
        "rope_factor": factor,
        "rope_beta_fast": rope.number("beta_fast", 32.0),
        "rope_beta_slow": rope.number("beta_slow", 1.0),
        "rope_original_context": rope.integer(
            "original_max_position_embeddings", fields.integer("max_position_embeddings", 131072)),
        "rope_truncate": bool(rope.data.get("truncate", True)),  # absent means true in transformers
    }


def _stops(eos: Any, vocab: int) -> tuple[int, ...]:
    """Ids that end a generation: what the config lists, and in harmony's vocabulary also its other two."""
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int or token < 0 for token in listed):
        raise ConfigError(f"field eos_token_id must be a token id or a list of them, found {eos!r}")
    stops = (*listed, *(_HARMONY_STOPS if vocab == O200K_HARMONY else ()))
    return tuple(dict.fromkeys(token for token in stops if token < vocab))


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
