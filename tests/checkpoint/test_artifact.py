"""An artifact comes back as it was written; every change to it is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gptoss_compile import artifact as module
from gptoss_compile.artifact import TOKENIZER, Artifact, ArtifactError, ArtifactWriter
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.config import Bucket
from gptoss_compile.pack import add_weights


def write(path: Path, make: SimpleNamespace, seed: int, mode: str = "pack") -> Checkpoint:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    with ArtifactWriter(path) as writer:
        make.describe(writer, checkpoint.config)
        for bucket in ("decode-1", "extend-32x2"):
            writer.write(f"plans/{bucket}.json", json.dumps({"bucket": bucket}).encode())
        writer.add_file("kernels/embed.cubin").write_bytes(bytes(range(256)))
        writer.write(TOKENIZER, b"IQ== 0\n")
        add_weights(mode, checkpoint, [make.recipes(checkpoint)], writer)
    return checkpoint


@pytest.fixture
def path(tmp_path: Path, seed: int, make: SimpleNamespace) -> Path:
    write(tmp_path / "out" / "artifact", make, seed)
    return tmp_path / "out" / "artifact"


def refused(path: Path, *names: str, target: str | None = None) -> None:
    with pytest.raises(ArtifactError) as error:
        Artifact.open(path, target=target)
    message = str(error.value).replace(str(path.parent), "")  # pytest's folder is named after the test
    for name in names:
        assert name.replace(str(path.parent), "") in message, f"{name!r} not named in: {message}"
    assert "\n" not in message


@pytest.mark.parametrize("mode", ["pack", "link", "random:5"])
def test_round_trip(tmp_path: Path, seed: int, mode: str, make: SimpleNamespace) -> None:
    checkpoint = write(tmp_path / "artifact", make, seed, mode)
    artifact = Artifact.open(tmp_path / "artifact", target="cpu")
    assert artifact.config == checkpoint.config and artifact.target == "cpu" and artifact.has_tokenizer
    assert artifact.buckets == (Bucket.decode(1), Bucket.extend(32, 2))
    assert (artifact.page_size, artifact.max_context, artifact.window_ring) == (16, 128, 3)
    assert artifact.weights == {"pack": "files"}.get(mode, mode) and artifact.ranks == 1
    assert artifact.plan(Bucket.extend(32, 2)) == {"bucket": "extend-32x2"}
    assert artifact.file("kernels/embed.cubin").read_bytes() == bytes(range(256))
    with pytest.raises(ArtifactError, match="kernels/other"):
        artifact.file("kernels/other")
    if mode == "random:5":
        checkpoint = Checkpoint.random(checkpoint.config, 5)
    found = dict(artifact.open_weights())
    assert found.keys() == checkpoint.logical.keys()
    for name, array in found.items():
        expected = checkpoint.read(name)
        bits = (expected.view(torch.uint16) if expected.dtype == torch.bfloat16 else expected).numpy()
        assert array.dtype == bits.dtype and np.array_equal(array, bits), name


def test_equal_input_gives_equal_bytes(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, make, seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6
    for rel in files:
        assert (tmp_path / "a" / rel).read_bytes() == (tmp_path / "b" / rel).read_bytes(), rel


def test_flipped_byte_in_any_file(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        data = file.read_bytes()
        places = {0, len(data) - 1, *rng.sample(range(len(data)), min(len(data), 40))}
        for at in places if file.name == "manifest.json" else sorted(places)[:3]:
            flipped = bytearray(data)
            flipped[at] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            refused(path, file.name if file.name != "manifest.json" else str(path))
        file.write_bytes(data)
    Artifact.open(path)


def test_white_space_and_order_in_the_manifest_count(path: Path) -> None:
    manifest = path / "manifest.json"
    text = manifest.read_text()
    for changed in (text + " ", text.replace("\n ", "\n\t", 1), json.dumps(json.loads(text))):
        manifest.write_text(changed)
        refused(path, "manifest.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"schema": "1"}', '{"schema": true}',
                                     "[" * 9999])
def test_manifest_that_is_none(path: Path, content: str) -> None:
    (path / "manifest.json").write_text(content)
    refused(path, "manifest.json", "damaged")


def test_truncated(path: Path) -> None:
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        data = file.read_bytes()
        for size in (0, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            refused(path, file.name, "damaged" if file.name == "manifest.json" else "truncated")
        file.write_bytes(data)


def test_missing_and_extra(path: Path) -> None:
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        aside = path.parent / "aside"
        file.rename(aside)
        refused(path, file.name)
        aside.rename(file)
    for rel in ("extra", "kernels/extra.cubin", "new/extra"):
        (path / rel).parent.mkdir(exist_ok=True)
        (path / rel).write_bytes(b"")
        refused(path, rel, "not in its manifest")
        (path / rel).unlink()
    Artifact.open(path)


@pytest.mark.parametrize(("step", "age"), [(1, "newer"), (-1, "older")])
def test_another_schema_is_named_before_anything_else(path: Path, step: int, age: str) -> None:
    """Whatever else a newer version changes, digest and files included, the message says what is the matter.
    """
    (path / "manifest.json").write_text(json.dumps({"schema": module.SCHEMA + step, "whatever": 1}))
    refused(path, f"schema {module.SCHEMA + step}", age)


def test_wrong_target(path: Path) -> None:
    refused(path, "cpu", "sm90", target="sm90")


@pytest.mark.parametrize("kind", ["listed", "manifest", "extra", "folder", "dangling"])
def test_link_that_leaves(path: Path, kind: str) -> None:
    outside = path.parent / "outside"
    if kind in ("listed", "manifest"):
        file = path / ("manifest.json" if kind == "manifest" else "kernels/embed.cubin")
        file.rename(outside)
    elif kind == "folder":
        file = path / "kernels"
        file.rename(outside)
    else:
        file = path / "stray"
        if kind == "extra":
            outside.write_bytes(b"")
    file.symlink_to(outside)
    refused(path, file.name, "leaves the directory")


def test_pipe(path: Path) -> None:
    (path / "kernels/embed.cubin").unlink()
    os.mkfifo(path / "kernels/embed.cubin")
    refused(path, "kernels/embed.cubin", "no plain file")


def test_link_that_stays_is_the_file(path: Path) -> None:
    (path / "kernels/embed.cubin").rename(path / "kernels/other.cubin")
    (path / "kernels/embed.cubin").symlink_to("other.cubin")
    refused(path, "kernels/other.cubin")  # only because nobody listed that


@pytest.mark.parametrize("damage", ["gone", "missing", "flipped", "truncated", "extra"])
def test_damaged_pack(tmp_path: Path, seed: int, damage: str, make: SimpleNamespace) -> None:
    write(tmp_path / "artifact", make, seed, "link")
    (pack,) = (tmp_path / "cache" / "packs").iterdir()
    shard = pack / "model-00001.safetensors"
    change: dict[str, Callable[[], Any]] = {
        "gone": lambda: shutil.rmtree(pack),
        "missing": shard.unlink,
        "flipped": lambda: shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1])),
        "truncated": lambda: os.truncate(shard, 100),
        "extra": lambda: (pack / "extra").write_bytes(b""),
    }
    change[damage]()
    refused(tmp_path / "artifact", str(pack))


def test_only_a_whole_artifact_replaces_an_older_one(path: Path, seed: int, make: SimpleNamespace) -> None:
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(KeyError), ArtifactWriter(path) as writer:
        writer.write("plans/x.json", b"{}")
        raise KeyError
    assert (path / "manifest.json").read_bytes() == before
    Artifact.open(path)
    write(path, make, seed + 1)
    assert (path / "manifest.json").read_bytes() != before
    Artifact.open(path)
    assert [item.name for item in path.parent.iterdir()] == ["artifact"]


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    (tmp_path / "file").write_text("1")
    for name in ("thesis", "file"):
        with pytest.raises(ArtifactError, match=name), ArtifactWriter(tmp_path / name):
            pass
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"


def test_the_runtime_side_needs_no_torch() -> None:
    code = "import sys, gptoss_compile.artifact, gptoss_compile.weights; print(sorted(sys.modules))"
    root = str(Path(__file__).parents[2])
    loaded = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=True,
                            capture_output=True, text=True).stdout
    assert "'gptoss_compile.safetensors_io'" in loaded
    assert "'torch'" not in loaded and "'triton'" not in loaded and "'safetensors'" not in loaded
