"""Makes the helpers of this folder importable by its tests, and what several files of them start from."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bench_scripts import BENCH
from fake_host import FakeHost
from two_ranks import compile_for_two, learn

from gptoss_compile.artifact import Artifact
from gptoss_compile.runtime import cuda_driver
from gptoss_compile.runtime.rank_cuda import RESERVE


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_for_two(tmp_path_factory.mktemp("tp") / "artifact")


@pytest.fixture
def host(two_ranks: Artifact, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """Two GPUs that know the kernels of `two_ranks`."""
    fake = FakeHost(2, RESERVE + (256 << 20))
    learn(fake, two_ranks)
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    return fake


@pytest.fixture(scope="session")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benches' kernels that read."""
    folder = tmp_path_factory.mktemp("read")
    subprocess.run([sys.executable, BENCH / "read_kernel.py", folder], check=True)
    return folder
