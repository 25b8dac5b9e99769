"""Every layout of one model gives the same logical weights, and they mean what transformers takes them to
mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_compile import dialect
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import ModelConfig
from gptoss_compile.config_parse import parse_config
from gptoss_compile.demo import save_huggingface

DATA = Path(__file__).parent / "data"


def same(left: Checkpoint, right: Checkpoint) -> None:
    assert dict(left.logical) == dict(right.logical)
    for name in left.logical:
        assert torch.equal(left.read(name).view(torch.uint8), right.read(name).view(torch.uint8)), name


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_all_layouts_agree(tmp_path: Path, seed: int, experts: str, make: SimpleNamespace) -> None:
    source = Checkpoint.random(make.config(seed, experts), seed)
    save_huggingface(source, tmp_path / "ours")
    make.original(source, tmp_path / "parent" / "original")
    make.huggingface(source, tmp_path / "single")
    make.huggingface(source, tmp_path / "sharded", 3)
    for folder in ("ours", "parent/original", "parent", "single", "sharded"):
        opened = Checkpoint.open(tmp_path / folder)
        assert opened.config == source.config
        same(opened, source)


def test_rows_are_slices(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    source = Checkpoint.random(make.config(seed, "bf16"), seed)
    for folder in (make.huggingface(source, tmp_path / "hf"), make.original(source, tmp_path / "original")):
        opened = Checkpoint.open(folder)
        for name, info in opened.logical.items():
            if info.shape[0] >= 2:
                expected = source.read(name)[1:2]
                assert torch.equal(opened.read_rows(name, 1, 2), expected), name
                assert torch.equal(source.read_rows(name, 1, 2), expected), name


def test_a_model_that_transformers_saved(tmp_path: Path, seed: int) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(
        num_hidden_layers=2, hidden_size=36, intermediate_size=20, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, vocab_size=64,
        sliding_window=16, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for dtype, ours in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model.to(dtype).save_pretrained(tmp_path / ours)
        opened = Checkpoint.open(tmp_path / ours)
        state = model.state_dict()
        assert opened.config.hidden == 36 and opened.config.expert_format == "bf16"
        assert opened.config.rope_factor == 32 and opened.config.rope_theta == 150000
        assert opened.logical["layers.1.gate_up.weight"].dtype == ours
        for logical, theirs in (("embed.weight", "model.embed_tokens.weight"),
                                ("lm_head.weight", "lm_head.weight"),
                                ("layers.1.q.bias", "model.layers.1.self_attn.q_proj.bias"),
                                ("layers.0.sinks", "model.layers.0.self_attn.sinks"),
                                ("layers.0.router.weight", "model.layers.0.mlp.router.weight"),
                                ("layers.1.gate_up.bias", "model.layers.1.mlp.experts.gate_up_proj_bias")):
            assert torch.equal(opened.read(logical), state[theirs]), logical
        for name in ("gate_up", "down"):
            expected = state[f"model.layers.1.mlp.experts.{name}_proj"].transpose(1, 2)
            assert torch.equal(opened.read(f"layers.1.{name}.weight"), expected)
        read = sum(opened.read(name).numel() for name in opened.logical)
        assert read == sum(parameter.numel() for parameter in model.parameters())


def test_mxfp4_means_what_transformers_says(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = Checkpoint.random(make.config(seed), seed)
    opened = Checkpoint.open(make.huggingface(source, tmp_path / "hf"))
    for name in ("layers.0.gate_up", "layers.0.down"):
        blocks, scales = opened.read(f"{name}.blocks"), opened.read(f"{name}.scales")
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        ours = dialect.mxfp4_dequantize(blocks, scales, torch.bfloat16)
        assert torch.equal(ours, theirs.transpose(1, 2))


def test_half_precision_is_widened(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    source = Checkpoint.random(make.config(seed), seed)
    folder = make.huggingface(source, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float16) if tensor.dtype == torch.bfloat16 else tensor
               for name, tensor in tensors.items()}, folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    assert opened.logical["norm.weight"].dtype == "fp32"
    assert torch.equal(opened.read("norm.weight"), source.read("norm.weight").to(torch.float16).float())


def test_published_configs() -> None:
    small, large = (parse_config(DATA / f"config-{size}.json", "bf16") for size in ("20b", "120b"))
    assert (small.num_layers, small.num_experts, large.num_layers, large.num_experts) == (24, 32, 36, 128)
    assert small.windowed[:2] == (True, False) and small.expert_format == "mxfp4" and not small.rope_truncate
    assert small.eos_ids == (200002, 199999, 200012)
    assert parse_config(DATA / "config-original.json", "mxfp4") == small


def test_rope_parameters_and_rope_scaling_mean_the_same(tmp_path: Path) -> None:
    data = json.loads((DATA / "config-20b.json").read_bytes())
    data["rope_parameters"] = {**data.pop("rope_scaling"), "rope_theta": data.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert parse_config(tmp_path / "config.json", "bf16") == parse_config(DATA / "config-20b.json", "bf16")
    del data["rope_parameters"]["truncate"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert parse_config(tmp_path / "config.json", "bf16").rope_truncate
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000}
    (tmp_path / "config.json").write_text(json.dumps(data))
    plain: ModelConfig = parse_config(tmp_path / "config.json", "bf16")
    assert plain.rope_factor == 1 and plain.rope_theta == 10000


def test_digest_follows_the_content(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    source = Checkpoint.random(make.config(seed), seed)
    first = make.huggingface(source, tmp_path / "a")
    digest = Checkpoint.open(first).digest()
    assert digest == Checkpoint.open(first).digest()  # the second time from the cache
    assert digest == Checkpoint.open(make.huggingface(source, tmp_path / "b")).digest()
    path = first / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert Checkpoint.open(first).digest() != digest
    assert Checkpoint.random(source.config, 1).digest() != Checkpoint.random(source.config, 2).digest()


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, seed: int, make: SimpleNamespace,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's snapshots are links to blobs beside them; those may leave the folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Checkpoint.random(make.config(seed), seed)
    written = make.huggingface(source, tmp_path / "hf", 2)
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / "0123456789012345678901234567890123456789"
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(snapshot.name)
    for file in written.iterdir():
        file.rename(repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    same(Checkpoint.open("some/model"), source)
