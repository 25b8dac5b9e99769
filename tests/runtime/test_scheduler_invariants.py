"""The scheduler's invariants under random operations."""

from __future__ import annotations

from fake_executor import FakeExecutor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_bench import Bench

from gptoss_compile.config import Bucket


class SchedulerMachine(RuleBasedStateMachine):
    """Small pages, windows and pools, so that a few operations reach every corner."""

    @initialize(
        page_size=st.sampled_from((1, 2, 4)),
        window=st.integers(1, 9),
        spare_pages=st.integers(0, 12),
        spare_window=st.integers(0, 12),
        sequences=st.integers(1, 5),
        budget=st.integers(1, 20),
        caching=st.booleans(),
        extend=st.sampled_from(((16, 1, 16), (16, 3, 4), (8, 8, 8), (20, 2, 2))),
        ahead=st.booleans(),
    )
    def build(
        self,
        page_size: int,
        window: int,
        spare_pages: int,
        spare_window: int,
        sequences: int,
        budget: int,
        caching: bool,
        extend: tuple[int, int, int],
        ahead: bool,
    ) -> None:
        span = -(-(window - 1) // page_size) + 1
        buckets = (Bucket.decode(1), Bucket.decode(4), Bucket("extend", 4, 1, 4), Bucket("extend", *extend))
        executor = FakeExecutor(
            buckets=buckets,
            page_size=page_size,
            window=window,
            max_context=40,
            num_pages=1 + 40 // page_size + spare_pages,
            num_window_pages=1 + span + spare_window,
        )
        self.bench = Bench(executor, max_num_seqs=sequences, budget=budget, caching=caching, ahead=ahead)
        self.total = 0

    @rule(length=st.integers(1, 30), family=st.integers(0, 2), max_tokens=st.integers(0, 9),
          priority=st.sampled_from((0, 0, 1)), score=st.booleans())
    def add(self, length: int, family: int, max_tokens: int, priority: int, score: bool) -> None:
        """Prompts of one family are prefixes of each other."""
        self.bench.add(
            [(i * (family + 3)) % 95 for i in range(length)], max_tokens, priority=priority, score=score
        )
        self.total += length + max_tokens

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    @precondition(lambda self: self.bench.arrivals)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = f"r{data.draw(st.integers(0, self.bench.arrivals - 1))}"
        request = self.bench.requests[request_id]
        finished = self.bench.scheduler.abort(request)
        if finished is None:
            assert request_id in self.bench.finished
        else:
            assert finished.reason == "abort"
            self.bench.finished[request_id] = finished

    @invariant()
    def pools(self) -> None:
        if hasattr(self, "bench"):
            self.bench.check_pools()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.drain(limit=100 + 20 * self.total)
        assert len(self.bench.finished) == self.bench.arrivals
        assert self.bench.cache.full.held == self.bench.cache.window.held == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None,
                                         suppress_health_check=list(HealthCheck))
