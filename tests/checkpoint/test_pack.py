"""Packing: what is stored, that it is the same each time, that little memory is held and that a kill leaves
nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_compile import pack as module
from gptoss_compile.artifact import Artifact, ArtifactWriter
from gptoss_compile.checkpoint import Checkpoint, CheckpointError
from gptoss_compile.demo import save_huggingface
from gptoss_compile.pack import add_weights
from gptoss_compile.paths import atomic_directory
from gptoss_compile.random_weights import widen_bf16

MERGED = ["layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight"]


def merged_recipes(checkpoint: Checkpoint, dtype: str) -> list[dict[str, Any]]:
    c = checkpoint.config
    return [
        {"name": "rope", "values": [1.0, 0.1, 1e-7], "dtype": "fp32", "shape": [3]},
        {"name": "blocks", "parts": ["layers.0.down.blocks"], "dtype": "u8",
         "shape": list(checkpoint.logical["layers.0.down.blocks"].shape)},
        {"name": "qkv", "parts": MERGED, "dtype": dtype, "shape": [c.q_size + 2 * c.kv_size, c.hidden]},
    ]


def write(path: Path, checkpoint: Checkpoint, recipes: Any, make: SimpleNamespace, mode: str = "pack",
          progress: Any = None) -> Artifact:
    with ArtifactWriter(path) as writer:
        make.describe(writer, checkpoint.config)
        add_weights(mode, checkpoint, recipes, writer, progress)
    return Artifact.open(path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_recipes(tmp_path: Path, seed: int, dtype: str, make: SimpleNamespace,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are concatenated, dtypes converted, constants stored, and shards limited in size."""
    monkeypatch.setattr(module, "SHARD_BYTES", 1)  # so each weight gets a file of its own
    checkpoint = Checkpoint.random(make.config(seed), seed)
    progress: list[tuple[int, int]] = []
    artifact = write(tmp_path / "a", checkpoint, [merged_recipes(checkpoint, dtype)], make,
                     progress=lambda done, total: progress.append((done, total)))
    assert artifact.weight_files() == [tmp_path / f"a/weights/model-{i:05d}.safetensors" for i in (1, 2, 3)]
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1]
    stored = {name: tensor for path in artifact.weight_files() for name, tensor in load_file(path).items()}
    expected = torch.cat([checkpoint.read(name) for name in MERGED])
    assert torch.equal(stored["qkv"], expected if dtype == "bf16" else expected.float())
    assert stored["rope"].tolist() == torch.tensor([1.0, 0.1, 1e-7]).tolist()
    assert torch.equal(stored["blocks"], checkpoint.read("layers.0.down.blocks"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_random_mode_equals_packing(tmp_path: Path, seed: int, dtype: str, make: SimpleNamespace) -> None:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    recipes = [merged_recipes(checkpoint, dtype)]
    packed = dict(write(tmp_path / "a", checkpoint, recipes, make).open_weights())
    drawn = dict(write(tmp_path / "b", checkpoint, recipes, make, f"random:{seed}").open_weights())
    assert packed.keys() == drawn.keys()
    for name in packed:
        assert packed[name].dtype == drawn[name].dtype and np.array_equal(packed[name], drawn[name]), name
    if dtype == "bf16":
        wide = widen_bf16(packed["qkv"])
        assert np.array_equal(wide, torch.cat([checkpoint.read(name) for name in MERGED]).float().numpy())


def test_fp32_is_rounded_to_bf16(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    folder = make.huggingface(Checkpoint.random(make.config(seed), seed), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn(len(tensors["model.norm.weight"]))
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    recipe = {"name": "n", "parts": ["norm.weight"], "dtype": "bf16", "shape": [checkpoint.config.hidden]}
    (_, bits), = write(tmp_path / "a", checkpoint, [[recipe]], make).open_weights()
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16),
                       tensors["model.norm.weight"].to(torch.bfloat16))
    tensors["model.norm.weight"][0] = 3.4e38
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="norm"):
        write(tmp_path / "b", Checkpoint.open(folder), [[recipe]], make)


def test_a_scale_beyond_what_the_kernels_take(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    checkpoint, name = Checkpoint.random(make.config(seed), seed), "layers.0.down.scales"
    info = checkpoint.logical[name]
    largest = int(checkpoint.read(name).max())
    recipe = {"name": name, "parts": [name], "dtype": "u8", "shape": list(info.shape), "largest": largest}
    write(tmp_path / "a", checkpoint, [[recipe]], make)
    with pytest.raises(CheckpointError, match=rf"{name} holds the MXFP4 scale {largest}.* none above {largest - 1} "):
        write(tmp_path / "b", checkpoint, [[{**recipe, "largest": largest - 1}]], make)
    assert not (tmp_path / "b").exists()


def test_ranks_have_their_own_files(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    ranks = [[{"name": "x", "parts": [name], "dtype": "bf16", "shape": list(checkpoint.logical[name].shape)}]
             for name in MERGED]
    for mode in ("pack", "link", "random:1"):
        artifact = write(tmp_path / mode, checkpoint, ranks, make, mode)
        assert artifact.ranks == 3
        for rank, name in enumerate(MERGED):
            (_, found), = artifact.open_weights(rank)
            source = Checkpoint.random(checkpoint.config, 1) if mode == "random:1" else checkpoint
            assert np.array_equal(found, source.read(name).view(torch.uint16).numpy())


def test_link_packs_once(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    recipes = [make.recipes(checkpoint)]
    for name in ("a", "b"):
        artifact = write(tmp_path / name, checkpoint, recipes, make, "link")
        assert not (tmp_path / name / "weights").exists()
        if name == "a":
            stamp = artifact.weight_files()[0].stat().st_ino
    assert artifact.weight_files()[0].stat().st_ino == stamp
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    os.truncate(artifact.weight_files()[0], 99)  # noticed, and packed again
    assert dict(write(tmp_path / "c", checkpoint, recipes, make, "link").open_weights()).keys() == \
        checkpoint.logical.keys()
    other = Checkpoint.random(checkpoint.config, seed + 1)
    assert write(tmp_path / "d", other, recipes, make, "link").weight_files() != artifact.weight_files()
    assert len(list((tmp_path / "cache" / "packs").iterdir())) == 2


def test_the_safetensors_library_reads_packs(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    path, = write(tmp_path / "a", checkpoint, [make.recipes(checkpoint)], make).weight_files()
    assert load_file(path).keys() == checkpoint.logical.keys()


def test_every_array_is_aligned(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    """Whatever odd sizes come first."""
    checkpoint = Checkpoint.random(make.config(seed), seed)
    recipes = [{"name": f"{dtype}{i}", "values": [1.0] * 3, "dtype": dtype, "shape": [3]}
               for i in range(2) for dtype in ("u8", "bf16", "fp32", "i32")]
    for name, array in write(tmp_path / "a", checkpoint, [recipes], make).open_weights():
        assert array.flags.aligned and array.tolist() == [0x3F80 if name.startswith("bf16") else 1] * 3, name


@pytest.mark.parametrize("mode", ["zip", "random:", "random:x", "random:-1", ""])
def test_unknown_mode(tmp_path: Path, seed: int, mode: str, make: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="pack, link or random:SEED"):
        write(tmp_path / "a", Checkpoint.random(make.config(seed), seed), [[]], make, mode)


PACKING = """
import json, signal, sys, time
from gptoss_compile.artifact import ArtifactWriter
from gptoss_compile.checkpoint import Checkpoint, CheckpointError
from gptoss_compile.demo import save_huggingface
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.pack import add_weights
from gptoss_compile.paths import atomic_directory
folder, out, pause = sys.argv[1:]
checkpoint = Checkpoint.open(folder)
recipes = [{"name": n, "parts": [n], "dtype": i.dtype, "shape": list(i.shape)}
           for n, i in checkpoint.logical.items()]
def progress(done, total):
    print(done, total, flush=True)
    time.sleep(float(pause))
def peak():  # in KiB; ru_maxrss would count what the parent held when it forked
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
before = peak()
with ArtifactWriter(out) as writer:
    writer.describe(target="cpu", config=checkpoint.config, buckets=[Bucket.decode(1)], page_size=16,
                    max_context=128, window_ring=3, passes=[], tools={})
    add_weights("pack", checkpoint, [recipes], writer, progress)
print(json.dumps([before, peak()]))
"""


def packing(folder: Path, out: Path, pause: float) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", PACKING, str(folder), str(out), str(pause)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_kill_in_the_middle(tmp_path: Path, seed: int, how: signal.Signals, make: SimpleNamespace) -> None:
    """No artifact appears. After a kill that no process can answer, the next writer clears what was left."""
    checkpoint = Checkpoint.random(make.config(seed), seed)
    folder = make.huggingface(checkpoint, tmp_path / "hf")
    out = tmp_path / "out"
    process = packing(folder, out / "artifact", 60)
    assert process.stdout and process.stdout.readline()
    assert [item.name.split("-")[0] for item in out.iterdir()] == [".artifact.partial"]
    process.send_signal(how)
    assert process.wait(30) != 0
    assert not (out / "artifact").exists()
    if how == signal.SIGINT:
        assert list(out.iterdir()) == []
    write(out / "artifact", checkpoint, [make.recipes(checkpoint)], make)
    assert [item.name for item in out.iterdir()] == ["artifact"]


def test_many_writers_of_one_directory(tmp_path: Path) -> None:
    def write_some(number: int) -> None:
        for turn in range(30):
            with atomic_directory(tmp_path / "it") as folder:
                (folder / "who").write_text(f"{number} {turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_some, range(4)))
    assert [item.name for item in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it" / "who").read_text().endswith(" 29")


def test_two_writers_at_once_leave_each_other_alone(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    checkpoint = Checkpoint.random(make.config(seed), seed)
    with ArtifactWriter(tmp_path / "out" / "a") as slow:
        write(tmp_path / "out" / "a", checkpoint, [make.recipes(checkpoint)], make)
        make.describe(slow, checkpoint.config)
        add_weights("random:3", checkpoint, [make.recipes(checkpoint)], slow)
    assert Artifact.open(tmp_path / "out" / "a").weights == "random:3"
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.slow
def test_packing_holds_little_memory(tmp_path: Path, seed: int, make: SimpleNamespace) -> None:
    """A checkpoint of 1.1 GB, with tensors of 0.34 GB, is packed with 0.15 GB more than at the start."""
    config = dataclasses.replace(make.config(seed), num_layers=2, windowed=(True, False), hidden=1536,
                                 intermediate=1536, num_experts=144, head_dim=64)
    save_huggingface(Checkpoint.random(config, seed), tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 1e9
    started = time.monotonic()
    output, _ = packing(tmp_path / "hf", tmp_path / "out", 0).communicate(timeout=120)
    before, after = json.loads(output.splitlines()[-1])
    print(f"{size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s, resident {before / 1e3:.0f} MB "
          f"before, at most {after / 1e3:.0f} MB")
    assert after - before < 150_000
