"""Which tokens of which requests the next step computes. A pure state machine: no device, clock or thread.

`schedule` gives a step, the engine runs it and samples, `commit` takes the sampled tokens. In between nothing
changes.

The rules:
- Requests are ranked by (priority, arrival). The waiting ones are admitted in that order, each only if the
  pages free or reclaimable now hold all of its tokens, so that one blocked request is never overtaken for
  ever.
- A step gives every generating sequence one token and the rest of its room to prompts, in rank order. Where
  the mixed bucket has too few rows for all, steps with and without prompts alternate and the longest unserved
  sequences go first.
- When a sequence gets no page, the lowest-ranked running one gives its pages up and waits again; what it had
  computed is recomputed, or found in the prefix cache. The highest-ranked is never the victim of another and
  fits alone, so it
  always finishes: no livelock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.kv_cache import KVCache
from gptoss_compile.runtime.prefix_cache import PrefixCache
from gptoss_compile.runtime.request import Finished, FinishReason, Request, Running, Waiting


@dataclass(frozen=True)
class Chunk:
    """The tokens [start, end) of one sequence in one step.

    scored: prompt positions whose logits are wanted. samples: whether the last token's logits choose the next
    token.
    """

    sequence: Running
    start: int
    end: int
    scored: range
    samples: bool

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> int:
        return len(self.scored) + self.samples


@dataclass(frozen=True)
class Step:
    bucket: Bucket
    chunks: tuple[Chunk, ...]

    @property
    def first_rows(self) -> tuple[int, ...]:
        """Row of the logits at which each chunk's rows start; a chunk without rows has one all the same."""
        if self.bucket.kind == "decode":
            return tuple(range(len(self.chunks)))
        starts = [0]
        for chunk in self.chunks:
            starts.append(starts[-1] + chunk.rows)
        return tuple(starts[:-1])


