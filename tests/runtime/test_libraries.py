"""Steps that call a library's function: a small one for the CPU in a kernel's place, on a driver made of host memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.expected import expected_step, tensors_of
from gptoss_compile.launch_plan import Extern, KernelLaunch, LaunchPlan
from gptoss_compile.runtime import cuda_driver
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.libraries import load_function
from gptoss_compile.runtime.rank_cuda import RESERVE
from gptoss_compile.target import Target

DECODE, EXTEND = Bucket.decode(1), Bucket.extend(24, 3, 8)
CONFIG = ModelConfig(
    num_layers=2, hidden=64, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    experts_per_token=2, vocab_size=96, sliding_window=16, windowed=(True, False), max_position=64,
    rope_original_context=32, eos_ids=(0,))
STREAM, CALL = 4321, Extern("rope-0123", "rope_table", ("positions", "inv_freq", "scale", "out0"))
META: dict[str, Any] = {"symbol": "rope_table", "target": "sm90"}
SOURCE = """
#include <cmath>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
using tvm::ffi::TensorView;
// out [T, 2, D/2]: (cos, sin) of position * frequency, times scale
void rope_table(TensorView positions, TensorView frequencies, double scale, TensorView out) {
    const int64_t tokens = positions.size(0), half = frequencies.size(0);
    TVM_FFI_ICHECK_EQ((int64_t)TVMFFIEnvGetStream(out.device().device_type, out.device().device_id), 4321) << "stream";
    TVM_FFI_ICHECK(out.device().device_type == kDLCUDA && out.ndim() == 3 && out.size(0) == tokens && out.size(1) == 2);
    TVM_FFI_ICHECK(out.stride(0) == 2 * half && out.stride(1) == half && out.stride(2) == 1);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < half; i++) {
            float angle = ((int32_t*)positions.data_ptr())[t] * ((float*)frequencies.data_ptr())[i];
            float* to = (float*)out.data_ptr() + 2 * half * t + i;
            to[0] = std::cos(angle) * scale, to[half] = std::sin(angle) * scale;
        }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_table, rope_table);
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("library") / "rope.cpp"
    path.write_text(SOURCE)
    include = tvm_ffi.libinfo.find_include_path()
    built = path.with_suffix(".so")
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", f"-I{include}", path, "-o", built], check=True)
    return built.read_bytes()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    request = Request(Target.parse("sm90"), "pack", (DECODE, EXTEND))
    return compile_checkpoint(Checkpoint.random(CONFIG, 3), None, request, tmp_path_factory.mktemp("cuda") / "artifact")


@pytest.fixture
def driver(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(memory=RESERVE + (64 << 20))
    fake.codes = {path.read_bytes(): path.stem for path in (artifact.path / "kernels").glob("*.cubin")}
    fake._cuStreamCreate = lambda flags: STREAM  # type: ignore[method-assign]
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    return fake


@pytest.fixture
def executor(artifact: Artifact, driver: FakeDriver) -> Iterator[CudaExecutor]:
    loaded = CudaExecutor.load(artifact, num_pages=40, max_num_seqs=8)
    yield loaded
    loaded.close()


def with_call(plan: LaunchPlan, call: Extern = CALL) -> LaunchPlan:
    """The plan with the function in its kernel's place, behind which nothing is launched programmatically."""
    steps = list(plan.steps)
    at = next(i for i, step in enumerate(steps) if step.op == "rope_table")
    first, *others = steps[at + 1].launches
    assert isinstance(first, KernelLaunch)
    steps[at] = replace(steps[at], launches=(call,))
    steps[at + 1] = replace(steps[at + 1], launches=(replace(first, pdl=False), *others))
    return LaunchPlan.loads(replace(plan, steps=tuple(steps)).dumps())


def files(code: bytes, **meta: str) -> dict[str, bytes]:
    return {f"{CALL.binary}.so": code, f"{CALL.binary}.json": json.dumps({**META, **meta}).encode()}


def test_a_call_survives_json(artifact: Artifact) -> None:
    plan = with_call(LaunchPlan.loads(artifact.file(f"plans/{EXTEND.name}.json").read_text()))
    assert [launch for step in plan.steps for launch in step.launches if isinstance(launch, Extern)] == [CALL]
    assert LaunchPlan.loads(plan.dumps()) == plan


def test_a_call_computes_in_its_place(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact,
                                      library: bytes) -> None:
    seed = int.from_bytes(os.urandom(3))
    print(f"seed {seed}")
    (expected,) = expected_step(artifact, EXTEND, tensors_of(artifact), seed)
    before = executor.graphs[EXTEND].programmatic
    plan = with_call(executor.plans[EXTEND])
    executor.install(EXTEND, [plan], files(library))
    assert executor.graphs[EXTEND].programmatic == before - 2, "neither to nor from it"
    inputs = {name.removeprefix("input."): a for name, a in expected.items() if name.startswith("input.")}
    driver.expect(plan, {str(c.key): executor.true_shape(c).shape for c in plan.caches} | {"sampled": (8,)})
    number = next(i for i, step in enumerate(plan.steps) if step.op == "rope_table")
    found = []
    executor.run_steps(EXTEND, inputs, lambda rank, at, step: found.append(executor.read(EXTEND, step.outputs[0]))
                       if at == number else None)
    assert np.allclose(found[0], expected[f"step.{number}.0"], atol=1e-6)


def refusal(executor: CudaExecutor, given: dict[str, bytes], call: Extern = CALL) -> str:
    with pytest.raises(CudaError) as caught:
        executor.install(EXTEND, [with_call(executor.plans[EXTEND], call)], given)
    return str(caught.value)


def test_what_is_wrong_with_a_library_is_said(executor: CudaExecutor, driver: FakeDriver, library: bytes,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(executor, files(library, target="sm100")) == (
        "library rope-0123 was compiled for sm100, the artifact for sm90")
    assert refusal(executor, files(b"nonsense")).startswith("loading library rope-0123 failed: ")
    text = refusal(executor, files(library), replace(CALL, args=CALL.args[1:]))
    assert text.startswith("launching extend-24x3 step ") and "(rope_table, kernel rope-0123) failed: " in text
    assert driver.capturing is None, "no capture is left open"
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    text = refusal(executor, files(library))
    assert "apache-tvm-ffi, and that is not installed: pip install 'gptoss-compile[extern]'" in text


def test_a_process_that_calls_it_has_no_pytorch(library: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rope.so"
    path.write_bytes(library)
    code = ("import sys; from pathlib import Path; from gptoss_compile.runtime.libraries import load_function\n"
            f"print(load_function('rope', Path({str(path)!r}).read_bytes(), {META!r}))\n"
            "print(sorted({'torch', 'triton', 'numpy.f2py'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert callable(load_function("rope", library, META))
