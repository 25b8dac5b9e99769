"""How an answer leaves the engine: as deltas, through a handle that any thread or event loop can wait on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from gptoss_compile.runtime.request import FinishReason
from gptoss_compile.runtime.sampler import TokenLogprobs

# How a consumer that waits goes on, and the event loop it lives in.
Wake = tuple[asyncio.AbstractEventLoop | None, Callable[[], object]]


class EngineError(RuntimeError):
    """The engine cannot serve: it failed, or is shutting down. The message says which and why."""


class RequestOutput(NamedTuple):
    """What is new since the previous output of the same request.

    token_ids:       includes the id that stopped the answer, which stop_id repeats.
    logprobs:        one a token if SamplingParams.logprobs was given, else None.
    prompt_logprobs: on the first output, if asked for: one a prompt token, None for the first.
    finish_reason:   on the last output.
    cached_tokens:   prompt tokens that came from the prefix cache.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    cached_tokens: int = 0

    @staticmethod
    def join(outputs: Sequence[RequestOutput]) -> RequestOutput:
        """One output in place of several in a row (at least one), in time linear in their tokens."""
        logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
        return RequestOutput(
            outputs[-1].request_id,
            token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
            logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
            prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
            finish_reason=outputs[-1].finish_reason,
            stop_id=outputs[-1].stop_id,
            cached_tokens=max(output.cached_tokens for output in outputs))


class RequestHandle:
    """One submitted request. Iterate it, with `for` or `async for`, from one consumer.

    The engine never waits for the consumer: outputs that pile up come joined as one. Iteration ends after the
    output with a finish_reason, and raises EngineError if the engine failed. Leaving it early does not abort.
    """

    def __init__(self, request_id: str, prompt_tokens: int, abort: Callable[[], None]) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self._abort = abort
        self._lock = threading.Lock()
        self._outputs: list[RequestOutput] = []
        self._ended = False
        self._error: EngineError | None = None
        self._wake: Wake | None = None

    def abort(self) -> None:
        """End the request soon, whatever its state; its last output then has finish_reason `abort`."""
        self._abort()

    def result(self) -> RequestOutput:
        """The whole answer, waiting for its end."""
        return RequestOutput.join(list(self))

    async def collect(self) -> RequestOutput:
        """The whole answer, waiting for its end in the running event loop."""
        return RequestOutput.join([output async for output in self])

    def __iter__(self) -> Iterator[RequestOutput]:
        while True:
            event = threading.Event()
            output, more = self.take((None, event.set))
            if output:
                yield output
            elif more:
                event.wait()
            if not more:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        while True:
            event = asyncio.Event()
            output, more = self.take((loop, event.set))
            if output:
                yield output
            elif more:
                await event.wait()
            if not more:
                return

    def take(self, wake: Wake) -> tuple[RequestOutput | None, bool]:
        """What has piled up, and whether more may come. If nothing has, `wake` is called once it does: its function, in its
        event loop if it has one. Raises EngineError."""
        with self._lock:
            if self._outputs:
                output, self._outputs = RequestOutput.join(self._outputs), []
                return output, not self._ended or self._error is not None
            if self._error:
                raise self._error
            self._wake = None if self._ended else wake
            return None, not self._ended

    # The engine's side --------------------------------------------------------------------------------------

    def deliver(self, output: RequestOutput) -> Wake | None:
        """Give the consumer an output. If it waits for one, the engine has to `wake` it."""
        return self._add(output, ended=output.finish_reason is not None)

    def fail(self, error: EngineError) -> Wake | None:
        return self._add(None, ended=True, error=error)

    def _add(self, output: RequestOutput | None, *, ended: bool, error: EngineError | None = None) -> Wake | None:
        with self._lock:
            if output:
                self._outputs.append(output)
            self._ended, self._error = ended, error
            wake, self._wake = self._wake, None
        return wake


def wake(waiting: Iterable[tuple[RequestHandle, Wake]]) -> None:
    """Wake consumers that wait, those of one event loop together: to pass something to a loop costs a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[RequestHandle, Callable[[], object]]]] = {}
    for handle, (loop, resume) in waiting:
        if loop is None:
            resume()
        else:
            loops.setdefault(loop, []).append((handle, resume))
    for loop, consumers in loops.items():
        try:
            loop.call_soon_threadsafe(_resume, [resume for _, resume in consumers])
        except RuntimeError:  # the event loop is closed: nobody will read on
            for handle, _ in consumers:
                handle.abort()


def _resume(consumers: Iterable[Callable[[], object]]) -> None:
    for resume in consumers:
        resume()
