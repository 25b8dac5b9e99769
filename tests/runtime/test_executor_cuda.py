"""The CUDA executor on a driver made of host memory: places, graphs and messages. What a GPU computes is in tests/gpu."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real
from fake_cuda import FakeDriver

from gptoss_compile import gumbel
from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.expected import expected_step, tensors_of
from gptoss_compile.launch_plan import Operand
from gptoss_compile.runtime import cuda_driver
from gptoss_compile.runtime.check import check_bucket
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import load_executor
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.rank_cuda import RESERVE
from gptoss_compile.runtime.sampling_params import SamplingParams
from gptoss_compile.runtime.staging import upload_weights
from gptoss_compile.target import Target

DECODE, EXTEND = Bucket.decode(3), Bucket.extend(24, 3, 8)
CONFIG = ModelConfig(
    num_layers=2, hidden=64, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    experts_per_token=2, vocab_size=96, sliding_window=16, windowed=(True, False), max_position=64,
    rope_original_context=32, eos_ids=(0,))
STATUS = real.CUresult


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact for sm90 with stored weights."""
    folder = tmp_path_factory.mktemp("cuda")
    request = Request(Target.parse("sm90"), "pack", (DECODE, EXTEND))
    return compile_checkpoint(Checkpoint.random(CONFIG, 3), None, request, folder / "artifact")


