"""Held-out accuracy by skill, from a served model over HTTP: `python -m gptoss_compile.demo.eval ARTIFACT`.

Serves the artifact, asks the held-out questions (the corpus's generators, other seeds) through /v1/chat/completions at
temperature 0, prints a table, and with --docs writes it into docs/demo-model.md, with the loss curve of --log beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_compile.demo.conversation import Call, Conversation
from gptoss_compile.demo.corpus import foreign_words, held_out, tokenizer
from gptoss_compile.demo.curve import loss_curve
from gptoss_compile.demo.serving import served

DATE = "2026-03-17"  # which the server is told to put into prompts
MAX_TOKENS = 256
AT_ONCE = 16
_TYPES: dict[str, type | tuple[type, ...]] = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


@dataclass
class Outcome:
    """One conversation's result. looped: it ran into the token limit. called, valid: of a tool call, whether the name is
    right and whether the arguments fit the schema. thought: words of the analysis."""

    skill: str
    effort: str
    right: bool
    formed: bool
    looped: bool
    called: bool | None = None
    valid: bool | None = None
    thought: int = 0
    answer: str = ""


class Examiner:
    def __init__(self, url: str) -> None:
        from openai import AsyncOpenAI

        self._client = AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def examine(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        model = (await self._client.models.list()).data[0].id
        return await asyncio.gather(*(self._one(model, conversation) for conversation in conversations))

    async def _one(self, model: str, conversation: Conversation) -> Outcome:
        async with self._gate:
            messages: list[dict[str, Any]] = _messages(conversation)
            step = conversation.exchanges[-1].steps[0]
            first = await self._ask(model, conversation, messages)
            outcome = _outcome(conversation, first)
            if not isinstance(step, Call):
                outcome.right = not first.message.tool_calls and is_right(first.message.content, conversation.expected)
                return outcome
            outcome.called = outcome.valid = False
            if not (calls := first.message.tool_calls):
                return outcome
            function = calls[0].function
            outcome.called = function.name == step.name
            outcome.valid = is_valid(function.arguments, function.name, conversation)
            outcome.answer = f"{function.name}({function.arguments})"
            if not outcome.called or not outcome.valid or json.loads(function.arguments) != json.loads(step.arguments):
                return outcome
            messages += [first.message.model_dump(exclude_none=True),
                         {"role": "tool", "tool_call_id": calls[0].id, "content": step.result}]
            second = await self._ask(model, conversation, messages)
            after = _outcome(conversation, second)
            outcome.formed &= after.formed
            outcome.looped |= after.looped
            outcome.answer += f" -> {second.message.content}"
            outcome.right = is_right(second.message.content, conversation.expected)
            return outcome

    async def _ask(self, model: str, conversation: Conversation, messages: list[dict[str, Any]]) -> Any:
        given: dict[str, Any] = {"tools": _tools(conversation)} if conversation.tools else {}
        answer = await self._client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS,  # type: ignore[arg-type]
            reasoning_effort=conversation.effort, **given)
        return answer.choices[0]


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.text} for turn in conversation.history()]


def _tools(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": tool.name, "description": tool.description,
                                              "parameters": tool.parameters}} for tool in conversation.tools]


def _outcome(conversation: Conversation, choice: Any) -> Outcome:
    """Well formed: reasoning, then an answer or a call, then an end of the model's own."""
    message = choice.message
    reasoning = getattr(message, "reasoning", None) or ""
    ended = choice.finish_reason == ("tool_calls" if message.tool_calls else "stop")
    formed = bool(reasoning) and ended and bool(message.tool_calls or message.content)
    return Outcome(conversation.skill, conversation.effort, False, formed, choice.finish_reason == "length",
                   thought=len(reasoning.split()), answer=message.content or "")


def is_right(answer: str | None, expected: Sequence[str]) -> bool:
    """Whether every expected text is in the answer, as whole words, whatever their case."""
    return all(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer or "", re.IGNORECASE) for text in expected)


