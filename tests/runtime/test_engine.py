"""The engine from its users' side: iteration, abort, failure, shutdown, refusals, statistics."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from engines import GREEDY, make_engine, until
from fake_executor import FakeExecutor

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import load_executor
from gptoss_compile.runtime.outputs import EngineError, RequestOutput
from gptoss_compile.runtime.sampling_params import RequestError, SamplingParams


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.shutdown(drain=False)


class Gate(FakeExecutor):
    """Runs one step for every `open()`."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def open(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.permits.release()

    def run(self, bucket, inputs):  # type: ignore[no-untyped-def]
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        return super().run(bucket, inputs)


def test_outputs_come_one_by_one_and_add_up(engine: Engine) -> None:
    handle = engine.submit([1, 2, 3], replace(GREEDY, logprobs=2, prompt_logprobs=1))
    outputs = list(handle)
    total = RequestOutput.join(outputs)
    assert len(total.token_ids) == len(total.logprobs or ()) == 8 and total.finish_reason == "length"
    assert outputs[0].prompt_logprobs is not None and outputs[0].prompt_logprobs[0] is None
    assert len(outputs[0].prompt_logprobs) == 3 and all(o.prompt_logprobs is None for o in outputs[1:])
    assert all(o.finish_reason is None for o in outputs[:-1])
    first = (total.logprobs or ())[0]
    assert first.top[0] == (first.token_id, first.logprob) and len(first.top) == 2
    assert handle.prompt_tokens == 3 and list(handle) == []


def test_many_consumers_in_one_event_loop_and_a_slow_one(engine: Engine) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(20)]
    expected = [engine.submit(p, GREEDY).result().token_ids for p in prompts]

    async def consume(prompt: list[int], nap: float) -> RequestOutput:
        parts = []
        async for output in engine.submit(prompt, GREEDY):
            parts.append(output)
            await asyncio.sleep(nap)
        assert nap < 0.05 or len(parts) < 8, "outputs that pile up must come joined"
        return RequestOutput.join(parts)

    async def main() -> list[RequestOutput]:
        return await asyncio.gather(*(consume(p, 0.1 if i == 0 else 0) for i, p in enumerate(prompts)))

    assert [output.token_ids for output in asyncio.run(main())] == expected

    async def collected() -> RequestOutput:
        return await engine.submit(prompts[0], GREEDY).collect()

    assert asyncio.run(collected()).token_ids == expected[0]


def test_an_event_loop_that_closes_aborts_its_request() -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=4, max_num_batched_tokens=256)
    engine.start()

    async def leave() -> None:
        await asyncio.wait_for(anext(aiter(engine.submit([1], replace(GREEDY, max_tokens=500)))), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    executor.open(10)
    until(lambda: engine.stats().requests_running == 0)
    assert engine.healthy and engine.stats().generation_tokens < 10
    executor.open(10)
    assert engine.submit([1], replace(GREEDY, max_tokens=1)).result().finish_reason == "length"
    engine.shutdown()


def test_abort_while_waiting_running_and_finished() -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=256)
    engine.start()
    running = engine.submit([1] * 40, replace(GREEDY, max_tokens=100))
    waiting = engine.submit([2] * 40, GREEDY)
    executor.open(3)
    assert len(next(iter(running)).token_ids) >= 1
    waiting.abort()
    running.abort()
    executor.open(3)
    assert waiting.result() == RequestOutput(waiting.request_id, finish_reason="abort")
    assert running.result().finish_reason == "abort"
    until(lambda: engine.stats().requests_waiting == 0)
    assert engine.stats().kv_pages_held == 0
    running.abort()
    executor.open(50)
    assert engine.submit([3], GREEDY).result().finish_reason == "length"
    engine.shutdown()


def test_an_executor_that_fails_fails_everyone_once_and_clearly() -> None:
    executor = FakeExecutor()
    executor.fail_at = 5
    engine = Engine(executor, max_num_seqs=2, max_num_batched_tokens=256)
    handles = [engine.submit([i], replace(GREEDY, max_tokens=50)) for i in range(5)]
    assert not engine.healthy
    engine.start()
    for handle in handles:
        with pytest.raises(EngineError, match="must be restarted: RuntimeError: the device fell off the bus"):
            handle.result()
    assert not engine.healthy and isinstance(engine.error, EngineError)
    assert isinstance(engine.error.__cause__, RuntimeError)
    with pytest.raises(EngineError, match="fell off the bus"):
        engine.submit([1], GREEDY)
    stats = engine.stats()
    assert stats.kv_pages_held == stats.requests_running == stats.requests_waiting == 0 and executor.closed
    engine.shutdown()


