"""Tools that run on the server, in Responses: scripted tool loops, streamed and not, their limits and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, ScriptedEngine
from served import asgi_client
from server_tools import MCP, NO_SANDBOX, PY, SANDBOX, THOUGHT, URL, WEB, Station, ask, call, final, needs_sandbox, prompt
from test_http import error_of
from test_responses import TOOL

from gptoss_compile.runtime.api.app import build_app
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.responses_tools import MAX_REFUSALS, REFUSAL
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.api.tool_server import mcp_tools
from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.search import Corpus
from gptoss_compile.runtime.api.tool_server.server import PYTHON, Toolbox, ToolServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
    if item == "code_interpreter_call" and NO_SANDBOX:
        pytest.skip(f"no sandbox here: {NO_SANDBOX}")
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
