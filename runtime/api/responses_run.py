"""A response being made."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gptoss_compile.runtime.api.errors import ApiError
from gptoss_compile.runtime.api.generation import Answers, Context, Submission
from gptoss_compile.runtime.api.grammar import TurnGrammar
from gptoss_compile.runtime.api.harmony import STOP_IDS, HarmonyParser
from gptoss_compile.runtime.api.logprobs import LogprobNames
from gptoss_compile.runtime.api.render import FunctionTool, Prompt, Turn, extend
from gptoss_compile.runtime.api.responses_conversation import conversation, render_input
from gptoss_compile.runtime.api.responses_declared import callers, memory_key
from gptoss_compile.runtime.api.responses_output import Output, OutputOptions
from gptoss_compile.runtime.api.responses_prompt import client_tools
from gptoss_compile.runtime.api.responses_schema import ResponseBody, ToolChoice
from gptoss_compile.runtime.api.responses_store import Record
from gptoss_compile.runtime.api.responses_tools import MAX_CALLS, OutputEvent
from gptoss_compile.runtime.api.tokenizer import Tokenizer, TooLongError
from gptoss_compile.runtime.api.tool_server.server import Toolbox
from gptoss_compile.runtime.api.turn_rules import response_format, response_rules
from gptoss_compile.runtime.outputs import RequestOutput


class ResponseRun:
    """One response being made: a task that writes events into a record, which any number of readers may follow."""

    def __init__(self, context: Context, body: ResponseBody, parent: Record | None = None) -> None:
        self.context, self.body, self.parent = context, body, parent
        self.model = context.served(body.model)
        self.tokenizer = context.text_tokenizer()

    async def start(self) -> Record:
        """Render, submit, and go on in a task. Raises ApiError for what cannot be served."""
        prompt, given, box = conversation(self.context, self.body, self.parent)
        answer = response_format(self.body)
        self.rules = response_rules(self.body, prompt.tools, box, answer)
        [grammar] = await self.context.turn_grammars(self.rules)
        if answer:
            prompt = replace(prompt, answer_format=answer.text)
        limit = self.context.prompt_limit(None)
        room = min(self.body.max_output_tokens or limit // 8, limit // 2) if self.body.truncation == "auto" else None
        ids = await render_input(self.context, prompt, limit, room)
        self.answers = await self._submit(ids, 0, grammar)
        record = Record(self._new(prompt), given.items, given.turns, given.callers)
        if self.body.store is not False:
            self.context.responses.add(record)
        record.task = asyncio.create_task(self._run(record, prompt.tools, box, ids))
        record.task.add_done_callback(lambda _: self._ended(record))
        return record

    def prepare(self) -> Record:
        """A finished response without an answer, to go on from."""
        prompt, given, _ = conversation(self.context, self.body, self.parent)
        record = Record(self._new(prompt), given.items, given.turns, given.callers)
        if self.body.store is not False:
            self.context.responses.add(record)
        record.emit("response.created", response=dict(record.response))
        record.response |= {"status": "completed", "completed_at": int(time.time()), "usage": usage(0, 0, 0, 0)}
        record.emit("response.completed", response=dict(record.response))
        self.context.responses.finish(record)
        return record

    async def _submit(self, ids: list[int], written: int, grammar: TurnGrammar | None) -> Answers:
        """Let the model write on. written: tokens that it has spent of max_output_tokens."""
        params = self.body.params(STOP_IDS)
        if params.max_tokens is not None:
            params = replace(params, max_tokens=params.max_tokens - written)
        answers = Answers(self.context, "input")
        await answers.submit(
            [Submission(ids, params, grammar)], priority=self.body.priority or 0, cache_salt=self.body.cache_salt
        )
        return answers

    def _new(self, prompt: Prompt) -> dict[str, Any]:
        """The response object, every key present, before anything was generated."""
        body = self.body
        reasoning = body.reasoning
        choice: Any = body.tool_choice
        tools = [_echoed_tool(tool.model_dump()) for tool in body.tools or ()]
        if isinstance(choice, ToolChoice):
            choice = choice.model_dump(exclude_none=True)
        given = body.text.format if body.text else None
        text: dict[str, Any] = {"format": given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}}
        if body.text and body.text.verbosity:
            text["verbosity"] = body.text.verbosity
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "queued" if body.background else "in_progress",
            "incomplete_details": None,
            "model": self.model,
            "previous_response_id": body.previous_response_id,
            "instructions": body.instructions,
            "output": [],
            "error": None,
            "tools": tools,
            "tool_choice": choice or "auto",
            "truncation": body.truncation or "disabled",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": text,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "reasoning": {"effort": prompt.effort, "summary": reasoning.summary if reasoning else None},
            "usage": None,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "store": body.store is not False,
            "background": bool(body.background),
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "user": body.user,
        }

    async def _run(self, record: Record, tools: Sequence[FunctionTool], box: Toolbox, ids: list[int]) -> None:
        output = Output(
            OutputOptions(
                {name: tool for name, tool in client_tools(self.body).items() if tool.function in tools},
                box,
                min(self.body.max_tool_calls or MAX_CALLS, MAX_CALLS),
                self.body.include or (),
                LogprobNames(self.tokenizer) if self.body.wants_logprobs else None,
                self.context.seal if self.body.wants_encrypted else None,
                self.body.summarises,
                self.context.options.reasoning_event,
            )
        )
        progress = _Progress(self.tokenizer, output)
        snapshot = record.response
        record.emit("response.created", response=dict(snapshot))
        snapshot["status"] = "in_progress"
        record.emit("response.in_progress", response=dict(snapshot))
        try:
            async with box:
                await self._write(record, progress, box, ids)
            status = "incomplete" if progress.finish_reason == "length" else "completed"
            details = {"reason": "max_output_tokens"} if status == "incomplete" else None
            self._end(record, progress, status, incomplete_details=details)
        except ApiError as error:
            self._end(record, progress, "failed", error={"code": "server_error", "message": error.message})
        except asyncio.CancelledError:
            self._end(record, progress, "cancelled")
        finally:
            self.context.metrics.harmony_repairs.inc(progress.repairs)

    async def _write(self, record: Record, progress: _Progress, box: Toolbox, ids: list[int]) -> None:
        """Let the model write, make its call of a server's tool, and let it write on, until it makes none."""
        output = progress.output
        listed = {item.get("server_label") for item in record.input_items if item["type"] == "mcp_list_tools"}
        for label in (label for label in box.labels if label not in listed):
            record.emit_all(output.list_tools(label))
        while True:
            progress.begin(len(ids))
            async with self.answers:
                async for _, new in self.answers.outputs():
                    record.emit_all(progress.feed(new))
                    if output.waiting is not None:
                        break
            if output.waiting is None:
                return
            record.emit_all(await output.make_call())
            left = self.body.max_output_tokens is None or progress.tokens < self.body.max_output_tokens
            try:
                ids = await extend(self.tokenizer, ids, progress.new_turns(), self.context.prompt_limit(None))
            except TooLongError:
                left = False
            if not left or output.exhausted:
                progress.finish_reason = "length"
                return
            [grammar] = await self.context.turn_grammars(self.rules and replace(self.rules, must_call=False))
            self.answers = await self._submit(ids, progress.tokens, grammar)

    def _ended(self, record: Record) -> None:
        """Whatever ended the task, even before it began: nothing runs on, and nobody waits for ever."""
        self.answers.abort()
        if not record.finished:
            assert record.task is not None
            record.response["status"] = "cancelled" if record.task.cancelled() else "failed"
            record.response["error"] = {"code": "server_error", "message": "The server failed to answer."}
            record.wake()

    def _end(self, record: Record, progress: _Progress, status: str, **fields: Any) -> None:
        """The terminal event. There is none for a cancelled response: its readers just see the stream end."""
        output = progress.output
        used = usage(progress.prompt_tokens, progress.cached_tokens, progress.tokens, output.reasoning_tokens)
        items = [item for item in output.items if item.get("status") != "in_progress"]
        record.response |= {"status": status, "output": items, "usage": used, **fields}
        if status == "completed":
            record.response["completed_at"] = int(time.time())
        record.turns += output.turns
        record.callers |= callers(items)
        record.item_turns = output.item_turns
        for item, written in output.written():
            self.context.memory.remember(memory_key(item["type"], item["id"], item.get("call_id")), written)
        record.pages = output.pages
        if status == "cancelled":
            record.wake()
        else:
            record.emit(f"response.{status}", response=dict(record.response))
        self.context.responses.finish(record)


