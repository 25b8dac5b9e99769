"""bench/extern_attention.py with a function for the CPU in FlashInfer's place: an error is of the layer that makes it."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_scripts import bench
from fake_cuda import FakeDriver

from gptoss_compile.artifact import Artifact, plan_file
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.dialect import OPS
from gptoss_compile.launch_plan import Extern, KernelLaunch, LaunchPlan
from gptoss_compile.runtime import cuda_driver, rank_cuda
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.target import Target

CONFIG = ModelConfig(  # a window, full, a window again, full again
    num_layers=4, hidden=64, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    experts_per_token=2, vocab_size=96, sliding_window=16, windowed=(True, False, True, False), max_position=256,
    rope_original_context=32, eos_ids=(0,))
EXTEND = Bucket.extend(24, 3, 3)
NAME, LENGTHS = "attention-0123", (24, 100)  # the last chunk of 100 has 4 tokens and padding


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    request = Request(Target.parse("sm90"), "random:1", (Bucket.decode(1), EXTEND))
    return compile_checkpoint(Checkpoint.random(CONFIG, 3), None, request, tmp_path_factory.mktemp("extern") / "ours")


def with_calls(plan: LaunchPlan) -> LaunchPlan:
    """The plan with a function in the place of every attention, behind which nothing is launched programmatically."""
    steps = list(plan.steps)
    for at, step in enumerate(steps):
        if step.op == "attention":
            first, *others = steps[at + 1].launches
            assert isinstance(first, KernelLaunch)
            call = Extern(NAME, "attention", (*step.operands, "out0"))
            steps[at] = replace(step, kernel="flashinfer_attention", launches=(call,))
            steps[at + 1] = replace(steps[at + 1], launches=(replace(first, pdl=False), *others))
    return LaunchPlan.loads(replace(plan, steps=tuple(steps)).dumps())


@pytest.fixture(scope="module")
def theirs(ours: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("extern") / "theirs"
    shutil.copytree(ours.path, folder)
    plan = folder / plan_file(EXTEND, 0)
    plan.write_text(with_calls(LaunchPlan.loads(plan.read_text())).dumps())
    (folder / "kernels" / f"{NAME}.so").write_bytes(b"")
    (folder / "kernels" / f"{NAME}.json").write_text(json.dumps({"symbol": "attention", "target": "sm90"}))
    return Artifact(folder, ours.manifest)


@pytest.fixture
def driver(ours: Artifact, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Its kernels are their twins; it is told which plan comes."""
    fake = FakeDriver(memory=rank_cuda.RESERVE + (8 << 20))
    fake.codes = {path.read_bytes(): path.stem for path in (ours.path / "kernels").glob("*.cubin")}
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    upload = CudaExecutor.upload

    def told(self: CudaExecutor, bucket: Bucket, inputs: Any) -> None:
        fake.expect(self.plans[bucket], {str(c.key): self.true_shape(c).shape for c in self.plans[bucket].caches})
        upload(self, bucket, inputs)

    monkeypatch.setattr(CudaExecutor, "upload", told)
    return fake


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench, for which a layer takes ours 2 µs and theirs 1."""
    found = bench("extern_attention", monkeypatch)

    def time_twice(executor: CudaExecutor, bucket: Bucket, again: Any) -> float:
        attentions = [step for number, step in enumerate(executor.plans[bucket].steps) if number in again]
        return 1 + sum(1e-3 if step.kernel == "flashinfer_attention" else 2e-3 for step in attentions)

    monkeypatch.setattr(found, "time_twice", time_twice)
    return found


def view(tensor: Any) -> torch.Tensor:
    """A library's argument as what it is here: host memory."""
    raw = (ctypes.c_uint8 * (int(tensor.numel()) * (2 if str(tensor.dtype) == "bfloat16" else 4))).from_address(
        tensor.data_ptr())
    return torch.frombuffer(raw, dtype=getattr(torch, str(tensor.dtype))).view(*tensor.shape)


def measure(module: ModuleType, ours: Artifact, theirs: Artifact, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch,
            capsys: pytest.CaptureFixture[str], wrong: int | None = None) -> tuple[int, dict[str, Any]]:
    """The bench's exit status and JSON. wrong: the window whose layers' attention is."""
    pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")

    def attention(*arguments: Any) -> None:
        if driver.capturing is not None:
            return
        *tensors, window, scale, out = arguments
        result = OPS["attention"].reference(*map(view, tensors), window, scale)
        if window == wrong:
            result[..., ::2] *= 2
        view(out).copy_(result)

    monkeypatch.setattr(rank_cuda, "load_function", lambda *_: attention)
    monkeypatch.setattr(module.Artifact, "open", lambda path: ours if path == ours.path else theirs)
    lengths = ",".join(map(str, LENGTHS))
    monkeypatch.setattr(sys, "argv", ["extern_attention.py", str(ours.path), str(theirs.path), f"--lengths={lengths}"])
    status = module.main()
    out = capsys.readouterr().out
    print(out)
    assert not driver.blocks, "everything was given back"
    return status, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("wrong", [None, 16, 0])
def test_an_error_is_of_its_own_layer(module: ModuleType, ours: Artifact, theirs: Artifact, driver: FakeDriver,
                                      monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                      wrong: int | None) -> None:
    """The full layer's is not that of the windowed one before it, nor of where its routers send tokens for it."""
    status, result = measure(module, ours, theirs, driver, monkeypatch, capsys, wrong)
    assert (status, result["good"]) == (int(wrong is not None), wrong is None)
    assert [(row["length"], row["window"]) for row in result["rows"]] == [(n, w) for n in LENGTHS for w in (16, 0)]
    for row in result["rows"]:
        assert row["error"] > 0.5 if row["window"] == wrong else row["error"] == 0, row
        assert (row["kernel"], row["ours"], row["theirs"]) == ("flashinfer_attention", 2.0, 1.0)
    keys = [f"tokens=24 sequences=3 heads=4 kv_heads=2 window={window}" for window in (16, 0)]
    assert result["entries"] == {key: {"kernel": "flashinfer_attention"} for key in keys}


@pytest.mark.parametrize("other", ["steps", "inputs"])
def test_two_that_differ(module: ModuleType, ours: Artifact, theirs: Artifact, tmp_path: Path, driver: FakeDriver,
                          monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: str) -> None:
    """Of another model, or of another --max-context."""
    shutil.copytree(theirs.path, tmp_path / "other")
    path = tmp_path / "other" / plan_file(EXTEND, 0)
    plan = LaunchPlan.loads(path.read_text())
    path.write_text(replace(plan, **{other: getattr(plan, other)[:-1]}).dumps())
    artifact = Artifact(tmp_path / "other", theirs.manifest)
    monkeypatch.setattr(module.Artifact, "open", lambda path: ours if path == ours.path else artifact)
    monkeypatch.setattr(sys, "argv", ["extern_attention.py", str(ours.path), str(artifact.path)])
    assert module.main() == 1
    assert f"extend-24x3 of {artifact.path} has other {other} than OURS" in capsys.readouterr().err
    assert not driver.blocks, "everything was given back"
