"""The scheduler as a state machine: invariants under random operations, and the rules one by one."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest
from fake_executor import FakeExecutor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.batch import StepInputs
from gptoss_compile.runtime.kv_cache import KVCache, PagePool
from gptoss_compile.runtime.prefix_cache import PrefixCache
from gptoss_compile.runtime.request import Finished, Request
from gptoss_compile.runtime.sampling_params import SamplingParams
from gptoss_compile.runtime.scheduler import Scheduler, Step


class Bench:
    """A scheduler driven by hand on a FakeExecutor, with its invariants checked around every step."""

    def __init__(
        self, executor: FakeExecutor, *, max_num_seqs: int = 8, budget: int = 256, caching: bool = True, ahead: bool = False
    ) -> None:
        executor.runs_ahead = ahead
        self.executor = executor
        self.cache = KVCache(executor)
        self.scheduler = Scheduler(executor.buckets, self.cache, PrefixCache(self.cache, enabled=caching),
                                   max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.inputs = StepInputs(executor, executor.config.vocab_size)
        self.flights: deque[Step] = deque()
        self.budget = budget
        self.arrivals = 0
        self.requests: dict[str, Request] = {}
        self.finished: dict[str, Finished] = {}

    def add(self, prompt: list[int], max_tokens: int = 4, *, priority: int = 0, score: bool = False,
            stop_ids: tuple[int, ...] = (96,)) -> Request:
        request = Request(
            f"r{self.arrivals}",
            list(prompt),
            len(prompt),
            SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=0 if score else None),
            max_tokens,
            0,
            frozenset(stop_ids),
            (priority, self.arrivals),
        )
        self.arrivals += 1
        self.requests[request.request_id] = request
        self.scheduler.add(request)
        return request

    def step(self) -> Step | None:
        """Schedule and start a step, and commit the oldest in flight, unless it may stay there alone."""
        step = None
        if not (self.flights and self.flights[-1].needs_host):
            step = self.scheduler.schedule()
        if step is not None:
            self.start(step)
        if self.flights and not (step and len(self.flights) == 1 and self.executor.runs_ahead):
            self.commit(self.flights.popleft())
        elif step is None:
            assert not self.scheduler.has_work
        return step

    def start(self, step: Step) -> None:
        self.check_step(step)
        self.check_pools()
        self.executor.submit(step.bucket, *self.inputs.build(step))
        for chunk in step.chunks:
            if chunk.scored:  # each position is scored once, in order
                assert chunk.scored.start == chunk.sequence.request.scored
        self.scheduler.start(step)
        self.flights.append(step)
        self.check_pools()

    def commit(self, step: Step) -> None:
        chosen = self.executor.result().tolist()
        ends = [row + len(chunk.scored) for chunk, row in zip(step.chunks, step.first_rows, strict=True)]
        tokens = [chosen[end] if chunk.samples else None for chunk, end in zip(step.chunks, ends, strict=True)]
        if step.needs_host:
            greedy = [end for chunk, end in zip(step.chunks, ends, strict=True)
                      if chunk.samples and chunk.sequence.request.params.greedy]
            assert self.executor.logits(greedy).argmax(-1).tolist() == [chosen[end] for end in greedy]
        for done in self.scheduler.commit(step, tokens):
            self.finished[done.request.request_id] = done
            assert done.request.scored == done.request.to_score, "a prompt position was never scored"
        self.check_pools()

    def drain(self, limit: int) -> None:
        for _ in range(limit):
            if self.step() is None and not (self.flights or self.scheduler.has_work):
                return
        raise AssertionError(f"still busy after {limit} steps: livelock")

    def check_step(self, step: Step) -> None:
        requests = [chunk.sequence.request for chunk in step.chunks]
        tokens, rows = sum(c.tokens for c in step.chunks), sum(c.rows for c in step.chunks)
        assert step.chunks and len({r.request_id for r in requests}) == len(requests)
        assert [r.rank for r in requests] == sorted(r.rank for r in requests)
        assert tokens <= min(step.bucket.tokens, self.budget) and rows <= step.bucket.rows
        assert (
            len(requests) <= step.bucket.sequences
            and self.scheduler.num_running <= self.scheduler.max_num_seqs
        )
        cheaper = [b for b in self.executor.buckets if b.tokens < step.bucket.tokens]
        assert not any(
            b.tokens >= tokens
            and b.sequences >= len(requests)
            and b.rows >= rows
            and (b.kind == "extend" or tokens == len(requests))
            for b in cheaper
        ), "not the cheapest bucket"
        size = self.cache.page_size
        for chunk in step.chunks:
            pages = chunk.sequence.pages
            assert 0 <= chunk.start < chunk.end <= chunk.sequence.request.length
            assert pages.window_start * size <= max(0, chunk.start - self.cache.window_tokens + 1)
            assert pages.end - pages.window_start <= self.cache.ring and pages.end * size >= chunk.end
            for page in range(chunk.start // size, self.cache.pages(chunk.end)):
                for pool, row in ((self.cache.full, pages.full_row), (self.cache.window, pages.window_row)):
                    written = int(row[page % len(row)])
                    assert pool.references[written] == 1 and written not in pool._key_of, (
                        "a shared page is written"
                    )

    def check_pools(self) -> None:
        full: Counter[int] = Counter()
        window: Counter[int] = Counter()
        for running in self.scheduler.running:
            pages = running.pages
            full.update(pages.full_row[: pages.end].tolist())
            window.update(
                int(pages.window_row[p % self.cache.ring]) for p in range(pages.window_start, pages.end)
            )
        for pool, holders in ((self.cache.full, full), (self.cache.window, window)):
            check_pool(pool, holders)


def check_pool(pool: PagePool, holders: Counter[int]) -> None:
    assert {p: n for p, n in enumerate(pool.references) if n} == dict(holders), "reference counts"
    places = [*pool._free, *pool._cached, *holders]
    assert sorted(places) == list(range(1, pool.capacity + 1)), "a page is in two places, or in none"
    assert {key: page for page, key in pool._key_of.items()} == pool._page_of
    assert set(pool._cached) <= set(pool._key_of) and not set(pool._free) & set(pool._key_of)
    assert (pool.free, pool.cached, pool.held) == (len(pool._free), len(pool._cached), len(holders))


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


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(i * 7 + salt) % 95 for i in range(length)]


def test_a_step_mixes_generating_sequences_with_a_prompt() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(20), 50)
    bench.step()
    bench.add(prompt(600, 1), 50)
    step = bench.step()
    assert (
        step is not None
        and [c.tokens for c in step.chunks] == [1, 255]
        and step.bucket == Bucket.extend(256, 16)
    )


def test_generating_sequences_are_served_while_prompts_keep_coming() -> None:
    """The extend bucket has one sequence, so steps alternate: no answer waits for the end of the prompts."""
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(4), Bucket.extend(32, 1))), max_num_seqs=4)
    bench.add(prompt(10), 100)
    bench.step()
    for salt in range(3):
        bench.add(prompt(1000, salt + 1), 100)
    kinds = [step.bucket.kind for step in (bench.step() for _ in range(20)) if step]
    assert kinds == ["decode", "extend"] * 10 or kinds == ["extend", "decode"] * 10


def test_generating_sequences_beyond_a_step_take_turns() -> None:
    bench = Bench(FakeExecutor(), budget=2)
    requests = [bench.add(prompt(2, i), 50, stop_ids=()) for i in range(5)]
    while any(r.num_generated == 0 for r in requests):
        bench.step()
    before = [r.num_generated for r in requests]
    for _ in range(25):
        bench.step()
    assert [r.num_generated - b for r, b in zip(requests, before, strict=True)] == [10] * 5


def test_a_small_token_budget_prefers_the_bucket_with_more_sequences() -> None:
    buckets = (Bucket.decode(8), Bucket.extend(64, 8), Bucket.extend(256, 2))
    bench = Bench(FakeExecutor(buckets=buckets), budget=64)
    for i in range(5):
        bench.add(prompt(8, i), 5)
    step = bench.step()
    assert step is not None and len(step.chunks) == 5


def test_a_prompt_waits_while_admitting_it_would_only_take_pages_from_others() -> None:
    bench = Bench(FakeExecutor(num_pages=1 + 30))
    first = bench.add(prompt(160), 100, stop_ids=())  # ends with 17 pages
    bench.step()
    second = bench.add(prompt(400, 1), 5)  # 25 pages
    bench.step()
    assert [r.request for r in bench.scheduler.running] == [first]
    bench.drain(300)
    assert bench.scheduler.preemptions == 0 and second.request_id in bench.finished


def test_an_early_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    """A large one waits for pages while small ones keep coming; it is never overtaken for good."""
    bench = Bench(FakeExecutor(num_pages=1 + 40, num_window_pages=1 + 60))
    for i in range(5):
        bench.add(prompt(60, i), 30)
    bench.step()
    large = bench.add(prompt(500), 20)
    for i in range(400):
        bench.add(prompt(40, i), 30)
        bench.step()
        if large.request_id in bench.finished:
            break
    assert large.request_id in bench.finished
    assert bench.scheduler.num_waiting > 10


def test_priority_then_arrival_decides_who_goes_first_and_who_yields() -> None:
    bench = Bench(FakeExecutor(num_pages=1 + 12, num_window_pages=1 + 60), max_num_seqs=2)
    low = bench.add(prompt(64, 1), 60, priority=5, stop_ids=())
    first = bench.add(prompt(64, 2), 60, stop_ids=())
    second = bench.add(prompt(64, 3), 60, stop_ids=())
    bench.step()
    assert [r.request for r in bench.scheduler.running] == [first, second]
    bench.drain(2000)
    assert list(bench.finished) == [first.request_id, second.request_id, low.request_id]
    assert bench.scheduler.preemptions > 0


def test_a_preempted_prompt_is_not_scored_twice() -> None:
    """Few rows make scoring slow, and meanwhile an older answer takes the pages away."""
    buckets = (Bucket.decode(1), Bucket("extend", 64, 2, 3))
    bench = Bench(FakeExecutor(buckets=buckets, num_pages=1 + 25), max_num_seqs=2)
    bench.add(prompt(200), 150, stop_ids=())
    scored = bench.add(prompt(150, 1), 3, score=True)
    while not bench.scheduler.preemptions:
        bench.step()
    assert 0 < scored.scored < 149
    bench.drain(1000)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_scored_prompts_take_chunks_of_the_rows_there_are(rows: int) -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(1), Bucket("extend", 64, 2, rows))), max_num_seqs=1)
    request = bench.add(prompt(300), 0, score=True)
    sizes = []
    while step := bench.step():
        sizes.append(step.chunks[0].tokens)
    # The last prompt token predicts nothing and is free where there is room for it in the last chunk.
    assert set(sizes[:-1]) == {min(rows, 64)} and sum(sizes) == 300 and request.scored == 299


def test_a_request_without_scores_is_not_limited_by_rows() -> None:
    bench = Bench(FakeExecutor(buckets=(Bucket.decode(1), Bucket("extend", 64, 1, 1))), max_num_seqs=1)
    bench.add(prompt(128), 1)
    bench.drain(3)


def test_the_same_prompt_again_hits_the_boundary_before_its_last_token() -> None:
    for length in (127, 128, 129, 144, 300):
        bench = Bench(FakeExecutor())
        bench.add(prompt(length), 3)
        bench.drain(10)
        again = bench.add(prompt(length), 3)
        bench.drain(10)
        assert again.cached_tokens == (length - 1) // 16 * 16
        assert bench.finished["r0"].request.tokens == bench.finished["r1"].request.tokens


def test_the_next_turn_hits_the_end_of_the_answer_and_a_shared_beginning_the_chunk_end() -> None:
    bench = Bench(FakeExecutor())
    first = bench.add(prompt(700), 100)
    bench.drain(200)
    turn = bench.add([*first.tokens, *prompt(30)], 3)
    bench.drain(10)
    assert turn.cached_tokens == (len(first.tokens) - 1) // 16 * 16
    shared = bench.add(
        [*prompt(700)[:300], *prompt(100, 9)], 3
    )  # diverges after the first chunk's end at 256
    bench.drain(10)
    assert shared.cached_tokens == 256


def test_a_hit_needs_the_window_pages() -> None:
    """Other prompts push the window pages out of their small pool while all full pages stay: no hit, same
    answer."""
    bench = Bench(FakeExecutor(num_window_pages=1 + 30))
    bench.add(prompt(400), 3)
    bench.drain(10)
    for salt in range(1, 5):
        bench.add(prompt(300, salt), 3)
        bench.drain(10)
    again = bench.add(prompt(400), 3)
    bench.drain(10)
    assert (
        again.cached_tokens == 0
        and bench.finished["r5"].request.tokens == bench.finished["r0"].request.tokens
    )
    assert bench.cache.full.find(again.keys[0]) is not None


def test_salts_and_scores_keep_prompts_apart() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(200), 1)
    bench.drain(10)
    salted = Request(
        "salted", prompt(200), 200, SamplingParams(max_tokens=1), 1, 0, frozenset(), (0, 99), salt="b"
    )
    bench.scheduler.add(salted)
    scored = bench.add(prompt(200), 1, score=True)
    bench.drain(20)
    assert salted.cached_tokens == 0 and scored.cached_tokens == 0


def test_pages_of_a_beginning_outlive_those_of_its_end() -> None:
    """Eviction takes the least recently used request's last pages first."""
    bench = Bench(FakeExecutor(num_pages=1 + 30))
    request = bench.add(prompt(320), 1)
    bench.drain(10)
    bench.add(prompt(240, 5), 1)
    bench.drain(10)
    there = [bench.cache.full.find(key) is not None for key in request.keys]
    assert there == sorted(there, reverse=True) and any(there) and not all(there)


