"""The engine: one thread that schedules, submits, takes results and delivers until it is told to stop.

Where the executor gains by it, the engine runs one step ahead: while step n runs, step n+1 is scheduled and submitted, and
reads on the device the tokens that step n will choose. So a sequence that ends in step n is in step n+1 all the same, and
what that gives is dropped. The one rule: behind a step of which the host needs logits (because a request asks for more than
a temperature, or for log-probabilities), nothing is scheduled before its result is there.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptoss_compile.gumbel import NO_TOKEN
from gptoss_compile.runtime.batch import StepInputs
from gptoss_compile.runtime.executor import Executor, Floats
from gptoss_compile.runtime.kv_cache import KVCache
from gptoss_compile.runtime.outputs import EngineError, RequestHandle, RequestOutput, wake
from gptoss_compile.runtime.prefix_cache import PrefixCache
from gptoss_compile.runtime.request import Finished, LogitsProcessor, Request
from gptoss_compile.runtime.sampler import LogitsError, Sampler, TokenLogprobs
from gptoss_compile.runtime.sampling_params import RequestError, SamplingParams
from gptoss_compile.runtime.scheduler import Scheduler, Step

logger = logging.getLogger(__name__)

# Seconds after which a thread that computes lets another one go on. The engine's thread has to wait for its turn behind each
# call to the driver, several times a step; Python's own 5 ms are longer than a step.
SWITCH_INTERVAL = 5e-5


@dataclass(frozen=True)
class EngineStats:
    """A consistent snapshot; counters run from the start. Pages are sums over both pools.

    Every page is held (by a running request), cached (by the prefix cache alone) or free.
    """

    requests_running: int = 0
    requests_waiting: int = 0
    kv_pages_held: int = 0
    kv_pages_cached: int = 0
    kv_pages_free: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0


@dataclass
class _Live:
    """The engine's side of a request that has not finished."""

    request: Request
    handle: RequestHandle
    prompt_logprobs: list[TokenLogprobs | None]
    delivered: bool = False

    @property
    def scores(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's log-probabilities if they were asked for and are complete."""
        complete = len(self.prompt_logprobs) == self.request.prompt_length
        wanted = self.request.params.prompt_logprobs is not None
        return tuple(self.prompt_logprobs) if wanted and complete else None


class _Answer(NamedTuple):
    """What one step gave one request: a token if it chose one."""

    request: Request
    token: int | None = None
    logprobs: TokenLogprobs | None = None


class Engine:
    """Serves requests on one executor, which it owns from here on (`shutdown` closes it).

    All methods may be called from any thread. `error` is what killed the engine, if anything did.
    """

    def __init__(self, executor: Executor, *, max_num_seqs: int, max_num_batched_tokens: int,
                 enable_prefix_caching: bool = True, vocab_limit: int | None = None) -> None:
        """Raises ValueError where the executor's buckets and pages cannot serve the limits.

        vocab_limit: ids from it on are never generated (default: the model's whole vocabulary).
        """
        self._executor = executor
        self._cache = KVCache(executor)
        prefix = PrefixCache(self._cache, enabled=enable_prefix_caching)
        self._scheduler = Scheduler(executor.buckets, self._cache, prefix, max_num_seqs=max_num_seqs,
                                    max_num_batched_tokens=max_num_batched_tokens)
        self._flights: deque[Step] = deque()  # submitted, oldest first
        self._vocab_limit = min(vocab_limit or executor.config.vocab_size, executor.config.vocab_size)
        self._inputs = StepInputs(executor, self._vocab_limit)
        self._sampler = Sampler(self._vocab_limit)
        self._eos_ids = frozenset(executor.config.eos_ids)
        self.max_model_len = min(executor.max_context, self._cache.full.capacity * executor.page_size)
        self.error: EngineError | None = None
        self._lock = threading.Lock()  # guards _live's keys, _closing and error against submit
        self._live: dict[str, _Live] = {}
        self._closing = False
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # run by the engine's thread
        self._arrivals = itertools.count()
        self._thread = threading.Thread(target=self._main, name="gptoss-engine", daemon=True)
        self._prompt_tokens = self._cached_tokens = self._generation_tokens = self._steps = 0
        self._last_step = time.monotonic()
        self._publish()

    # For users ----------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def seconds_since_step(self) -> float:
        """How long ago the executor last answered (or the engine was idle): large only if a step hangs."""
        return time.monotonic() - self._last_step if self._live else 0.0

    def start(self) -> None:
        self._thread.start()

    def submit(self, prompt: Sequence[int], params: SamplingParams, *, request_id: str | None = None,
               priority: int = 0, cache_salt: str | None = None,
               logits_processor: LogitsProcessor | None = None) -> RequestHandle:
        """Queue a request. Lower `priority` values go first; equal ones in order of arrival.

        Requests share cached prefixes only within one cache_salt. max_tokens is clamped to what the context
        and the pages hold. Raises RequestError if it can never be served, EngineError if the engine has
        failed or is closing.
        """
        tokens = self._checked(prompt, params)
        request_id = request_id or f"request-{secrets.token_hex(8)}"
        room = self.max_model_len - len(tokens)
        request = Request(
            request_id, tokens, len(tokens), params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids),
            rank=(priority, next(self._arrivals)), salt=cache_salt or "", logits_processor=logits_processor)
        handle = RequestHandle(request_id, len(tokens), lambda: self._inbox.put(lambda: self._abort(request)))
        with self._lock:
            if self.error:
                raise self.error
            if self._closing:
                raise EngineError("the engine is shutting down and takes no more requests")
            if request_id in self._live:
                raise RequestError("request_id", f"{request_id!r} is in use by an unfinished request")
            self._live[request_id] = _Live(request, handle, [None])
            self._inbox.put(lambda: self._scheduler.add(request))
        return handle

    def stats(self) -> EngineStats:
        return self._stats

    def shutdown(self, drain: bool = True) -> None:
        """Refuse new requests, finish (drain) or abort the others, end the thread and close the executor.

        A second call with drain=False cuts a drain short. Calling it again afterwards does nothing.
        """
        with self._lock:
            self._closing = True
        self._inbox.put((lambda: None) if drain else self._abort_all)
        if self._thread.is_alive():
            self._thread.join()
        elif self._thread.ident is None:  # never started
            self._end(EngineError("the engine was shut down before it was started"))

    # Checking a request -------------------------------------------------------------------------------------

    def _checked(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        try:
            array = np.asarray(prompt)
        except (TypeError, ValueError):  # ragged
            array = np.empty(0)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise RequestError("prompt", "must be a list of at least one token id")
        vocab = self._executor.config.vocab_size
        if array.min() < 0 or array.max() >= vocab:
            found = f"{array.min()} … {array.max()}"
            raise RequestError("prompt", f"token ids must be in [0, {vocab}), found {found}")
        longest = self.max_model_len - (params.max_tokens != 0)
        if array.size > longest:
            by_context = self.max_model_len == self._executor.max_context
            limit = "context length" if by_context else "KV cache (--kv-pages)"
            raise RequestError(
                "prompt",
                f"has {array.size} tokens, but the {limit} leaves room for {longest}; "
                "shorten the prompt or serve with a larger one",
            )
        for token in params.logit_bias:
            if token >= self._vocab_limit:
                raise RequestError("logit_bias", f"token {token} is not among the {self._vocab_limit} ids")
        return [int(token) for token in array.tolist()]

    # The engine's thread ------------------------------------------------------------------------------------

    def _main(self) -> None:
        error = EngineError("the engine was shut down")
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            while True:
                self._receive()
                if self._idle:
                    if self._closing and self._inbox.empty():
                        break
                    continue
                self._turn()
        except Exception as failure:
            logger.exception("the engine failed")
            cause = f"{type(failure).__name__}: {failure}"
            error = EngineError(f"the engine failed and must be restarted: {cause}")
            error.__cause__ = failure
            self.error = error
        self._end(error)

    @property
    def _idle(self) -> bool:
        return not (self._flights or self._scheduler.has_work)

    def _receive(self) -> None:
        """Take in what was submitted and aborted; wait for it if there is nothing else to do."""
        received = False
        while not self._inbox.empty() or (self._idle and not received and not self._closing):
            self._inbox.get()()
            received = True
            self._last_step = self._last_step if self._scheduler.num_running else time.monotonic()
        if received:
            self._publish()

    def _turn(self) -> None:
        """Start a step and end the oldest, but for one that may stay in flight alone while the next is prepared."""
        started = self._start_step()
        if self._flights and not (started and len(self._flights) == 1 and self._executor.runs_ahead):
            self._end_step(self._flights.popleft())

    def _start_step(self) -> bool:
        """Submit a step if there is one to be scheduled now."""
        if self._flights and self._flights[-1].needs_host:
            return False
        step = self._scheduler.schedule()
        if step is None:
            return False
        self._executor.submit(step.bucket, *self._inputs.build(step))
        self._scheduler.start(step)
        self._flights.append(step)
        return True

    def _end_step(self, step: Step) -> None:
        """Take the result of the oldest step in flight, and deliver it."""
        chosen = self._executor.result().tolist()
        self._last_step = time.monotonic()
        logits = self._host_logits(step)
        answers, tokens = [], []
        for chunk, row in zip(step.chunks, step.first_rows, strict=True):
            request, token, logprobs = chunk.sequence.request, None, None
            if not request.ended:
                if chunk.scored:
                    self._score(request, chunk.scored, logits, row)
                if chunk.samples:
                    row += len(chunk.scored)
                    token = self._sampler.sample(logits[row], request) if request.on_host else chosen[row]
                    if token == NO_TOKEN:
                        raise LogitsError(f"request {request.request_id!r}, token {len(request.tokens)}: the largest logit "
                                          "is not finite")
                    if (count := request.params.logprobs) is not None:
                        logprobs = self._sampler.logprobs(logits[row], token, count)
                answers.append(_Answer(request, token, logprobs))
            tokens.append(token)
        finished = {f.request: f for f in self._scheduler.commit(step, tokens)}
        self._steps += 1
        self._deliver(answers, finished)

    def _host_logits(self, step: Step) -> dict[int, Floats]:
        """The rows of a step's logits that the host needs."""
        if not step.needs_host:
            return {}
        rows: list[int] = []
        for chunk, row in zip(step.chunks, step.first_rows, strict=True):
            rows += range(row, row + len(chunk.scored) + (chunk.samples and chunk.sequence.request.needs_logits))
        return dict(zip(rows, self._executor.logits(rows), strict=True))

    def _score(self, request: Request, scored: range, logits: dict[int, Floats], row: int) -> None:
        """Log-probabilities of prompt tokens, from the rows of the logits that begin at `row`."""
        count = request.params.prompt_logprobs
        assert count is not None
        scores = self._live[request.request_id].prompt_logprobs
        for position in scored:
            scores.append(self._sampler.logprobs(logits[row + position - scored.start], request.tokens[position + 1], count))

    def _deliver(self, answers: Iterable[_Answer], finished: Mapping[Request, Finished]) -> None:
        """Give consumers what is new to them, when the statistics tell of it."""
        outputs: list[tuple[RequestHandle, RequestOutput]] = []
        for request, token, logprobs in answers:
            end = finished.get(request)
            if token is None and end is None:
                continue
            live, first, cached = self._live[request.request_id], None, request.cached_tokens or 0
            reason, stop_id = (end.reason, end.stop_id) if end else (None, None)
            if token is not None:
                self._generation_tokens += 1
            if not live.delivered:
                live.delivered, first = True, live.scores
                self._prompt_tokens += request.prompt_length
                self._cached_tokens += cached
            outputs.append((live.handle, RequestOutput(
                request.request_id, () if token is None else (token,), None if logprobs is None else (logprobs,), first,
                reason, stop_id, cached)))
            if end:
                with self._lock:
                    del self._live[request.request_id]
            elif request.logits_processor:
                request.logits_processor.prepare(request.generated)
        self._publish()
        wake([(handle, consumer) for handle, output in outputs if (consumer := handle.deliver(output))])

    def _abort(self, request: Request) -> None:
        live = self._live.get(request.request_id)
        if live is None or live.request is not request:
            return  # it has finished, and another may have its name by now
        if finished := self._scheduler.abort(request):
            self._deliver([_Answer(request)], {request: finished})

    def _abort_all(self) -> None:
        for live in list(self._live.values()):
            self._abort(live.request)

    def _end(self, error: EngineError) -> None:
        """Nothing runs any more: drop what is left, with the error, and close the executor."""
        with self._lock:
            self._closing = True
            left = list(self._live.values())
            self._live.clear()
        try:
            for live in left:
                self._scheduler.abort(live.request)
            self._publish()
        finally:  # a failure may have left the scheduler in pieces; nobody must wait for ever because of that
            wake((live.handle, consumer) for live in left if (consumer := live.handle.fail(error)))
            self._executor.close()

    def _publish(self) -> None:
        full, window = self._cache.full, self._cache.window
        self._stats = EngineStats(
            requests_running=self._scheduler.num_running,
            requests_waiting=self._scheduler.num_waiting,
            kv_pages_held=full.held + window.held,
            kv_pages_cached=full.cached + window.cached,
            kv_pages_free=full.free + window.free,
            preemptions=self._scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps)