class _Progress:
    """How far the answer is: tokens in, events out. Written in one round, and one more after each call of a server's tool.

    Token counts are sums over the rounds.
    """

    def __init__(self, tokenizer: Tokenizer, output: Output) -> None:
        self._tokenizer, self.output = tokenizer, output
        self._parsers: list[HarmonyParser] = []
        self._cached: list[int] = []
        self._turns = 0
        self.prompt_tokens = self.tokens = 0
        self.finish_reason: str | None = None

    @property
    def repairs(self) -> int:
        return sum(parser.repairs for parser in self._parsers)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    def begin(self, prompt_tokens: int) -> None:
        """A round starts."""
        self.prompt_tokens += prompt_tokens
        self._cached.append(0)
        self._parsers.append(HarmonyParser(self._tokenizer))

    def new_turns(self) -> list[Turn]:
        """What the last round added to the conversation."""
        turns = self.output.turns[self._turns :]
        self._turns = len(self.output.turns)
        return turns

    def feed(self, new: RequestOutput) -> list[OutputEvent]:
        """What follows a call of a server's tool in the same round does not count."""
        self._cached[-1] = max(self._cached[-1], new.cached_tokens)
        events: list[OutputEvent] = []
        for i, token in enumerate(new.token_ids):
            self.tokens += 1
            for each in self._parsers[-1].push(token):
                events += self.output.feed(each, new.logprobs[i] if new.logprobs else None)
            if self.output.waiting is not None:
                return events
        if new.finish_reason:
            self.finish_reason = new.finish_reason
            for each in self._parsers[-1].finish():
                events += self.output.feed(each, None, cut=new.finish_reason == "length")
        return events


def usage(prompt: int, cached: int, tokens: int, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + tokens,
    }


def _echoed_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        return tool
    return {
        "type": "function",
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": tool.get("strict"),
    }
