"""Tools that run on the server, in Responses: scripted tool loops, streamed and not, their limits and failures."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import asgi_client
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import Script, ScriptedEngine
from test_http import error_of
from test_responses import TOOL, check_events, events, no_nulls

from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.responses_tools import MAX_REFUSALS, REFUSAL
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server import mcp_tools
from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.sandbox import Limits, Sandbox
from gptoss_compile.runtime.api.tool_server.search import Corpus
from gptoss_compile.runtime.api.tool_server.server import PYTHON, Toolbox, ToolServer

URL = "/v1/responses"
WEB, PY = {"type": "web_search_preview"}, {"type": "code_interpreter", "container": {"type": "auto"}}
MCP = {"type": "mcp", "server_label": "station", "server_url": "http://nobody.invalid", "require_approval": "never"}
THOUGHT = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SANDBOX = Sandbox(Limits(memory=512 << 20, files=4 << 20, cpu_seconds=5, wall_seconds=5.0))
needs_sandbox = pytest.mark.skipif(bool(why := SANDBOX.unavailable()), reason=f"no sandbox here: {why}")

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def call(recipient: str, text: str, channel: str = "analysis", kind: str = "code") -> str:
    return f"{THOUGHT}<|channel|>{channel} to={recipient} {kind}<|message|>{text}<|call|>"


def final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "kestrel.md").write_text("# Kestrels\n\nA kestrel hovers.\n\nSee [owls](deep/owl.md).\n" + "line\n" * 900)
    (tmp_path / "deep" / "owl.md").write_text("# Owls\n\nAn owl hunts at night, silently.\n")
    (tmp_path / "skipped.bin").write_bytes(b"owl")
    return tmp_path


class Station:
    """An MCP server's tools, in process."""

    def __init__(self) -> None:
        self.sessions = 0
        tools = (mcp_tools.McpTool("forecast", "Forecast of a city.", {"type": "object", "properties": {"city": {}}}),)
        self.server = mcp_tools.McpServer("station.invalid:1", "station", tools)

    async def __aenter__(self) -> Station:
        self.sessions += 1
        return self

    async def __aexit__(self, *failure: Any) -> None:
        self.sessions -= 1

    async def call_tool(self, name: str, arguments: dict[str, Any], read_timeout_seconds: float) -> Any:
        if arguments.get("city") == "Atlantis":
            raise ConnectionError("the line went dead")

        class Result:
            content = (type("Text", (), {"type": "text", "text": f"{arguments['city']}: sunny"}),)
            is_error = False

        return Result


@pytest.fixture
def station(monkeypatch: pytest.MonkeyPatch) -> Station:
    station = Station()
    monkeypatch.setattr(mcp_tools, "_client", lambda address: station)
    return station


@pytest.fixture
def client(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, corpus: Path, station: Station
) -> httpx.AsyncClient:
    tools = ToolServer(Corpus(corpus), SANDBOX, {"station": station.server})
    return asgi_client(build_app(engine, tokenizer, options, tools))


async def ask(client: httpx.AsyncClient, stream: bool, **fields: Any) -> dict[str, Any]:
    """The final response, checked against the official types, and its events too if streamed."""
    answer = await client.post(URL, json={"input": "hi", "stream": stream, **fields})
    assert answer.status_code == 200, answer.text
    if stream:
        found = events(answer)
        check_events(found)
        for each in found:
            EVENTS.validate_python(each)
        body: dict[str, Any] = found[-1]["response"]
    else:
        body = answer.json()
    Response.model_validate(body)
    assert no_nulls(body["output"])
    return body | {"kinds": [each["type"] for each in found] if stream else []}


