"""Engines on the stand-in of an executor, for tests of the engine."""

from __future__ import annotations

import time

from fake_executor import FakeExecutor

from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def make_engine(**options: object) -> Engine:
    engine = Engine(FakeExecutor(**options), max_num_seqs=8, max_num_batched_tokens=256)  # type: ignore[arg-type]
    engine.start()
    return engine


def until(condition, timeout: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
