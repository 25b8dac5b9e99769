"""What the model writes as the output items of a response, and the events that tell of them as they grow.

One item is open at a time: output_item.added, content_part.added, deltas, the text's done, content_part.done,
output_item.done. An item never has an optional field that is null: absent fields are left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from gptoss_compile.runtime.api.harmony import Event, Message
from gptoss_compile.runtime.api.logprobs import LogprobNames
from gptoss_compile.runtime.api.render import Turn
from gptoss_compile.runtime.api.responses_declared import CALLS, Declared, as_input
from gptoss_compile.runtime.api.responses_tools import MAX_CALLS, MAX_REFUSALS, CallItem, OutputEvent, list_tools
from gptoss_compile.runtime.api.seal import Seal
from gptoss_compile.runtime.api.tool_server.browser import Page
from gptoss_compile.runtime.api.tool_server.server import Target, Toolbox
from gptoss_compile.runtime.api.tools import NAMESPACE, as_turn, call_id, called_tool, is_thought
from gptoss_compile.runtime.sampler import TokenLogprobs


@dataclass(frozen=True)
class OutputOptions:
    """tools: the client's, by the names that the model knows. summaries: give the reasoning as a summary, too.
    reasoning_event: its name.

    toolbox: the tools that run on this server; max_calls: how many calls of those there may be; include: the request's.
    """

    tools: Mapping[str, Declared]
    toolbox: Toolbox
    max_calls: int = MAX_CALLS
    include: Sequence[str] = ()
    logprobs: LogprobNames | None = None
    seal: Seal | None = None
    summaries: bool = False
    reasoning_event: str = "response.reasoning_text"


class Output:
    """The items of one response. Feed it the parser's events; it returns the response's."""

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self.items: list[dict[str, Any]] = []
        self.turns: list[Turn] = []
        self.item_turns: dict[str, list[Turn]] = {}
        self.reasoning_tokens = 0
        self.calls = 0  # of the server's tools
        self.call: CallItem | None = None  # the one that is written, or waiting
        self.waiting: Turn | None = None  # the call to be made; it joins the conversation together with its result
        self._container = f"cntr_{secrets.token_hex(16)}"
        self._scores: list[dict[str, Any]] = []

    @property
    def called(self) -> bool:
        return any(item["type"] in CALLS for item in self.items)

    def feed(self, event: Event, scores: TokenLogprobs | None, *, cut: bool = False) -> Iterator[OutputEvent]:
        """cut: the message is closed because the answer ran out of room."""
        if (target := self._target(event.message)) is not None:
            yield from self._call_event(event, target, cut)
        elif event.kind == "open":
            yield from self._open(event.message)
        elif event.kind == "text":
            yield from self._text(event, scores)
        else:
            yield from self._close(event.message, "incomplete" if cut else "completed")

    @property
    def exhausted(self) -> bool:
        """Whether the model goes on calling although it was told that it may not."""
        return self.calls >= self._options.max_calls + MAX_REFUSALS

    @property
    def pages(self) -> Sequence[Page]:
        return tuple(self._options.toolbox.pages)

    async def make_call(self) -> list[OutputEvent]:
        """Make the call that waits."""
        call = self.call
        assert call is not None and self.waiting is not None
        result = await call.run()
        made = self.waiting
        answer = Turn("tool", result, made.channel, name=(made.recipient or "").removeprefix(NAMESPACE))
        self.turns += [made, answer]
        if call.item is not None:
            self.item_turns[call.item["id"]] = [made, answer]
        self.call = self.waiting = None
        return list(call.finish())

    def written(self) -> Iterator[tuple[dict[str, Any], list[Turn]]]:
        """Each item that is no reasoning, with what the model wrote since the one before it, and the item itself at last."""
        start = 0
        for item in self.items:
            if item["type"] != "reasoning" and (own := self.item_turns.get(item["id"])):
                end = next(i for i in range(start, len(self.turns)) if self.turns[i] is own[-1]) + 1
                yield item, self.turns[start:end]
                start = end

    def list_tools(self, label: str) -> Iterator[OutputEvent]:
        """Tell what an MCP server offers."""
        yield from list_tools(self.items, self._options.toolbox, label)

    def _target(self, message: Message) -> Target | None:
        """The server's tool that a message calls; a function of the client that has the same name comes first."""
        declared = (message.recipient or "").startswith(NAMESPACE) and called_tool(message, self._options.tools)
        return None if declared or message.channel == "final" else self._options.toolbox.target(message.recipient)

    def _call_event(self, event: Event, target: Target, cut: bool) -> Iterator[OutputEvent]:
        message = event.message
        if event.kind == "open":
            include = self._options.include
            self.call = CallItem(
                self._options.toolbox,
                target,
                len(self.items),
                self._container,
                refused=self.calls >= self._options.max_calls,
                show_outputs="code_interpreter_call.outputs" in include,
                show_sources="web_search_call.action.sources" in include,
            )
            yield from self.call.open()
            if self.call.item is not None:
                self.items.append(self.call.item)
            return
        assert self.call is not None
        if event.kind == "text":
            yield from self.call.write(event.text)
            return
        known = self.call.item is not None
        yield from self.call.close(message.text, cut=cut)
        if self.call.item is not None and not known:
            self.items.append(self.call.item)
        self.calls += 1
        if not cut:
            self.waiting = Turn(
                "assistant", message.text, message.channel, recipient=message.recipient, tokens=message.tokens
            )

    def _where(self, **fields: Any) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _open(self, message: Message) -> Iterator[OutputEvent]:
        item = self._new_item(message)
        self.items.append(item)
        self._scores = []
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": deepcopy(item)}
        if item["type"] not in CALLS:
            yield "response.content_part.added", self._where(content_index=0, part=self._part(""))

    def _new_item(self, message: Message) -> dict[str, Any]:
        name = called_tool(message, self._options.tools)
        if name is not None:
            return self._options.tools[name].item(call_id())
        if is_thought(message):
            return {
                "type": "reasoning",
                "id": f"rs_{secrets.token_hex(16)}",
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
        return {
            "type": "message",
            "id": f"msg_{secrets.token_hex(16)}",
            "role": "assistant",
            "content": [],
            "status": "in_progress",
            "phase": "commentary" if message.channel == "commentary" else "final_answer",
        }

    def _in_json(self, message: Message) -> bool:
        """Whether a call of a custom tool holds its input as JSON."""
        name = called_tool(message, self._options.tools)
        return name is not None and self._options.tools[name].format is None

    def _part(self, text: str) -> dict[str, Any]:
        if self.items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        browser = self._options.toolbox.browser
        notes = list(browser.citations(text)) if browser else []
        part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": notes}
        return part | ({"logprobs": list(self._scores)} if self._options.logprobs else {})

    def _text(self, event: Event, scores: TokenLogprobs | None) -> Iterator[OutputEvent]:
        kind = self.items[-1]["type"]
        if kind == "function_call":
            if event.text:
                yield "response.function_call_arguments.delta", self._where(delta=event.text)
        elif kind == "custom_tool_call":  # in JSON the input is known once that is complete
            if event.text and not self._in_json(event.message):
                yield "response.custom_tool_call_input.delta", self._where(delta=event.text)
        elif kind == "reasoning":
            self.reasoning_tokens += event.from_token
            if event.text:
                yield f"{self._options.reasoning_event}.delta", self._where(content_index=0, delta=event.text)
        else:
            entries = []
            if self._options.logprobs and scores and event.from_token:
                entries = [self._options.logprobs.entry(scores)]
                self._scores += entries
            if event.text or entries:
                yield "response.output_text.delta", self._where(content_index=0, delta=event.text, logprobs=entries)

    def _close(self, message: Message, status: str) -> Iterator[OutputEvent]:
        item, text = self.items[-1], message.text
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield "response.function_call_arguments.done", self._where(arguments=text, name=item["name"])
        elif item["type"] == "custom_tool_call":
            item["input"] = text
            if self._in_json(message):
                item["input"] = as_input(text)
                yield "response.custom_tool_call_input.delta", self._where(delta=item["input"])
            yield "response.custom_tool_call_input.done", self._where(input=item["input"])
        else:
            yield from self._close_text(item, text)
        if item["type"] == "reasoning" and self._options.seal and message.tokens:
            item["encrypted_content"] = self._options.seal.close(message.tokens)
        self._remember(message, item)
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": deepcopy(item)}

    def _close_text(self, item: dict[str, Any], text: str) -> Iterator[OutputEvent]:
        if item["type"] == "reasoning":
            yield f"{self._options.reasoning_event}.done", self._where(content_index=0, text=text)
        else:
            for number, note in enumerate(self._part(text)["annotations"]):
                where = self._where(content_index=0, annotation_index=number)
                yield "response.output_text.annotation.added", {**where, "annotation": note}
            yield "response.output_text.done", self._where(content_index=0, text=text, logprobs=list(self._scores))
        item["content"] = [self._part(text)]
        yield "response.content_part.done", self._where(content_index=0, part=self._part(text))
        if item["type"] == "reasoning" and self._options.summaries:
            yield from self._summary(item, text)

    def _summary(self, item: dict[str, Any], text: str) -> Iterator[OutputEvent]:
        """The reasoning once more, for clients that show nothing but its summary."""
        where = self._where(summary_index=0)
        part = {"type": "summary_text", "text": text}
        yield "response.reasoning_summary_part.added", {**where, "part": {"type": "summary_text", "text": ""}}
        yield "response.reasoning_summary_text.delta", {**where, "delta": text}
        yield "response.reasoning_summary_text.done", {**where, "text": text}
        yield "response.reasoning_summary_part.done", {**where, "part": part}
        item["summary"] = [part]

    def _remember(self, message: Message, item: dict[str, Any]) -> None:
        turn = as_turn(message, self._options.tools)
        self.turns.append(turn)
        self.item_turns[item["id"]] = [turn]
