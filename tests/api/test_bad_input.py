"""What bad input gets, on a real socket: the table in docs/api.md."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted import Script
from served import Running

from gptoss_compile.runtime.api import protocol
from gptoss_compile.runtime.api.schema_text import SHOWN, Room

CHAT = "/v1/chat/completions"
MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'
Answer = tuple[int, dict[str, Any]]


def exchange(running: Running, data: bytes, *, more: Callable[[socket.socket], None] | None = None) -> Answer:
    """Send bytes, read to the end of the connection: the status and the error."""
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as client:
        try:
            client.sendall(data)
            if more:
                more(client)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered already
        received = b""
        try:
            while chunk := client.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def post(body: str | bytes, *, path: str = CHAT, headers: str = "", length: int | None = None) -> bytes:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    size = len(data) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer key\r\nconnection: close\r\ncontent-length: {size}\r\n"
    return f"{head}{headers}\r\n".encode() + data


def chat(fields: str) -> bytes:
    return post(f"{{{MESSAGES}, {fields}}}")


WIDE = {"type": "object", "properties": {str(i): {"$ref": "#/$defs/a"} for i in range(300)}}


def doubling(key: str, levels: int) -> dict[str, Any]:
    """A schema of `levels` definitions, each with two references to the next."""
    chain = {f"l{i}": {key: [{"$ref": f"#/$defs/l{i + 1}"}] * 2} for i in range(levels)}
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/l0"}}, "$defs": {**chain, f"l{levels}": {}}}


BOMBS: dict[str, Any] = {
    "references to references": {**WIDE, "$defs": {"a": {**WIDE, "properties": {str(i): {} for i in range(300)}}}},
    "references to itself": {**WIDE, "$defs": {"a": WIDE}},
    "doubling anyOf": doubling("anyOf", 40),
    "doubling oneOf": doubling("oneOf", 40),
    "doubling tuples": doubling("prefixItems", 40) | {"additionalProperties": {"allOf": [{"anyOf": [{}, {}]}] * 40}},
    "choices in allOf": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in "ab"]} for i in range(16)]},
    "many properties": {"properties": {str(i): {} for i in range(3000)}},
    "deep": {"properties": {"x": json.loads('{"items": ' * 120 + "{}" + "}" * 120)}},
}
CASES: dict[str, tuple[bytes, int, str | None]] = {
    "NaN": (chat('"temperature": NaN'), 400, None),
    "infinity": (chat('"temperature": Infinity'), 400, None),
    "a float that overflows": (chat('"temperature": 1e999'), 400, None),
    "a negative count": (chat('"n": -1'), 400, None),
    "a huge count": (chat('"n": 1000000000000'), 400, None),
    "an integer of 10,000 digits": (chat('"seed": 1' + "0" * 10_000), 400, None),
    "the wrong type": (chat('"temperature": "0.7"'), 400, None),
    "JSON 10,000 deep": (post("[" * 10_000 + "]" * 10_000), 400, None),
    "JSON 10,000 deep in a field": (chat('"user": ' + '{"a":' * 10_000 + "1" + "}" * 10_000), 400, None),
    "a lone surrogate, escaped": (post('{"messages": [{"role": "user", "content": "\\ud800"}]}'), 400, None),
    "a lone surrogate, raw": (post('{"messages": [{"role": "user", "content": "\ud800"}]}'), 400, None),
    "bytes that are not UTF-8": (post(b'{"user": "\xff\xfe"}'), 400, None),
    "no JSON": (post("hello"), 400, None),
    "an empty body": (post(""), 400, None),
    "a prompt beyond the context": (post(json.dumps({"messages": [{"role": "user", "content": "a b " * 9000}]})), 400,
                                    "context_length_exceeded"),
    "a text/plain body": (post("{}", headers="content-type: text/plain\r\n"), 400, None),
    "a form": (post("a=1", headers="content-type: application/x-www-form-urlencoded\r\n"), 400, None),
    "17 MiB announced": (post("", length=17 << 20), 413, "request_too_large"),
    "17 MiB in chunks": (post("", headers="").replace(b"content-length: 0", b"transfer-encoding: chunked")
                         + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 272, 413, "request_too_large"),
    "an unknown model": (chat('"model": "gpt-4"'), 404, "model_not_found"),
    "an unknown route": (post("{}", path="/v1/nothing"), 404, "unknown_url"),
    "a wrong method": (b"GET " + CHAT.encode() + b" HTTP/1.1\r\nhost: t\r\nconnection: close\r\n"
                       b"authorization: Bearer key\r\n\r\n", 405, "method_not_allowed"),
    "a wrong key": (b"GET /v1/models HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n", 401, "invalid_api_key"),
    "a head of 1 MiB": (b"GET /health HTTP/1.1\r\nhost: t\r\n" + b"x: " + b"y" * (1 << 20), 400, "invalid_http"),
    "20,000 headers": (b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(20_000)), 400, "invalid_http"),
    "a URL of 1 MiB": (b"GET /" + b"a" * (1 << 20), 400, "invalid_http"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),
    "a bad content-length": (b"POST /tokenize HTTP/1.1\r\nhost: t\r\ncontent-length: x\r\n\r\n", 400, "invalid_http"),
}


def test_table(running: Running) -> None:
    for name, (data, status, code) in CASES.items():
        found, error = exchange(running, data)
        assert (found, error["code"]) == (status, code), f"{name}: {found} {error}"
        assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 700, name
        assert "Traceback" not in error["message"] and ".py" not in error["message"], name


def test_unknown_fields_are_ignored(running: Running, script: Script) -> None:
    script.add("<|channel|>final<|message|>x<|return|>")
    body = {"messages": [{"role": "user", "content": "hi", "zz": 1}], "zzz": {"a": [1]}}
    answer = httpx.post(running.url + CHAT, json=body, headers={"authorization": "Bearer key"})
    assert answer.status_code == 200


@pytest.mark.parametrize("name", BOMBS)
def test_schema_bombs(running: Running, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Refused after a bounded number of steps, before anything of them is compiled into a grammar and shown."""
    steps = []
    take = Room.take
    monkeypatch.setattr(Room, "take", lambda room: (steps.append(1), take(room)))  # type: ignore[func-returns-value]
    for strict in (False, True):
        steps.clear()
        tool = {"type": "function", "function": {"name": "f", "parameters": BOMBS[name], "strict": strict}}
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
        answer = httpx.post(running.url + CHAT, json=body, headers={"authorization": "Bearer key"}, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json_schema", answer.text[:300]
        assert len(steps) <= SHOWN + 1


def test_slow_heads_are_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    for beginning in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: t\r\nx: "):
        status, error = exchange(running, beginning)
        assert (status, error["code"]) == (408, "request_timeout")
    kept = b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(kept)
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")  # the second request of a connection
        assert client.recv(65536).startswith(b"HTTP/1.1 408")
