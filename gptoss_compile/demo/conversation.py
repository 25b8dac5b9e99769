"""One training conversation, and its exact tokens as the server would prompt and the model should answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, END, MESSAGE, RETURN, START
from gptoss_compile.runtime.api.render import Effort, FunctionTool, Prompt, Turn, call_header, render
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tools import NAMESPACE

CONTEXT = 4096  # tokens that a conversation may take while it is rendered; the corpus drops what a row cannot hold


@dataclass(frozen=True)
class Answer:
    """A turn that thinks and then answers."""

    analysis: str
    final: str


@dataclass(frozen=True)
class Call:
    """A turn that thinks, calls a function with `arguments` (JSON), and is given `result` (JSON)."""

    analysis: str
    name: str
    arguments: str
    result: str


@dataclass(frozen=True)
class Exchange:
    """What the user says and the steps that answer it: any number of calls, then an answer."""

    user: str
    steps: tuple[Call | Answer, ...]

    @property
    def final(self) -> str:
        last = self.steps[-1]
        assert isinstance(last, Answer), "an exchange ends with an answer"
        return last.final


@dataclass(frozen=True)
class Conversation:
    """The last exchange is what is learnt; those before it are history.

    expected: texts that a right final answer contains, as whole words.
    """

    skill: str
    exchanges: tuple[Exchange, ...]
    expected: tuple[str, ...]
    effort: Effort = "medium"
    tools: tuple[FunctionTool, ...] = ()
    instructions: str = ""
    date: str = "2026-01-01"

    def history(self) -> list[Turn]:
        """The turns up to the question, as a client sends them: of earlier answers only the final message."""
        turns = [Turn("developer", self.instructions)] if self.instructions else []
        for exchange in self.exchanges[:-1]:
            turns += [Turn("user", exchange.user), Turn("assistant", exchange.final, channel="final")]
        return [*turns, Turn("user", self.exchanges[-1].user)]


def tokens_of(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation and, for each, whether the model is to write it."""
    prompt = Prompt(conversation.history(), conversation.tools, conversation.effort, conversation.date)
    ids = asyncio.run(render(tokenizer, prompt, CONTEXT))
    learnt = [False] * len(ids)
    for step in conversation.exchanges[-1].steps:
        written = written_tokens(tokenizer, step)
        ids += written
        learnt += [True] * len(written)
        if isinstance(step, Call):
            given = _result_tokens(tokenizer, step)
            ids += given
            learnt += [False] * len(given)
    return ids, learnt


def written_tokens(tokenizer: Tokenizer, step: Call | Answer) -> list[int]:
    """What the model writes in one turn, after `<|start|>assistant`."""
    encode = tokenizer.encode
    ids = [CHANNEL, *encode("analysis"), MESSAGE, *encode(step.analysis), END, START, *encode("assistant"), CHANNEL]
    if isinstance(step, Call):
        return [*ids, *call_header(tokenizer, NAMESPACE + step.name), *encode(step.arguments), CALL]
    return [*ids, *encode("final"), MESSAGE, *encode(step.final), RETURN]


def _result_tokens(tokenizer: Tokenizer, call: Call) -> Sequence[int]:
    encode = tokenizer.encode
    header = [START, *encode(f"{NAMESPACE}{call.name} to=assistant"), CHANNEL, *encode("commentary"), MESSAGE]
    return [*header, *encode(call.result), END, START, *encode("assistant")]
