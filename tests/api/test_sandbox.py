"""The sandbox of the python tool: what a program finds in it, and when it ends."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from server_tools import SANDBOX, children, needs_sandbox

from gptoss_compile.runtime.api.tool_server.base import ToolError
from gptoss_compile.runtime.api.tool_server.sandbox import Limits, Sandbox
from gptoss_compile.runtime.api.tool_server.server import ToolServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
