"""Which tokens of which requests the next step computes. A pure state machine: no device, clock or thread.

`schedule` gives a step, `start` says that it was submitted, `commit` takes the tokens that it chose. One more step may be
scheduled and started before a step is committed: a sequence whose next token is not known yet (`Request.ahead`) then reads
it from the row that chooses it. Steps run one after the other, so a page may pass to another sequence, or get a name in
the prefix cache, while steps that use it are in flight: whoever reads it or writes to it next comes later. What a step
computed for a request that had ended before is dropped: its key lies behind all that was named.

The rules:
- Requests are ranked by (priority, arrival). The waiting ones are admitted in that order, each only if the
  pages free or reclaimable now hold all of its tokens, so that one blocked request is never overtaken for
  ever.
- A step gives every generating sequence one token and the rest of its room to prompts, in rank order, in the
  bucket that takes most tokens so. Where none has room for all, steps with and without prompts alternate;
  prompts go first in theirs, and of the generating sequences the longest unserved.
- When a sequence gets no page, the lowest-ranked running one gives its pages up and waits again; what it had
  computed is recomputed, or found in the prefix cache. The highest-ranked is never the victim of another and
  fits alone, so it
  always finishes: no livelock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.kv_cache import KVCache
from gptoss_compile.runtime.prefix_cache import PrefixCache
from gptoss_compile.runtime.request import Finished, FinishReason, Request, Running, Waiting

_NONE = range(0)


class Chunk(NamedTuple):
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

    @cached_property
    def needs_host(self) -> bool:
        """Whether the host looks at logits of it. Then it is committed before the next step is scheduled."""
        return any(chunk.scored or (chunk.samples and chunk.sequence.request.needs_logits) for chunk in self.chunks)

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Row of the logits at which each chunk's rows start; a chunk without rows has one all the same."""
        if self.bucket.kind == "decode":
            return tuple(range(len(self.chunks)))
        starts = [0]
        for chunk in self.chunks:
            starts.append(starts[-1] + chunk.rows)
        return tuple(starts[:-1])


class Mix(NamedTuple):
    """What a step with prompts can be: its bucket, how many generating sequences it serves, and tokens in all."""

    bucket: Bucket
    decodes: int
    tokens: int


