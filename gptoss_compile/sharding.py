"""How a model is cut over ranks (tensor parallelism): what each rank computes and which slices of the weights it holds.

A rank has whole key/value heads with their query heads and sinks, a span of every expert's intermediate features, and a span
of the vocabulary's rows of lm_head. Spans are of whole units and differ by one unit at most: a unit is one kv head, what
`feature_unit` says of features, one row of lm_head. Norms, router and embedding are whole on every rank; the biases of what
gives partial sums, o and down, are rank 0's, and zeros elsewhere. Standard library only.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from gptoss_compile.config import MXFP4_BLOCK, ConfigError, ModelConfig
from gptoss_compile.launch_plan import Cut, LaunchPlan, Weight
from gptoss_compile.target import Target

Span = tuple[int, int]  # [start, stop)
STAGE_FEATURES = 96  # Hopper's kernels run MXFP4 experts in so many features, 192 rows of gate_up, at a time


def spans(units: int, ranks: int) -> list[Span]:
    """Each rank's share of `units`, in rank order, as even as whole units allow."""
    return list(pairwise(-(-units * rank // ranks) for rank in range(ranks + 1)))


def feature_unit(config: ModelConfig, target: Target) -> int:
    """Intermediate features that stay together: those of a stage of the target's kernels or of an MXFP4 block, else one."""
    if config.expert_format != "mxfp4":
        return 1
    return STAGE_FEATURES if target.name == "sm90" else MXFP4_BLOCK


def rank_config(config: ModelConfig, rank: int, ranks: int, target: Target) -> ModelConfig:
    """The model as a rank computes it: with its own numbers of heads and of intermediate features.

    Raises ConfigError if some rank would be left without a share, or if features are left over.
    """
    if ranks == 1:
        return config
    unit = feature_unit(config, target)
    if config.intermediate % unit:
        raise ConfigError(f"--tp {ranks}: for {target.name} MXFP4 experts are shared in {unit} features at a time, of which "
                          f"the model's {config.intermediate} are no multiple; compile with --tp 1, or for the cpu target")
    for name, units in (("key/value heads", config.num_kv_heads), ("rows of lm_head", config.vocab_size),
                        (_feature_units(unit), config.intermediate // unit)):
        if units < ranks:
            raise ConfigError(f"--tp {ranks}: the model has {units} {name}, fewer than ranks, and they are not copied; "
                              f"shard over at most {units}")
    kv_heads = _size(kv_span(config, rank, ranks))
    return replace(config, num_kv_heads=kv_heads, num_heads=kv_heads * config.heads_per_kv,
                   intermediate=_size(feature_span(config, rank, ranks, target)))


def kv_span(config: ModelConfig, rank: int, ranks: int) -> Span:
    """A rank's key/value heads."""
    return spans(config.num_kv_heads, ranks)[rank]


def feature_span(config: ModelConfig, rank: int, ranks: int, target: Target) -> Span:
    """A rank's intermediate features of every expert."""
    unit = 1 if ranks == 1 else feature_unit(config, target)
    start, stop = spans(config.intermediate // unit, ranks)[rank]
    return start * unit, stop * unit


def cut_of(name: str, config: ModelConfig, rank: int, ranks: int, target: Target) -> Cut | None:
    """A rank's part of the logical weight `name` of the whole model; None: all of it. See `is_zero` for biases."""
    heads, features = kv_span(config, rank, ranks), feature_span(config, rank, ranks, target)
    queries = _times(heads, config.heads_per_kv)
    module, _, kind = (name.split(".", 2)[2] if name.startswith("layers.") else name).partition(".")
    match module, kind:
        case "q", _:
            return Cut(0, *_times(queries, config.head_dim))
        case "k" | "v", _:
            return Cut(0, *_times(heads, config.head_dim))
        case "sinks", _:
            return Cut(0, *queries)
        case "o", "weight":
            return Cut(1, *_times(queries, config.head_dim))
        case "gate_up", _:  # rows of gate and up alternate
            return Cut(1, *_times(features, 2))
        case "down", "weight":
            return Cut(2, *features)
        case "down", "blocks" | "scales":
            return Cut(2, features[0] // MXFP4_BLOCK, features[1] // MXFP4_BLOCK)
        case "lm_head", _:
            return Cut(0, *spans(config.vocab_size, ranks)[rank])
    return None


def is_zero(name: str, rank: int) -> bool:
    """Whether a rank has zeros in place of this logical weight: a bias that the ranks' sum must hold once."""
    return rank > 0 and name.endswith((".o.bias", ".down.bias"))


def rank_plan(plan: LaunchPlan, config: ModelConfig, rank: int, ranks: int) -> LaunchPlan:
    """The plan of one rank, from one made for the same shapes with whole weights in its recipes.

    config: of the whole model.
    """
    if ranks == 1:
        return plan
    target = Target.parse(plan.target)
    return replace(plan, rank=rank, weights=tuple(_rank_weight(w, config, rank, ranks, target) for w in plan.weights))


def _rank_weight(weight: Weight, config: ModelConfig, rank: int, ranks: int, target: Target) -> Weight:
    if any(is_zero(part, rank) for part in weight.parts):
        return replace(weight, parts=())
    cuts = [cut_of(part, config, rank, ranks, target) for part in weight.parts]
    return replace(weight, cuts=tuple(cut for cut in cuts if cut is not None))


def _feature_units(unit: int) -> str:
    return {1: "intermediate features", MXFP4_BLOCK: "MXFP4 blocks of intermediate features"}.get(
        unit, f"groups of {unit} intermediate features")


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _size(span: Span) -> int:
    return span[1] - span[0]
