"""Artifacts of small models on a real GPU: every kernel of every plan against the interpreter, then as graphs.

The cases are compiled here if PyTorch and Triton are; else they come from $GPTOSS_GPU_CASES, made elsewhere by
bench/gpu_cases.py. The check itself runs in a process of its own, which must load neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_compile.runtime.cuda_driver import CudaError, Device

pytestmark = pytest.mark.gpu
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    try:
        device = Device.open("sm90")
    except CudaError as error:
        pytest.skip(f"no sm90 GPU: {error}")
    device.close()
    if folder := os.environ.get("GPTOSS_GPU_CASES"):
        return sorted(p for p in Path(folder).iterdir() if (p / "artifact").is_dir())
    if not all(map(importlib.util.find_spec, ("torch", "triton"))):
        pytest.skip("nothing to compile with here, and GPTOSS_GPU_CASES names no cases")
    made = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, BENCH / "gpu_cases.py", made], check=True)
    return sorted(made.iterdir())


def test_every_buffer_and_every_replay(cases: list[Path]) -> None:
    done = subprocess.run([sys.executable, BENCH / "gpu_check.py", *cases], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["good"] and len(result["cases"]) == len(cases) >= 4 and not result["imported"]
    for case in result["cases"]:
        kinds = {bucket["bucket"].split("-")[0] for bucket in case["buckets"]}
        assert kinds == {"decode", "extend"}
        assert all(b["replays"] == 1000 and b["programmatic_edges"] == b["launches"] - 2 for b in case["buckets"])


def test_another_architecture_is_refused(cases: list[Path]) -> None:
    with pytest.raises(CudaError, match=r"compiled for sm100, but the GPU here, .* is sm90"):
        Device.open("sm100")
