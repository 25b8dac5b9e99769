"""The engine one step ahead of its executor: when it is, what is dropped, and how often consumers are woken."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from engines import GREEDY, make_engine, until
from fake_executor import FakeExecutor

from gptoss_compile.runtime.engine import Engine


class Counting(FakeExecutor):
    """Runs ahead, takes two milliseconds a step, and notes how many steps were in flight with each that was submitted."""

    def __init__(self) -> None:
        super().__init__(ahead=True)
        self.together: list[int] = []
        self.sent: list[tuple[int, int]] = []

    def submit(self, bucket, rows, columns):  # type: ignore[no-untyped-def]
        super().submit(bucket, rows, columns)
        self.together.append(len(self.flights))
        self.sent.append((rows, columns))

    def execute(self) -> None:
        time.sleep(0.002)
        super().execute()


@pytest.mark.parametrize("extras", [{}, {"temperature": 0.8}, {"logprobs": 1}, {"temperature": 0.8, "top_p": 0.9},
                                    {"presence_penalty": 0.5}, {"min_tokens": 2}, {"logit_bias": {5: 1.0}}], ids=str)
def test_a_step_runs_ahead_unless_the_host_needs_its_logits(extras: dict[str, object]) -> None:
    params = replace(GREEDY, max_tokens=30, seed=3, **extras)  # type: ignore[arg-type]
    executor = Counting()
    engine = Engine(executor, max_num_seqs=4, max_num_batched_tokens=256)
    engine.start()
    got = engine.submit([4, 5], params).result()
    ahead = not extras or set(extras) == {"temperature"}
    assert executor.together == ([1] + [2] * 29 if ahead else [1] * 30)
    sent = [pair for pair in executor.sent if pair != (0, 0)]
    assert [columns for _, columns in sent] == [1, 1, 2], "tables go out for a bucket's first step, and when they change"
    alone = make_engine()
    assert got._replace(request_id="") == alone.submit([4, 5], params).result()._replace(request_id="")
    if ahead:
        with_logprobs = engine.submit([4, 5], replace(params, logprobs=0)).result()
        assert with_logprobs.token_ids == got.token_ids, "to ask for log-probabilities changes no token"
    engine.shutdown()
    alone.shutdown()


def test_a_sequence_that_ends_is_dropped_from_the_step_ahead() -> None:
    executor = Counting()
    engine = Engine(executor, max_num_seqs=4, max_num_batched_tokens=256)
    engine.start()
    free = engine.submit([1, 2, 3], replace(GREEDY, max_tokens=40)).result().token_ids
    stop = next(t for i, t in enumerate(free) if i > 8 and t not in free[:i])
    steps = len(executor.together)
    got = engine.submit([1, 2, 3], replace(GREEDY, max_tokens=40, stop_token_ids=(stop,))).result()
    assert got.token_ids == free[: free.index(stop) + 1] and got.stop_id == stop
    until(lambda: engine.stats().steps == len(executor.together))
    assert len(executor.together) == steps + len(got.token_ids) + 1, "one step too many, of which nothing is seen"
    assert engine.stats().generation_tokens == 40 + len(got.token_ids) and engine.stats().kv_pages_held == 0
    engine.shutdown()


def test_an_event_loop_is_woken_once_a_step() -> None:
    executor = Counting()
    engine = Engine(executor, max_num_seqs=8, max_num_batched_tokens=256)

    async def main() -> int:
        loop, calls = asyncio.get_running_loop(), 0
        passed = loop.call_soon_threadsafe

        def counted(*arguments):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return passed(*arguments)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        handles = [engine.submit([i], replace(GREEDY, max_tokens=30)) for i in range(8)]
        engine.start()
        assert all(len(output.token_ids) == 30 for output in await asyncio.gather(*(h.collect() for h in handles)))
        return calls

    assert asyncio.run(main()) <= engine.stats().steps + 1
    engine.shutdown()
