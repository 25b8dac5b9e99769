"""The answers of one HTTP request: submitted together, read as they come, aborted when nobody wants them any more."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

from gptoss_compile.runtime.api.errors import ApiError, bad_request, context_exceeded, unavailable
from gptoss_compile.runtime.api.grammar import Grammars, TurnGrammar, TurnRules
from gptoss_compile.runtime.api.metrics import Metrics, Timer
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.responses_store import ResponseStore
from gptoss_compile.runtime.api.seal import Seal
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server.server import ToolServer
from gptoss_compile.runtime.api.turn_memory import TurnMemory
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.outputs import EngineError, RequestHandle, RequestOutput, Wake
from gptoss_compile.runtime.sampling_params import RequestError, SamplingParams

_LARGE = 10_000  # tokens of a prompt whose submission would hold up the event loop


@dataclass(frozen=True)
class Context:
    """What the routes share."""

    engine: Engine
    tokenizer: Tokenizer | None
    options: ServerOptions
    metrics: Metrics
    tool_server: ToolServer = field(default_factory=ToolServer)
    responses: ResponseStore = field(default_factory=ResponseStore)
    seal: Seal = field(default_factory=Seal)
    memory: TurnMemory = field(default_factory=TurnMemory)

    def text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise bad_request(
                "This artifact has no o200k_harmony tokenizer, so it takes and gives token ids only: use "
                "/v1/completions with a prompt of token ids and return_token_ids: true.",
                code="tokenizer_unavailable",
            )
        return self.tokenizer

    def served(self, model: str | None) -> str:
        """The model name to answer with. Raises ApiError 404 for a model that is not served here."""
        if model is None or model in self.options.served_model_names:
            return model or self.options.model
        raise ApiError(
            404,
            f"The model {model[:200]!r} does not exist; this server has {self.options.model!r}.",
            param="model",
            code="model_not_found",
        )

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.text_tokenizer())

    async def turn_grammars(self, rules: TurnRules | None, count: int = 1) -> Sequence[TurnGrammar | None]:
        """One for each of `count` answers. Raises ApiError for rules that cannot be enforced."""
        return [None] * count if rules is None else await asyncio.to_thread(self.grammars.compile, rules, count)

    def prompt_limit(self, max_tokens: int | None) -> int:
        """The longest prompt that leaves room for one token, if one is wanted."""
        return self.engine.max_model_len - (max_tokens != 0)


@dataclass(frozen=True)
class Submission:
    prompt: Sequence[int]
    params: SamplingParams
    grammar: TurnGrammar | None = None


class Answers:
    """Several requests to the engine, read as one stream. A context manager: leaving it aborts what still runs."""

    def __init__(self, context: Context, param: str) -> None:
        self._context = context
        self._param = param
        self._handles: list[RequestHandle] = []
        self._grammars: list[TurnGrammar | None] = []
        self._timers: list[Timer] = []
        self._open: set[int] = set()

    async def submit(
        self, submissions: Sequence[Submission], *, priority: int = 0, cache_salt: str | None = None
    ) -> None:
        """Hand all to the engine. Raises ApiError, after which none of them runs."""
        limit = max((self._context.prompt_limit(s.params.max_tokens) for s in submissions), default=0)
        for submission in submissions:
            if len(submission.prompt) > limit:
                raise context_exceeded(len(submission.prompt), limit, self._param)
        try:
            for submission in submissions:
                await self._submit(submission, priority, cache_salt)
        except BaseException:
            self.abort()
            raise

    async def _submit(self, submission: Submission, priority: int, cache_salt: str | None) -> None:
        def call() -> RequestHandle:
            return self._context.engine.submit(
                submission.prompt,
                submission.params,
                request_id=f"req-{secrets.token_hex(12)}",
                priority=priority,
                cache_salt=cache_salt,
                logits_processor=submission.grammar,
            )

        try:
            handle = call() if len(submission.prompt) < _LARGE else await asyncio.to_thread(call)
        except RequestError as error:
            raise bad_request(f"{error}.", self._param if error.field == "prompt" else error.field) from None
        except EngineError as error:
            raise unavailable(f"{error}.") from None
        self._open.add(len(self._handles))
        self._handles.append(handle)
        self._grammars.append(submission.grammar)
        self._timers.append(Timer(self._context.metrics, len(submission.prompt)))

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        for index in tuple(self._open):
            self.end(index)

    def end(self, index: int) -> None:
        """This answer is complete for us: let the engine stop."""
        if index in self._open:
            self._open.discard(index)
            self._handles[index].abort()
            self._timers[index].done()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the submission, what is new), until all have ended.

        Raises ApiError 503 if the engine fails, 400 if a grammar does.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        while self._open:
            news.clear()
            found = False
            for index in tuple(self._open):
                if index in self._open and (output := self._take(index, (loop, news.set))):
                    found = True
                    yield index, output
            if not found:
                await news.wait()

    def _take(self, index: int, wake: Wake) -> RequestOutput | None:
        try:
            output, _ = self._handles[index].take(wake)
        except EngineError as error:
            raise unavailable(f"{error}.") from None
        if output is None:
            return None
        if output.finish_reason == "abort":
            raise unavailable("The engine ended the request: the server is shutting down.")
        if (grammar := self._grammars[index]) and grammar.error:
            raise bad_request(f"The schema became too complex to enforce: {grammar.error}.", code="invalid_json_schema")
        self._timers[index].tokens(len(output.token_ids))
        if output.finish_reason:
            self._open.discard(index)
            self._timers[index].done()
        return output


@dataclass
class Usage:
    """Tokens of a whole HTTP request, all its answers together."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def chat(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
