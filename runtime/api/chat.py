"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptoss_compile.runtime.api.chat_prompt import calls_key, chat_prompt
from gptoss_compile.runtime.api.choice import Choice
from gptoss_compile.runtime.api.errors import ApiError, context_exceeded
from gptoss_compile.runtime.api.generation import Answers, Context, Submission, Usage
from gptoss_compile.runtime.api.harmony import STOP_IDS
from gptoss_compile.runtime.api.http import EventStream, event, read_json, until_disconnect
from gptoss_compile.runtime.api.render import render
from gptoss_compile.runtime.api.schemas import ChatBody
from gptoss_compile.runtime.api.tokenizer import TooLongError
from gptoss_compile.runtime.api.turn_rules import chat_format, chat_rules
from gptoss_compile.runtime.outputs import RequestOutput


async def chat_completions(request: Request) -> Response:
    context: Context = request.app.state.context
    chat = Chat(context, await read_json(request, ChatBody, context.options))
    if not chat.body.stream:
        return JSONResponse(await until_disconnect(request, chat.whole()))
    return EventStream(chat.events(await chat.start()))


class Chat:
    """One request to /v1/chat/completions."""

    def __init__(self, context: Context, body: ChatBody) -> None:
        self.context, self.body = context, body
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": context.served(body.model),
        }
        self.tokenizer = context.text_tokenizer()
        self.prompt: list[int] = []
        self.choices: list[Choice] = []
        self.usage = Usage()

    async def start(self) -> Answers:
        """Render the prompt and submit it n times. Raises ApiError."""
        body = self.body
        prompt = chat_prompt(body, self.context.options, self.context.memory)
        answer = chat_format(body)
        grammars = await self.context.turn_grammars(chat_rules(body, prompt.tools, answer), body.n or 1)
        if answer:
            prompt = replace(prompt, answer_format=answer.text)
        limit = self.context.prompt_limit(None)
        try:
            self.prompt = await render(self.tokenizer, prompt, limit)
        except TooLongError as error:
            raise context_exceeded(error.tokens, limit, "messages") from None
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        answers = Answers(self.context, "messages")
        await answers.submit(
            [
                Submission(
                    self.prompt, body.params(i, max_tokens=max_tokens, logprobs=logprobs, stop_ids=STOP_IDS), grammar
                )
                for i, grammar in enumerate(grammars)
            ],
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
        )
        names = [tool.name for tool in prompt.tools]
        self.choices = [Choice(self.tokenizer, body, i, names) for i in range(body.n or 1)]
        self.usage.prompt = len(self.prompt)
        return answers

    def _advance(self, answers: Answers, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Take in what is new; what it adds to the choice as `delta`s of a stream."""
        choice = self.choices[index]
        self.usage.cached = max(self.usage.cached, output.cached_tokens if index == 0 else 0)
        tokens, reasoning, repairs = choice.tokens, choice.reasoning_tokens, choice.repairs
        deltas = choice.feed(output)
        self.usage.completion += choice.tokens - tokens
        self.usage.reasoning += choice.reasoning_tokens - reasoning
        self.context.metrics.harmony_repairs.inc(choice.repairs - repairs)
        if choice.finish_reason:
            answers.end(index)
        if choice.finish_reason == "tool_calls":
            self.context.memory.remember(calls_key(call.id for call in choice.calls), choice.turns)
        return deltas

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async with await self.start() as answers:
            async for index, output in answers.outputs():
                self._advance(answers, index, output)
        whole = {
            **self.head,
            "object": "chat.completion",
            "choices": [choice.whole() for choice in self.choices],
            "usage": self.usage.chat(),
        }
        return whole | ({"prompt_token_ids": self.prompt} if self.body.return_token_ids else {})

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The answer as a stream. An error after its start is an event, as the official clients expect."""
        async with answers:
            first = {"prompt_token_ids": self.prompt} if self.body.return_token_ids else {}
            for choice in self.choices:
                yield event(self._chunk(choice.chunk({"role": "assistant", "content": ""})) | first)
            try:
                async for index, output in answers.outputs():
                    for chunk in self._advance(answers, index, output):
                        yield event(self._chunk(chunk))
            except ApiError as error:
                yield event(error.body)
                return
            if self.body.streams_usage:
                yield event({**self._chunk(None), "usage": self.usage.chat()})
            yield event("[DONE]")

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": [choice] if choice else []}
        if self.body.streams_usage or self.body.usage_in_every_chunk:
            chunk["usage"] = self.usage.chat() if self.body.usage_in_every_chunk else None
        return chunk
