"""Small checkpoints in every layout, written here with the safetensors library and names spelt out, so that
reading is
tested against something other than its own tables."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.demo import huggingface_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def seed() -> Iterator[int]:
    value = int.from_bytes(os.urandom(3))
    print(f"seed {value}")
    yield value


def make_config(seed: int, experts: str = "mxfp4") -> ModelConfig:
    """A random small model. BF16 sizes are no multiples of 32, so that nothing may rely on it."""
    rng = random.Random(seed)
    unit = 32 if experts == "mxfp4" else 6
    layers, kv_heads = rng.randint(1, 3), rng.randint(1, 2)
    return ModelConfig(
        num_layers=layers, hidden=unit * rng.randint(1, 3), intermediate=unit * rng.randint(1, 3),
        num_heads=kv_heads * rng.randint(1, 4), num_kv_heads=kv_heads, head_dim=rng.choice((8, 16)),
        num_experts=rng.randint(3, 5), experts_per_token=2, vocab_size=rng.randint(50, 99), sliding_window=16,
        windowed=tuple(i % 2 == 0 for i in range(layers)), expert_format=experts, eos_ids=())


def write_huggingface(source: Checkpoint, folder: Path, shards: int = 1) -> Path:
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    tensors = {}
    for logical in source.logical:
        name = names.get(logical, logical)
        for ours, theirs in (
                ("layers.", "model.layers."), (".attn_norm.", ".input_layernorm."),
                (".sinks", ".self_attn.sinks"),
                (".moe_norm.", ".post_attention_layernorm."), (".router.", ".mlp.router."),
                (".gate_up.weight", ".mlp.experts.gate_up_proj"), (".down.weight", ".mlp.experts.down_proj"),
                (".gate_up.", ".mlp.experts.gate_up_proj_"), (".down.", ".mlp.experts.down_proj_"),
                *((f".{x}.", f".self_attn.{x}_proj.") for x in "qkvo")):
            if ours in name and not (ours == "layers." and name.startswith("model.")):
                name = name.replace(ours, theirs)
        tensor = source.read(logical)
        swap = logical.endswith(("gate_up.weight", "down.weight"))
        tensors[name] = tensor.transpose(1, 2).contiguous() if swap else tensor
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(source.config)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
             for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_original(source: Checkpoint, folder: Path) -> Path:
    read, c = source.read, source.config
    tensors = {"embedding.weight": read("embed.weight"), "unembedding.weight": read("lm_head.weight"),
               "norm.scale": read("norm.weight")}
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}.", f"block.{i}."
        tensors |= {
            f"{theirs}attn.norm.scale": read(f"{ours}attn_norm.weight"),
            f"{theirs}attn.sinks": read(f"{ours}sinks"),
            f"{theirs}mlp.norm.scale": read(f"{ours}moe_norm.weight"),
            f"{theirs}mlp.mlp1_bias": read(f"{ours}gate_up.bias"),
            f"{theirs}mlp.mlp2_bias": read(f"{ours}down.bias"),
        }
        for kind in ("weight", "bias"):
            tensors[f"{theirs}attn.qkv.{kind}"] = torch.cat([read(f"{ours}{x}.{kind}") for x in "qkv"])
            tensors[f"{theirs}attn.out.{kind}"] = read(f"{ours}o.{kind}")
            tensors[f"{theirs}mlp.gate.{kind}"] = read(f"{ours}router.{kind}")
        for index, name in ((1, "gate_up"), (2, "down")):
            if c.expert_format == "bf16":
                tensors[f"{theirs}mlp.mlp{index}_weight"] = read(f"{ours}{name}.weight")
            else:
                for part in ("blocks", "scales"):
                    tensors[f"{theirs}mlp.mlp{index}_weight.{part}"] = read(f"{ours}{name}.{part}")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "num_hidden_layers": c.num_layers, "num_experts": c.num_experts,
        "experts_per_token": c.experts_per_token, "vocab_size": c.vocab_size, "hidden_size": c.hidden,
        "intermediate_size": c.intermediate, "swiglu_limit": 7.0,
        "head_dim": c.head_dim, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "sliding_window": c.sliding_window, "initial_context_length": 4096, "rope_theta": 150000,
        "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32}))
    return folder


def identity_recipes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [{"name": name, "parts": [name], "dtype": info.dtype, "shape": list(info.shape)}
            for name, info in checkpoint.logical.items()]


def describe(writer: Any, config: ModelConfig) -> None:
    writer.describe(target="cpu", config=config, buckets=[Bucket.decode(1), Bucket.extend(32, 2)],
                    page_size=16, max_context=128, window_ring=3, passes=[{"name": "fuse", "matches": 2}],
                    tools={"torch": "2"})


@pytest.fixture
def make() -> SimpleNamespace:
    """The helpers above, for test modules (which cannot import each other)."""
    helpers: dict[str, Callable[..., Any]] = {
        "config": make_config, "huggingface": write_huggingface, "original": write_original,
        "recipes": identity_recipes, "describe": describe}
    return SimpleNamespace(**helpers)