def test_logits_that_are_not_numbers_are_an_error() -> None:
    class Broken(FakeExecutor):
        def run(self, bucket, inputs):  # type: ignore[no-untyped-def]
            logits = super().run(bucket, inputs)
            logits[:, 50] = np.nan
            return logits

    engine = Engine(Broken(), max_num_seqs=2, max_num_batched_tokens=256)
    engine.start()
    with pytest.raises(EngineError, match="largest logit is not finite"):
        engine.submit([1], GREEDY).result()
    engine.shutdown()


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown(drain: bool) -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=256)
    engine.start()
    handles = [engine.submit([i], GREEDY) for i in range(3)]
    assert executor.entered.acquire(timeout=5)
    stopper = threading.Thread(target=engine.shutdown, kwargs={"drain": drain})
    stopper.start()
    until(lambda: engine._closing)
    with pytest.raises(EngineError, match="shutting down"):
        engine.submit([1], GREEDY)
    executor.open(100)
    stopper.join(10)
    assert not stopper.is_alive() and executor.closed and not engine.healthy and engine.error is None
    assert {h.result().finish_reason for h in handles} == ({"length"} if drain else {"abort"})
    engine.shutdown()


def test_a_drain_can_be_cut_short() -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=256)
    engine.start()
    handle = engine.submit([1], replace(GREEDY, max_tokens=3000))
    draining = threading.Thread(target=engine.shutdown)
    draining.start()
    executor.open(3)
    until(lambda: engine.stats().steps == 3)
    cutting = threading.Thread(target=engine.shutdown, kwargs={"drain": False})
    cutting.start()
    time.sleep(0.05)
    executor.open(3)
    for thread in (draining, cutting):
        thread.join(10)
        assert not thread.is_alive()
    assert handle.result().finish_reason == "abort"


def test_an_engine_that_never_started_shuts_down() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=16)
    handle = engine.submit([1], GREEDY)
    engine.shutdown()
    assert executor.closed
    with pytest.raises(EngineError, match="before it was started"):
        handle.result()


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "prompt: must be a list of at least one token id"),
    ([1.5], "prompt: must be a list of at least one token id"),
    ([[1], [2, 3]], "prompt: must be a list of at least one token id"),
    ([1, 97], r"prompt: token ids must be in \[0, 97\), found 1 … 97"),
    ([-1], r"prompt: token ids must be in \[0, 97\)"),
    ([1] * 4096, "prompt: has 4096 tokens, but the context length leaves room for 4095; shorten"),
])
def test_prompts_that_cannot_be_served(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(prompt, GREEDY)
    assert caught.value.field == "prompt" and isinstance(caught.value, ValueError)


def test_the_pages_bound_a_request_that_the_context_would_allow() -> None:
    engine = make_engine(num_pages=1 + 4)
    assert engine.max_model_len == 64
    with pytest.raises(
        RequestError, match=r"has 64 tokens, but the KV cache \(--kv-pages\) leaves room for 63"
    ):
        engine.submit([1] * 64, GREEDY)
    assert engine.submit([1] * 64, replace(GREEDY, max_tokens=0)).result().finish_reason == "length"
    answer = engine.submit([1] * 10, replace(GREEDY, max_tokens=131072)).result()
    assert len(answer.token_ids) == 54 and answer.finish_reason == "length"
    assert len(engine.submit([1] * 60, replace(GREEDY, max_tokens=None)).result().token_ids) == 4
    engine.shutdown()


def test_stop_ids_end_ids_and_min_tokens(engine: Engine) -> None:
    prompt = list(range(10))
    free = engine.submit(prompt, replace(GREEDY, max_tokens=60)).result().token_ids
    stop = free[5]
    first = free.index(stop)
    got = engine.submit(prompt, replace(GREEDY, stop_token_ids=[stop])).result()  # type: ignore[arg-type]
    assert (got.token_ids, got.finish_reason, got.stop_id) == (free[: first + 1], "stop", stop)
    held = engine.submit(
        prompt, replace(GREEDY, max_tokens=60, stop_token_ids=(stop,), min_tokens=20)
    ).result()
    assert stop not in held.token_ids[:20] and len(held.token_ids) >= 20
    biased = replace(GREEDY, ignore_eos=False, logit_bias={96: 100})
    assert engine.submit(prompt, biased).result().stop_id == 96
    assert engine.submit(prompt, replace(biased, ignore_eos=True)).result().token_ids == (96,) * 8


def test_a_logits_processor_sees_what_was_generated(engine: Engine) -> None:
    seen: list[list[int]] = []

    prepared: list[list[int]] = []

    class OnlyNext:
        def __call__(self, generated, logits) -> None:  # type: ignore[no-untyped-def]
            seen.append(list(generated))
            allowed = logits[40 + len(generated)]
            logits[:] = -np.inf
            logits[40 + len(generated)] = allowed

        def prepare(self, generated) -> None:  # type: ignore[no-untyped-def]
            prepared.append(list(generated))

    got = engine.submit(
        [1], replace(GREEDY, temperature=1.0, logprobs=0), logits_processor=OnlyNext()
    ).result()
    assert got.token_ids == tuple(range(40, 48)) and seen[3] == [40, 41, 42]
    assert prepared == seen[1:], "it is told of each token before it is asked for the next"
    assert all(lp.logprob > -20 for lp in got.logprobs or ()), "log-probabilities are the model's own"


def test_statistics_prefix_hits_and_names(engine: Engine) -> None:
    assert engine.seconds_since_step == 0
    prompt = [i % 90 for i in range(300)]
    first = engine.submit(prompt, GREEDY, request_id="a").result()
    again = engine.submit(prompt, GREEDY, request_id="a").result()  # free again once it has finished
    salted = engine.submit(prompt, GREEDY, cache_salt="x").result()
    assert first.token_ids == again.token_ids == salted.token_ids
    assert (first.cached_tokens, again.cached_tokens, salted.cached_tokens) == (0, 288, 0)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generation_tokens) == (900, 288, 24)
    assert stats.kv_pages_held == 0 and stats.kv_pages_cached > 36 and stats.kv_pages_free > 8000


