"""A scheduler driven by hand, with its invariants checked around every step."""

from __future__ import annotations

from collections import Counter, deque

from fake_executor import FakeExecutor

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


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(i * 7 + salt) % 95 for i in range(length)]
