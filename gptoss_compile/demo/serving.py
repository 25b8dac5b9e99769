"""A server in a process of its own, for as long as it is needed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(artifact: Path, *options: str) -> Iterator[str]:
    """gptoss-serve on a free port, ready to answer: the URL of its API. Ended in the end, with code 0 or a SystemExit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gptoss_compile.cli", "serve", str(artifact), "--port", str(port), *options]
    server = subprocess.Popen(command)
    try:
        _wait(server, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        code = server.wait()
    if code:
        raise SystemExit(f"the server ended with code {code}")


def _wait(server: subprocess.Popen[bytes], port: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the server did not come up within {seconds:.0f} s" if server.poll() is None
                     else f"the server ended with code {server.returncode}")
