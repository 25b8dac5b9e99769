"""gptoss-serve: the real server on a loopback socket, seen by the official client in strict mode."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import openai
import pytest
from scripted import Script, ScriptedEngine
from served import Running

from gptoss_compile.runtime import server

ANSWER = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello 👍🏽!<|return|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
USER: Any = [{"role": "user", "content": "hi"}]


def test_official_client(strict: openai.OpenAI, script: Script) -> None:
    assert [model.id for model in strict.models.list()] == ["gpt-oss"]
    assert strict.models.retrieve("gpt-oss").id == "gpt-oss"
    script.add(ANSWER, ANSWER, CALL, CALL, "text", ANSWER)
    chat: Any = strict.chat.completions
    whole = chat.create(model="gpt-oss", messages=USER, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == "Hello 👍🏽!" and whole.choices[0].message.reasoning == "Think."
    assert whole.usage.completion_tokens_details.reasoning_tokens == 2
    chunks = list(chat.create(model="gpt-oss", messages=USER, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello 👍🏽!"
    assert chunks[-1].usage.total_tokens > 0
    called = chat.create(model="gpt-oss", messages=USER, tools=[TOOL]).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.tool_calls[0].function.arguments == '{"a": 1}'
    with strict.chat.completions.stream(model="gpt-oss", messages=USER, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "f"
    text = strict.completions.create(model="gpt-oss", prompt=[1, 2], max_tokens=1, logprobs=1)
    assert text.choices[0].text == "text" and text.choices[0].logprobs is not None
    for status, error, arguments in (
        (400, openai.BadRequestError, {"temperature": 3}),
        (404, openai.NotFoundError, {"model": "x"}),
    ):
        with pytest.raises(error) as caught:
            chat.create(**{"model": "gpt-oss", "messages": USER, **arguments})
        assert caught.value.status_code == status and caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=str(strict.base_url), api_key="wrong", max_retries=0).models.list()


def test_official_client_on_responses(strict: openai.OpenAI, script: Script) -> None:
    tool: Any = {"type": "function", "name": "f", "parameters": TOOL["function"]["parameters"], "strict": False}
    script.add(CALL, ANSWER, ANSWER, ANSWER)
    first = strict.responses.create(model="gpt-oss", input="hi", tools=[tool])
    call: Any = first.output[-1]
    assert call.type == "function_call" and call.arguments == '{"a": 1}'
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    second = strict.responses.create(
        model="gpt-oss",
        input=[output],
        tools=[tool],
        previous_response_id=first.id,
        include=["message.output_text.logprobs"],
        reasoning={"effort": "low", "summary": "auto"},
        top_logprobs=2,
    )
    assert second.output_text == "Hello 👍🏽!" and second.usage is not None
    with strict.responses.stream(model="gpt-oss", input="hi", tools=[tool], reasoning={"summary": "auto"}) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Hello 👍🏽!"
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds and "response.reasoning_summary_text.done" in kinds
    assert strict.responses.retrieve(second.id).id == second.id
    assert len(list(strict.responses.retrieve(second.id, stream=True, starting_after=2))) > 5
    assert [item.type for item in strict.responses.input_items.list(second.id)] == ["function_call_output"]
    assert strict.responses.input_tokens.count(model="gpt-oss", input="hi").input_tokens > 50
    background = strict.responses.create(model="gpt-oss", input="hi", background=True)
    assert background.status in ("queued", "in_progress", "completed")
    strict.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        strict.responses.retrieve(second.id)


def test_closing_a_stream_aborts(strict: openai.OpenAI, engine: ScriptedEngine) -> None:
    stream = strict.chat.completions.create(
        model="gpt-oss", messages=USER, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 2
    while engine.stats().kv_pages_held and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.stats().kv_pages_held == 0


def test_draining_finishes_answers(running: Running, strict: openai.OpenAI, script: Script) -> None:
    script.add("<|channel|>final<|message|>" + "word " * 100 + "<|return|>")
    stream = strict.chat.completions.create(model="gpt-oss", messages=USER, stream=True)
    chunks = [next(iter(stream))]
    running.servers[0].should_exit = True  # what SIGTERM sets
    chunks += list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "word " * 100
    running.thread.join(10)
    assert running.ended == [None]


def test_engine_death_ends_the_server(running: Running, strict: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.executor.fail = True
    with pytest.raises(openai.InternalServerError):
        strict.chat.completions.create(model="gpt-oss", messages=USER)
    assert httpx.get(running.url + "/health").status_code == 503
    running.thread.join(10)
    assert isinstance(running.ended[0], server.EngineDiedError) and "fell off the bus" in str(running.ended[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "/nonexistent"),
        (["x", "--port", "99999"], "port"),
        (["x", "--kv-pages", "0"], "positive"),
        ([], "ARTIFACT"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        code: Any = server.main(arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


def test_busy_port(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            server._listen("127.0.0.1", port)
    with pytest.raises(OSError, match="cannot listen on"):
        server._listen("no such host", 0)


def test_unusable_certificate() -> None:
    with pytest.raises(OSError, match="cannot use the certificate"):
        server._check_certificate("/nonexistent.pem", None)
    with pytest.raises(ValueError, match="needs --ssl-certfile"):
        server._check_certificate(None, "/nonexistent.pem")


def test_importing_the_runtime_is_cheap() -> None:
    code = (
        "import sys; import gptoss_compile.runtime as r; r.serve; "
        "print([m for m in ('torch', 'triton', 'starlette', 'numpy', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_serving_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys; import gptoss_compile.runtime.server; "
        "print([m for m in ('torch', 'triton', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