def test_limits_that_cannot_work_are_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match="no extend bucket"):
        Bench(FakeExecutor(buckets=(Bucket.decode(4),)))
    with pytest.raises(ValueError, match=r"max_num_seqs \(0\) .* at least 1"):
        Bench(FakeExecutor(), max_num_seqs=0)
    with pytest.raises(ValueError, match="at least 2 and 10"):
        Bench(FakeExecutor(num_window_pages=9))
    with pytest.raises(ValueError, match="extend bucket of at least 16 tokens"):
        Bench(FakeExecutor(buckets=(Bucket.extend(1, 1),), window=130))


def test_inputs_are_padded_as_executors_expect() -> None:
    bench = Bench(FakeExecutor())
    bench.add(prompt(5), 9)
    bench.add(prompt(3), 9)
    step = bench.scheduler.schedule()
    assert step is not None
    assert bench.inputs.build(step) == (2, 1)
    arrays = bench.executor.inputs(step.bucket)
    np.testing.assert_array_equal(arrays["positions"][:10], [0, 1, 2, 3, 4, 0, 1, 2, -1, -1])
    np.testing.assert_array_equal(arrays["sequences"][:10], [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(arrays["rows"][:4], [4, 7, 0, 0])
    assert not arrays["tokens"][8:].any()