def prompt(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return str(tokenizer.encoding.decode(engine.prompts[-1]))


@pytest.mark.parametrize("stream", [False, True])
async def test_browser(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    script.add(
        call("browser.search", '{"query": "owl hunts"}'),
        call("browser.open", '{"id": 0}'),
        call("browser.find", '{"pattern": "NIGHT"}'),
        final("At night【1†L2】, not noon【9†L1】."),
    )
    body = await ask(client, stream, tools=[WEB], include=["web_search_call.action.sources"])
    calls = [item for item in body["output"] if item["type"] == "web_search_call"]
    assert [item["action"]["type"] for item in calls] == ["search", "open_page", "find_in_page"]
    assert all(item["status"] == "completed" for item in calls)
    assert calls[0]["action"]["sources"][0] == {"type": "url", "url": "file:///deep/owl.md"}
    assert calls[1]["action"]["url"] == calls[2]["action"]["url"] == "file:///deep/owl.md"
    note = {"type": "url_citation", "start_index": 8, "end_index": 14, "url": "file:///deep/owl.md", "title": "Owls"}
    assert body["output"][-1]["content"][0]["annotations"] == [note]
    text = prompt(engine, tokenizer)
    assert "namespace browser {" in text and "[1] Owls (file:///deep/owl.md)\n**viewing lines [0 - 2] of 2**" in text
    assert "<|start|>browser.search to=assistant<|channel|>analysis<|message|>[0] Search results" in text
    assert "# 【0†match at L2】\nL1: An owl hunts at night" in text
    assert len(engine.prompts) == 4 and engine.prompts[3][: len(engine.prompts[2])] == engine.prompts[2]
    assert body["usage"]["input_tokens"] == sum(map(len, engine.prompts))
    assert body["usage"]["input_tokens_details"]["cached_tokens"] > 0
    if stream:
        step = ["output_item.added", "web_search_call.in_progress", "web_search_call.searching"]
        step += ["web_search_call.completed", "output_item.done"]
        assert "|".join(step) in "|".join(kind.removeprefix("response.") for kind in body["kinds"])
        assert body["kinds"].count("response.output_text.annotation.added") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_mistakes_are_told_to_the_model(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    wrong = {
        ("browser.open", '{"id": 0}'): "No page was opened yet",
        ("browser.search", '{"query": 5}'): "query: Input should be a valid string",
        ("browser.open", '{"id": "file:///../../etc/passwd"}'): "There is no page 'file:///../../etc/passwd' here",
        ("browser.search", '{"query": "kestrel"}'): "【0†Kestrels】",
        ("browser.open", '{"id": 7}'): "There is no link 7",
        ("browser.open", '{"cursor": 9}'): "There is no cursor 9",
        ("browser.find", '{"pattern": "x"}'): "find needs an opened page",
    }
    script.add(*(call(*each) for each in wrong), final("ok"))
    body = await ask(client, stream, tools=[{"type": "web_search_preview_2025_03_11"}])
    assert body["status"] == "completed" and body["output"][-1]["content"][0]["text"] == "ok"
    text = prompt(engine, tokenizer)
    for message in wrong.values():
        assert message in text
    failed = [item for item in body["output"] if item.get("status") == "failed"]
    assert [item["action"]["type"] for item in failed] == ["open_page", "find_in_page"]


@pytest.mark.parametrize(
    ("function", "text"), [("fly", "{}"), ("search", "{"), ("search", "[]"), ("find", "{}"), ("open", "")]
)
async def test_what_the_grammar_forbids(corpus: Path, function: str, text: str) -> None:
    """Turns without a grammar could hold these."""
    box = Toolbox(ToolServer(Corpus(corpus)), browser=True)
    target = box.target(f"browser.{function}")
    assert target is not None and box.target("functions.browser.open") is not None and box.target("python") is None
    with pytest.raises(ToolError, match=r"has no function|Bad arguments|No page"):
        await box.call(target, text)


@needs_sandbox
@pytest.mark.parametrize("stream", [False, True])
async def test_python(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    script.add(call("python", "print(6 * 7)"), call("python", "1 / 0"), call("python", "x = 1"), final("42"))
    body = await ask(client, stream, tools=[PY], include=["code_interpreter_call.outputs"])
    calls = [item for item in body["output"] if item["type"] == "code_interpreter_call"]
    assert [item["code"] for item in calls] == ["print(6 * 7)", "1 / 0", "x = 1"]
    assert calls[0]["outputs"] == [{"type": "logs", "logs": "42"}] and calls[0]["container_id"].startswith("cntr_")
    assert "ZeroDivisionError" in calls[1]["outputs"][0]["logs"] and len({item["id"] for item in calls}) == 3
    text = prompt(engine, tokenizer)
    assert f"## python\n\n{PYTHON}" in text and "<|start|>python to=assistant<|channel|>analysis<|message|>42<|end|>" in text
    if stream:
        kinds = [kind.removeprefix("response.code_interpreter_call") for kind in body["kinds"]]
        for kind in (".in_progress", "_code.delta", "_code.done", ".interpreting", ".completed"):
            assert kind in kinds


@pytest.mark.parametrize("stream", [False, True])
async def test_mcp(
    client: httpx.AsyncClient,
    script: Script,
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    station: Station,
    stream: bool,
) -> None:
    script.add(
        call("station.forecast", '{"city": "Bonn"}', "commentary", "<|constrain|>json"),
        call("station.forecast", '{"city": "Atlantis"}'),
        final("sunny"),
    )
    body = await ask(client, stream, tools=[MCP])
    listing, *rest = body["output"]
    assert listing["type"] == "mcp_list_tools" and [tool["name"] for tool in listing["tools"]] == ["forecast"]
    calls = [item for item in rest if item["type"] == "mcp_call"]
    assert [item["status"] for item in calls] == ["completed", "failed"]
    assert calls[0]["output"] == "Bonn: sunny" and calls[0]["server_label"] == "station" and "error" not in calls[0]
    assert calls[1]["error"]["content"][0]["text"] == "The tool failed: the line went dead"
    text = prompt(engine, tokenizer)
    assert "namespace station {" in text and "type forecast" in text and station.sessions == 0
    assert "<|start|>station.forecast to=assistant<|channel|>commentary<|message|>Bonn: sunny<|end|>" in text
    if stream:
        kinds = [kind.removeprefix("response.mcp_") for kind in body["kinds"]]
        for kind in ("list_tools.completed", "call_arguments.delta", "call_arguments.done", "call.completed", "call.failed"):
            assert kind in kinds
        return
    script.add(final("again"))  # the history as a client sends it back, when the store has forgotten it
    history = [{**item, "id": f"x{i}"} for i, item in enumerate(body["output"])]
    again = await ask(client, False, tools=[MCP], input=[{"role": "user", "content": "hi"}, *history[:3]])
    assert [item["type"] for item in again["output"]] == ["message"]
    assert '<|channel|>analysis to=station.forecast code<|message|>{"city": "Bonn"}<|call|>' in prompt(engine, tokenizer)


async def test_loops_end(client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    """max_tool_calls: further calls are refused, and after some refusals the response ends; max_output_tokens sums up."""
    search = call("browser.search", '{"query": "owl"}')
    script.add(search, search, search, final("ok"))
    body = await ask(client, True, tools=[WEB], max_tool_calls=2)
    assert [item["type"] for item in body["output"]].count("web_search_call") == 2 and body["status"] == "completed"
    assert prompt(engine, tokenizer).count(REFUSAL) == 1
    before = len(engine.prompts)
    script.add(*[search] * (1 + MAX_REFUSALS))
    body = await ask(client, True, tools=[WEB], max_tool_calls=1)
    assert body["status"] == "incomplete" and len(engine.prompts) - before == 1 + MAX_REFUSALS
    once = len(script.ids(search))
    for limit in (once + 2, once, once - 3):
        script.add(search, search)
        body = await ask(client, True, tools=[WEB], max_output_tokens=limit)
        assert body["status"] == "incomplete" and body["usage"]["output_tokens"] == limit
        assert script.next() is not None or limit > once
        script._queue.clear()


@needs_sandbox
async def test_cut_call_is_not_made(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    script.add(call("python", "print(1)\n" * 50))
    body = await ask(client, True, tools=[PY], max_output_tokens=40)
    assert body["output"][-1]["status"] == "incomplete" == body["status"]
    script.add(final("ok"))
    await ask(client, False, tools=[PY], previous_response_id=body["id"])
    assert "to=python" not in prompt(engine, tokenizer)


async def test_full_context(client: httpx.AsyncClient, script: Script) -> None:
    """Results that no longer fit end the response; it does not fail."""
    script.add(
        call("browser.search", '{"query": "kestrel"}'),
        *[call("browser.open", '{"id": 0, "cursor": 0, "num_lines": 800}')] * 8,
    )
    body = await ask(client, True, tools=[WEB])
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_with_functions_and_history(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    """A function call after a search ends the response; the next one knows the pages, and old ones go with a final."""
    function = THOUGHT + '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"P"}<|call|>'
    script.add(call("browser.search", '{"query": "owl"}'), function, call("browser.open", '{"id": 0}'), final("x【1†L0】"))
    first = await ask(client, False, tools=[WEB, TOOL])
    assert [item["type"] for item in first["output"]][1::2] == ["web_search_call", "function_call"]
    result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "rain"}
    fields = {"tools": [WEB, TOOL], "previous_response_id": first["id"]}
    second = await ask(client, True, input=[result], **fields)
    assert "[0] Search results" in prompt(engine, tokenizer) and "[1] Owls" in prompt(engine, tokenizer)
    assert second["output"][-1]["content"][0]["annotations"][0]["title"] == "Owls"
    script.add(final("y"), final("z"))
    await ask(client, False, previous_response_id=second["id"])
    assert "Search results" not in prompt(engine, tokenizer) and "x【1†L0】" in prompt(engine, tokenizer)
    items = [{"role": "user", "content": "hi"}, *({"type": "item_reference", "id": i["id"]} for i in first["output"][:2])]
    await ask(client, False, input=items, tools=[WEB])
    assert "[0] Search results" in prompt(engine, tokenizer)


async def test_off_is_left_out(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    script: Script,
    options: ServerOptions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = asgi_client(build_app(engine, tokenizer, options))
    script.add(*[call("browser.search", '{"query": "owl"}'), final("ok"), final("ok")])
    body = await ask(bare, True, tools=[WEB, PY, MCP])
    assert [item["type"] for item in body["output"]] == ["reasoning", "reasoning"]  # a call of what there is not
    assert "namespace" not in prompt(engine, tokenizer) and "# Tools" not in prompt(engine, tokenizer)
    for name in ("web_search_preview", "code_interpreter", "station"):
        assert name in caplog.text
    assert error_of(await bare.post(URL, json={"input": "x", "tools": [WEB], "tool_choice": WEB}))["param"] == "tool_choice"
    await ask(client, False, tools=[{"type": "file_search", "vector_store_ids": []}, {**MCP, "server_label": "other"}])
    assert "# Tools" not in prompt(engine, tokenizer)
    await ask(client, False, tools=[WEB], tool_choice="none")
    assert "# Tools" not in prompt(engine, tokenizer)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "mcp"}, "tools[0].server_label"),
        ({**MCP, "require_approval": "always"}, "tools[0].require_approval"),
        ({**MCP, "allowed_tools": "forecast"}, "tools[0].allowed_tools"),
    ],
)
async def test_refused(client: httpx.AsyncClient, tool: dict[str, Any], param: str) -> None:
    answer = await client.post(URL, json={"input": "x", "tools": [tool]})
    assert answer.status_code == 400 and error_of(answer)["param"] == param


async def test_allowed(client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    script.add(*[final("ok")] * 2)
    body = await ask(client, False, tools=[{**MCP, "allowed_tools": {"tool_names": []}}])
    assert body["output"][0]["tools"] == []
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search_preview"}]}
    await ask(client, False, tools=[WEB, MCP, TOOL], tool_choice=choice)
    text = prompt(engine, tokenizer)
    assert "namespace browser" in text and "namespace station" not in text and "get_weather" not in text


async def test_remote_browser_and_python(
    engine: ScriptedEngine, tokenizer: Tokenizer, options: ServerOptions, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MCP servers that call themselves browser and python, like gpt-oss's own, stand in for the built-in tools."""
    seen = []

    class Remote(Station):
        async def call_tool(self, name: str, arguments: dict[str, Any], read_timeout_seconds: float) -> Any:
            seen.append((name, arguments))
            return await super().call_tool(name, {"city": name}, read_timeout_seconds)

    monkeypatch.setattr(mcp_tools, "_client", lambda address: Remote())
    servers = {name: mcp_tools.McpServer("x:1", name, ()) for name in ("browser", "python")}
    client = asgi_client(build_app(engine, tokenizer, options, ToolServer(servers["browser"], servers["python"])))
    script.add(call("browser.search", '{"query": "owl"}'), call("browser.open", '{"id": 3}'))
    script.add(call("browser.find", '{"pattern": "x"}'), call("python", "print(1)"), final("ok【0†L1】"))
    body = await ask(client, True, tools=[WEB, PY])
    assert [item["status"] for item in body["output"] if item["type"].endswith("_call")] == ["completed"] * 4
    assert [name for name, _ in seen] == ["search", "open", "find", "python"] and seen[3][1] == {"code": "print(1)"}
    assert "<|message|>python: sunny<|end|>" in prompt(engine, tokenizer)


async def test_functions_come_first(client: httpx.AsyncClient, script: Script) -> None:
    script.add(THOUGHT + '<|channel|>commentary to=functions.python <|constrain|>json<|message|>{"city":"P"}<|call|>')
    body = await ask(client, True, tools=[PY, {**TOOL, "name": "python"}])
    assert body["output"][-1]["type"] == "function_call"


@pytest.mark.parametrize(
    ("choice", "item"),
    [
        (WEB, "web_search_call"),
        ({"type": "code_interpreter"}, "code_interpreter_call"),
        ({"type": "mcp", "server_label": "station"}, "mcp_call"),
        ({"type": "mcp", "server_label": "station", "name": "forecast"}, "mcp_call"),
        ("required", "web_search_call"),
    ],
)
async def test_forced(
    client: httpx.AsyncClient, script: Script, engine: ScriptedEngine, choice: Any, item: str
) -> None:
    """The first turn must call; what the script wants to say instead is masked. Later turns are free."""
    if item == "code_interpreter_call" and why:
        pytest.skip(f"no sandbox here: {why}")
    rest = {
        "web_search_call": ' to=browser.search <|constrain|>json<|message|>{"query": "owl"}<|call|>',
        "code_interpreter_call": " to=python code<|message|>print(1)<|call|>",
        "mcp_call": ' to=station.forecast <|constrain|>json<|message|>{"city": "Bonn"}<|call|>',
    }[item]
    script.add("<|channel|>commentary" + rest, final("ok"))
    body = await ask(client, False, tools=[WEB, PY, MCP] if item != "web_search_call" else [WEB], tool_choice=choice)
    assert body["tool_choice"] == choice and item in [each["type"] for each in body["output"]]
    assert body["output"][-1]["content"][0]["text"] == "ok"
    before = len(engine.prompts)
    script.add(final("no"), final("ok"))
    answer = await ask(client, False, tools=[WEB, PY, MCP], tool_choice=choice, max_output_tokens=40)
    rounds = len(engine.prompts) - before  # an answer can only come after a call, even one whose arguments made no sense
    assert rounds > 1 or "final_answer" not in [each.get("phase") for each in answer["output"]]


@pytest.mark.parametrize("extra", [{"server_label": "other"}, {"server_label": "station", "name": "x"}])
async def test_forced_refused(client: httpx.AsyncClient, extra: dict[str, str]) -> None:
    answer = await client.post(URL, json={"input": "x", "tools": [MCP], "tool_choice": {"type": "mcp", **extra}})
    assert answer.status_code == 400 and error_of(answer)["param"] == "tool_choice"


@needs_sandbox
async def test_cancel_ends_the_sandbox(client: httpx.AsyncClient, script: Script) -> None:
    script.add(call("python", "import time\ntime.sleep(60)"))
    body = (await client.post(URL, json={"input": "hi", "tools": [PY], "background": True})).json()
    found = None
    for _ in range(400):
        await asyncio.sleep(0.01)
        found = (await client.get(f"{URL}/{body['id']}")).json()
        if children(os.getpid()):
            break
    start = time.monotonic()
    assert found and (await client.post(f"{URL}/{body['id']}/cancel")).json()["status"] == "cancelled"
    assert time.monotonic() - start < 2 and not children(os.getpid())


def children(pid: int) -> list[str]:
    """Jails that this process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (folder / "cmdline").read_text(), (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if "jail.py" in command and int(parent) == pid:
            found.append(command)
    return found


# The sandbox ----------------------------------------------------------------------------------------------------------


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "Network is unreachable"),
        ("import socket; print(len(socket.if_nameindex()))", "1"),  # loopback, which is down
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", "PermissionError"),
        ("import ctypes; print(ctypes.CDLL(None).vfork())", "-1"),
        ("import threading as t; x = t.Thread(target=print, args=('ran',)); x.start(); x.join()", "ran"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("import os; print(sorted({'home', 'proc', 'etc', 'sys', 'work'} & set(os.listdir('/'))))", "[]"),
        ("open('/usr/lib/planted', 'w')", "Read-only file system"),
        ("import ctypes; print(ctypes.CDLL(None).mount(b'tmpfs', b'/usr', b'tmpfs', 0, None))", "-1"),
        ("import ctypes; print(ctypes.CDLL(None).umount2(b'/usr', 2))", "-1"),
        ("import os; print(os.getpid(), 'EXA_API_KEY' in os.environ, len(os.environ))", "1 False 5"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('/tmp/big', 'wb').write(bytes(5 << 20))", "File too large"),
        ("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))", "No space left on device"),
        ("open('/mnt/data/x', 'w').write('kept'); print(open('/mnt/data/x').read())", "kept"),
        ("print('y' * 10**6)", "[output cut at 16000 characters]"),
        ("import sys; print(sys.stdin.read())", ""),
        ("def f(: pass", "SyntaxError"),
        ("print('\\ud800'.encode('utf-8', 'surrogatepass'))", "b'\\xed\\xa0\\x80'"),
    ],
)
async def test_sandbox(code: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXA_API_KEY", "secret")
    assert (await SANDBOX.run(code)).splitlines()[-1:] == [shown] or shown in await SANDBOX.run(code)


@needs_sandbox
async def test_sandbox_keeps_nothing() -> None:
    await SANDBOX.run("open('/tmp/left', 'w').write('x')")
    assert "FileNotFoundError" in await SANDBOX.run("open('/tmp/left')") and not Path("/tmp/left").exists()


@needs_sandbox
@pytest.mark.parametrize("code", ["import time; print('hi', flush=True); time.sleep(60)", "while True: pass"])
async def test_sandbox_time(code: str) -> None:
    short = Sandbox(Limits(cpu_seconds=60, wall_seconds=1.5))
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"Timed out after 1\.5 s"):
        await short.run(code)
    assert time.monotonic() - start < 5 and not children(os.getpid())


async def test_sandbox_unavailable(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, corpus: Path) -> None:
    monkeypatch.setattr(Sandbox, "unavailable", lambda self: "unshare is not allowed here")
    tools = await asyncio.to_thread(ToolServer.load, "demo", str(corpus))
    assert tools.python is None and tools.browser and "the python tool is off: unshare is not allowed" in caplog.text


# What --tool-server names ---------------------------------------------------------------------------------------------


def test_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.delenv("EXA_API_KEY", raising=False)
    assert ToolServer.load(None) == ToolServer()
    assert ToolServer.load("demo").browser is None and "set EXA_API_KEY" in caplog.text
    for names, corpus, message in (
        ("demo", str(tmp_path), "holds no text files"),
        (None, str(tmp_path), "--search-corpus is for --tool-server demo"),
        ("127.0.0.1:1", None, "no MCP server answers at 127.0.0.1:1|need the package mcp"),
    ):
        with pytest.raises(ValueError, match=message):
            ToolServer.load(names, corpus)


async def test_exa(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_compile.runtime.api.tool_server.search import Exa

    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers["x-api-key"], json.loads(request.content)))
        if "down" in request.content.decode():
            return httpx.Response(503, text="secret details")
        return httpx.Response(200, json={"results": [{"url": "http://a.b/c", "title": None, "text": "T"}]})

    exa = Exa("key", httpx.MockTransport(answer))
    (found,) = await exa.search("owls", 3)
    assert (found.url, found.title, found.text) == ("http://a.b/c", "http://a.b/c", "T")
    assert (await exa.fetch("http://a.b/c")).text == "T"
    assert seen[0][:2] == ("/search", "key") and seen[0][2]["numResults"] == 3 and seen[1][0] == "/contents"
    with pytest.raises(ToolError, match="answered 503"):
        await exa.search("down", 1)


SERVER = '''
import sys
from mcp.server import MCPServer
server = MCPServer("weather station")
@server.tool()
def forecast(city: str) -> str:
    """Forecast of a city."""
    if city == "Atlantis":
        raise ValueError("sunk")
    return f"{city}: sunny"
if __name__ == "__main__":
    server.run()
'''


@pytest.fixture
def http_server(request: pytest.FixtureRequest) -> Iterator[str]:
    pytest.importorskip("mcp", reason="the package mcp is not installed")
    import uvicorn

    names: dict[str, Any] = {"__name__": "station"}
    exec(SERVER, names)
    listener = server._listen("127.0.0.1", 0)
    sse = request.node.callspec.params["transport"] == "sse"
    app = names["server"].sse_app() if sse else names["server"].streamable_http_app()
    web = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield "{}:{}".format(*listener.getsockname()[:2]) + "/sse" * sse
    web.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("transport", ["http", "sse", "stdio"])
async def test_real_mcp(
    transport: str,
    request: pytest.FixtureRequest,
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    options: ServerOptions,
    script: Script,
    tmp_path: Path,
) -> None:
    import shlex
    import sys

    pytest.importorskip("mcp", reason="the package mcp is not installed")
    address = request.getfixturevalue("http_server") if transport != "stdio" else ""
    if transport == "stdio":
        (tmp_path / "station.py").write_text(SERVER)
        address = f"stdio:{shlex.join([sys.executable, str(tmp_path / 'station.py')])}"
    tools = await asyncio.to_thread(ToolServer.load, address)
    client = asgi_client(build_app(engine, tokenizer, options, tools))
    script.add(
        call("weather_station.forecast", '{"city": "Bonn"}'),
        call("weather_station.forecast", '{"city": "Atlantis"}'),
        final("sunny"),
    )
    body = await ask(client, True, tools=[{"type": "mcp", "server_label": "weather_station"}])
    calls = [item for item in body["output"] if item["type"] == "mcp_call"]
    assert [item["status"] for item in calls] == ["completed", "failed"] and calls[0]["output"] == "Bonn: sunny"