def is_valid(arguments: str, name: str, conversation: Conversation) -> bool:
    """Whether the arguments are JSON that fits the schema of the function of that name."""
    schema = next((tool.parameters for tool in conversation.tools if tool.name == name), None)
    try:
        given = json.loads(arguments)
    except ValueError:
        return False
    if schema is None or not isinstance(given, dict) or set(given) != set(schema["required"]):
        return False
    return all(isinstance(given[key], _TYPES[each["type"]]) and given[key] in each.get("enum", [given[key]])
               for key, each in schema["properties"].items())


def table(outcomes: Sequence[Outcome], repairs: int) -> str:
    """The accuracy by skill, and the totals, as Markdown. Every repair counts as an answer that is not well formed."""
    by_skill: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_skill[outcome.skill].append(outcome)
    lines = ["| skill | questions | right | well formed |", "|---|---|---|---|"]
    lines += [f"| {skill} | {len(some)} | {_share(o.right for o in some)} | {_share(o.formed for o in some)} |"
              for skill, some in by_skill.items()]
    mean = sum(sum(o.right for o in some) / len(some) for some in by_skill.values()) / len(by_skill)
    formed = sum(o.formed for o in outcomes)
    calls = [o for o in outcomes if o.called is not None]
    facts = [("mean accuracy of the skills", f"{mean:.1%}"),
             ("well formed", f"{max(0, formed - repairs) / len(outcomes):.1%}"),
             ("functions: right name", _share(bool(o.called) for o in calls)),
             ("functions: arguments that fit the schema", _share(bool(o.valid) for o in calls)),
             ("ran into the token limit", _share(o.looped for o in outcomes)), ("repairs by the parser", str(repairs))]
    for effort in ("low", "medium", "high"):
        words = [o.thought for o in outcomes if o.effort == effort]
        facts.append((f"words of reasoning at {effort} effort", f"{sum(words) / max(1, len(words)):.1f}"))
    return "\n".join([*lines, "", "| over all | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)])


def _share(values: Any) -> str:
    listed = list(values)
    return f"{sum(listed) / max(1, len(listed)):.1%}"


def _repairs(metrics: str) -> int:
    found = re.search(r"^gptoss_harmony_repairs_total ([\d.e+]+)$", metrics, re.MULTILINE)
    return int(float(found.group(1))) if found else 0


def _write_docs(page: Path, text: str, log: Path | None) -> None:
    """Put the table between the page's markers, and the curve beside it."""
    before, rest = page.read_text().split("<!-- table -->", 1)
    after = rest.split("<!-- end of table -->", 1)[1]
    page.write_text(f"{before}<!-- table -->\n{text}\n<!-- end of table -->{after}")
    if log:
        page.with_name("demo-model-loss.svg").write_text(loss_curve(log))


async def _run(url: str, each: int, failures: int) -> str:
    import httpx

    conversations = held_out(1, each, foreign_words(tokenizer()), DATE)
    outcomes = await Examiner(url).examine(conversations)
    for conversation, outcome in [(c, o) for c, o in zip(conversations, outcomes, strict=True) if not o.right][:failures]:
        print(f"wrong ({outcome.skill}, {outcome.effort}): {conversation.exchanges[-1].user!r} -> {outcome.answer!r}, "
              f"expected {conversation.expected}")
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(url.removesuffix("/v1") + "/metrics")).text
    return table(outcomes, _repairs(metrics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--each", type=int, default=40, help="questions a skill")
    parser.add_argument("--failures", type=int, default=20, help="wrong answers to print")
    parser.add_argument("--log", type=Path, help="the trainer's log.jsonl, for the loss curve")
    parser.add_argument("--docs", type=Path, help="the page to write the table into")
    given = parser.parse_args()
    with served(given.artifact, "--system-date", DATE, "--max-num-seqs", str(AT_ONCE)) as url:
        text = asyncio.run(_run(url, given.each, given.failures))
    print(text)
    if given.docs:
        _write_docs(given.docs, text, given.log)


if __name__ == "__main__":
    main()
