"""POST /v1/completions: text or token ids in, text and token ids out, log-probabilities of both."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import chain
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptoss_compile.runtime.api.errors import ApiError, bad_request, context_exceeded
from gptoss_compile.runtime.api.generation import Answers, Context, Submission, Usage
from gptoss_compile.runtime.api.http import EventStream, event, read_json, until_disconnect
from gptoss_compile.runtime.api.logprobs import LOWEST_LOGPROB
from gptoss_compile.runtime.api.schemas import CompletionBody
from gptoss_compile.runtime.api.stops import StopStrings
from gptoss_compile.runtime.api.tokenizer import Detokenizer, Tokenizer, TooLongError
from gptoss_compile.runtime.outputs import RequestOutput
from gptoss_compile.runtime.sampler import TokenLogprobs

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 1024


async def completions(request: Request) -> Response:
    context: Context = request.app.state.context
    body = await read_json(request, CompletionBody, context.options)
    completion = Completion(context, body)
    if not body.stream:
        return JSONResponse(await until_disconnect(request, completion.whole()))
    answers = await completion.start()
    return EventStream(completion.events(answers))


class Completion:
    """One request to /v1/completions."""

    def __init__(self, context: Context, body: CompletionBody) -> None:
        self.context, self.body = context, body
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.served(body.model),
        }
        if body.stops:
            context.text_tokenizer()
        self.choices: list[Choice] = []
        self.usage = Usage()

    async def start(self) -> Answers:
        body = self.body
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = await self._prompts(self.context.prompt_limit(max_tokens))
        n = body.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise bad_request(f"{len(prompts)} prompts with n = {n} are more than {MAX_CHOICES} choices.", "n")
        submissions = [
            Submission(
                prompt,
                body.params(
                    i,
                    max_tokens=max_tokens,
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if body.echo else None,
                ),
            )
            for prompt in prompts
            for i in range(n)
        ]
        answers = Answers(self.context, "prompt")
        await answers.submit(submissions, priority=body.priority or 0, cache_salt=body.cache_salt)
        self.choices = [Choice(self.context.tokenizer, body, i, s.prompt) for i, s in enumerate(submissions)]
        self.usage.prompt = sum(map(len, prompts))
        return answers

    async def _prompts(self, limit: int) -> list[list[int]]:
        given = self.body.prompt
        if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
            given = [given]
        if not isinstance(given, list) or not given:
            raise bad_request(
                "prompt must be a string, a list of strings, a list of token ids, or a list of such lists; "
                "none of them empty.",
                "prompt",
            )
        return [await self._prompt(prompt, limit) for prompt in given]

    async def _prompt(self, prompt: Any, limit: int) -> list[int]:
        if isinstance(prompt, list) and prompt and all(map(_is_id, prompt)):
            return prompt
        if not isinstance(prompt, str):
            raise bad_request("Every prompt must be a string or a list of at least one token id.", "prompt")
        try:
            ids = await self.context.text_tokenizer().encode_async(prompt, limit)
        except TooLongError as error:
            raise context_exceeded(error.tokens, limit, "prompt") from None
        if not ids:
            raise bad_request("The prompt must not be empty.", "prompt")
        return ids

    def _advance(self, answers: Answers, index: int, output: RequestOutput) -> dict[str, Any]:
        """Take in what is new; the choice as a chunk of a stream shows it."""
        choice = self.choices[index]
        n = self.body.n or 1
        if output.cached_tokens and not choice.started and index % n == 0:
            self.usage.cached += output.cached_tokens
        before = choice.generated
        chunk = choice.feed(output)
        self.usage.completion += choice.generated - before
        if choice.finish_reason:
            answers.end(index)
        return chunk

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async with await self.start() as answers:
            chunks: list[list[dict[str, Any]]] = [[] for _ in self.choices]
            async for index, output in answers.outputs():
                chunks[index].append(self._advance(answers, index, output))
        return {**self.head, "choices": [_joined(parts) for parts in chunks], "usage": self.usage.chat()}

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The answer as a stream. An error after its start is an event, as the official clients expect."""
        async with answers:
            try:
                async for index, output in answers.outputs():
                    yield event(self._chunk([self._advance(answers, index, output)]))
            except ApiError as error:
                yield event(error.body)
                return
            if self.body.streams_usage:
                yield event({**self.head, "choices": [], "usage": self.usage.chat()})
            yield event("[DONE]")

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self.head, "choices": choices}
        if self.body.streams_usage or self.body.usage_in_every_chunk:
            chunk["usage"] = self.usage.chat() if self.body.usage_in_every_chunk else None
        return chunk


class Choice:
    """One answer as it grows. Without a tokenizer its text stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, body: CompletionBody, index: int, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer) if tokenizer else None
        self._body, self._index, self._prompt = body, index, prompt
        self._stops = StopStrings(body.stops, include=bool(body.include_stop_str_in_output))
        self._offset = 0
        self.started = False
        self.generated = 0
        self.finish_reason: str | None = None

    def feed(self, output: RequestOutput) -> dict[str, Any]:
        chunk: dict[str, Any] = {"index": self._index, "text": "", "logprobs": None, "finish_reason": None}
        scored: list[tuple[int, TokenLogprobs | None]] = []
        if not self.started and self._body.echo:
            chunk["text"] = self._tokenizer.decode(self._prompt) if self._tokenizer else ""
            scored += zip(self._prompt, output.prompt_logprobs or (), strict=False)
        taken: list[int] = []
        for i, token in enumerate(output.token_ids):
            taken.append(token)
            if output.logprobs:
                scored.append((token, output.logprobs[i]))
            chunk["text"] += self._stops.push(self._text.push(token) if self._text else "")
            if self._stops.matched is not None:
                break
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        elif output.finish_reason:
            self.finish_reason = output.finish_reason
            rest = self._stops.push(self._text.finish() if self._text else "")
            chunk["text"] += rest + self._stops.finish()
        if self._body.logprobs is not None:
            chunk["logprobs"] = self._logprobs(scored)
        if self._body.return_token_ids:
            chunk |= {"prompt_token_ids": None if self.started else list(self._prompt), "token_ids": taken}
        self.generated += len(taken)
        chunk["finish_reason"] = self.finish_reason
        self.started = True
        return chunk

    def _logprobs(self, scored: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, scores in scored:
            result["tokens"].append(self._name(token))
            result["token_logprobs"].append(None if scores is None else max(scores.logprob, LOWEST_LOGPROB))
            top = (
                None
                if scores is None
                else {
                    self._name(t): max(logprob, LOWEST_LOGPROB) for t, logprob in (*scores.top, (token, scores.logprob))
                }
            )
            result["top_logprobs"].append(top)
            result["text_offset"].append(self._offset)
            self._offset += len(self._tokenizer.token_bytes(token).decode(errors="ignore")) if self._tokenizer else 0
        return result

    def _name(self, token: int) -> str:
        return self._tokenizer.token_text(token) if self._tokenizer else f"token_id:{token}"


def _joined(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of one choice as one."""
    whole = chunks[0] | {
        "text": "".join(chunk["text"] for chunk in chunks),
        "finish_reason": chunks[-1]["finish_reason"],
    }
    if whole["logprobs"]:
        whole["logprobs"] = {
            key: _concatenated(chunk["logprobs"][key] for chunk in chunks) for key in whole["logprobs"]
        }
    if "token_ids" in whole:
        whole["token_ids"] = _concatenated(chunk["token_ids"] for chunk in chunks)
    return whole


def _concatenated(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