class Scheduler:
    """Admits, batches, preempts and finishes requests. Raises ValueError for limits it cannot keep."""

    def __init__(self, buckets: Sequence[Bucket], cache: KVCache, prefix: PrefixCache, *, max_num_seqs: int,
                 max_num_batched_tokens: int) -> None:
        if min(max_num_seqs, max_num_batched_tokens) < 1:
            raise ValueError(f"max_num_seqs ({max_num_seqs}) and max_num_batched_tokens "
                             f"({max_num_batched_tokens}) must be at least 1")
        # Cheapest first.
        self._buckets = sorted(buckets, key=lambda b: (b.tokens, b.kind != "decode", b.sequences))
        self._extends = [bucket for bucket in self._buckets if bucket.kind == "extend"]
        if not self._extends:
            raise ValueError("the artifact has no extend bucket to read prompts with; compile it with one")
        self._budget = max_num_batched_tokens
        self._decode_limit = max(map(self._places, buckets))
        self.max_num_seqs = min(max_num_seqs, max(b.sequences for b in buckets))
        self._cache = cache
        self._prefix = prefix
        self._waiting: list[Waiting] = []  # in rank order
        self._running: dict[Request, Running] = {}  # the longest unserved first
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

    def abort(self, request: Request) -> Finished | None:
        """End a request in whatever state it is; None if it is not here (any more)."""
        here = request in self._running or any(waiting.request is request for waiting in self._waiting)
        return self._finish(request, "abort") if here else None

    def schedule(self) -> Step | None:
        """The next step, of at least one token; None if there is nothing to do before a step in flight is committed."""
        self._admit()
        while True:
            picked, mix = self._pick()
            if not picked:
                return None
            if chunks := self._plan(picked, mix):
                self._read_last = any(chunk.sequence.pending > 1 for chunk in chunks)
                return Step(self._cheapest(chunks), tuple(chunks))
            # All that were picked gave up their pages to sequences that were not; those are picked next.

    def start(self, step: Step) -> None:
        """The step was submitted: what it computes counts as computed from here on."""
        for chunk, row in zip(step.chunks, step.first_rows, strict=True):
            request = chunk.sequence.request
            running = self._running[request] = chunk.sequence.advance(chunk.end, row + len(chunk.scored))
            if chunk.start < request.prompt_length:
                request.scored = max(request.scored, chunk.scored.stop)
                self._keep(running)
            request.ahead += chunk.samples
        if len(step.chunks) < len(self._running):  # who was served goes last
            served = {chunk.sequence.request for chunk in step.chunks}
            self._running = dict(sorted(self._running.items(), key=lambda item: item[0] in served))

    def commit(self, step: Step, chosen: Sequence[int | None]) -> list[Finished]:
        """Take for each chunk of the oldest step in flight the token it chose, if it does. Returns what finished by it."""
        finished = []
        for chunk, token in zip(step.chunks, chosen, strict=True):
            request = chunk.sequence.request
            request.ahead -= chunk.samples
            if request.ended:
                continue
            if token is not None:
                assert chunk.samples
                request.tokens.append(token)
            elif chunk.samples or chunk.end < request.prompt_length:
                continue
            if ending := request.ending():
                finished.append(self._finish(request, *ending))
        return finished

    # Admission ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_num_seqs:
            request = self._waiting[0].request
            if request.ahead:
                return  # preempted while a step in flight chooses its next token, which must be known to be read
            pages, computed = self._prefix.match(request.tokens, request.keys, request.salt, request.reusable)
            running = self._waiting[0].admit(pages, computed)
            if not self._fits(running):
                self._cache.release(pages)
                return
            self._waiting.pop(0)
            self._running[request] = running
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
            lacking = self._cache.shortage(running.pages, running.request.length)
            full, window = full + lacking[0], window + lacking[1]
        return full <= self._cache.full.available and window <= self._cache.window.available

    def _enqueue(self, waiting: Waiting) -> None:
        insort(self._waiting, waiting, key=lambda w: w.request.rank)

    # Planning a step ----------------------------------------------------------------------------------------

    def _plan(self, picked: Sequence[Running], mix: Mix | None) -> list[Chunk]:
        """Chunks of the picked sequences, in rank order, their pages allocated; of one token each in a step without prompts.
        May preempt; may be empty."""
        spare_tokens = spare_rows = slots = 0  # beyond one token and row for each generating sequence
        if mix:
            places = self._places(mix.bucket)
            spare_tokens = self._room(mix.bucket) - mix.decodes
            slots = places - mix.decodes
            spare_rows = mix.bucket.rows - min(places, len(picked))
        chunks: list[Chunk] = []
        for running in picked:
            if running.request not in self._running:
                continue  # preempted for a higher-ranked one
            wanted = running.pending if mix else 1
            if wanted > 1:
                if not (slots and spare_tokens):
                    continue
                wanted = min(wanted, spare_tokens)
            end = _limit_rows(running, running.computed + wanted, 1 + spare_rows)
            if self._cache.grow(running.pages, running.computed, end) != end:
                end = self._allocate(running, end)
            if end > running.computed:
                chunk = _chunk(running, end)
                chunks.append(chunk)
                if mix:
                    spare_rows -= max(0, chunk.rows - 1)
                    if running.pending > 1:
                        slots -= 1
                        spare_tokens -= chunk.tokens
        return chunks

    def _pick(self) -> tuple[list[Running], Mix | None]:
        """The sequences to serve, in rank order, and, if prompts are among them, the step that they are to fill."""
        prompts: list[Running] = []
        decodes: list[Running] = []
        for running in self._running.values():
            if pending := running.pending:
                (prompts if pending > 1 else decodes).append(running)
        mix = self._fullest(prompts, len(decodes)) if prompts else None
        if mix and (mix.decodes == len(decodes) or not self._read_last):
            return _ranked(prompts + decodes[: mix.decodes]), mix
        return _ranked(decodes[: self._decode_limit]), None

    def _fullest(self, prompts: Sequence[Running], decodes: int) -> Mix:
        """The step that serves all generating sequences, if one can, and takes the most tokens; of equals the cheapest."""
        totals = list(accumulate(running.pending for running in _ranked(prompts)))
        mixes = [self._mix(bucket, totals, decodes) for bucket in self._extends]
        return max([mix for mix in mixes if mix.decodes == decodes] or mixes, key=lambda mix: mix.tokens)

    def _mix(self, bucket: Bucket, totals: Sequence[int], decodes: int) -> Mix:
        """totals: of the first prompt's tokens, the first two's and so on."""
        room, places = self._room(bucket), self._places(bucket)
        if decodes >= places:  # then only places that the prompts leave
            decodes = max(0, places - 1 - bisect_left(totals, room, hi=len(totals) - 1))
        return Mix(bucket, decodes, decodes + min(room - decodes, totals[min(places - decodes, len(totals)) - 1]))

    def _room(self, bucket: Bucket) -> int:
        """How many tokens a step of the bucket may compute."""
        return min(bucket.tokens, self._budget)

    def _places(self, bucket: Bucket) -> int:
        """How many sequences may choose a token in a step of the bucket."""
        return min(self._room(bucket), bucket.sequences, bucket.rows)

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
        del self._running[victim.request]
        self._keep(victim)
        self._cache.release(victim.pages)
        self._enqueue(victim.preempt())
        self.preemptions += 1

    def _finish(self, request: Request, reason: FinishReason, stop_id: int | None = None) -> Finished:
        request.ended = True
        if running := self._running.pop(request, None):
            self._keep(running)
            self._cache.release(running.pages)
            return running.finish(reason, stop_id)
        (waiting,) = (waiting for waiting in self._waiting if waiting.request is request)
        self._waiting.remove(waiting)
        return waiting.finish(reason, stop_id)

    def _keep(self, running: Running) -> None:
        """Name the pages of the sequence's known tokens."""
        request = running.request
        end = min(running.computed, len(request.tokens))
        self._prefix.keep(running.pages, request.tokens, request.keys, request.salt, end)

    def _cheapest(self, chunks: Sequence[Chunk]) -> Bucket:
        tokens, rows = sum([c.end - c.start for c in chunks]), sum([c.rows for c in chunks])
        single = tokens == len(chunks)
        for bucket in self._buckets:
            enough = bucket.sequences >= len(chunks) and bucket.tokens >= tokens and bucket.rows >= rows
            if enough and (single or bucket.kind == "extend"):
                return bucket
        raise AssertionError(f"no bucket for {len(chunks)} sequences, {tokens} tokens, {rows} rows")


def _ranked(sequences: Sequence[Running]) -> list[Running]:
    return sorted(sequences, key=lambda running: running.request.rank)


def _chunk(running: Running, end: int) -> Chunk:
    request, start = running.request, running.computed
    scored = _NONE if request.scored >= request.to_score else range(max(start, request.scored), min(end, request.to_score))
    return Chunk(running, start, end, scored, end == len(request.tokens) + request.ahead and request.max_tokens > 0)


def _limit_rows(running: Running, end: int, rows: int) -> int:
    """The largest end, at most the given one, whose chunk wants no more than `rows` (at least 1) rows."""
    if running.request.scored >= running.request.to_score:
        return end  # it wants one at most
    while (excess := _chunk(running, end).rows - rows) > 0:
        end -= excess  # a token adds at most one row, so this never overshoots
    return end