@pytest.fixture
def driver(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(memory=RESERVE + (64 << 20))
    for path in (artifact.path / "kernels").glob("*.cubin"):
        fake.codes[path.read_bytes()] = path.stem
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    return fake


@pytest.fixture
def executor(artifact: Artifact, driver: FakeDriver) -> Iterator[CudaExecutor]:
    loaded = CudaExecutor.load(artifact, num_pages=40, max_num_seqs=8)
    yield loaded
    loaded.close()


def expect(driver: FakeDriver, executor: CudaExecutor, bucket: Bucket, times: int = 1) -> None:
    plan = executor.plans[bucket]
    shapes = {str(cache.key): executor.read(bucket, cache).shape for cache in plan.caches}
    shapes["sampled"] = (max(bucket.rows for bucket in executor.buckets),)
    driver.expect(plan, shapes, times)


@pytest.mark.parametrize("bucket", [DECODE, EXTEND], ids=str)
def test_computes_what_the_interpreter_computes(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact,
                                                bucket: Bucket) -> None:
    seed = int.from_bytes(os.urandom(3))
    print(f"seed {seed}")
    expected = expected_step(artifact, bucket, tensors_of(artifact), seed)
    expect(driver, executor, bucket, 7)
    report = check_bucket(executor, bucket, expected, replays=3)
    assert report.good, report.faults
    assert max(c.element for c in report.comparisons) == 0 and report.chain == 0 and report.replays == 3
    assert report.programmatic == report.launches - 2 > 10
    assert len(report.comparisons) == sum(len(step.outputs) for step in executor.plans[bucket].steps)


def test_a_wrong_buffer_is_found_where_it_is_made(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact) -> None:
    (expected,) = arrays = expected_step(artifact, DECODE, tensors_of(artifact), 1)
    wrong = next(i for i, step in enumerate(executor.plans[DECODE].steps) if step.op == "linear_residual")
    expected[f"step.{wrong}.0"] = expected[f"step.{wrong}.0"].copy()
    expected[f"step.{wrong}.0"][0, 5] += 40  # of a bf16's last bits
    expect(driver, executor, DECODE, 5)
    report = check_bucket(executor, DECODE, arrays, replays=1)
    kernel = executor.plans[DECODE].steps[wrong].launches[0].binary
    assert report.faults[0].startswith(f"step {wrong} linear_residual ({kernel}): out0 bf16[3, 64] is off by"), report.faults


def step_inputs(artifact: Artifact, bucket: Bucket, seed: int) -> dict[str, Any]:
    expected, = expected_step(artifact, bucket, tensors_of(artifact), seed)
    return {name.removeprefix("input."): a.copy() for name, a in expected.items() if name.startswith("input.")}


def test_another_plan_takes_a_buckets_place(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact) -> None:
    """One that needs more memory: it runs in its own, and the graph before still replays in what there was."""
    inputs, plan, before = step_inputs(artifact, DECODE, 3), executor.plans[DECODE], executor.graphs[DECODE]
    expect(driver, executor, DECODE, 3)
    logits, place = executor.run(DECODE, inputs).copy(), executor.address(DECODE, plan.logits)
    graph = executor.install(DECODE, [replace(plan, arena_bytes=1 << 20)], {})
    assert executor.graphs[DECODE] is graph and executor.address(DECODE, plan.logits) != place
    assert np.array_equal(executor.run(DECODE, inputs), logits)
    before.replay()
    before.close()


def put(executor: CudaExecutor, bucket: Bucket, inputs: dict[str, Any], rows: int, columns: int) -> None:
    for name, array in executor.inputs(bucket).items():
        if name in inputs:
            array[...] = inputs[name]
    executor.submit(bucket, rows, columns)


def test_a_step_is_few_driver_calls(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact) -> None:
    inputs = step_inputs(artifact, DECODE, 2)
    wanted = gumbel.NOTHING + np.zeros((3, 1), np.int32)
    wanted[0] = gumbel.words(0, CONFIG.vocab_size, 0)
    expect(driver, executor, DECODE, 5)
    logits = executor.run(DECODE, inputs).copy()
    assert logits.shape == (3, CONFIG.vocab_size) and logits.dtype == np.float32
    for rows, calls in ((0, []), (3, ["cuMemcpy2DAsync"])):
        driver.calls.clear()
        put(executor, DECODE, {**inputs, "words": wanted}, rows, 4 if rows else 0)
        assert executor.result().tolist() == [logits[0].argmax(), -1, -1]
        events = ["cuEventSynchronize", "cuEventRecord"]
        assert [name for name in driver.calls if name not in events] == [
            "cuCtxSetCurrent", "cuMemcpyHtoDAsync", *calls, "cuGraphLaunch", "cuMemcpyDtoHAsync"]
    driver.calls.clear()
    assert np.array_equal(executor.logits([0, 2]), logits[[0, 2]])
    assert driver.calls == ["cuMemcpyDtoHAsync"] * 2 + ["cuStreamSynchronize"]


def test_only_what_changed_is_copied(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact) -> None:
    """Rows and columns of the tables beyond what `submit` is told keep what they had."""
    expect(driver, executor, DECODE, 2)
    inputs = step_inputs(artifact, DECODE, 2)
    executor.run(DECODE, inputs)
    places = {str(operand.key): operand for operand in executor.plans[DECODE].inputs}
    changed = {name: inputs[name] + 1 for name in ("full_table", "window_table")}
    put(executor, DECODE, changed, 2, 3)
    executor.result()
    for name, part in (("full_table", np.s_[:2, :3]), ("window_table", np.s_[:2])):
        inputs[name][part] = changed[name][part]
        assert np.array_equal(executor.read(DECODE, places[name]), inputs[name])


def test_a_token_reaches_the_next_step_without_the_host(executor: CudaExecutor, driver: FakeDriver,
                                                        artifact: Artifact) -> None:
    """Two steps in flight, and more behind them, give what steps give that are told each token."""
    inputs, steps = step_inputs(artifact, DECODE, 7), 5
    used = inputs["positions"] >= 0
    count = int(used.sum())
    inputs["positions"][used] = 20 + np.arange(count)
    inputs["full_table"][used] = 1 + np.arange(count * inputs["full_table"].shape[1]).reshape(count, -1)
    inputs["window_table"][used] = inputs["full_table"][used, : inputs["window_table"].shape[1]]
    expect(driver, executor, DECODE, 2 * steps)
    now, wanted = {name: a.copy() for name, a in inputs.items()}, []
    for _ in range(steps):
        wanted.append(executor.run(DECODE, now).argmax(-1)[used].tolist())
        now["tokens"][used] = wanted[-1]
        now["positions"] += used
    words = np.stack([gumbel.words(0 if row else -1, CONFIG.vocab_size, 0) for row in used])
    put(executor, DECODE, {**inputs, "words": words}, 3, inputs["full_table"].shape[1])
    found = []
    for _ in range(steps - 1):
        inputs["positions"] += used
        rows = np.where(used, np.arange(3), -1)
        put(executor, DECODE, {"tokens": np.zeros(3), "positions": inputs["positions"], "source": rows}, 0, 0)
        found.append(executor.result()[used].tolist())
    found.append(executor.result()[used].tolist())
    assert found == wanted


@pytest.mark.parametrize("extras", [{}, {"temperature": 0.8}, {"logprobs": 2}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_the_engine_gets_the_same_with_a_step_ahead_and_without(
        executor: CudaExecutor, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, extras: dict[str, Any]) -> None:
    """Two answers at once, one of them after a prompt in several chunks."""
    replay = driver._cuGraphLaunch

    def replay_any(graph: Any, stream: Any) -> None:
        bucket = next(b for b, g in executor.graphs.items() if g.parts[0]._executable is graph)
        plan = executor.plans[bucket]
        shapes = {str(cache.key): executor.true_shape(cache).shape for cache in plan.caches}
        driver.expect(plan, {**shapes, "sampled": (8,)})
        replay(graph, stream)

    monkeypatch.setattr(driver, "_cuGraphLaunch", replay_any, raising=False)
    monkeypatch.setattr(executor, "close", lambda: None)
    params = SamplingParams(**{"temperature": 0.0, "seed": 4, "max_tokens": 12, "ignore_eos": True, **extras})
    answers = []
    for ahead in (False, True):
        executor.runs_ahead = ahead
        engine = Engine(executor, max_num_seqs=3, max_num_batched_tokens=24, enable_prefix_caching=False)
        handles = [engine.submit(prompt, params) for prompt in (list(range(30)), [7, 8])]
        engine.start()
        answers.append([handle.result()._replace(request_id="") for handle in handles])
        engine.shutdown()
    assert answers[0] == answers[1] and [len(answer.token_ids) for answer in answers[0]] == [12, 12]


def laid_out(executor: CudaExecutor) -> set[str]:
    """Weights that are not kept as they are stored, and of which a fake GPU knows no more than that."""
    return {name for layout in executor.plans[DECODE].layouts.values() for name in layout.sources}


def test_weights_arrive_whatever_the_size_of_a_chunk(artifact: Artifact, driver: FakeDriver,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_compile.runtime.staging.CHUNK", 1000)
    seen: list[tuple[int, int]] = []
    executor = load_executor_with(artifact, seen)
    weights = {w.name: w for w in executor.plans[DECODE].weights}
    for name, array in artifact.open_weights():
        if name not in laid_out(executor):
            found = executor.read(DECODE, Operand("weight", name, weights[name].dtype, weights[name].shape))
            assert np.array_equal(found, array), name
    assert seen[-1][0] == seen[-1][1] and [a for a, _ in seen] == sorted(a for a, _ in seen)
    executor.close()


def load_executor_with(artifact: Artifact, seen: list[tuple[int, int]]) -> CudaExecutor:
    return CudaExecutor.load(artifact, num_pages=40, max_num_seqs=8, progress=lambda *pair: seen.append(pair))


def test_random_weights_are_generated(tmp_path: Path, driver: FakeDriver) -> None:
    request = Request(Target.parse("sm90"), "random:5", (DECODE, EXTEND))
    artifact = compile_checkpoint(Checkpoint.random(CONFIG, 5), None, request, tmp_path / "artifact")
    for path in (artifact.path / "kernels").glob("*.cubin"):
        driver.codes[path.read_bytes()] = path.stem
    executor = CudaExecutor.load(artifact, num_pages=40, max_num_seqs=8)
    weights = {w.name: w for plan in executor.plans.values() for w in plan.weights}
    for name, array in artifact.open_weights():
        if name not in laid_out(executor):
            found = executor.read(DECODE, Operand("weight", name, weights[name].dtype, weights[name].shape))
            assert np.array_equal(found, array), name
    assert "cuEventRecord" not in driver.calls[: driver.calls.index("cuLaunchKernelEx")], "nothing is copied but constants"
    expected = expected_step(artifact, DECODE, tensors_of(artifact), 0)
    expect(driver, executor, DECODE, 5)
    report = check_bucket(executor, DECODE, expected, replays=1)
    assert report.good, report.faults
    executor.close()


def test_pages_fill_what_is_left_and_close_gives_all_back(artifact: Artifact, driver: FakeDriver) -> None:
    executor = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=5_000)
    assert executor.num_pages < 5_000 * 4, "the memory limits them, not the demand"
    left = driver.memory - driver.used - RESERVE
    assert 0 < left < 32 << 20, "of the 64 MiB beside the reserve, at least half is in use"
    executor.close()
    executor.close()
    assert not driver.blocks


def refusal(artifact: Artifact, **options: Any) -> str:
    options = {"num_pages": 40, "max_num_seqs": 8, **options}
    with pytest.raises(CudaError) as error:
        load_executor(artifact, **options)
    print(error.value)
    return str(error.value)


def test_refuses_an_old_driver(artifact: Artifact, driver: FakeDriver) -> None:
    driver.version = 12040
    text = refusal(artifact)
    assert "too old" in text and "CUDA 12.4" in text and "12.8" in text and "update" in text


@pytest.mark.parametrize("how", [{"devices": 0}, {"init": STATUS.CUDA_ERROR_NO_DEVICE}])
def test_refuses_a_machine_without_a_gpu(artifact: Artifact, driver: FakeDriver, how: dict[str, Any]) -> None:
    vars(driver).update(how)
    assert "sees none; check nvidia-smi" in refusal(artifact)


def test_refuses_another_architecture(artifact: Artifact, driver: FakeDriver) -> None:
    driver.capability = (10, 3)
    text = refusal(artifact)
    assert "compiled for sm90" in text and "Fake GPU" in text and "--target sm103" in text


def test_out_of_memory_says_what_for(artifact: Artifact, driver: FakeDriver) -> None:
    text = refusal(artifact, num_pages=10**7)
    assert "out of GPU memory: the KV cache (10000001 pages" in text and "GiB" in text and "held so far: " in text
    assert not driver.blocks, "a failed load keeps nothing"
    driver.memory = 50_000
    assert "out of GPU memory: weights need" in refusal(artifact)


def test_a_refused_launch_is_named(artifact: Artifact, driver: FakeDriver) -> None:
    capture = driver._cuStreamBeginCapture

    def fail_from_here(*arguments: Any) -> None:
        driver.failing["cuLaunchKernelEx"] = STATUS.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        capture(*arguments)

    driver._cuStreamBeginCapture = fail_from_here  # type: ignore[method-assign]
    text = refusal(artifact)
    assert "launching decode-3 step 0 (" in text and "kernel " in text and "LAUNCH_OUT_OF_RESOURCES (in words)" in text
    assert driver.capturing is None and not driver.blocks


def test_a_failure_while_running_is_named(executor: CudaExecutor, driver: FakeDriver, artifact: Artifact) -> None:
    expected, = expected_step(artifact, DECODE, tensors_of(artifact), 2)
    inputs = {name.removeprefix("input."): a for name, a in expected.items() if name.startswith("input.")}
    expect(driver, executor, DECODE, 2)
    driver.failing["cuStreamSynchronize"] = STATUS.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match=r"running decode-3 failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        executor.run(DECODE, inputs)
    with pytest.raises(CudaError, match=r"running decode-3 step 0 \(\w+, kernel \w+-\w+\) failed: CUDA_ERROR_ILLEGAL"):
        executor.run_steps(DECODE, inputs)
    driver.failing.clear()


def test_a_dropped_attribute_is_not_silent(artifact: Artifact, driver: FakeDriver) -> None:
    driver.drop_pdl = True
    assert "0 programmatic edges instead of" in refusal(artifact)


def test_without_a_driver_one_error_and_no_compiler(artifact: Artifact) -> None:
    """In a fresh process: the real package, no libcuda, neither torch nor triton."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    code = (
        "import sys, gptoss_compile.runtime\n"
        "from gptoss_compile.artifact import Artifact\n"
        "from gptoss_compile.runtime.executor import load_executor\n"
        "try:\n"
        f"    load_executor(Artifact.open({str(artifact.path)!r}), num_pages=None, max_num_seqs=1)\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, error)\n"
        "print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    error, modules = done.stdout.splitlines()
    assert error.startswith("CudaError this artifact was compiled for sm90, an NVIDIA GPU, but no NVIDIA driver is "
                            "installed here"), error
    assert modules == "[]"


def test_the_executor_imports_neither_torch_nor_triton_nor_cuda() -> None:
    code = ("import sys, gptoss_compile.runtime.check\n"
            "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'triton', 'cuda')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_bf16_is_widened_where_the_plan_computes_in_fp32(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_compile.runtime.staging.CHUNK", 128)
    device = cuda_driver.Device.open("sm90")
    bits = np.arange(3 * 40, dtype=np.uint16).reshape(3, 40) * 257
    place = device.allocate(4 * bits.size, "a weight")
    upload_weights(device, [("w", bits)], {"w": place}, {"w": "fp32"})
    found = np.ctypeslib.as_array((ctypes.c_uint32 * bits.size).from_address(place))
    assert np.array_equal(found, bits.reshape(-1).astype(np.uint32) << 16)
    device.close()
