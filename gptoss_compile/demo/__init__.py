"""The demo checkpoint: small, but of GPT-OSS's true architecture, vocabulary and file layout.

Its weights come with the project (see `packed`, and docs/demo-model.md for how they were trained).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import ModelConfig
from gptoss_compile.demo import packed
from gptoss_compile.layouts import placements
from gptoss_compile.logical import TensorInfo
from gptoss_compile.paths import atomic_directory, cache_dir
from gptoss_compile.safetensors_io import DTYPES, encode_header


def build_demo(folder: Path | None = None) -> Path:
    """The folder of the demo checkpoint, which is written unless it is there. By default in the user's cache.
    """
    folder = folder or cache_dir() / f"demo-{version()}"
    if not (folder / "config.json").exists():
        save_huggingface(source(), folder)
    return folder


def source() -> Checkpoint:
    """The demo's weights. Raises CheckpointError if their file is missing or damaged."""
    return packed.bundled()


def version() -> str:
    """Part of the demo folder's name, so that an older demo is not taken for this one."""
    return packed.CHECKSUM.read_text()[:12]


def save_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint in the layout of the published ones: config.json, generation_config.json and one
    model.safetensors. The folder appears whole or not at all."""
    config = checkpoint.config
    places = placements(config, "huggingface")
    infos = {places[name].name: TensorInfo(places[name].shape, info.dtype)
             for name, info in checkpoint.logical.items()}
    header = encode_header({name: (DTYPES[info.dtype], info.shape) for name, info in infos.items()})
    with atomic_directory(folder) as fresh:
        with open(fresh / "model.safetensors", "wb") as file:
            file.write(header)
            for name in checkpoint.logical:
                tensor = checkpoint.read(name)
                if places[name].transposed:
                    tensor = tensor.transpose(1, 2)
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        _write_json(fresh / "config.json", huggingface_config(config))
        _write_json(fresh / "generation_config.json", _generation_config(config))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, field for field as in openai/gpt-oss-20b."""
    data: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": config.eos_ids[0] if config.eos_ids else None,
        "experts_per_token": config.experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initial_context_length": config.rope_original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "layer_types": [f"{'sliding' if windowed else 'full'}_attention" for windowed in config.windowed],
        "max_position_embeddings": config.max_position,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "pad_token_id": 199999 if config.vocab_size > 199999 else None,
        "rms_norm_eps": config.rms_eps,
        "rope_scaling": {
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_context,
            "rope_type": "yarn",
            "truncate": config.rope_truncate,
        },
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.expert_format == "mxfp4":
        data["quantization_config"] = {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                       "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        }
    return data


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    return {"do_sample": True, "eos_token_id": list(config.eos_ids)}
