"""Every defect of a checkpoint is refused with one error that names the file and the tensor or field."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_compile.artifact import ArtifactWriter
from gptoss_compile.checkpoint import Checkpoint, CheckpointError
from gptoss_compile.pack import add_weights

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path, seed: int, make: SimpleNamespace) -> Path:
    source = Checkpoint.random(make.config(seed), seed)
    written: Path = make.huggingface(source, tmp_path / "checkpoint", 2)
    return written


def edit(folder: Path, change: Callable[[Tensors], None], shard: str = SHARD) -> None:
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def refused(folder: Path, *names: str) -> None:
    with pytest.raises(CheckpointError) as error:
        opened = Checkpoint.open(folder)
        for name in opened.logical:
            opened.read(name)
    message = str(error.value).replace(str(folder.parent), "")  # pytest's folder is named after the test
    for name in names:
        assert name.replace(str(folder.parent), "") in message, f"{name!r} not named in: {message}"
    assert "\n" not in message


def test_the_fixture_is_sound(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    assert all(opened.read(name).shape == info.shape for name, info in opened.logical.items())


def pick(folder: Path, seed: int, dense: bool = True) -> str:
    """Some tensor of the first shard."""
    tensors = load_file(folder / SHARD)
    fitting = [name for name in tensors if (tensors[name].dtype != torch.uint8) == dense]
    return random.Random(seed).choice(sorted(fitting))


def test_missing_tensor(folder: Path, seed: int) -> None:
    name = pick(folder, seed)
    edit(folder, lambda tensors: tensors.pop(name))
    refused(folder, name, SHARD, "missing")
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    refused(folder, name, INDEX, "missing")


def test_missing_tensor_without_index(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    folder = make.original(Checkpoint.random(make.config(seed), seed), tmp_path / "original")
    edit(folder, lambda tensors: tensors.pop("block.0.attn.qkv.bias"), "model.safetensors")
    refused(folder, "block.0.attn.qkv.bias", "model.safetensors", "missing")


def test_extra_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mlp.gate": torch.zeros(2)}))
    refused(folder, "model.layers.0.mlp.gate", SHARD)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.layers.0.mlp.gate": SHARD}))
    refused(folder, "model.layers.0.mlp.gate", SHARD)


def test_misshapen_tensor(folder: Path, seed: int) -> None:
    name = pick(folder, seed)
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refused(folder, name, SHARD, "shape")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_wrong_dtype(folder: Path, seed: int, dtype: torch.dtype) -> None:
    name = pick(folder, seed)
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, name, SHARD, "dtype")


def test_wrong_dtype_of_blocks(folder: Path, seed: int) -> None:
    name = pick(folder, seed, dense=False)
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float32)}))
    refused(folder, name, SHARD, "dtype")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_value_that_is_not_finite(folder: Path, seed: int, value: str, dtype: torch.dtype) -> None:
    """One bad value anywhere in any tensor."""
    name = pick(folder, seed)

    def poison(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        flat = tensors[name].view(-1)
        flat[seed % len(flat)] = float(value)

    edit(folder, poison)
    refused(folder, name, SHARD, "NaN or infinity")


def test_value_that_is_not_finite_is_found_in_every_tensor(folder: Path, seed: int) -> None:
    for shard in sorted(path.name for path in folder.glob("*.safetensors")):
        sound = (folder / shard).read_bytes()
        for name, tensor in load_file(folder / shard).items():
            if tensor.dtype == torch.bfloat16:
                edit(folder, lambda tensors, name=name: tensors[name].view(-1)[-1:].fill_(torch.nan), shard)
                refused(folder, name, shard)
                (folder / shard).write_bytes(sound)


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_scale_that_is_not_finite(folder: Path, seed: int, scale: int) -> None:
    shard = next(path.name for path in folder.glob("*.safetensors")
                 if any(name.endswith("_scales") for name in load_file(path)))
    name = next(name for name in load_file(folder / shard) if name.endswith("_scales"))
    edit(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(scale), shard)
    refused(folder, name, shard, str(scale))


def test_truncated_shard(folder: Path, seed: int) -> None:
    path = folder / SHARD
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 5, header // 2, header, header + (len(data) - header) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(folder, SHARD, "truncated")
    path.write_bytes(data + b"\0")
    refused(folder, SHARD, "follow the last tensor")


def test_garbled_header(folder: Path, seed: int) -> None:
    """Any flipped header byte is an error or, in a place without meaning, harmless; never another exception.
    """
    path = folder / SHARD
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for at in random.Random(seed).sample(range(header), 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1:])
        try:
            Checkpoint.open(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)


def test_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    refused(folder, SHARD, "missing")


@pytest.mark.parametrize("escape", ["dots", "absolute", "link"])
def test_index_that_points_outside(folder: Path, tmp_path: Path, escape: str) -> None:
    outside = shutil.copy(folder / SHARD, tmp_path / "outside.safetensors")
    (folder / SHARD).unlink()
    name = {"dots": "../outside.safetensors", "absolute": str(outside), "link": SHARD}[escape]
    if escape == "link":
        (folder / SHARD).symlink_to(outside)
    else:
        def redirect(index: dict[str, Any]) -> None:
            files = index["weight_map"]
            index["weight_map"] = {t: name if files[t] == SHARD else files[t] for t in files}

        edit_json(folder / INDEX, redirect)
    refused(folder, name, INDEX, "leaves the folder")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_broken_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


@pytest.mark.parametrize("content", ["", "{\"hidden_size\": ", "[]", "null", "\xff"])
def test_config_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, "config.json")


@pytest.mark.parametrize(("field", "value"), [
    ("hidden_size", None), ("hidden_size", "64"), ("hidden_size", -1), ("hidden_size", 2.5),
    ("vocab_size", True), ("num_hidden_layers", None), ("num_local_experts", 0), ("num_attention_heads", []),
    ("model_type", "llama"), ("model_type", None),
    ("rms_norm_eps", "x"), ("rms_norm_eps", float("nan")), ("swiglu_limit", -7),
    ("rope_scaling", 3), ("rope_scaling", {"rope_type": "linear", "factor": 2}),
    ("rope_scaling", {"rope_type": "yarn"}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 32.0, "attention_factor": 1.0}),
    ("layer_types", ["chunked_attention"]), ("layer_types", "x"), ("tie_word_embeddings", True),
    ("attention_bias", False), ("eos_token_id", "stop"), ("quantization_config", {"quant_method": "awq"}),
    ("swiglu_alpha", 2.0), ("rope_theta", 0)])
def test_config_field(folder: Path, field: str, value: Any) -> None:
    def change(data: dict[str, Any]) -> None:
        if value is None:
            del data[field]
        else:
            data[field] = value

    edit_json(folder / "config.json", change)
    refused(folder, "config.json", "NaN" if value != value else field)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_config_of_another_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data.update(vocab_size=data["vocab_size"] + 1))
    refused(folder, "model.embed_tokens.weight", ".safetensors", "shape")


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(tmp_path / "nothing", "nothing")
    with pytest.raises(CheckpointError, match=r"openai/gpt-oss-20b .*cannot be downloaded"):
        Checkpoint.open("openai/gpt-oss-20b")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "safetensors")


def test_nothing_is_left_half_written(folder: Path, tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    """A bad value is found while packing; the artifact, the pack in the cache and their traces are gone."""
    shard = sorted(folder.glob("*.safetensors"))[-1].name
    name = next(t for t, tensor in load_file(folder / shard).items() if tensor.dtype == torch.bfloat16)
    edit(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(torch.inf), shard)
    checkpoint = Checkpoint.open(folder)
    out = tmp_path / "out"
    out.mkdir()
    for mode in ("pack", "link"):
        with pytest.raises(CheckpointError, match=name), ArtifactWriter(out / "artifact") as writer:
            make.describe(writer, checkpoint.config)
            add_weights(mode, checkpoint, [make.recipes(checkpoint)], writer)
    assert list(out.iterdir()) == []
    assert list((tmp_path / "cache" / "packs").iterdir()) == []
