"""The GPU benches on two GPUs that compute nothing."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from bench_scripts import bench, learn_kernels
from fake_cuda import Captured
from fake_host import FakeHost, Machine
from two_ranks import CONFIG, FEW, MANY, TWO

from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.runtime.executor_cuda import CudaExecutor

EXCHANGES = {  # of a yardstick, by kernel: two sums a layer, of which lm_head's is a launch of its own
    TWO: {"push": 4, "collect": 3, "exchange_slots": 1, "exchange_rows": 0, "all_gather": 1},
    FEW: {"push": 4, "collect": 2, "exchange_slots": 2, "exchange_rows": 0, "all_gather": 1},
    MANY: {"push": 0, "collect": 0, "exchange_slots": 0, "exchange_rows": 4, "all_gather": 1}}


class IdleMachine(Machine):
    """Its kernels do nothing, but for the generator's."""

    def task(self, captured: Captured) -> Callable[[], bool]:
        return super().task(captured) if captured.function.startswith("random_weights") else lambda: True


@pytest.mark.parametrize(("name", "options"), [
    ("decode", ["--tp=2", "--batches=3,8", "--contexts=100"]), ("prefill", ["--tp=2", "--lengths=20,60", "--rest=0"]),
    ("steps", ["--tp=2", "--batches=1", "--context=20", "--steps=10"]),
    ("kernels", ["--context=100"]), ("collectives", ["--tp=2", "--context=100", "--rows=1,96"])])
def test_benches_of_two_ranks(name: str, options: list[str], two_ranks: Artifact, host: FakeHost, read: Path,
                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for machine in host.machines:
        machine.__class__ = IdleMachine
        learn_kernels(machine.codes, read)
    module = bench(name, monkeypatch)
    monkeypatch.setattr(module, "SUSTAINED", 0.01, raising=False)
    monkeypatch.setattr(module, "matmul", lambda: None, raising=False)
    monkeypatch.setattr(module, "nccl", lambda *_: {1: 17.2, 96: 20.5}, raising=False)
    options += [f"--read={read}"] if name == "decode" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(two_ranks.path), *options])
    assert module.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = result.get("artifacts", [result])[0]
    assert result["gpu"] == "2 x Fake GPU"
    if name == "decode":
        (row,) = result["rows"]
        assert row["ratio"].keys() == {"chain", "early", "bytes", "alone"}
        assert result["ranks"] == 2 and row["bytes"] == max(row["gpu_bytes"]) == row["gpu_bytes"][0] > row["gpu_bytes"][1]
    if name == "collectives":
        assert [(b["rows"], b["sums"], b["us_alone"] is None) for b in result["buckets"]] == [
            (2, 4, True), (3, 4, True), (24, 4, False), (96, 4, False)]
    assert not any(machine.blocks for machine in host.machines), "everything was given back"


@pytest.mark.parametrize("bucket", [TWO, FEW, MANY], ids=str)
def test_the_yardstick_exchanges_as_the_step_does(bucket: Bucket, two_ranks: Artifact, host: FakeHost, read: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums are pushed where the next step looks for them; a step that sums up in a launch of its own does."""
    for machine in host.machines:
        learn_kernels(machine.codes, read)
    gpu = bench("gpu", monkeypatch)
    with closing(CudaExecutor.load(two_ranks, num_pages=80, max_num_seqs=30)) as executor:
        yardstick, found = gpu.Yardstick(executor, read), []
        for rank, reader in zip(executor.ranks, yardstick._readers, strict=True):
            kernels = []
            for step in rank.plans[bucket].steps:
                made = reader.launches("8192-4", bucket, gpu.Read(100_000, step=step))
                kernels.append([launch.function.split()[-1].partition("-8192")[0] for launch in made])
                for launch in made:
                    if "read_exchange" not in launch.function:
                        continue
                    operand = step.operands.get("partial", step.outputs[0])
                    vector, area, slots, count, _ = list(launch.keep[0])[1:6]
                    assert (area, slots) == (rank.areas[rank.number], rank.address(bucket, operand)) and vector
                    assert ctypes.c_uint32.from_address(count).value == bucket.tokens * CONFIG.hidden
            found.append([re.sub(r"-[0-9a-f]{16}$", "", name) for names in kernels for name in names])
    assert found[0] == found[1]
    reads = [name.removeprefix("8192-4-") for name in found[0]]
    ours = {name: reads.count(name) for name in ("push", "collect", "exchange_slots", "exchange_rows", "all_gather")}
    assert ours == EXCHANGES[bucket] and reads[-1] == "all_gather"


def test_startup_of_two_ranks(two_ranks: Artifact, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in host.machines:
        machine.__class__ = IdleMachine
    module = bench("startup", monkeypatch)
    result = module.measure(two_ranks.path, 2, 8, time.time())
    assert result["ranks"] == 2 and result["checked_weights"] > 10
    with pytest.raises(ValueError, match="--tp 4: it was compiled for 2"):
        module.measure(two_ranks.path, 4, 8, time.time())
