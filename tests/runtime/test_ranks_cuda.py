"""The CUDA executor of several ranks, on a host made of memory whose GPUs compute at their own pace. See fake_host.py."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from cuda.bindings import driver as real
from fake_host import FakeHost
from two_ranks import CONFIG, FEW, MANY, PROMPT, TWO, compile_for_two, learn

from gptoss_compile import gumbel
from gptoss_compile.artifact import Artifact
from gptoss_compile.config import Bucket
from gptoss_compile.expected import expected_step, tensors_of
from gptoss_compile.launch_plan import Operand
from gptoss_compile.runtime import exchange_cuda, server
from gptoss_compile.runtime.check import check_bucket
from gptoss_compile.runtime.cuda_driver import CudaError
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.exchange_cuda import HEADER
from gptoss_compile.runtime.executor import load_executor
from gptoss_compile.runtime.executor_cuda import CudaExecutor
from gptoss_compile.runtime.outputs import EngineError
from gptoss_compile.runtime.sampling_params import SamplingParams


@pytest.fixture
def artifact(two_ranks: Artifact) -> Artifact:
    return two_ranks


@pytest.fixture
def executor(artifact: Artifact, host: FakeHost) -> Iterator[CudaExecutor]:
    loaded = CudaExecutor.load(artifact, num_pages=80, max_num_seqs=30)
    yield loaded
    loaded.close()


def expect(host: FakeHost, executor: CudaExecutor, bucket: Bucket, times: int = 1) -> None:
    for rank in executor.ranks:
        plan = rank.plans[bucket]
        shapes = {str(cache.key): rank.true_shape(cache).shape for cache in plan.caches}
        host.expect(rank.number, plan, {**shapes, "sampled": (rank.rows,)}, times)


def step_inputs(artifact: Artifact, bucket: Bucket, seed: int) -> dict[str, Any]:
    expected, _ = expected_step(artifact, bucket, tensors_of(artifact), seed)
    return {name.removeprefix("input."): a.copy() for name, a in expected.items() if name.startswith("input.")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """With BF16 experts, whose features are shared one by one."""
    config = replace(CONFIG, expert_format="bf16", intermediate=75)
    return compile_for_two(tmp_path_factory.mktemp("bf16") / "artifact", config)


# ---- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [FEW, MANY, PROMPT], ids=str)
def test_computes_what_the_interpreter_computes(executor: CudaExecutor, host: FakeHost, artifact: Artifact,
                                                bucket: Bucket) -> None:
    seed = int.from_bytes(os.urandom(3))
    print(f"seed {seed}")
    expected = expected_step(artifact, bucket, tensors_of(artifact), seed)
    expect(host, executor, bucket, 7)
    report = check_bucket(executor, bucket, expected, replays=3)
    assert report.good, report.faults
    assert max(c.element for c in report.comparisons) == 0 and report.chain == 0 and report.replays == 3
    assert {(c.rank, c.op) for c in report.comparisons} >= {(rank, "all_gather") for rank in (0, 1)}
    assert len(report.comparisons) == sum(len(s.outputs) for rank in executor.ranks for s in rank.plans[bucket].steps)


@pytest.mark.parametrize("bucket", [TWO, MANY, PROMPT], ids=str)
def test_computes_with_experts_in_bf16(host: FakeHost, plain: Artifact, bucket: Bucket) -> None:
    learn(host, plain)
    with closing(CudaExecutor.load(plain, num_pages=80, max_num_seqs=30)) as executor:
        expect(host, executor, bucket, 7)
        report = check_bucket(executor, bucket, expected_step(plain, bucket, tensors_of(plain), 3), replays=3)
    assert report.good and max(c.element for c in report.comparisons) == 0, report.faults


def test_a_wrong_buffer_names_its_rank(executor: CudaExecutor, host: FakeHost, artifact: Artifact) -> None:
    expected = expected_step(artifact, FEW, tensors_of(artifact), 1)
    wrong = next(i for i, step in enumerate(executor.plans[FEW].steps) if step.op == "linear_partial")
    expected[1][f"step.{wrong}.0"] = expected[1][f"step.{wrong}.0"] * np.float32(1.5)
    expect(host, executor, FEW, 5)
    report = check_bucket(executor, FEW, expected, replays=1)
    assert report.faults[0].startswith(f"step {wrong} of rank 1 linear_partial ("), report.faults
    consumer = next(f for f in report.faults if "reduce_norm_route" in f)
    assert "of rank" in consumer, "a partial sum that was put in its place by hand goes to every rank"


def test_every_weight_is_the_ranks_part(executor: CudaExecutor, artifact: Artifact, host: FakeHost) -> None:
    cut = zeros = 0
    for rank in executor.ranks:
        plan = rank.plans[FEW]
        laid = {name: layout.sources[0] for layout in plan.layouts.values() for name in layout.sources}
        weights = {w.name: w for w in plan.weights}
        for name, array in artifact.open_weights(rank.number):
            if name in laid:
                first = laid[name]
                parts = host.machines[rank.number].laid[rank.weights.places[first]]
                found = parts[plan.layouts[first].sources.index(name)].numpy()
                assert np.array_equal(found, array.reshape(-1).view(np.uint8)), name
            else:
                found = executor.read(FEW, Operand("weight", name, weights[name].dtype, weights[name].shape), rank.number)
                assert np.array_equal(found, array), name
            cut += bool(weights[name].cuts)
            zeros += not (weights[name].parts or weights[name].values)
    assert cut > 20 and zeros == 2 * CONFIG.num_layers


# ---- how a step is run ---------------------------------------------------------------------------------------------


def put(executor: CudaExecutor, bucket: Bucket, inputs: dict[str, Any], rows: int, columns: int) -> None:
    for name, array in executor.inputs(bucket).items():
        if name in inputs:
            array[...] = inputs[name]
    executor.submit(bucket, rows, columns)


def test_a_step_is_few_driver_calls_on_each_gpu(executor: CudaExecutor, host: FakeHost, artifact: Artifact) -> None:
    inputs = step_inputs(artifact, FEW, 2)
    wanted = np.stack([gumbel.words(0, CONFIG.vocab_size, 0)] * 3)
    expect(host, executor, FEW, 4)
    logits = executor.run(FEW, inputs).copy()
    for rows, tables in ((0, []), (3, ["cuMemcpy2DAsync"])):
        host.calls.clear()
        put(executor, FEW, {**inputs, "words": wanted}, rows, 4 if rows else 0)
        assert executor.result().tolist() == logits.argmax(-1).tolist()
        calls = [call for call in host.calls if "Event" not in call[0] and "Query" not in call[0]]
        per_rank = ["cuMemcpyHtoDAsync", *tables, "cuGraphLaunch"]
        assert [name for name, rank in calls if rank == 1 and name != "cuCtxSetCurrent"] == per_rank
        assert [name for name, rank in calls if rank == 0 and name != "cuCtxSetCurrent"] == [*per_rank, "cuMemcpyDtoHAsync"]
        assert sum(name == "cuCtxSetCurrent" for name, _ in calls) == 3, "which costs time too"
    assert np.array_equal(executor.logits([0, 2]), logits[[0, 2]])


def test_ranks_share_inputs_and_pages(executor: CudaExecutor, host: FakeHost) -> None:
    assert executor.device_name == "2 x Fake GPU"
    assert len({id(executor.inputs(FEW)["tokens"]) for _ in executor.ranks}) == 1
    pages = [rank.true_shape(rank.plans[FEW].caches[1]).shape for rank in executor.ranks]
    assert [shape[0] for shape in pages] == [executor.num_pages] * 2 == [81, 81]
    assert [shape[2] for shape in pages] == [2, 1], "key/value heads"


def test_pools_are_those_of_the_fullest_gpu(artifact: Artifact, host: FakeHost) -> None:
    host.machines[1].memory -= 210 << 20
    scarce = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=5000)
    host.machines[1].memory += 210 << 20
    scarce.close()
    ample = CudaExecutor.load(artifact, num_pages=None, max_num_seqs=5000)
    assert scarce.num_pages < ample.num_pages
    ample.close()
    assert not any(machine.blocks for machine in host.machines), "everything was given back"


@pytest.mark.parametrize("ahead", [False, True])
def test_the_engine_serves(executor: CudaExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """The same answers whether it runs a step ahead or not."""
    answers = serve(executor, host, monkeypatch, ahead)
    assert answers == serve(executor, host, monkeypatch, not ahead) and [len(a) for a in answers] == [8, 8]


def serve(executor: CudaExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> list[tuple[int, ...]]:
    start = CudaExecutor._start

    def expected(self: CudaExecutor, bucket: Bucket, rows: int, columns: int) -> None:
        follow(host, executor, bucket)
        start(self, bucket, rows, columns)

    with monkeypatch.context() as patch:
        patch.setattr(CudaExecutor, "_start", expected)
        patch.setattr(executor, "close", lambda: None)
        patch.setattr(executor, "runs_ahead", ahead)
        engine = Engine(executor, max_num_seqs=3, max_num_batched_tokens=24, enable_prefix_caching=False)
        params = SamplingParams(temperature=0.8, seed=4, max_tokens=8, ignore_eos=True)
        handles = [engine.submit(prompt, params) for prompt in (list(range(30)), [7, 8])]
        engine.start()
        found = [handle.result().token_ids for handle in handles]
        engine.shutdown()
    return found


def follow(host: FakeHost, executor: CudaExecutor, bucket: Bucket) -> None:
    expect(host, executor, bucket)


# ---- what may go wrong ---------------------------------------------------------------------------------------------


def refusal(artifact: Artifact) -> str:
    with pytest.raises(CudaError) as error:
        load_executor(artifact, num_pages=40, max_num_seqs=3)
    print(error.value)
    return str(error.value)


def test_too_few_gpus(artifact: Artifact, host: FakeHost) -> None:
    for machine in host.machines:
        machine.devices = 1
    text = refusal(artifact)
    assert text.startswith("this artifact was compiled for 2 GPUs, one a rank, but 1 is visible: ")
    assert "CUDA_VISIBLE_DEVICES" in text and "smaller --tp" in text


def test_gpus_that_do_not_reach_each_other(artifact: Artifact, host: FakeHost) -> None:
    host.apart.add((1, 0))
    text = refusal(artifact)
    assert text.startswith("GPU 1 (Fake GPU) has no access to the memory of GPU 0 (Fake GPU), through which ranks exchange")
    assert not any(machine.blocks for machine in host.machines)


def test_headers_say_who_and_where(executor: CudaExecutor, host: FakeHost) -> None:
    assert host.peers == {(0, 1), (1, 0)}
    areas = executor.ranks[0].areas
    for rank in executor.ranks:
        raw = rank.read(FEW, Operand("exchange", 0, "u8", (256,)))
        header = raw[: HEADER.itemsize].view(HEADER)[0]
        assert header["base"].tolist() == [*areas, *[0] * 6]
        assert (header["step"], header["rank"], header["ranks"], header["limit_ms"]) == (1, rank.number, 2, 1000)
        assert not raw[HEADER.itemsize :].any()
    assert (HEADER.fields["step"][1], HEADER.fields["report"][1], HEADER.itemsize) == (64, 80, 88)  # type: ignore[index]


def stall(executor: CudaExecutor, host: FakeHost, monkeypatch: pytest.MonkeyPatch, limit_ms: int) -> None:
    """From now on rank 1 does nothing; kernels wait for it for so long."""
    monkeypatch.setattr(exchange_cuda, "LIMIT_MS", limit_ms)
    for rank in executor.ranks:
        where = Operand("exchange", HEADER.fields["limit_ms"][1], "i32", (1,))  # type: ignore[index]
        rank.write(FEW, where, np.array([limit_ms], np.int32))
    host.stalled.add(1)


def test_a_rank_that_stalls_is_named(executor: CudaExecutor, host: FakeHost, artifact: Artifact,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = step_inputs(artifact, FEW, 2)
    expect(host, executor, FEW, 2)
    stall(executor, host, monkeypatch, 200)
    start = time.perf_counter()
    put(executor, FEW, inputs, 3, 4)
    with pytest.raises(CudaError, match=r"^rank 1 \(Fake GPU, GPU 1\) did not answer within 0.2 s, running decode-3$"):
        executor.result()
    assert time.perf_counter() - start >= 0.2
    held = len(host.machines[0].blocks)
    executor.close()
    assert len(host.machines[0].blocks) == held, "what may still be in use is left to the process's end"


def test_a_rank_that_fails_is_named(executor: CudaExecutor, host: FakeHost, artifact: Artifact) -> None:
    inputs = step_inputs(artifact, FEW, 2)
    expect(host, executor, FEW, 2)
    host.stalled.add(1)
    put(executor, FEW, inputs, 3, 4)
    host.machines[1].broken = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match=r"^rank 1 \(Fake GPU, GPU 1\) running decode-3 failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        executor.result()


def test_patience_ends_where_nobody_reports(executor: CudaExecutor, host: FakeHost, artifact: Artifact,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_cuda, "PATIENCE", 0.1)
    inputs = step_inputs(artifact, FEW, 2)
    expect(host, executor, FEW, 2)
    host.stalled |= {0, 1}
    put(executor, FEW, inputs, 3, 4)
    with pytest.raises(CudaError, match=r"^rank 0 \(Fake GPU, GPU 0\) did not finish within 0.1 s, running decode-3$"):
        executor.result()


@pytest.mark.parametrize(("reports", "culprit"), [
    ([2, 0, 2, 0], 1), ([3, 0, 1, 1], 0), ([2, 1, 2, 2], 1), ([0, 0, 4, 0], 3), ([2, 4, 0, 0], 3)])
def test_who_is_to_blame(reports: list[int], culprit: int) -> None:
    """A rank for which others waited and that did not wait itself; or the one for which most did."""
    exchange = object.__new__(exchange_cuda.Exchange)
    exchange.reports = np.array(reports, np.uint32)
    assert exchange._missed() == culprit


def test_the_engine_ends_with_a_rank(artifact: Artifact, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = CudaExecutor.load(artifact, num_pages=80, max_num_seqs=30)
    start = executor._start
    monkeypatch.setattr(executor, "_start", lambda *step: (follow(host, executor, step[0]), start(*step)))
    engine = Engine(executor, max_num_seqs=3, max_num_batched_tokens=24)
    engine.start()
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    handle = engine.submit([1, 2, 3], params)
    first = threading.Event()
    monkeypatch.setattr(engine._scheduler, "commit", told(engine._scheduler.commit, first))
    assert first.wait(10) and engine.healthy
    engine._inbox.put(lambda: stall(executor, host, monkeypatch, 200))
    with pytest.raises(EngineError, match=r"rank 1 \(Fake GPU, GPU 1\) did not answer within 0.2 s"):
        handle.result()
    assert not engine.healthy
    engine.shutdown()


def test_the_server_ends_with_a_rank(artifact: Artifact, host: FakeHost, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """A stalled rank: requests fail and /health tells so, then the process ends."""
    monkeypatch.setattr(server, "DEATH_TICKS", 20)  # time for a slow machine to ask
    loaded: list[CudaExecutor] = []
    start, init, ended = CudaExecutor._start, CudaExecutor.__init__, []

    def keep(self: CudaExecutor, *arguments: Any) -> None:
        init(self, *arguments)
        loaded.append(self)

    def followed(self: CudaExecutor, bucket: Bucket, rows: int, columns: int) -> None:
        follow(host, self, bucket)
        start(self, bucket, rows, columns)

    monkeypatch.setattr(CudaExecutor, "__init__", keep)
    monkeypatch.setattr(CudaExecutor, "_start", followed)
    with closing(server._listen("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(artifact.path), "--port", str(port), "--kv-pages", "60", "--max-num-seqs", "3"]
    thread = threading.Thread(target=lambda: ended.append(server.main(arguments)), daemon=True)
    thread.start()
    url, ask = f"http://127.0.0.1:{port}", {"model": "artifact", "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}
    while status(url) != 200:
        assert thread.is_alive()
        time.sleep(0.05)
    assert httpx.post(f"{url}/v1/completions", json=ask).status_code == 200
    stall(loaded[0], host, monkeypatch, 1000)
    answer = httpx.post(f"{url}/v1/completions", json=ask)
    assert answer.status_code == 503 and status(url) == 503
    thread.join(60)
    said = capsys.readouterr()
    assert ended == [1] and "rank 1 (Fake GPU, GPU 1) did not answer within 1.0 s" in said.err
    assert said.out.startswith("Taking 2 GPUs, one for each rank of artifact")


def status(url: str) -> int | None:
    try:
        return httpx.get(f"{url}/health").status_code
    except httpx.TransportError:
        return None


def told(call: Any, event: threading.Event) -> Any:
    def wrapped(*arguments: Any) -> Any:
        event.set()
        return call(*arguments)

    return wrapped