class Scheduler:
    """Admits, batches, preempts and finishes requests. Raises ValueError for limits it cannot keep."""

    def __init__(self, buckets: Sequence[Bucket], cache: KVCache, prefix: PrefixCache, *, max_num_seqs: int,
                 max_num_batched_tokens: int) -> None:
        if min(max_num_seqs, max_num_batched_tokens) < 1:
            raise ValueError(f"max_num_seqs ({max_num_seqs}) and max_num_batched_tokens "
                             f"({max_num_batched_tokens}) must be at least 1")
        extends = [bucket for bucket in buckets if bucket.kind == "extend"]
        if not extends:
            raise ValueError("the artifact has no extend bucket to read prompts with; compile it with one")
        # Cheapest first.
        self._buckets = sorted(buckets, key=lambda b: (b.tokens, b.kind != "decode", b.sequences))
        self._budget = max_num_batched_tokens
        self._mixed = max(extends, key=lambda b: (min(b.tokens, self._budget), b.sequences, -b.tokens))
        self._mixed_limit = min(self._mixed.tokens, self._mixed.sequences, self._mixed.rows, self._budget)
        self._decode_limit = min(self._budget, max(min(b.tokens, b.sequences, b.rows) for b in buckets))
        self.max_num_seqs = min(max_num_seqs, max(b.sequences for b in buckets))
        self._cache = cache
        self._prefix = prefix
        self._waiting: list[Waiting] = []  # in rank order
        self._running: dict[str, Running] = {}  # the longest unserved first
        self._read_last = False  # whether the last step had prompts
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Running, ...]:
        return tuple(self._running.values())

    def add(self, request: Request) -> None:
        """A new request; it must fit the page pools alone."""
        self._enqueue(Waiting(request))

    def abort(self, request_id: str) -> Finished | None:
        """End a request in whatever state it is; None if it is not here (any more)."""
        if running := self._running.pop(request_id, None):
            return self._finish(running, "abort")
        for index, waiting in enumerate(self._waiting):
            if waiting.request.request_id == request_id:
                return self._waiting.pop(index).finish("abort")
        return None

    def schedule(self) -> Step | None:
        """The next step, or None if there is nothing to do. Every step computes at least one token."""
        self._admit()
        while self._running:
            if chunks := self._plan():
                self._read_last = any(chunk.sequence.pending > 1 for chunk in chunks)
                return Step(self._cheapest(chunks), tuple(chunks))
            # All that were picked gave up their pages to sequences that were not; those are picked next.
        assert not self._waiting
        return None

    def commit(self, step: Step, sampled: Sequence[int | None]) -> list[Finished]:
        """Take for each chunk of a step the sampled token, if it samples. Returns what finished by it."""
        served = {chunk.sequence.request.request_id for chunk in step.chunks}
        self._running = dict(sorted(self._running.items(), key=lambda item: item[0] in served))  # they go last
        finished = []
        for chunk, token in zip(step.chunks, sampled, strict=True):
            request = chunk.sequence.request
            running = chunk.sequence.advance(chunk.end)
            self._running[request.request_id] = running
            request.scored = max(request.scored, chunk.scored.stop)
            if chunk.start < request.prompt_length:
                self._keep(running)
            if token is not None:
                assert chunk.samples
                request.tokens.append(token)
            if running.computed >= request.prompt_length and (ending := request.ending()):
                del self._running[request.request_id]
                finished.append(self._finish(running, *ending))
        return finished

    # Admission ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_num_seqs:
            request = self._waiting[0].request
            pages, computed = self._prefix.match(request.tokens, request.keys, request.salt, request.reusable)
            running = self._waiting[0].admit(pages, computed)
            if not self._fits(running):
                self._cache.release(pages)
                return
            self._waiting.pop(0)
            self._running[request.request_id] = running
            if request.cached_tokens is None:
                request.cached_tokens = computed

    def _fits(self, candidate: Running) -> bool:
        """Whether the pools hold all tokens of the running and the candidate, and a full page more for each.

        Alone it is let in regardless: it fits by itself, and chunks adapt to the pages there are.
        """
        if not self._running:
            return True
        full, window = len(self._running) + 1, 0
        for running in (*self._running.values(), candidate):
            lacking = self._cache.shortage(running.pages, len(running.request.tokens))
            full, window = full + lacking[0], window + lacking[1]
        return full <= self._cache.full.available and window <= self._cache.window.available

    def _enqueue(self, waiting: Waiting) -> None:
        insort(self._waiting, waiting, key=lambda w: w.request.rank)

    # Planning a step ----------------------------------------------------------------------------------------

    def _plan(self) -> list[Chunk]:
        """Chunks of the picked sequences, in rank order, their pages allocated. May preempt; may be empty."""
        picked, mixed = self._pick()
        decodes = sum(r.pending == 1 for r in picked)
        spare_tokens = spare_rows = slots = 0  # beyond one token and row for each generating sequence
        if mixed:
            spare_tokens = min(self._mixed.tokens, self._budget) - decodes
            slots = self._mixed_limit - decodes
            spare_rows = self._mixed.rows - min(self._mixed_limit, len(picked))
        chunks: list[Chunk] = []
        for running in picked:
            is_prompt = running.pending > 1
            if running.request.request_id not in self._running:
                continue  # preempted for a higher-ranked one
            if is_prompt and not (slots and spare_tokens):
                continue
            end = running.computed + (min(running.pending, spare_tokens) if is_prompt else 1)
            end = self._allocate(running, _limit_rows(running, end, 1 + spare_rows))
            if end > running.computed:
                chunk = _chunk(running, end)
                chunks.append(chunk)
                spare_rows -= max(0, chunk.rows - 1)
                slots -= is_prompt
                spare_tokens -= chunk.tokens if is_prompt else 0
        return chunks

    def _pick(self) -> tuple[list[Running], bool]:
        """The sequences to serve, in rank order, and whether prompts are among them."""
        prompts = [r for r in self._running.values() if r.pending > 1]
        decodes = [r for r in self._running.values() if r.pending == 1]
        mixed = bool(prompts) and (len(decodes) < self._mixed_limit or not self._read_last)
        picked = prompts + decodes[: self._mixed_limit - 1] if mixed else decodes[: self._decode_limit]
        return sorted(picked, key=lambda r: r.request.rank), mixed

    def _allocate(self, running: Running, end: int) -> int:
        """Give a sequence pages for tokens up to `end` or as far as they go; returns the end reached.

        If there is none for even one token, lower-ranked sequences give theirs up, lastly the sequence itself
        (then the end is where it was).
        """
        while (reached := self._cache.grow(running.pages, running.computed, end)) == running.computed:
            victim = max(self._running.values(), key=lambda r: r.request.rank)
            assert victim is not running or len(self._running) > 1, "a request does not fit alone"
            self._preempt(victim)
            if victim is running:
                break
        return reached

    def _preempt(self, victim: Running) -> None:
        del self._running[victim.request.request_id]
        self._keep(victim)
        self._cache.release(victim.pages)
        self._enqueue(victim.preempt())
        self.preemptions += 1

    def _finish(self, running: Running, reason: FinishReason, stop_id: int | None = None) -> Finished:
        self._keep(running)
        self._cache.release(running.pages)
        return running.finish(reason, stop_id)

    def _keep(self, running: Running) -> None:
        request = running.request
        self._prefix.keep(running.pages, request.tokens, request.keys, request.salt, running.computed)

    def _cheapest(self, chunks: Sequence[Chunk]) -> Bucket:
        tokens, rows = sum(c.tokens for c in chunks), sum(c.rows for c in chunks)
        single = tokens == len(chunks)
        for bucket in self._buckets:
            enough = bucket.sequences >= len(chunks) and bucket.tokens >= tokens and bucket.rows >= rows
            if enough and (single or bucket.kind == "extend"):
                return bucket
        raise AssertionError(f"no bucket for {len(chunks)} sequences, {tokens} tokens, {rows} rows")


def _chunk(running: Running, end: int) -> Chunk:
    request = running.request
    scored = range(max(running.computed, request.scored), min(end, request.to_score))
    samples = end == len(request.tokens) and request.max_tokens > 0
    return Chunk(running, running.computed, end, scored, samples)


def _limit_rows(running: Running, end: int, rows: int) -> int:
    """The largest end, at most the given one, whose chunk wants no more than `rows` (at least 1) rows."""
    while (excess := _chunk(running, end).rows - rows) > 0:
        end -= excess  # a token adds at most one row, so this never overshoots
    return end