def test_a_late_abort_does_not_hit_the_next_request_of_that_name() -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=256)
    engine.start()
    executor.open(8)
    first = engine.submit([1], GREEDY, request_id="a")
    first.result()
    second = engine.submit([1], GREEDY, request_id="a")
    first.abort()
    executor.open(8)
    assert second.result().finish_reason == "length"
    engine.shutdown()


def test_a_name_in_use_is_refused() -> None:
    executor = Gate()
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=256)
    engine.start()
    engine.submit([1], GREEDY, request_id="a")
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.submit([1], GREEDY, request_id="a")
    executor.open(100)
    engine.shutdown()


def test_submitting_from_many_threads(engine: Engine) -> None:
    prompts = [[random.randrange(95) for _ in range(50)] for _ in range(40)]
    results: dict[int, RequestOutput] = {}

    def worker(start: int) -> None:
        for i in range(start, 40, 4):
            results[i] = engine.submit(prompts[i], GREEDY).result()

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [results[i].token_ids for i in range(40)] == [
        engine.submit(p, GREEDY).result().token_ids for p in prompts
    ]


def test_sampling_does_not_depend_on_the_batch(engine: Engine) -> None:
    params = SamplingParams(temperature=1.3, seed=11, max_tokens=40, ignore_eos=True)
    single = engine.submit([5, 6], params).result().token_ids
    handles = [engine.submit([i, i], replace(params, seed=i)) for i in range(12)]
    crowd = engine.submit([5, 6], params)
    assert crowd.result().token_ids == single
    assert len({h.result().token_ids for h in handles}) == 12
    unseeded = {engine.submit([5, 6], replace(params, seed=None)).result().token_ids for _ in range(3)}
    assert len(unseeded) == 3


def test_buckets_are_the_cheapest_that_fit() -> None:
    executor = FakeExecutor(
        buckets=(Bucket.decode(1), Bucket.decode(4), Bucket.extend(32, 4), Bucket.extend(256, 4))
    )
    engine = Engine(executor, max_num_seqs=4, max_num_batched_tokens=256)
    engine.start()
    engine.submit([1] * 280, replace(GREEDY, max_tokens=2)).result()
    assert [bucket.name for bucket, _ in executor.ran] == ["extend-256x4", "extend-32x4", "decode-1"]
    engine.shutdown()


def test_serving_loads_neither_torch_nor_triton() -> None:
    code = ("import sys, gptoss_compile.runtime.engine, gptoss_compile.runtime.executor; "
            "print([m for m in ('torch', 'triton', 'gptoss_compile.dialect') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_artifact_that_nothing_can_run_is_refused() -> None:
    with pytest.raises(ValueError, match="target 'gfx950', which this version compiles for but cannot serve"):
        load_executor(SimpleNamespace(target="gfx950"), num_pages=None, max_num_seqs=1)  # type: ignore[arg-type]
