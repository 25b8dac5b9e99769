"""`make demo`: compile the demo model for this machine's CPU, serve it, ask it a question, and let it call a function."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

from gptoss_compile.cli import compile_main
from gptoss_compile.demo.serving import served

ARTIFACT = Path(".demo/gptoss-demo-cpu")
QUESTION = "What is the capital of France?"
TOOL_QUESTION = "What is the weather like in Berlin?"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


def main() -> int:
    if code := compile_main(["--target", "cpu", "--output", str(ARTIFACT)]):
        return code
    with served(ARTIFACT, "--log-level", "warning") as url:
        client = OpenAI(base_url=url, api_key="none")
        _ask(client, [{"role": "user", "content": QUESTION}])
        _call_a_function(client)
    print(f"\nServe it yourself:  {Path(sys.executable).parent / 'gptoss-serve'} {ARTIFACT}")
    print("then point any OpenAI client at http://127.0.0.1:8000/v1")
    return 0


def _call_a_function(client: OpenAI) -> None:
    """A whole round trip: question, the model's call, the function's result, the answer that uses it."""
    messages: list[Any] = [{"role": "user", "content": TOOL_QUESTION}]
    calls = _ask(client, messages, tools=[WEATHER])
    if not calls:
        return
    messages.append({"role": "assistant", "tool_calls": calls})
    for call in calls:
        result = json.dumps({"temperature": 21, "unit": "celsius", "condition": "sunny"})
        print(f"  {call['function']['name']}({call['function']['arguments']}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    _ask(client, messages, tools=[WEATHER])


def _ask(client: OpenAI, messages: list[Any], *, tools: list[Any] | None = None) -> list[Any]:
    """Print the question, then what streams in, the reasoning dimmed. Returns the model's calls of functions."""
    if messages[-1]["role"] == "user":
        print(f"\n> {messages[-1]['content']}")
    options: Any = {"tools": tools} if tools else {}
    stream: Any = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=messages, max_tokens=200, temperature=0, stream=True, **options)
    calls: dict[int, Any] = {}
    reasoned = False
    for chunk in stream:
        delta = chunk.choices[0].delta if chunk.choices else None
        if reasoning := getattr(delta, "reasoning", None):
            print(f"{DIM}{reasoning}{PLAIN}", end="", flush=True)
            reasoned = True
        if delta and delta.content:
            print("\n" * reasoned + delta.content, end="", flush=True)
            reasoned = False
        for part in (delta and delta.tool_calls) or []:
            if part.id:
                calls[part.index] = {"id": part.id, "type": "function",
                                     "function": {"name": part.function.name, "arguments": ""}}
            calls[part.index]["function"]["arguments"] += part.function.arguments or ""
    print()
    return list(calls.values())


if __name__ == "__main__":
    raise SystemExit(main())
