"""One answer of a chat as it grows: tokens in, content, reasoning and tool calls out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptoss_compile.runtime.api.harmony import STOP_IDS, Event, HarmonyParser, Message
from gptoss_compile.runtime.api.logprobs import LogprobNames
from gptoss_compile.runtime.api.render import Turn
from gptoss_compile.runtime.api.schemas import ChatBody
from gptoss_compile.runtime.api.stops import StopStrings
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tools import Call, as_turn, called_tool
from gptoss_compile.runtime.outputs import RequestOutput
from gptoss_compile.runtime.sampler import TokenLogprobs


class Choice:
    """Where a message's text goes is decided by its recipient first, its channel second:

    - a declared tool, on any channel but final: a tool call;
    - final, and commentary without recipient (what the model says before a call): content;
    - everything else, calls of tools that do not exist included: reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, body: ChatBody, index: int, tools: Sequence[str]) -> None:
        self._body, self._index, self._tools = body, index, tools
        self._names = LogprobNames(tokenizer)
        self._parser = HarmonyParser(tokenizer, ignore_eos=bool(body.ignore_eos))
        self._stops = StopStrings(body.stops, include=bool(body.include_stop_str_in_output))
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Call] = []
        self._logprobs: list[dict[str, Any]] = []
        self._token_ids: list[int] = []
        self._shown: dict[str, Message] = {}  # content, reasoning -> the message last written there
        self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None  # the stop string or id that cut the answer short

    @property
    def tokens(self) -> int:
        return len(self._token_ids)

    @property
    def repairs(self) -> int:
        return self._parser.repairs

    def feed(self, output: RequestOutput) -> list[dict[str, Any]]:
        """Take in what is new and return it as choices of chunks of a stream."""
        chunks: list[dict[str, Any]] = []
        for i, token in enumerate(output.token_ids):
            chunks += self._token(token, output.logprobs[i] if output.logprobs else None)
            if self._stops.matched is not None:
                self.finish_reason, self.stop_reason = "stop", self._stops.matched
                break
        if output.finish_reason and not self.finish_reason:
            chunks += [chunk for each in self._parser.finish() for chunk in self._event(each, None)]
            if rest := self._stops.finish():
                chunks.append(self._say("content", rest))
            called = bool(self._calls) and all(call.complete for call in self._calls)
            self.finish_reason = "tool_calls" if called else output.finish_reason
            if output.stop_id not in (None, *STOP_IDS):
                self.stop_reason = output.stop_id
        if self.finish_reason:
            chunks.append(self.chunk({}) | self._finish)
        return chunks

    @property
    def calls(self) -> Sequence[Call]:
        return self._calls

    @property
    def turns(self) -> list[Turn]:
        return [as_turn(message, self._tools) for message in self._parser.messages]

    @property
    def _finish(self) -> dict[str, Any]:
        reason = {} if self.stop_reason is None else {"stop_reason": self.stop_reason}
        return {"finish_reason": self.finish_reason, **reason}

    def whole(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self._calls else ""),
            "refusal": None,
        }
        if self._reasoning and self._body.include_reasoning is not False:
            message["reasoning"] = message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self._calls
            ]
        choice = {
            "index": self._index,
            "message": message,
            **self._finish,
            "logprobs": {"content": self._logprobs, "refusal": None} if self._body.logprobs else None,
        }
        return choice | ({"token_ids": self._token_ids} if self._body.return_token_ids else {})

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _token(self, token: int, scores: TokenLogprobs | None) -> list[dict[str, Any]]:
        self._token_ids.append(token)
        chunks = [chunk for each in self._parser.push(token) for chunk in self._event(each, scores)]
        if self._body.return_token_ids:
            chunks = chunks or [self.chunk({})]
            chunks[-1]["token_ids"] = [token]
        return chunks

    def _event(self, event: Event, scores: TokenLogprobs | None) -> list[dict[str, Any]]:
        message = event.message
        if name := called_tool(message, self._tools):
            return self._call_event(event, name)
        if event.kind != "text":
            return []
        if message.channel == "final" or (message.channel == "commentary" and message.recipient is None):
            entry = self._names.entry(scores) if scores and event.from_token else None
            text = self._stops.push(self._separated("content", message) + event.text)
            return [self._say("content", text, entry)] if text or entry else []
        self.reasoning_tokens += event.from_token
        text = self._separated("reasoning", message) + event.text
        return [self._say("reasoning", text)] if text and self._body.include_reasoning is not False else []

    def _call_event(self, event: Event, name: str) -> list[dict[str, Any]]:
        if event.kind == "open":
            call = Call(event.message, name, len(self._calls))
            self._calls.append(call)
            function = {"name": name, "arguments": ""}
            return [
                self.chunk(
                    {"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]}
                )
            ]
        if not event.text:
            return []
        index = self._calls[-1].index
        return [self.chunk({"tool_calls": [{"index": index, "function": {"arguments": event.text}}]})]

    def _separated(self, place: str, message: Message) -> str:
        """A blank line before the text of a second message that goes to the same place."""
        before, self._shown[place] = self._shown.get(place, message), message
        return "" if before is message else "\n\n"

    def _say(self, place: str, text: str, entry: dict[str, Any] | None = None) -> dict[str, Any]:
        (self._content if place == "content" else self._reasoning).append(text)
        delta = {"content": text} if place == "content" else {"reasoning": text, "reasoning_content": text}
        chunk = self.chunk(delta)
        if entry is not None:
            self._logprobs.append(entry)
            chunk["logprobs"] = {"content": [entry], "refusal": None}
        return chunk
